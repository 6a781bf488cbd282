"""Counts which experts a prompt uses, with an observer that is called for every layer.

python examples/watch.py MODEL.moe
"""

import sys

import numpy as np

import edgemoe
from edgemoe.experts import Observer


class Counter(Observer):
    def __init__(self):
        self.counts = {}

    def planned(self, routing, plan, residency):
        row = self.counts.setdefault(routing.layer, np.zeros(residency.shape[1], int))
        np.add.at(row, routing.experts, 1)


counter = Counter()
with edgemoe.load(sys.argv[1], observer=counter) as engine:
    engine.logits(list(range(1, 40)))
for layer, counts in sorted(counter.counts.items()):
    print(
        f"layer {layer}: expert {counts.argmax()} most often, {counts.max()} of {counts.sum()} uses"
    )
