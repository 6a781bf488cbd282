"""A real server with a scripted model, for agents: the model calls a tool, and ends once the tool has answered.

python scripted.py FOLDER TOOL ARGUMENTS    writes requests to FOLDER/requests.jsonl, and the port to stdout
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from tiny import tiny_checkpoint

from edgemoe.convert.convert import convert
from edgemoe.convert.demo import demo_path
from edgemoe.file.format import open_moe
from edgemoe.runtime import slots
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.serve import app
from edgemoe.serve.server import listen, serve
from edgemoe.serve.settings import Settings

CONTEXT = 65536


def roomy(path):
    """Writes a tiny model with the demo's vocabulary and a context long enough for the prompts of agents."""
    checkpoint, rng = tiny_checkpoint(), np.random.default_rng(0)
    sections = open_moe(demo_path()).sections
    size, width = 49152, checkpoint.config["hidden_size"]
    checkpoint.config |= {
        "vocab_size": size, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        checkpoint._tensors[name] = rng.standard_normal((size, width)).astype(np.float32)
    names = ("tokenizer.json", "tokenizer_config.json")
    checkpoint.files = {name: bytes(sections[name]) for name in names}
    convert(checkpoint, path)


class Script:
    """A sampler that returns the tokens of a given text."""

    def __init__(self, ids):
        self._ids = iter(ids)

    def sample(self, row, history, allowed=None):
        return next(self._ids)


def main(folder, tool, arguments):
    folder = Path(folder)
    roomy(folder / "roomy.moe")
    opened = open_model(folder / "roomy.moe", EngineOptions(sequences=2, context=CONTEXT))
    tokenizer, start, body_of = opened.text.tokenizer, slots.Slot.start, app.body_of
    call = f'I look.\n<tool_call>\n{{"name": "{tool}", "arguments": {arguments}}}\n</tool_call>'

    def scripted(slot, request, tokens, *rest):
        start(slot, request, tokens, *rest)
        text = tokenizer.decode(tokens.tolist(), skip_special=False)
        last = text.rpartition("<|im_start|>user")[2]
        said = (
            "Done." if "<tool_response>" in last else call if "<tool_call>" in text else "A title"
        )
        slot.sampler = Script([*tokenizer.encode(said), 2])

    async def recorded(request, **how):
        body = await body_of(request, **how)
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        line = {"path": path, "headers": dict(request.headers), "body": json.loads(body)}
        with open(folder / "requests.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        return body

    slots.Slot.start, app.body_of = scripted, recorded
    settings = Settings(port=0, has_grammar=False)
    with listen(settings) as door:
        serve(
            opened, settings, door, name="roomy", sampling=opened.text.sampling,
            ready=lambda _, port, __: print(port, flush=True),
        )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
