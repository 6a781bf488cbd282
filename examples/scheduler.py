"""Compares schedulers: what each reads, and that the exact ones do not change the answer.

python examples/scheduler.py MODEL.moe
"""

import sys

import edgemoe

PARAMS = edgemoe.SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
RUNS = {
    "on demand": ("on-demand", {"look_ahead": False}),
    "reading ahead": ("on-demand", {}),
    "next-use": ("on-demand", {"eviction": "next-use"}),
    "hobbit (changes the answer)": ("hobbit", {}),
}
for name, (scheduler, options) in RUNS.items():
    with edgemoe.load(sys.argv[1], scheduler=scheduler, options=options) as engine:
        list(engine.generate([1, 2, 3], PARAMS))
        stats = engine.stats
        print(
            f"{name:28} hits {stats.hit_rate:4.0%}, read {stats.bytes_read / 1e6:6.1f} MB, #{stats.logits_hash}"
        )
        for note in engine.notes:
            print(f"  {note}")
