"""`.moe` files without weights. They have all that planning needs, and the ordinary reader opens them."""

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
    """Writes the file that `Writer` would, with holes in place of the weights; they take no disk space.

    Args:
        bits: the last level stored, as for `Writer`.
        sections: content by name.

    Raises:
        ValueError: `bits` is not a level of the scheme.
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
