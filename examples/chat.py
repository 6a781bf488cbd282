"""Asks one question and prints the reply as it is made.

python examples/chat.py MODEL.moe [QUESTION]
"""

import sys

import edgemoe

question = sys.argv[2] if len(sys.argv) > 2 else "What is the capital of France?"
with edgemoe.load(sys.argv[1], ram="4GiB") as engine:
    chat = engine.chat(system="Answer in one sentence.")
    for piece in chat.say(question):
        print(piece, end="", flush=True)
    print()
