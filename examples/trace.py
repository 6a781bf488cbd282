"""Records what the router chooses, and replays it at other budgets and policies without the model.

python examples/trace.py MODEL.moe
"""

import sys
import tempfile
from pathlib import Path

import edgemoe
from edgemoe.lab.routing.replay import Tape, make_scheduler, replay
from edgemoe.runtime.trace import read

params = edgemoe.SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "some.trace"
    with edgemoe.load(sys.argv[1], trace=path) as engine:
        list(engine.generate([1, 2, 3], params))
        experts = engine.budget.experts
    tape = Tape(read(path))
for share in (0.25, 0.5, 0.75):
    slots = int(share * experts)
    rates = []
    for policy in ("lru", "lfu"):
        scheduler = make_scheduler(
            tape, "on-demand", budget_bytes=slots, options={"look_ahead": False}
        )
        result = replay(tape, scheduler, budget_bytes=slots, policy=policy)
        rates.append(f"{policy} {result.hit_rate:.0%}")
    print(f"memory for {share:.0%} of the experts: hits {', '.join(rates)}")
