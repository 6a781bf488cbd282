"""What a device does without the host: choosing experts by a router's logits, and repeating recorded work."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import configured, plug_in

from edgemoe import _core
from edgemoe.quant import plane_widths, quantize

ROOM = 1 << 24
E, K = 40, 6
RULES = (
    {"scoring": "softmax", "renormalise": False},
    {"scoring": "softmax", "renormalise": True, "gate_scale": 2.5},
    {"scoring": "softmax_topk", "renormalise": True},
    {"scoring": "sigmoid", "renormalise": True},
    {"scoring": "sigmoid", "renormalise": True, "groups": 8, "used_groups": 3, "group_by_two": True},
    {"scoring": "softmax", "renormalise": False, "groups": 5, "used_groups": 2, "gate_scale": 16.0},
)  # fmt: skip


@pytest.fixture(scope="module")
def device():
    return _core.Device(plug_in(), 0, ROOM)


@pytest.fixture(scope="module")
def ws(device):
    return _core.DeviceWorkspace(device, 8, 128, 128, 64, 32, 4, 32)


@pytest.fixture(scope="module")
def cpu():
    return _core.Workspace(1, 8, 128, 128, 64, 32, 4)


def put(device, array):
    out = _core.DeviceArray(device, array.shape)
    out.upload(np.ascontiguousarray(array, np.float32))
    return out


def logits_of(seed, weird=False):
    rng = np.random.default_rng(seed)
    out = np.round(rng.normal(size=(5, E)) * 4).astype(np.float32) / 4  # many are equal
    if weird:
        out[rng.integers(0, 5, 12), rng.integers(0, E, 12)] = rng.choice(
            [np.nan, np.inf, -np.inf, -0.0], 12
        )
    return out


@pytest.mark.parametrize("weird", [False, True], ids=["finite", "no-numbers"])
@pytest.mark.parametrize("biases", ["none", "logits", "choice", "both"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_experts_and_gates_are_those_that_the_cpu_chooses(
    device, ws, cpu, isa, rule, biases, weird
):
    made = _core.RouteRule(num_experts=E, top_k=K, **rule)
    assert _core.device_can_choose(made)
    rng = np.random.default_rng(3)
    bias, choice = (rng.normal(size=E).astype(np.float32) for _ in range(2))
    bias = bias if biases in ("logits", "both") else None
    choice = choice if biases in ("choice", "both") else None
    logits = logits_of(1, weird)
    experts, gates = np.empty((5, K), np.int32), np.empty((5, K), np.float32)
    _core.choose(cpu, bias, choice, made, logits.copy(), experts, gates)
    there = [None if b is None else put(device, b) for b in (bias, choice)]
    to = [_core.DeviceArray(device, (5, K)) for _ in range(2)]
    _core.device_choose(ws, made, put(device, logits), *there, *to)
    assert (to[0].numpy().view(np.int32) == experts).all()
    np.testing.assert_array_equal(to[1].numpy(), gates)  # NaNs may have any bits
    broken = ~np.isfinite(logits).all(axis=1)
    assert broken.any() == weird
    assert (np.isnan(gates).all(axis=1) == broken).all()
    assert np.isfinite(gates[~broken]).all()


def test_a_rule_without_a_kernel_is_refused(device, ws):
    made = _core.RouteRule(num_experts=E, top_k=2, scoring="sparsemixer", renormalise=False)
    assert not _core.device_can_choose(made)
    with pytest.raises(ValueError, match="no kernel for this rule"):
        _core.device_choose(
            ws, made, put(device, np.zeros((1, E))), None, None, put(device, np.zeros((1, 2))),
            put(device, np.zeros((1, 2))),
        )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 4])
def test_what_was_noted_is_repeated_with_what_lies_there_then(device, ws, seed):
    with configured(seed=seed):
        x, out = put(device, np.zeros((1, 128))), _core.DeviceArray(device, (1, 32))
        matrix = np.random.default_rng(1).normal(size=(32, 128)).astype(np.float32)
        ladder = (2, 3, 4)
        rungs = quantize(matrix, ladder)
        w = _core.DeviceMatrix(
            device, _core.Nested.from_rungs(rungs, 32, 128, plane_widths(ladder))
        )
        ws.begin_noting()
        _core.device_linear(ws, x, [w], [out])
        assert _core.device_post(ws, [out])
        noted = ws.end_noting()
        for i in range(3):
            row = np.random.default_rng(i).normal(size=(1, 128)).astype(np.float32)
            x.upload(row)
            ws.repeat(noted)
            got = np.empty((1, 32), np.float32)
            _core.device_collect(ws, [got])
            _core.device_linear(ws, x, [w], [out])
            assert got.tobytes() == out.numpy().tobytes()
        ws.forget(noted)


def test_while_work_is_noted_nothing_is_copied_or_taken(device, ws):
    x = put(device, np.zeros((1, 128)))
    ws.begin_noting()
    with pytest.raises(RuntimeError, match="while work is recorded"):
        x.upload(np.zeros((1, 128), np.float32))
    with pytest.raises(RuntimeError, match="while work is recorded"):
        _core.DeviceArray(device, (4,))
    used = device.stats["used_bytes"]
    del x  # as Python's garbage collector may at any time
    assert device.stats["used_bytes"] == used
    ws.forget(ws.end_noting())
    assert device.stats["used_bytes"] < used
