"""Experts that no lossy mechanism touches: Super Experts (arXiv 2507.23279), or those that a user names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing
from edgemoe.quant import Allocation
from edgemoe.scheduler.base import Setting
from edgemoe.scheduler.plans import plan_slots, slot_bits

__all__ = ["spare", "spared_experts"]

_FROM_FILE, _NONE = "file", "none"


def spared_experts(setting: Setting, given: str) -> NDArray[np.bool_] | None:
    """Returns which experts are spared, [num_layers, num_experts]; None for none.

    Args:
        given: "file" for the experts that the file's section `allocation` protects, "none", or "LAYER.EXPERT,…" with
            the model's layer numbers.

    Raises:
        ValueError: there is no such expert.
        FormatError: the section is not an allocation.
    """
    layers = setting.layers or tuple(range(setting.num_layers))
    if given == _NONE:
        return None
    if given == _FROM_FILE:
        section = setting.sections.get("allocation")
        if section is None:
            return None
        found = Allocation.from_json(section, "section allocation")
        which, layers = found.protected, found.layers
    else:
        which = tuple(_pair(text) for text in given.split(","))
    out = np.zeros((setting.num_layers, setting.num_experts), bool)
    for layer, expert in which:
        if layer not in layers[: setting.num_layers] or not 0 <= expert < setting.num_experts:
            raise ValueError(f"spare: the model has no routed expert {layer}.{expert}")
        out[layers.index(layer), expert] = True
    return out if out.any() else None


def _pair(text: str) -> tuple[int, int]:
    layer, _, expert = text.strip().partition(".")
    if not (layer.isdecimal() and expert.isdecimal()):
        raise ValueError(f"spare: expected file, none or LAYER.EXPERT,…, got {text!r}")
    return int(layer), int(expert)


def spare(plan: Plan, routing: Routing, spared: NDArray[np.bool_], bits: NDArray[np.int8]) -> Plan:
    """Returns the plan in which every spared expert that the router chose runs at its full bits.

    If one had been left out, all gates of its token are set back to the router's own.

    Args:
        spared: [E], for the experts of this layer.
        bits: [E], the bits of each expert without any lossy mechanism.
    """
    of_slots, wanted = slot_bits(plan), bits[routing.experts]
    lacks = spared[routing.experts] & (of_slots < wanted)
    if not lacks.any():
        return plan
    left_out = (lacks & (of_slots == 0)).any(1, keepdims=True)
    gates = np.where(left_out, routing.gates, plan.gates).astype(np.float32)
    new = plan_slots(routing, np.where(lacks, wanted, of_slots), gates=gates)
    return replace(
        new, ahead=plan.ahead, ahead_bits=plan.ahead_bits, drop=plan.drop, drop_bits=plan.drop_bits
    )
