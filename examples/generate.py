"""Continues a list of tokens: the same seed gives the same tokens.

python examples/generate.py MODEL.moe
"""

import sys

import edgemoe

params = edgemoe.SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=16, ignore_eos=True)
with edgemoe.load(sys.argv[1]) as engine:
    first = list(engine.generate([1, 2, 3], params))
    second = list(engine.generate([1, 2, 3], params))
    print(first)
    assert first == second
