"""Holds a conversation of two turns: saves it after the first turn and continues from the file.

python examples/conversation.py MODEL.moe
"""

import sys
import tempfile
from pathlib import Path

import edgemoe

params = edgemoe.SamplingParams(temperature=0, max_tokens=24)
with edgemoe.load(sys.argv[1]) as engine, tempfile.TemporaryDirectory() as folder:
    chat = engine.chat(params=params)
    print("".join(chat.say("Name a colour.")))
    chat.save(Path(folder) / "chat.json")

    again = engine.chat(params=params)
    again.load(Path(folder) / "chat.json")
    print("".join(again.say("And another one.")))
    print(
        f"{len(again.messages)} messages; {engine.stats.cached_tokens} tokens were not computed again"
    )
