"""Training of the path predictor, `edgemoe.scheduler.paths`, on traces. The only module here that needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from edgemoe.arguments import whole
from edgemoe.runtime.trace import NO_TOKEN, Trace
from edgemoe.scheduler.paths import hashed

__all__ = ["pieces", "train"]

_LENGTH = 128  # tokens of a piece: how far back the recurrent state is trained to reach
_BATCH = 16
_RATE = 4e-3
_LEAST = 2 * _LENGTH  # the fewest tokens to train on


def pieces(
    traces: Iterable[Trace], length: int = _LENGTH
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Cuts the texts of traces of one model into pieces of `length` tokens; a shorter rest of a text is dropped.

    Returns:
        The tokens [n, length], and the experts that they were routed to, as 1 in [n, length, L, E].

    Raises:
        ValueError: the models of the traces have different shapes, or a trace lacks its tokens, or there are too few.
    """
    all_ids, all_uses = [], []
    shape: tuple[int, ...] | None = None
    for trace in traces:
        h = trace.header
        mine = (h.num_layers, h.num_experts, h.experts_per_token)
        if mine != (shape := shape or mine):
            raise ValueError("expected traces of one model, with as many experts per token")
        ids = trace.by_token("id")[:, 0].astype(np.int64)
        if len(ids) == 0:
            continue
        if (ids == NO_TOKEN).any():
            raise ValueError(
                f"a trace of {h.model} does not know its tokens; edgemoe profile trace records it again"
            )
        experts = trace.by_token("experts")
        starts = np.flatnonzero(trace.by_token("token")[:, 0] == 0)
        for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            for at in range(first, end - length + 1, length):
                uses = np.zeros((length, h.num_layers, h.num_experts), np.uint8)
                chosen = experts[at : at + length].astype(np.intp)
                np.put_along_axis(uses, chosen, 1, axis=2)
                all_ids.append(ids[at : at + length])
                all_uses.append(uses)
    if len(all_ids) * length < _LEAST:
        raise ValueError(
            f"expected traces of at least {_LEAST} tokens, in texts of at least {length}"
        )
    return np.array(all_ids), np.array(all_uses)


def train(
    ids: NDArray[np.int64],
    uses: NDArray[np.uint8],
    *,
    width: int = 192,
    rows: int = 16384,
    epochs: int = 6,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> bytes:
    """Trains on pieces of text and returns the section for the model's file.

    The loss is ExpertFlow's, the mean binary cross-entropy over all experts of all layers. Here it is the sum of the
    loss for the token's own path and of the loss for the next token's path. The optimiser is AdamW with a one-cycle
    learning rate.

    Args:
        ids: [n, T], tokens.
        uses: [n, T, L, E], 1 for experts that the router chose; see `pieces`.
        width: of the embedding and the state, 8 to 1024.
        rows: of the embedding, a power of two up to 2^20.
        epochs: how many times every piece is seen.
        seed: of the weights and the order of pieces.
        progress: called with the steps done and all steps.

    Raises:
        ValueError: torch is not installed, or a size is out of range.
    """
    width, epochs = whole("width", width, 8, 1024), whole("epochs", epochs, 1)
    if whole("rows", rows) < 2 or rows & (rows - 1) or rows > 1 << 20:
        raise ValueError(f"rows: expected a power of two of at most 2^20, got {rows}")
    try:
        import torch
        from torch import nn
    except ImportError:
        raise ValueError('training needs torch: pip install "edgemoe[train]"') from None
    torch.manual_seed(seed)
    n, T = ids.shape
    target = torch.from_numpy(uses.reshape(n, T, -1))
    token = torch.from_numpy(hashed(ids, rows))
    share = torch.from_numpy(uses.mean(axis=(0, 1), dtype=np.float64).reshape(-1)).float()
    base = torch.logit(share.clamp(1e-3, 1 - 1e-3))
    embedding = nn.Embedding(rows, width)
    nn.init.normal_(embedding.weight, std=0.05)
    unit = nn.GRU(width, width, batch_first=True)
    now, after = nn.Linear(2 * width, len(base)), nn.Linear(width, len(base))
    for head in (now, after):
        nn.init.zeros_(head.weight)
        head.bias.data = base.clone()
    parameters = [p for m in (embedding, unit, now, after) for p in m.parameters()]
    batch, done = min(_BATCH, n), 0
    steps = epochs * (n // batch)
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, max(steps, 2), pct_start=0.1)
    loss_of = nn.functional.binary_cross_entropy_with_logits
    for _ in range(epochs):
        for chosen in torch.randperm(n)[: n // batch * batch].view(-1, batch):
            x = embedding(token[chosen])
            state, _ = unit(x)
            y = target[chosen].float()
            loss = loss_of(now(torch.cat([state, x], dim=-1)), y)
            loss = loss + loss_of(after(state[:, :-1]), y[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            done += 1
            progress(done, steps)

    def array(tensor: Any) -> NDArray[np.float32]:
        return np.ascontiguousarray(tensor.detach().numpy(), np.float32)

    tensors: dict[str, NDArray[Any]] = {
        "embedding": array(embedding.weight).astype(np.float16),
        "w_input": array(unit.weight_ih_l0), "w_state": array(unit.weight_hh_l0),
        "b_input": array(unit.bias_ih_l0), "b_state": array(unit.bias_hh_l0),
        "now": array(now.weight), "now_bias": array(now.bias),
        "next": array(after.weight), "next_bias": array(after.bias),
    }  # fmt: skip
    return save(tensors)
