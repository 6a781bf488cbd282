"""lm-eval: a task from a local file, scored by echoed log-probabilities.

    with_lm_eval.py URL FOLDER

FOLDER has the model's tokenizer.json. The script writes `samples.json` there: of each choice its tokens, the length of
its context, and its log-probability.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

URL, FOLDER = sys.argv[1], Path(sys.argv[2])
ITEMS = [
    ("The capital of France is", ["Paris", "Berlin", "a fish"], 0), ("Water is", ["dry", "wet"], 1),
    ("One and one are", ["seven", "two", "blue"], 1), ("The sun is", ["cold", "hot"], 1),
]  # fmt: skip
(FOLDER / "items.jsonl").write_text(
    "".join(json.dumps({"text": t, "choices": c, "label": i}) + "\n" for t, c, i in ITEMS)
)
(FOLDER / "facts.yaml").write_text(f"""\
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {FOLDER / "items.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
""")
seen = []


class Told(LocalCompletionsAPI):
    """A client that records what it asked and what it was answered."""

    def parse_logprobs(self, outputs, tokens=None, ctxlens=None, **more):
        found = LocalCompletionsAPI.parse_logprobs(outputs, tokens=tokens, ctxlens=ctxlens, **more)
        seen.extend([list(t), c, f[0]] for t, c, f in zip(tokens, ctxlens, found, strict=True))
        return found


model = Told(
    base_url=f"{URL}/v1/completions",
    model="demo",
    tokenizer=str(FOLDER),
    batch_size=2,
    max_retries=1,
)
done = simple_evaluate(
    model=model, tasks=["facts"], task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
    bootstrap_iters=0,
)  # fmt: skip
assert len(seen) == sum(len(c) for _, c, _ in ITEMS)
assert done["results"]["facts"]["acc,none"] >= 0.5
(FOLDER / "samples.json").write_text(json.dumps(seen))
