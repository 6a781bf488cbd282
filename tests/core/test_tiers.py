"""Experts in a device's memory, the host's memory and the file, compared with a small Python model."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import configured, plug_in

from edgemoe import _core
from edgemoe.file.reader import open_moe
from edgemoe.store import ExpertStore, expert_bytes
from edgemoe.store.tiers import Tiers

N, EACH, TOP = 16, 8, 5
"""The experts of the tiny model, of one of its layers, and its levels."""
MOST = 3
"""The most experts of a request."""


class Model:
    """A slow, obvious model of both tiers, by the rules of docs/cuda.md: which expert must be where."""

    def __init__(self, sizes, host_bytes, device_slots):
        self.sizes, self.host_bytes, self.device_slots = sizes, host_bytes, device_slots
        self.host, self.device = {}, {}
        self.moving = {}
        """Experts being copied to the device, with levels. A failed copy holds its slot until the failure is seen."""
        self.failed = set()
        self.uses, self.host_uses = np.zeros(N), np.zeros(N)
        self.weight = self.host_weight = 1.0
        self.host_layer = -1
        self.promoted = []
        self.hits = self.misses = self.device_hits = self.last_tokens = 0

    def slots(self):
        return set(self.device) | set(self.moving)

    def residency(self):
        return [max(self.host.get(e, 0), self.device.get(e, 0)) for e in range(N)]

    def begin(self, experts, levels, counts, tokens, copies_work):
        layer = experts[0] // EACH
        there = [e for e, lv in zip(experts, levels, strict=True) if self.device.get(e, 0) >= lv]
        here = {e: lv for e, lv in zip(experts, levels, strict=True) if e not in there}
        self.device_hits += len(there)
        for e, count in zip(experts, counts, strict=True):
            self.uses[e] += count * self.weight
        self.weight *= 2 ** (tokens / 64 / (N // EACH))
        self.promoted = [(e, lv) for e, lv in self.promoted if self.device.get(e, 0) < lv]
        if self.promoted or here:
            self.promote(there, copies_work)
        else:
            self.arrive()
        if here:
            self.drop_what_is_twice(here)
            if layer <= self.host_layer:
                self.host_weight *= 2 ** (self.last_tokens / 64)
            self.host_layer, self.last_tokens = layer, tokens
            for e, count in zip(experts, counts, strict=True):
                if e in here:
                    self.host_uses[e] += count * self.host_weight
            for e, level in here.items():
                self.read(e, level, here)
        return there, here

    def promote(self, there, copies_work):
        wanted = [(e, lv) for e, lv in self.promoted if self.host.get(e, 0) >= lv]
        names = [e for e, _ in wanted]
        victims = sorted(
            self.uses[e] for e in self.device if e not in there and e not in names
        )  # fmt: skip
        free = self.device_slots - len(self.slots())
        self.promoted = []
        for e, level in wanted:
            if e not in self.device:
                if free > 0:
                    free -= 1
                elif victims and self.uses[e] > 1.2 * victims[0]:
                    victims.pop(0)
                else:
                    continue
            self.promoted.append((e, level))
        self.arrive()
        for e, level in self.promoted:
            if e in self.moving or self.device.get(e, 0) >= level:
                continue
            if e not in self.device and len(self.slots()) == self.device_slots:
                stay = {*there, *names, *self.moving}
                least = min((x for x in self.device if x not in stay), key=self.uses.__getitem__)
                del self.device[least]
            self.moving[e] = level
            if not copies_work:
                self.failed.add(e)

    def arrive(self):
        """Ends all earlier copies."""
        for e, level in self.moving.items():
            if e not in self.failed:
                self.device[e] = level
        self.moving.clear()
        self.failed.clear()

    def drop_what_is_twice(self, here):
        used = sum(self.sizes[level] for level in self.host.values())
        need = sum(
            self.sizes[lv] - self.sizes[self.host.get(e, 0)]
            for e, lv in here.items() if self.host.get(e, 0) < lv
        )  # fmt: skip
        kept = {e for e, _ in self.promoted} | set(here)
        twice = [e for e, lv in self.host.items() if self.device.get(e, 0) >= lv and e not in kept]
        for e in sorted(twice, key=self.uses.__getitem__):
            if used + need > self.host_bytes and need > 0:
                used -= self.sizes[self.host.pop(e)]

    def read(self, e, level, here):
        if self.host.get(e, 0) >= level:
            self.hits += 1
            return
        self.misses += 1
        self.host.pop(e, 0)
        while (
            sum(self.sizes[lv] for lv in self.host.values()) + self.sizes[level] > self.host_bytes
        ):
            self.evict(here)
        self.host[e] = level

    def evict(self, kept=()):
        del self.host[min((e for e in self.host if e not in kept), key=self.host_uses.__getitem__)]

    def close(self, here):
        """Chooses for promotion the most used of what the host ran.

        On a full device each must be used a fifth more than the least used expert there.
        """
        if not here:
            return
        order = sorted(here, key=lambda e: -self.uses[e])[:2]
        free = self.device_slots - len(self.slots())
        victims = sorted(self.uses[e] for e in self.device if e not in order)
        self.promoted = []
        for e in order:
            if e not in self.device:
                if free > 0:
                    free -= 1
                elif victims and self.uses[e] > 1.2 * victims[0]:
                    victims.pop(0)
                else:
                    continue
            self.promoted.append((e, here[e]))

    def shrink(self, e, level):
        for tier in (self.host, self.device):
            if tier is self.device and e in self.moving:
                continue  # an expert that is being copied stays
            if 0 < level < tier.get(e, 0):
                tier[e] = level
            elif level == 0:
                tier.pop(e, None)

    def limit(self, host_bytes):
        self.host_bytes = host_bytes
        while sum(self.sizes[lv] for lv in self.host.values()) > host_bytes:
            self.evict()

    def look(self, residency):
        """Checks the device's residency. Experts that were being copied may have arrived; nothing else may have."""
        there = {e: int(lv) for e, lv in enumerate(residency) if lv}
        for e, level in list(self.moving.items()):
            if there.get(e, 0) >= level and e not in self.failed:
                self.device[e] = self.moving.pop(e)
        assert there == self.device


