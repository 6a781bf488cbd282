"""A `.moe` file without its weights: everything that a plan needs, as the reader itself sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgemoe.config import ModelConfig
from edgemoe.file.layout import Layout, expert_ladder
from edgemoe.quant import Scheme

__all__ = ["write_hollow"]


def write_hollow(
    path: Path,
    config: ModelConfig,
    *,
    bits: int | None = None,
    scheme: Scheme,
    sections: Mapping[str, bytes],
) -> None:
    """Writes what `Writer` would, but for the weights: there the file has holes, which take no room.

    Args:
        bits: the last rung, as `Writer` takes it.
        sections: of the file, by name.

    Raises:
        ValueError: `bits` is no level.
        OSError: the file cannot be written.
    """
    ladder = scheme.ladder(bits, "bits")
    experts = expert_ladder(scheme, scheme.levels_of_experts(ladder), None)
    layout = Layout(
        config, scheme, ladder, tuple(experts),
        (len(experts),) * (len(config.moe_layers) * config.num_experts),
    )  # fmt: skip
    no_sums = {name: (0,) * len(place.sizes) for name, place in layout.places.items()}
    ending = layout.ending(no_sums, sections, {"name": "a plan"})
    with open(path, "wb") as file:
        for offset, content in ending.pieces:
            file.seek(offset)
            file.write(content)
        file.seek(0)
        file.write(ending.preamble)
