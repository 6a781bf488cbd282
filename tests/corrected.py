"""`.moe` files with low-rank corrections, and calibrations that have the products of all inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgemoe.config import dense_tensors
from edgemoe.convert.convert import convert
from edgemoe.convert.source import SourceModel
from edgemoe.quant import SCHEMES, Calibration, write_calibration
from edgemoe.quant.calibration import input_name

RANKS = {
    "experts.gate": (8, 8, 0, 0, 0), "experts.up": (16, 8, 8, 0, 0), "experts.down": (8, 16, 8, 0, 0),
    "q": (8, 8, 8, 0, 0), "k": (8, 0, 0, 0, 0), "o": (16, 16, 16, 0, 8), "head": (24, 8, 8, 0, 0),
    "embed": (8, 8, 8, 8, 8), "shared.up": (8, 8, 0, 0, 0), "shared.down": (8, 8, 8, 0, 0),
}  # fmt: skip


def products(rng, cols, count=(), *, few=False, uneven=False):
    """Returns the sum of x xᵀ over 400 random inputs x, whose strength falls off over orthogonal directions.

    Args:
        count: leading dimensions: so many sums.
        few: a few directions hold nearly everything.
        uneven: the strength differs by column instead.
    """
    strength = np.exp(-np.arange(cols) / (1 if few else 6)) + (0.01 if few else 0.1)
    mixing = np.linalg.qr(rng.standard_normal((cols, cols)))[0] * strength[:, None]
    x = rng.standard_normal((*count, 400, cols)) @ mixing
    if uneven:  # in the same way for all inputs with so many columns
        x = rng.standard_normal(x.shape) * np.random.default_rng(cols).permutation(
            np.geomspace(0.02, 4, cols)
        )
    return (x.swapaxes(-1, -2) @ x).astype(np.float32)


def calibrated(path, config, *, leaving=(), more=(), **kind):
    """Writes a calibration of random inputs and returns it.

    Args:
        leaving: names of tensors to leave out.
        more: further inputs, and their widths.
        kind: keyword arguments of `products`.
    """
    rng = np.random.default_rng(3)
    tensors = {}
    for name, spec in dense_tensors(config).items():
        key = f"dense.{input_name(name)}"
        if spec.kind == "nested" and f"{key}.count" not in tensors:
            tensors[f"{key}.count"] = np.array([400])
            tensors[f"{key}.products"] = products(rng, spec.shape[1], **kind)
    for name, cols in dict(more).items():
        tensors[f"dense.{name}.count"] = np.array([400])
        tensors[f"dense.{name}.products"] = products(rng, cols, **kind)
    for layer in config.moe_layers:
        counts = np.full(config.num_experts, 400)
        tensors[f"experts.{layer}.count"] = counts
        for port, cols in (("in", config.hidden_size), ("hidden", config.expert_hidden)):
            sums = products(rng, cols, (len(counts),), **kind)
            tensors[f"experts.{layer}.{port}.products"] = sums
    meta = {"source": "test", "model": "tiny", "tokens": "400", "window": "400", "bits": ""}
    write_calibration(path, {k: v for k, v in tensors.items() if k not in leaving}, meta)
    return Calibration(path)


def convert_corrected(source, path, *, ranks=None, **options):
    """Converts with corrections of `RANKS` or `ranks`, by a calibration written next to the file; returns the path."""
    config = SourceModel(source).config
    calibration = calibrated(path.with_suffix(".calib"), config)
    scheme = replace(SCHEMES["nested"], correction=RANKS if ranks is None else ranks)
    convert(source, path, scheme=scheme, calibration=calibration, **options)
    return path
