"""D2MoE's Matryoshka quantisation (MWQ) beside our nested codes: KL divergence to the float model, level by level.

    edgemoe convert path/to/mini-moe mini.moe
    edgemoe calibrate mini.moe --full --text calibration.txt
    python benchmarks/mwq.py path/to/mini-moe mini.calib held_out.txt

A study of quantisers alone: weights are rounded to what the codes mean and run in float32 by transformers, so that
activations cost nothing. Every linear and the embedding are at one level, the router is float. Windows of 256 tokens,
of which the second half counts.

MWQ (arXiv 2504.15299, section 3.3): an asymmetric base of b1 bits and one plane of signs for each further bit, each
with a scale of its own per group; b1 is 2 (version 1) or 5 (version 2). Its forms here:

    plain        range of the group, scale = mean |rest|: no calibration
    fitted       range and scales of least error on the calibration's inputs, group by group
    algorithm 1  the same, level by level over the whole matrix, with the block's error compensated in later blocks
    one pass     all levels of a block before the next; one level's error is compensated, named in the row

Bits per weight count float16 scales and zeros.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgemoe import _core
from edgemoe.quant import DEFAULT_LADDER, Calibration, plane_widths, quantize

_ROOT = Path(__file__).parents[1]
_SHRINKS = np.linspace(1.0, 0.5, 21).tolist()

Levels = dict[int, Tensor]
"""Bits -> weights [n, rows, cols] as that level means them."""
Quantiser = Callable[[Tensor, Tensor], Levels]
"""Weights [n, rows, cols] and second moments [n, cols, cols] -> levels."""


def error(rest: Tensor, moments: Tensor) -> Tensor:
    """Returns the squared output error of each row of a group, [n, rows]; rest [n, rows, g], moments [n, g, g]."""
    return ((rest @ moments) * rest).sum(-1)


def asymmetric(w: Tensor, bits: int, shrink: float = 1.0) -> Tensor:
    """Rounds a group [n, rows, g] to `bits` with a scale and a zero per row."""
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = ((high - low) * shrink / (2**bits - 1)).clamp(min=1e-12)
    middle = (high + low) / 2
    zero = (2**bits - 1) / 2 - middle / scale
    code = (w / scale + zero).round().clamp(0, 2**bits - 1)
    return ((code - zero) * scale).half().float()


def base(w: Tensor, bits: int, moments: Tensor | None) -> Tensor:
    """Returns a group's base: its range, or the clipped one of least error on the calibration's inputs."""
    best = asymmetric(w, bits)
    if moments is None:
        return best
    least = error(w - best, moments)
    for shrink in _SHRINKS[1:]:
        tried = asymmetric(w, bits, shrink)
        value = error(w - tried, moments)
        better = value < least
        best = torch.where(better[..., None], tried, best)
        least = torch.where(better, value, least)
    return best


def plane(rest: Tensor, moments: Tensor | None) -> Tensor:
    """Returns a group's plane of signs times its scale."""
    sign = torch.where(rest >= 0, 1.0, -1.0)
    if moments is None:
        return sign * rest.abs().mean(-1, keepdim=True).half().float()
    seen = sign @ moments
    scale = (seen * rest).sum(-1, keepdim=True) / (seen * sign).sum(-1, keepdim=True).clamp(
        min=1e-12
    )
    return sign * scale.half().float()


def groups(cols: int, size: int) -> Iterator[slice]:
    """Yields the groups of columns."""
    for first in range(0, cols, size):
        yield slice(first, min(first + size, cols))


def inverse_factor(moments: Tensor) -> Tensor:
    """Returns the upper Cholesky factor of the inverse of damped moments, [n, cols, cols], as GPTQ uses it."""
    damp = 0.01 * moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(moments.shape[-1], dtype=torch.float64)
    inverse = torch.linalg.inv(moments.double() + damp.double()[:, None, None] * eye)
    return torch.linalg.cholesky(inverse, upper=True).float()


def compensate(w: Tensor, lost: Tensor, g: slice, factor: Tensor) -> None:
    """Changes the columns after block `g` so that they make up for what was lost in it."""
    after = slice(g.stop, w.shape[-1])
    if g.stop < w.shape[-1]:
        scaled = torch.linalg.solve_triangular(factor[:, g, g], lost, upper=True, left=False)
        w[..., after] -= scaled @ factor[:, g, after]


def mwq_local(bits: tuple[int, ...], size: int, *, fitted: bool) -> Quantiser:
    """Returns MWQ without compensation: plain, or fitted to the calibration."""

    def run(w: Tensor, moments: Tensor) -> Levels:
        out = {b: torch.empty_like(w) for b in bits}
        for g in groups(w.shape[-1], size):
            h = moments[:, g, g] if fitted else None
            sum_ = base(w[..., g], bits[0], h)
            out[bits[0]][..., g] = sum_
            for b in bits[1:]:
                sum_ = sum_ + plane(w[..., g] - sum_, h)
                out[b][..., g] = sum_
        return out

    return run


