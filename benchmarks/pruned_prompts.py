"""Measures what the scheduler `mc` lacks of MC-MoE's pruning: protected tokens in prompts, and layers chosen by loss.

    edgemoe convert path/to/mini-moe mini.moe
    python benchmarks/pruned_prompts.py mini.moe calibration.txt held_out.txt

A token's last expert is left out if the ratio of its gate to the largest gate is below the median of the layer (ODP,
arXiv 2410.06270); in prompts too, and without giving its share to other experts. Protected tokens keep all experts:
those with the largest |h|_1 * (attention received, mean over heads) / (tokens that see it). Layers are ranked by what
pruning each alone costs on the first text; all figures in the table are of the second text. In float32. Needs the extra
`train`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from halves import cut, divergences, log_probs
from torch import Tensor
from torch.nn import functional

from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.bit_router import Routed
from edgemoe.lab.bits.choosing import ffn
from edgemoe.lab.quality.loss import standard_error


class Pruned(Routed):
    """A model that leaves out tokens' last experts; one sequence at a time."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        L = len(self.config.moe_layers)
        self.layers: set[int] = set()
        """The layers that are pruned."""
        self.betas = [0.0] * L
        self.ratios: list[list[Tensor]] = [[] for _ in range(L)]
        self.protected = 0.0
        """The share of tokens that are protected."""
        self.by = "importance"
        self.slots = self.skipped = 0
        self._received = torch.zeros(0)
        plain = functional.scaled_dot_product_attention

        def attend(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
            weights = (
                (q @ k.transpose(-1, -2) * scale).masked_fill(~attn_mask, -torch.inf).softmax(-1)
            )
            self._received = weights[0].mean(0).sum(0)
            return plain(q, k, v, attn_mask=attn_mask, scale=scale)

        functional.scaled_dot_product_attention = attend  # type: ignore[assignment]

    def _moe(self, layer: int, x: Tensor, choosing: Any) -> Tensor:
        c = self.config
        scores = x @ self._dense[f"layers.{c.moe_layers[layer]}.router"].T
        top, chosen = scores.topk(c.experts_per_token)
        if c.scoring == "softmax_topk":
            gates = top.softmax(-1)
        else:
            gates = scores.softmax(-1).gather(1, chosen)
            if c.renormalise:
                gates = gates / gates.sum(-1, keepdim=True)
        ratio = gates[:, -1] / gates[:, 0]
        self.ratios[layer].append(ratio)
        goes = (
            ratio < self.betas[layer]
            if layer in self.layers
            else torch.zeros(len(x), dtype=torch.bool)
        )
        if self.protected:
            T = len(x)
            value = x.abs().sum(1) * self._received / torch.arange(T, 0, -1)
            if self.by == "chance":
                value = torch.rand(T, generator=torch.Generator().manual_seed(layer))
            goes[value.topk(max(round(self.protected * T), 1)).indices] = False
        self.slots += gates.numel()
        self.skipped += int(goes.sum())
        gates[goes, -1] = 0
        out = torch.zeros_like(x)
        for e in range(c.num_experts):
            token, place = ((chosen == e) & (gates > 0)).nonzero(as_tuple=True)
            if len(token):
                part = ffn(x[token], *self._experts[self._full][layer * c.num_experts + e])
                out = out.index_add(0, token, gates[token, place, None] * part)
        return out


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="for medians, and for ranking layers")
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--ranking-windows", type=int, default=4)
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    moe = open_moe(args.model)
    model = Pruned(moe, (moe.ladder[-1][0],), rate=1.0)
    every = range(len(moe.config.moe_layers))

    pieces = partial(cut, moe, args.window)

    ranking, windows = pieces(args.text, args.ranking_windows), pieces(args.held_out, args.windows)
    first = log_probs(model, ranking)
    model.betas = [float(torch.cat(r).median()) for r in model.ratios]
    alone = []
    for layer in every:
        model.layers = {layer}
        alone.append(float(divergences(first, log_probs(model, ranking)).mean()))
    print("KL of pruning one layer, by layer:", " ".join(f"{x:.5f}" for x in alone))
    model.layers = set()
    reference = log_probs(model, windows)
    print("| layers | protected | skipped | KL |\n|---|---|---|---|")

    def row(name: str, layers: Any, share: float = 0.0, by: str = "importance") -> None:
        model.layers, model.protected, model.by = set(layers), share, by
        model.slots = model.skipped = 0
        kl = divergences(reference, log_probs(model, windows))
        said = f"{100 * share:g}% by {by}" if share else "none"
        print(
            f"| {name} | {said} | {100 * model.skipped / model.slots:.2f}% "
            f"| {kl.mean():.5f} ± {standard_error(kl, len(windows)):.5f} |",
            flush=True,
        )

    for share, by in (
        (0.0, ""),
        (0.02, "importance"),
        (0.02, "chance"),
        (0.1, "importance"),
        (0.1, "chance"),
    ):
        row("all", every, share, by)
    half, least = len(every) // 2, np.argsort(alone, kind="stable")
    row("the deepest half", every[half:])
    row("the first half", every[:half])
    row("the half that is hurt least", least[:half].tolist())


if __name__ == "__main__":
    main()
