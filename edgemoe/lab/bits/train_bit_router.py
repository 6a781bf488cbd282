"""Training of D2MoE's bit routers on a text, in steps that can be interrupted."""

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
from edgemoe.file.format import MoeFile
from edgemoe.file.reader import open_moe
from edgemoe.file.whole import write_whole
from edgemoe.lab.bits.calibrate import windows_of
from edgemoe.quant import BitRouters
from edgemoe.runtime.budget import default_ram, parse_size

if TYPE_CHECKING:
    from edgemoe.lab.bits.bit_router import Routed

__all__ = ["RouterSettings", "Row", "train_bit_router"]

_CONTROL = 0.2  # change of log alpha per step, for each bit that the average is off
_LINE = 10  # steps in a row of the record
_SAVE_EVERY = 50  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """How bit routers are trained."""

    levels: tuple[int, ...] = (2, 3, 4)
    """Precisions to choose from, ascending; the default is the paper's V1. A first one of 0 leaves the expert out."""
    average_bits: float | None = None
    """The average that alpha is steered towards; None for the middle of the levels, or with a fixed alpha."""
    alpha: float | None = None
    """The price of a bit in nats, fixed as in the paper; None to steer it."""
    capacities: tuple[float, ...] | None = None
    """The share of an expert's tokens that may use each precision while training; None for no limits."""
    window: int = 256
    """Tokens of each piece of text."""
    batch: int = 4
    """Pieces of text in a step."""
    rate: float = 0.003
    """The learning rate of Adam."""
    seed: int = 0

    @property
    def target(self) -> float:
        """The average bits to aim at. With a fixed alpha, they are only where training begins."""
        middle = (self.levels[0] + self.levels[-1]) / 2
        return middle if self.average_bits is None else self.average_bits

    @property
    def shares(self) -> list[float]:
        """The share of slots at each precision where training begins.

        The average is about `target`. If that is the middle of the levels, the shares are the paper's capacities.
        """
        n, reach = len(self.levels), self.levels[-1] - self.levels[0]
        outer = 0.3 if n > 2 else 0.5
        shares = [outer] + [(1 - 2 * outer) / max(n - 2, 1)] * (n - 2) + [outer]
        more = self.target - sum(s * b for s, b in zip(shares, self.levels, strict=True))
        more = max(-outer, min(outer, more / reach))
        return [outer - more, *shares[1:-1], outer + more]

    def check(self, moe: MoeFile) -> None:
        """Raises a ValueError that names a setting that is out of range."""
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
    """A row of the record of training: means over some steps."""

    step: int
    """The last of these steps, counted from the beginning."""
    divergence: float
    """KL divergence of the routed model from the full one, in nats per token."""
    bits: float
    """The average of the chosen precisions."""
    dropped: float
    """The share of slots that exceeded a capacity."""
    alpha: float
    """After the last of these steps."""


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
    """Trains bit routers up to `steps` steps, or goes on with those in `out`; returns them and the record.

    `out` is written from time to time and when the call is interrupted. It is the form of `BitRouters` with the state
    of training added. The same model, text and settings give the same routers on one machine, interrupted or not.

    Args:
        path: a `.moe` file.
        text: the text to train on.
        out: the file to write.
        steps: in all, including those that were done before.
        count: the most pieces of the text; None for all.
        ram: memory for the whole process; None for what is free, less a margin.
        threads: of torch, for the whole process from now on; None for torch's default.
        is_new: begin anew, whatever `out` holds.
        progress: called after each step with the steps done and all steps.

    Raises:
        ModuleNotFoundError: torch is not installed; the message says how to install it.
        ValueError: a setting, the text or `out` is not usable.
        FormatError: the model is damaged, or its family is not supported.
        OutOfBudget: the weights do not fit as float32.
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
    finally:  # after Ctrl-C too: the state is always that of whole steps
        if saved.tensors:
            saved.save(settings)
    return saved.routers(settings), saved.rows


def _one(model: Routed, pieces: NDArray[np.int32], settings: RouterSettings, saved: _Saved) -> None:
    """Does one step and records its result in `saved`."""
    rng = np.random.default_rng([settings.seed, saved.step])
    chosen = rng.choice(len(pieces), min(settings.batch, len(pieces)), replace=False)
    alpha = settings.alpha if settings.alpha is not None else saved.alpha
    step = model.learn(
        pieces[chosen], alpha=alpha, capacities=settings.capacities, seed=int(rng.integers(1 << 31))
    )
    if settings.alpha is None:
        # The first step has no price and shows of what order of magnitude one should be: a tenth of its divergence, on
        # the model that this was tried on.
        alpha = (alpha or step.divergence / 10) * math.exp(_CONTROL * (step.bits - settings.target))
    saved.add(model.state(), (step.divergence, step.bits, step.dropped), alpha)


class _Saved:
    """The contents of `out`: the routers, the state of Adam, and the record."""

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
        # In one assignment, so that an interrupt leaves the state before or after a step, not in between.
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
        """Loads the file if it exists.

        Raises:
            ValueError: it is something else, or belongs to another training.
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
    """Returns an estimate of the bytes of a step's activations, which autograd keeps."""
    tokens = settings.window * settings.batch
    slots = config.experts_per_token * len(settings.levels)
    per_layer = 12 * config.hidden_size + slots * (config.hidden_size + 4 * config.expert_hidden)
    return 4 * tokens * (config.num_layers * per_layer + 5 * config.vocab_size)


def _identity(moe: MoeFile, pieces: NDArray[np.int32], settings: RouterSettings) -> str:
    """Returns a hash of everything that the result depends on, except the number of steps."""
    digest = hashlib.sha256(repr((moe.config, moe.ladder, pieces.shape, settings)).encode())
    digest.update(moe.experts.crcs.tobytes())
    digest.update(pieces.tobytes())
    digest.update(repr([t.crcs for t in moe.tensors.values()]).encode())
    return digest.hexdigest()