def mwq_algorithm_1(bits: tuple[int, ...], size: int) -> Quantiser:
    """Returns MWQ as published: a level over the whole matrix, then the next on what it left."""

    def run(w: Tensor, moments: Tensor) -> Levels:
        factor = inverse_factor(moments)
        out: Levels = {}
        sum_ = torch.zeros_like(w)
        for b in bits:
            rest, added = w - sum_, torch.empty_like(w)
            for g in groups(w.shape[-1], size):
                h, part = moments[:, g, g], rest[..., g]
                added[..., g] = base(part, b, h) if b == bits[0] else plane(part, h)
                compensate(rest, part - added[..., g], g, factor)
            sum_ = sum_ + added
            out[b] = sum_
        return out

    return run


def mwq_one_pass(bits: tuple[int, ...], size: int, *, propagated: int) -> Quantiser:
    """Returns MWQ with all levels of a block at once, and the error of one of them compensated."""

    def run(w: Tensor, moments: Tensor) -> Levels:
        factor, w = inverse_factor(moments), w.clone()
        out = {b: torch.empty_like(w) for b in bits}
        for g in groups(w.shape[-1], size):
            h, part = moments[:, g, g], w[..., g]
            sum_ = base(part, bits[0], h)
            out[bits[0]][..., g] = sum_
            for b in bits[1:]:
                sum_ = sum_ + plane(part - sum_, h)
                out[b][..., g] = sum_
            compensate(w, part - out[propagated][..., g], g, factor)
        return out

    return run


def nested(w: Tensor, moments: Tensor) -> Levels:
    """Our codes, as `edgemoe convert` writes them without a calibration."""
    out = {b: torch.empty_like(w) for b in DEFAULT_LADDER}
    rows, cols = w.shape[1:]
    ids, widths = np.arange(rows, dtype=np.int32), plane_widths(DEFAULT_LADDER)
    for i, matrix in enumerate(w.numpy()):
        rungs = quantize(np.ascontiguousarray(matrix))
        for level, b in enumerate(DEFAULT_LADDER, 1):
            held = _core.Nested.from_rungs(rungs[:level], rows, cols, widths[:level])
            decoded = np.empty((rows, cols), np.float32)
            held.decode_rows(ids, decoded)
            out[b][i] = torch.from_numpy(decoded)
    return out


def nested_plain(size: int) -> Quantiser:
    """Returns our codes on the whole range of groups of another size."""

    def run(w: Tensor, moments: Tensor) -> Levels:
        out = {b: torch.empty_like(w) for b in DEFAULT_LADDER}
        for g in groups(w.shape[-1], size):
            part = w[..., g]
            low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
            scale = ((high - low) / 256).half().float().clamp(min=1e-7)
            middle = ((high + low) / 2).half().float()
            code = ((part - middle) / scale + 128).floor().clamp(0, 255)
            for b in out:
                cut = (code / 2 ** (8 - b)).floor()
                out[b][..., g] = scale * ((cut + 0.5) * 2 ** (8 - b) - 128) + middle
        return out

    return run


def nested_one_pass(size: int, *, propagated: int) -> Quantiser:
    """Returns our codes with what MWQ's one pass has: a range of least error on the calibration's inputs, judged at all
    levels at once, and the error of one level compensated."""

    def levels_of(part: Tensor, shrink: float) -> Levels:
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        scale = ((high - low) * shrink / 256).half().float().clamp(min=1e-7)
        middle = ((high + low) / 2).half().float()
        code = ((part - middle) / scale + 128).floor().clamp(0, 255)
        return {
            b: scale * (((code / 2 ** (8 - b)).floor() + 0.5) * 2 ** (8 - b) - 128) + middle
            for b in DEFAULT_LADDER
        }

    def run(w: Tensor, moments: Tensor) -> Levels:
        factor, w = inverse_factor(moments), w.clone()
        out = {b: torch.empty_like(w) for b in DEFAULT_LADDER}
        for g in groups(w.shape[-1], size):
            h, part = moments[:, g, g], w[..., g]
            best, least = levels_of(part, 1.0), torch.full(part.shape[:-1], torch.inf)
            for shrink in _SHRINKS:
                tried = levels_of(part, shrink)
                value = sum(
                    (4.0**b * error(part - v, h) for b, v in tried.items()), torch.zeros(())
                )
                better = value < least
                best = {b: torch.where(better[..., None], v, best[b]) for b, v in tried.items()}
                least = torch.where(better, value, least)
            for b, v in best.items():
                out[b][..., g] = v
            compensate(w, part - best[propagated], g, factor)
        return out

    return run


