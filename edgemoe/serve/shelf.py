"""What the page shows besides the running model: the measured cost of its levels, and the other models on this machine.

It is read when a page asks for it. Of other files only the index and the table of experts are read, one file at a time.
Their size is bounded, so that `Budget.growth` covers it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgemoe import library
from edgemoe.errors import EdgemoeError, OutOfBudget
from edgemoe.file.format import MoeFile
from edgemoe.file.reader import look_into
from edgemoe.lab.quality.choice import plain_rows, stored
from edgemoe.model import KvTypes
from edgemoe.ops import OpsShape
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.model import Model
from edgemoe.runtime.precisions import with_kv_table

__all__ = ["Shelf"]

_MOST = 50  # models that are listed
_OWN = (
    "quality",
    "allocation",
    "kv_types",
)  # sections of the model about the measured cost of its levels


class Shelf:
    """The source of /shelf. Used on the event loop; files are read on another thread."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._turn = asyncio.Lock()

    async def told(self) -> dict[str, Any]:
        """Returns the measured cost of the model's levels, whether it has an allocation, and the other models."""
        async with self._turn:  # one file at a time is open
            return await asyncio.to_thread(self._told)

    def _told(self) -> dict[str, Any]:
        model = self._model
        own = look_into(model.moe.path, _OWN)
        return {
            "has_allocation": "allocation" in own.sections or len(set(own.expert_bits.flat)) > 1,
            "measured_on": (stored(own) or {}).get("measured_on", ""),
            "quality": _quality(own, model),
            "models": list(self._others()),
        }

    def _others(self) -> Iterator[dict[str, Any]]:
        for kept in library.models()[:_MOST]:
            try:
                if kept.path.samefile(self._model.moe.path):
                    continue
                moe = look_into(kept.path, ("kv_types",))
            except (EdgemoeError, OSError) as error:
                yield {"name": kept.name, "broken": str(error)}
                continue
            c = moe.config
            yield {
                "name": kept.name, "bytes": moe.file_bytes, "family": c.family, "context": c.context_length,
                "layers": len(c.moe_layers), "experts": c.num_experts, "plan": list(self._plan(moe)),
            }  # fmt: skip

    def _plan(self, moe: MoeFile) -> Iterator[dict[str, Any]]:
        """Yields the share of the experts that this server's memory would hold, for each level from the highest down.

        It ends at the first level at which all experts fit.
        """
        budget, types = self._model.budget, self._types(moe)
        shape = OpsShape.of(moe.config, self._model.threads)
        for bits in sorted({bits for bits, _, _ in moe.ladder}, reverse=True):
            try:
                found = Budget.divide(
                    moe, ram=budget.ram, process=budget.process, level=moe.level(bits),
                    dense_level=len(moe.dense_ladder), context=None, kv_types=types, ops=shape,
                    sequences=budget.sequences,
                )  # fmt: skip
            except OutOfBudget as error:
                yield {"bits": bits, "why_not": str(error).partition(":")[0]}
            else:
                share = min(1.0, found.slots / found.experts)
                yield {"bits": bits, "resident": share, "context": found.context}
                if share == 1:
                    return  # all lower levels fit too

    def _types(self, moe: MoeFile) -> KvTypes:
        """Returns this server's types of keys and values; for "auto", those of the model's own table, or else f16."""
        options = replace(self._model.options, kv_table=None)
        try:
            return with_kv_table(moe, options).kv_types
        except ValueError:
            kinds = (options.cache_type_k, options.cache_type_v)
            keys, values = ("f16" if of == "auto" else of for of in kinds)
            return KvTypes(keys, values)


def _quality(moe: MoeFile, model: Model) -> dict[str, dict[str, Any]]:
    """Returns the measured cost of each level, by its bits, for the present bits of other weights and cache types."""
    options = model.options
    rows = plain_rows(
        moe, dense_bits=options.dense_bits or moe.dense_ladder[-1],
        cache_types=(options.cache_type_k, options.cache_type_v),
    )  # fmt: skip
    return {str(bits): _cost(row) for bits, row in rows.items()}


def _cost(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["kl"] is None:  # the reference of the others
        return {"is_reference": True}
    return {
        "change": math.expm1(row["loss_change"]), "error": row["loss_error"], "kl": row["kl"],
        "same_top": row.get("same_top"),
    }  # fmt: skip