@pytest.fixture(scope="module")
def moe(tiny_moe):
    return open_moe(tiny_moe)


def opened(moe, in_ram, slots):
    """Returns tiers with room for so many experts each, and the device."""
    each = expert_bytes(moe, TOP)
    device = _core.Device(plug_in(), 0, slots * each + (1 << 23))
    host = ExpertStore.open(
        moe, bits=8, budget_bytes=int(in_ram * each), most_bytes=8 * each, verify=True
    ).cache
    return Tiers(host, _core.Cache.on_device(device, host, slots * each), N // EACH), device


def settle(device):
    """Waits for all copies: giving back an array's memory waits for all work."""
    _core.DeviceArray(device, (0,))


@pytest.mark.parametrize("slots", [1, 2, 7])
@pytest.mark.parametrize("in_ram", [3, 5.5])
@pytest.mark.parametrize("mixed", [False, True])
def test_random_requests_equal_the_model(moe, slots, in_ram, mixed):
    each = expert_bytes(moe, TOP)
    tiers, device = opened(moe, in_ram, slots)
    tiers.uses = np.zeros(N)  # as a profile brings them
    pages = [0] + [expert_bytes(moe, level) for level in range(1, TOP + 1)]
    model = Model(pages, int(in_ram * each), slots)
    rng = np.random.default_rng(slots * 100 + int(in_ram * 10) + mixed)
    most = slots * each
    for _ in range(120):
        what = rng.random()
        if what < 0.04:
            e, level = int(rng.integers(N)), int(rng.integers(0, TOP + 1))
            settle(device)
            tiers.shrink(e, level)
            model.shrink(e, level)
            assert tiers.residency[e] == model.residency()[e]
        elif what < 0.07:
            limit = int(rng.integers(MOST, 8)) * each
            tiers.set_budget(limit)
            model.limit(limit)
            assert tiers.residency.tolist() == model.residency()
        n, layer = int(rng.integers(1, MOST + 1)), int(rng.integers(2))
        # Some experts are wanted more often than others, and sometimes that changes.
        p = np.roll(0.5 ** np.arange(EACH), rng.integers(EACH) if rng.random() < 0.1 else 0)
        experts = EACH * layer + rng.choice(EACH, n, replace=False, p=p / p.sum())
        levels = rng.integers(1, TOP + 1, n) if mixed else np.full(n, TOP)
        counts = rng.integers(1, 10**6, n)
        tokens = int(rng.integers(1, 9))
        works = rng.random() > 0.1
        with configured(may_copy=int(works)):
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            tiers.begin(experts.astype(np.int32), levels.astype(np.int8), offsets, tokens)
            there, here = model.begin(experts.tolist(), levels.tolist(), counts, tokens, works)
            given = []
            while group := tiers.next():
                chosen = [int(experts[i]) for i in group]
                assert all(e in (there if tiers.is_there else here) for e in chosen)
                given += group
                tiers.check_integrity()
        assert sorted(given) == list(range(n))
        settle(device)
        tiers.close()
        model.close(here)
        model.look(tiers.device.residency)
        assert {e: int(lv) for e, lv in enumerate(tiers.host.residency) if lv} == model.host
        if len(here):  # otherwise residency is not brought up to date
            assert tiers.residency.tolist() == model.residency()
        assert tiers.device.stats["committed_bytes"] <= most
        assert device.stats["peak_bytes"] <= device.stats["budget_bytes"]
    stats = tiers.stats
    assert stats["hits"] == model.hits + model.device_hits
    assert (stats["misses"], stats["device_hits"]) == (model.misses, model.device_hits)
    assert model.device_hits > 20


def test_what_is_copied_again_at_more_bits_is_whole(moe):
    """When the expert first came to the device, the host had only its first bits."""
    tiers, device = opened(moe, 3, 2)
    shape = (4, 512, 512, 32, 16, 2)
    x = np.random.default_rng(0).standard_normal((1, moe.config.hidden_size)).astype(np.float32)
    there, parts = _core.DeviceArray(device, x.shape), _core.DeviceArray(device, x.shape)
    there.upload(x)
    ws, here = _core.DeviceWorkspace(device, *shape, 8), _core.Workspace(1, *shape)
    expert, one = np.zeros(1, np.int32), np.arange(2, dtype=np.int32)
    outs, moved = {}, []
    for level in (2,) * 4 + (TOP,) * 4:
        args = expert, np.full(1, level, np.int8), one, np.zeros(1, np.int32)
        tiers.begin(*args[:3], 1)
        (group,) = [tiers.next()]
        if tiers.is_there:
            _core.device_expert_ffn(ws, there, tiers.device, *args, group, parts)
            moved.append((level, parts.numpy()))
        else:
            outs[level] = np.empty_like(x)
            _core.expert_ffn(here, x, tiers.host, *args, group, outs[level])
        tiers.close()
        settle(device)
    assert [level for level, _ in moved] == [2, TOP]
    for level, out in moved:
        assert np.array_equal(out, outs[level])
    assert not np.array_equal(outs[2], outs[TOP])
    ends = moe.experts.ends
    assert tiers.device.stats["bytes_read"] == ends[TOP - 1]
