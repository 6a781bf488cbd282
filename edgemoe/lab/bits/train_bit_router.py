"""Trains the routers of precisions of D2MoE on a text, in steps that can be interrupted."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError, OutOfBudget
from edgemoe.file.format import MoeFile, open_moe
from edgemoe.file.whole import write_whole
from edgemoe.lab.bits.calibrate import windows_of
from edgemoe.quant import BitRouters
from edgemoe.runtime.budget import default_ram, parse_size

if TYPE_CHECKING:
    from edgemoe.lab.bits.bit_router import Routed

__all__ = ["RouterSettings", "Row", "train_bit_router"]

_CONTROL = 0.2  # how fast alpha follows the average, per bit and step
_LINE = 10  # steps of a row of the record
_SAVE_EVERY = 50  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Says how routers are trained."""

    levels: tuple[int, ...] = (2, 3, 4)
    """Precisions to choose from, ascending; the paper's V1. A first one of 0 leaves the expert out."""
    average_bits: float | None = None
    """What alpha is steered to; None for the middle of the levels, or a fixed alpha."""
    alpha: float | None = None
    """Price of a bit in nats, the paper's fixed alpha; None to steer it."""
    capacities: tuple[float, ...] | None = None
    """Share of an expert's tokens that may use each precision while training; None for all."""
    window: int = 256
    """Tokens of each piece of text."""
    batch: int = 4
    """Pieces of a step."""
    rate: float = 0.003
    """Of Adam."""
    seed: int = 0

    @property
    def target(self) -> float:
        """Average bits that are aimed at; where they begin, with a fixed alpha."""
        middle = (self.levels[0] + self.levels[-1]) / 2
        return middle if self.average_bits is None else self.average_bits

    @property
    def shares(self) -> list[float]:
        """Of each precision in the beginning, about `target` on average; for its middle the paper's capacities."""
        n, reach = len(self.levels), self.levels[-1] - self.levels[0]
        outer = 0.3 if n > 2 else 0.5
        shares = [outer] + [(1 - 2 * outer) / max(n - 2, 1)] * (n - 2) + [outer]
        more = self.target - sum(s * b for s, b in zip(shares, self.levels, strict=True))
        more = max(-outer, min(outer, more / reach))
        return [outer - more, *shares[1:-1], outer + more]

    def check(self, moe: MoeFile) -> None:
        """Raises a ValueError that names what is out of range."""
        n = len(self.levels)
        if n < 2 or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels: expected two or more, ascending, got {self.levels}")
        for bits in self.levels:
            if bits != 0:
                moe.level(bits)
        if self.alpha is not None and self.average_bits is not None:
            raise ValueError("expected alpha or average bits, not both")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha: expected a number of at least 0, got {self.alpha}")
        low, high = self.levels[0], self.levels[-1]
        if self.average_bits is not None and not low < self.average_bits < high:
            raise ValueError(
                f"average bits: expected more than {low} and less than {high}, got {self.average_bits}"
            )
        c = self.capacities
        if c is not None and (
            len(c) != n or not all(0 <= x <= 1 for x in c) or not 0.999 < sum(c) < 1.001
        ):
            raise ValueError(f"capacities: expected {n} shares that sum to 1, got {c}")
        if self.batch < 1 or not self.rate > 0:
            raise ValueError("batch and rate: expected numbers above 0")


@dataclass(frozen=True, slots=True)
class Row:
    """Is the mean of some steps."""

    step: int
    """Steps by then."""
    divergence: float
    """KL of the routed model from the full one, in nats per token."""
    bits: float
    """Average of the chosen precisions."""
    dropped: float
    """Share of slots that exceeded a capacity."""
    alpha: float
    """At the end."""


def train_bit_router(
    path: str | os.PathLike[str],
    text: str,
    out: Path,
    settings: RouterSettings,
    *,
    steps: int,
    count: int | None = None,
    ram: int | str | None = None,
    threads: int | None = None,
    is_new: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[BitRouters, list[Row]]:
    """Trains routers, or goes on with those that `out` holds, up to `steps` steps; returns them and how it went.

    `out` is written from time to time and when the call is interrupted: a form of `BitRouters` that also holds what
    training needs. The same model, text and settings give the same routers on one machine, interrupted or not.

    Args:
        path: a `.moe` file.
        count: most pieces of the text; None for all.
        ram: memory for the whole process; None for what is free, less a margin.
        threads: of torch, which keeps the number; None for its own choice.
        is_new: begin anew whatever `out` holds.
        progress: is told of each step.

    Raises:
        ModuleNotFoundError: torch is not installed; one line says how to get it.
        ValueError: a setting, the text or `out` does not do.
        FormatError: the model is not sound.
        OutOfBudget: the weights would not fit as float32.
        OSError: `out` cannot be written.
    """
    try:
        from edgemoe.lab.bits import bit_router
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            'training needs torch: pip install "edgemoe[train]"', name="torch"
        ) from None
    moe = open_moe(path)
    settings.check(moe)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    pieces = windows_of(moe, text, window=settings.window, count=count)
    total = default_ram() if ram is None else parse_size(ram)
    needed = bit_router.model_bytes(moe, settings.levels) + _activations(moe.config, settings)
    if needed > total:
        raise OutOfBudget(
            f"training takes {needed >> 20} MiB for weights as float32 and what flows through them; "
            f"there are {total >> 20} MiB"
        )
    saved = _Saved(out, _identity(moe, pieces, settings))
    if not is_new:
        saved.load()
    if threads is not None:
        bit_router.use_threads(threads)
    model = bit_router.Routed(moe, settings.levels, rate=settings.rate)
    if saved.step:
        model.restore(saved.tensors)
    else:
        model.begin(pieces[: settings.batch], settings.shares)
    try:
        while saved.step < steps:
            _one(model, pieces, settings, saved)
            if progress is not None:
                progress(saved.step, steps)
            if saved.step % _SAVE_EVERY == 0:
                saved.save(settings)
    finally:  # Ctrl-C too: what is saved is that of whole steps
        if saved.tensors:
            saved.save(settings)
    return saved.routers(settings), saved.rows


