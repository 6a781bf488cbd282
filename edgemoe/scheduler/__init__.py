"""Schedulers: what to run at which bits, and what to load. Each paper is one file beside `base`."""

from __future__ import annotations

from edgemoe.scheduler.base import Scheduler
from edgemoe.scheduler.on_demand import OnDemand

__all__ = ["SCHEDULERS", "OnDemand", "Scheduler"]

SCHEDULERS: dict[str, type[Scheduler]] = {"on-demand": OnDemand}
"""By the name that `--scheduler` takes. Each is made as `cls(num_experts=…, bits=…)`."""
