"""The part of an engine that is on a device: opens it, divides its memory, and puts weights and experts there."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.devices import DeviceName, open_device
from edgemoe.errors import OutOfBudget, size_text
from edgemoe.file.format import MoeFile
from edgemoe.ops import Ops, OpsShape
from edgemoe.ops.cuda import CudaOps
from edgemoe.ops.cuda.placement import hosted, load_on, unsupported
from edgemoe.runtime.budget import parse_size
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.vram import Vram, default_vram
from edgemoe.store import ExpertStore, Told
from edgemoe.store.rates import Rates
from edgemoe.store.tiers import Tiers

__all__ = ["OnDevice", "device_notes"]

_LEAST_WITH_STREAM = 4  # room for so many experts, as those that only pass through take two

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A device that is open for a model."""

    device: _core.Device
    vram: Vram
    moe: MoeFile

    @classmethod
    def open(
        cls,
        moe: MoeFile,
        options: EngineOptions,
        dense_level: int,
        shape: OpsShape,
        spare: Callable[[Vram], int],
    ) -> OnDevice | None:
        """Opens the device that the options name, and divides its memory; returns None for the processor.

        Args:
            moe: the model's file.
            options: `device`, `vram`, `plug_in`, and those that decide sizes.
            dense_level: how many rungs of matrices outside the experts are used.
            shape: the shape of the operations.
            spare: for a device that shares the host's memory: returns how many bytes the host's budget leaves beside
                one expert, given such a division; raises OutOfBudget if not even that fits.

        Raises:
            ValueError: the model has something that devices do not support.
            DeviceError: there is no such device.
            OutOfBudget: the memory is too small; says the smallest that works.
        """
        name = DeviceName.parse(options.device)
        if name.ordinal is None:
            return None
        if what := unsupported(moe):
            raise ValueError(
                f"device {name}: {what} has no kernels there yet; --device cpu runs it"
            )
        device = open_device(name, None, options.plug_in)
        is_shared = device.info["is_unified"]
        if is_shared and options.vram is not None:
            raise ValueError(
                f"vram: {name} has the processor's memory and none of its own; ram is for both"
            )

        def divide(total: int) -> Vram:
            return Vram.divide(
                moe, vram=total, dense_level=dense_level, context=options.context,
                kv_types=options.kv_types, ops=shape, sequences=options.sequences,
                hosted=hosted(moe.config, _kinds(moe.config, options)), is_shared=is_shared,
            )  # fmt: skip

        if is_shared:  # context and chunk take a share of the spare memory, and experts the rest
            least = divide(0)
            total = least.taken + spare(least)
        else:
            free = device.info["free_bytes"]  # from the driver: other programs have the rest
            total = default_vram(free) if options.vram is None else parse_size(options.vram)
            if total > free:
                raise OutOfBudget(
                    f"vram: {size_text(total)} are more than the {size_text(free)} of {name} that are free; "
                    "nvidia-smi names the programs that have the rest"
                )
        vram = divide(total)
        device.limit(vram.taken if is_shared else total)
        logger.info("%s: %s; %d bytes of it for experts", name, device.info["name"], vram.room)
        return cls(device, vram, moe)

    def load(self, dense_level: int, *, verify: bool, told: Told) -> dict[str, Any]:
        """Loads the model's weights outside the routed experts; see `load_on`."""
        hosted = self.vram.hosted
        return load_on(self.device, self.moe, dense_level, hosted, verify=verify, told=told)

    def ops(self, shape: OpsShape) -> Ops:
        """Returns the device's operations."""
        corrected = bool(self.moe.scheme.correction)
        hosts = bool(self.vram.hosted)
        ops = CudaOps(
            shape, self.device, self.moe.config, hosts=hosts, corrected=corrected,
            shares=self.vram.is_shared,
        )  # fmt: skip
        return cast(Ops, ops)

    @property
    def lender(self) -> _core.Device | None:
        """The device, if it runs experts in the host's memory; see `ExpertStore.open`."""
        return self.device if self.vram.is_shared else None

    def over(self, store: ExpertStore, bits: NDArray[np.int8]) -> ExpertStore:
        """Returns a store that keeps some of the experts on the device; `store` itself if there is no room for any.

        If all experts fit on the device, all are loaded before this returns.

        Args:
            store: the experts in the host's memory.
            bits: [layers, E]: the bits that each expert runs at.

        Raises:
            ReadError: a read failed.
            FormatError: an expert's checksum does not match.
        """
        host, config = store.host, self.moe.config
        if self.vram.is_shared or self.vram.room < host.slot_bytes(len(store.level_bits)):
            return store
        room, window = self.vram.room, host.slot_bytes(len(store.level_bits))
        stream = rates = None
        if _LEAST_WITH_STREAM * window <= room < len(host.residency) * window:
            room -= _core.DeviceStream.bytes(window)
            stream = _core.DeviceStream(self.device, window)
            weights = sum(rows * cols for rows, cols in config.expert_shapes)
            rates = Rates(stream.measure(), weights)
        there = _core.Cache.on_device(self.device, host, room - _core.Device.taken(1))
        tiers = Tiers(host, there, len(config.moe_layers), stream, rates)
        tiers.fill(store.levels(bits.reshape(-1)))
        return ExpertStore(
            tiers, num_experts=config.num_experts, level_bits=store.level_bits,
            rungs=self.moe.experts.rungs,
        )  # fmt: skip


def device_notes(config: ModelConfig, options: EngineOptions) -> list[str]:
    """Returns which parts of a model the processor runs although the options name a device, one line each."""
    if DeviceName.parse(options.device).ordinal is None:
        return []
    reasons = Counter(hosted(config, _kinds(config, options)).values())
    return [
        f"{options.device}: the processor runs {count} of {config.num_layers} mixers, "
        f"as there are no kernels there yet for {why}"
        for why, count in reasons.items()
    ]


def _kinds(config: ModelConfig, options: EngineOptions) -> list[tuple[str, str]]:
    """Returns the types of keys and of values in each layer."""
    types = [options.kv_types.of(i) for i in range(config.num_layers)]
    return [(t.keys, t.values) for t in types]