@dataclass(frozen=True)
class Scheme:
    """Is one row of the table per level."""

    name: str
    levels: tuple[int, ...]
    run: Quantiser
    group: int
    is_mwq: bool = True

    def bits_per_weight(self, bits: int) -> float:
        """Returns the bits at a level, with float16 scales and zeros."""
        planes = bits - self.levels[0] if self.is_mwq else 0
        return bits + (32 + 16 * planes) / self.group


def schemes() -> Iterator[Scheme]:
    """Yields what is compared."""
    yield Scheme("nested", DEFAULT_LADDER, nested, 64, is_mwq=False)
    yield Scheme("nested, group 128", DEFAULT_LADDER, nested_plain(128), 128, is_mwq=False)
    for b in (2, 4, 8):
        run = nested_one_pass(64, propagated=b)
        name = f"nested, one pass, error of {b} bits"
        yield Scheme(name, DEFAULT_LADDER, run, 64, is_mwq=False)
    for bits, sizes in (((2, 3, 4), (128, 64)), ((5, 6, 7, 8), (128,))):
        for g in sizes:
            name = f"MWQ from {bits[0]} bits, group {g}"
            yield Scheme(f"{name}, plain", bits, mwq_local(bits, g, fitted=False), g)
            yield Scheme(f"{name}, fitted", bits, mwq_local(bits, g, fitted=True), g)
            yield Scheme(f"{name}, algorithm 1", bits, mwq_algorithm_1(bits, g), g)
            for b in (bits[0], bits[-1]):
                run = mwq_one_pass(bits, g, propagated=b)
                yield Scheme(f"{name}, one pass, error of {b} bits", bits, run, g)


class Model:
    """Is the float model, whose weights are replaced for a measurement."""

    def __init__(self, path: Path, calibration: Calibration) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.floats = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self._calibration = calibration

    def moments(self, name: str) -> Tensor:
        """Returns mean x xᵀ of a matrix's input by its name in a `.moe` file."""
        matrix = self._calibration.matrix(name)
        assert matrix is not None, name
        return torch.from_numpy(matrix)

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Yields a parameter's name and the moments of its inputs, [n, cols, cols]."""
        experts = self.model.config.num_local_experts
        yield "model.embed_tokens.weight", self.moments("embed")[None]
        for i in range(self.model.config.num_hidden_layers):
            for role in "qkvo":
                name = f"model.layers.{i}.self_attn.{role}_proj.weight"
                yield name, self.moments(f"layers.{i}.{role}")[None]
            for part, ours in (("gate_up_proj", "gate"), ("down_proj", "down")):
                stack = [self.moments(f"experts.{i}.{e}.{ours}") for e in range(experts)]
                yield f"model.layers.{i}.mlp.experts.{part}", torch.stack(stack)

    @torch.no_grad()
    def logs(self, windows: Tensor) -> Tensor:
        """Returns log-probabilities of the windows' second halves."""
        half = windows.shape[1] // 2
        out = [self.model(w[None]).logits[0, half:-1].log_softmax(-1) for w in windows]
        return torch.stack(out)

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        """Replaces parameters."""
        for name, parameter in self.model.named_parameters():
            if name in values:
                parameter.copy_(values[name].reshape(parameter.shape))


def main() -> None:
    """Parses the command line, measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a Mixtral checkpoint with a tied embedding")
    parser.add_argument("calibration", type=Path, help="of edgemoe calibrate --full")
    parser.add_argument("text", type=Path, help="held out")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--only", default="", help="schemes whose names match this pattern")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from tokenizers import Tokenizer

    model = Model(args.model, Calibration(args.calibration))
    ids = (
        Tokenizer.from_file(str(args.model / "tokenizer.json"))
        .encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False)
        .ids
    )
    windows = torch.tensor(ids[: args.window * args.windows]).reshape(-1, args.window)
    reference = model.logs(windows)
    rows: list[dict[str, object]] = []
    print("| scheme | bits | bits per weight | KL |\n|---|---|---|---|")
    for scheme in schemes():
        if not re.search(args.only, scheme.name):
            continue
        levels: dict[int, dict[str, Tensor]] = {b: {} for b in scheme.levels}
        for name, moments in model.matrices():
            w = model.floats[name]
            w = w if w.ndim == 3 else w[None]
            for b, value in scheme.run(w, moments).items():
                levels[b][name] = value
        for b in scheme.levels:
            model.put(levels[b])
            logs = model.logs(windows)
            kl = float((reference.exp() * (reference - logs)).sum(-1).mean())
            width = scheme.bits_per_weight(b)
            rows.append({"scheme": scheme.name, "bits": b, "bits_per_weight": width, "kl": kl})
            print(f"| {scheme.name} | {b} | {width:.3f} | {kl:.6f} |", flush=True)
    if args.json:
        commit = subprocess.run(
            ["git", "-C", str(_ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        args.json.write_text(
            json.dumps({"command": sys.argv, "commit": commit, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