def _one(model: Routed, pieces: NDArray[np.int32], settings: RouterSettings, saved: _Saved) -> None:
    """Does a step and keeps what came of it."""
    rng = np.random.default_rng([settings.seed, saved.step])
    chosen = rng.choice(len(pieces), min(settings.batch, len(pieces)), replace=False)
    alpha = settings.alpha if settings.alpha is not None else saved.alpha
    step = model.learn(
        pieces[chosen], alpha=alpha, capacities=settings.capacities, seed=int(rng.integers(1 << 31))
    )
    if settings.alpha is None:
        # The first step has no price; it tells of what order one is: a tenth, on the model that this was tried on.
        alpha = (alpha or step.divergence / 10) * math.exp(_CONTROL * (step.bits - settings.target))
    saved.add(model.state(), (step.divergence, step.bits, step.dropped), alpha)


class _Saved:
    """Is what `out` holds: the routers, what Adam knows, and the record."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.identity = identity
        self.step = 0
        self.alpha = 0.0
        self.tensors: dict[str, NDArray[Any]] = {}
        self.rows: list[Row] = []
        self._sums: list[tuple[float, float, float]] = []

    def add(
        self, tensors: dict[str, NDArray[Any]], figures: tuple[float, float, float], alpha: float
    ) -> None:
        sums = [*self._sums, figures]
        step = self.step + 1
        rows = self.rows
        if step % _LINE == 0:
            kl, bits, dropped = (sum(x) / len(sums) for x in zip(*sums, strict=True))
            rows = [*rows, Row(step, kl, bits, dropped, alpha)]
            sums = []
        # One assignment: an interrupt comes before or after a step, not within.
        self.tensors, self.step, self.alpha, self.rows, self._sums = (
            tensors, step, alpha, rows, sums,
        )  # fmt: skip

    def routers(self, settings: RouterSettings) -> BitRouters:
        about = {
            **asdict(settings), "identity": self.identity, "step": self.step, "final_alpha": self.alpha,
            "rows": [asdict(row) for row in self.rows], "since": self._sums,
        }  # fmt: skip
        return BitRouters(
            levels=settings.levels, settings=about,
            **{name: self.tensors[name] for name in ("weight", "gate_weight", "bias")},
        )  # fmt: skip

    def save(self, settings: RouterSettings) -> None:
        more = {k: v for k, v in self.tensors.items() if "." in k}
        write_whole(self.path, self.routers(settings).to_bytes(more))

    def load(self) -> None:
        """Takes what there is.

        Raises:
            ValueError: it is something else.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        other = ValueError(
            f"{self.path}: exists, and is not of this training; another -o, or --overwrite"
        )
        try:
            about = BitRouters.from_bytes(content, str(self.path)).settings
            if about.get("identity") != self.identity:
                raise other
            self.tensors = load(content)
            self.step, self.alpha = int(about["step"]), float(about["final_alpha"])
            self.rows = [Row(**row) for row in about["rows"]]
            self._sums = [tuple(x) for x in about["since"]]
        except (FormatError, KeyError, TypeError):
            raise other from None


def _activations(config: ModelConfig, settings: RouterSettings) -> int:
    """Returns about what flows through a step, which autograd keeps."""
    tokens = settings.window * settings.batch
    slots = config.experts_per_token * len(settings.levels)
    per_layer = 12 * config.hidden_size + slots * (config.hidden_size + 4 * config.expert_hidden)
    return 4 * tokens * (config.num_layers * per_layer + 5 * config.vocab_size)


def _identity(moe: MoeFile, pieces: NDArray[np.int32], settings: RouterSettings) -> str:
    """Returns a sum of what the result depends on, but for the number of steps."""
    digest = hashlib.sha256(repr((moe.config, moe.ladder, pieces.shape, settings)).encode())
    digest.update(moe.experts.crcs.tobytes())
    digest.update(pieces.tobytes())
    digest.update(repr([t.crcs for t in moe.tensors.values()]).encode())
    return digest.hexdigest()
