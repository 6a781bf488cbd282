"""Schedulers: what to run at which bits, and what to load. Each paper is one file beside `base`."""

from __future__ import annotations

from collections.abc import Callable

from edgemoe.scheduler.base import Scheduler, Setting
from edgemoe.scheduler.on_demand import OnDemand

__all__ = ["SCHEDULERS", "OnDemand", "Scheduler", "Setting"]

SCHEDULERS: dict[str, Callable[..., Scheduler]] = {"on-demand": OnDemand}
"""By the name that `--scheduler` takes. Each is made as `cls(setting, **options)`."""
