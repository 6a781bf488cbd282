"""Decodes with a custom loop: takes the likeliest token, but never the same token twice.

python examples/own_loop.py MODEL.moe
"""

import sys

import edgemoe

with edgemoe.load(sys.argv[1], context=128) as engine:
    used = [1]
    row = engine.logits(used, last_only=True)[0]
    while len(used) < 20:
        row[used] = -float("inf")
        used.append(int(row.argmax()))
        row = engine.extend(used[-1:])[0].copy()
    print(used)
    assert len(set(used)) == len(used)
