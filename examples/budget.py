"""Runs the same prompt with all experts in memory and with few of them: the answer is the same, bit for bit.

python examples/budget.py MODEL.moe
"""

import re
import sys

import edgemoe

PROMPT = [1, 2, 3, 5, 8, 13, 21]


def run(ram):
    with edgemoe.load(sys.argv[1], ram=ram, context=64) as engine:
        logits = engine.logits(PROMPT)
        stats = engine.stats
        print(
            f"ram {ram}: {engine.budget.slots / 2**20:.1f} MiB for experts, "
            f"hits {stats.hit_rate:.0%}, read {stats.bytes_read / 1e6:.1f} MB, #{stats.logits_hash}"
        )
        return logits


try:
    run("1KiB")
except edgemoe.OutOfBudget as error:  # names the smallest budget that works
    print(error)
    smallest = re.search(r"smallest that works is (\d+ MiB)", str(error))[1].replace(" ", "")
assert (run(None) == run(smallest)).all()
