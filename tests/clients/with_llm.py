"""llm, the command: a model in its list of OpenAI-compatible models, streamed and whole."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "extra-openai-models.yaml").write_text(
        f'- model_id: here\n  model_name: demo\n  api_base: "{sys.argv[1]}/v1"\n'
    )
    command = [str(Path(sys.executable).with_name("llm")), "-m", "here", "-o", "temperature", "0"]
    for more in ([], ["--no-stream"]):
        done = subprocess.run(
            [*command, *more, "What is the capital of France?"], capture_output=True, text=True, check=False,
            env={**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout, done.stdout
