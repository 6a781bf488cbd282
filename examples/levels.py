"""Compares the levels of one file: how often each predicts the same next token as the highest level.

python examples/levels.py MODEL.moe
"""

import sys

import numpy as np

import edgemoe

ids = np.random.default_rng(1).integers(0, 200, 64)
best = None
for bits in (8, 6, 4, 3, 2):
    with edgemoe.load(sys.argv[1], bits=bits) as engine:
        top = engine.logits(ids).argmax(1)
    best = top if best is None else best
    print(f"{bits} bits: {(top == best).mean():.0%} the same")
