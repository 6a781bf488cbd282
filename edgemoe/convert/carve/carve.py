"""Carves a dense Llama-architecture checkpoint into a Mixture of Experts of the Qwen2-MoE shape.

The neurons of every layer's FFN are divided among one shared expert and E routed ones. With all experts active, the
model computes the same function as the dense one. Two scales make it fit the standard architecture:

- The shared expert's gate is zero and sigmoid(0) = 1/2, so its w_down is stored doubled.
- The router's logits are tiny, so softmax gives each expert about 1/E, and the routed w_down is stored times E. An
  expert's contribution is then right for any number of active experts. So that number can be chosen for each run,
  and is not fixed by the file. E is a power of two, so both scales are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.carve.llama import DEFAULT_THETA, Array, LlamaShape, hidden_states, llama_shape
from edgemoe.convert.carve.partition import Partition, partition, require_scipy
from edgemoe.convert.carve.update import CarveUpdate, read_update
from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.text import check_text
from edgemoe.errors import FormatError
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["CarvedCheckpoint", "Progress", "carve", "default_widths"]

Progress = Callable[[int, int], None]
"""A callback that receives how many layers are calibrated, and the total."""

_CALIBRATION = Path(__file__).parents[1] / "data" / "calibration.txt"
_SEQUENCES, _LENGTH = 16, 512  # calibration runs on 8,192 tokens

_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FFN = re.compile(
    r"model\.layers\.(\d+)\.mlp\.(?:experts\.(\d+)|shared_expert)\.(gate|up|down)_proj\.weight"
)
_ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")
_ZERO = re.compile(r".*(?:shared_expert_gate\.weight|_proj\.bias)")


def carve(
    dense: Checkpoint,
    *,
    num_experts: int | None = None,
    shared: int | None = None,
    active: int | None = None,
    calibration: str | Sequence[int] | None = None,
    update: Path | None = None,
    progress: Progress | None = None,
) -> CarvedCheckpoint:
    """Presents a dense Llama-architecture checkpoint as a Mixture of Experts; tensors are made when they are read.

    Args:
        dense: the checkpoint, which must stay open.
        num_experts: routed experts per layer, a power of two (default 16, or the update's).
        shared: neurons of the shared expert (default about a third, or the update's).
        active: routed experts per token (default two thirds, rounded down).
        calibration: a text, or token ids, to run the dense model on; default is a text that ships with the package.
            Not used with an update.
        update: a file of trained labels, routers, norms and low-rank corrections for exactly this checkpoint; see
            `edgemoe.convert.carve.update`.
        progress: called after each layer that was calibrated.

    Raises:
        ValueError: the widths do not fit the model or the update, or `calibration` is empty or has token ids outside
            the vocabulary.
        FormatError: the checkpoint or the update is broken or not supported.
        ImportError: scipy is not installed, and there is no update.
    """
    shape = llama_shape(dense)
    check_text(dense, shape.vocab_size)  # before minutes of calibration
    if update is not None:
        found = read_update(update, shape)
        if num_experts not in (None, found.num_experts) or shared not in (None, found.shared):
            raise ValueError(
                f"carve: {update.name} is for {found.num_experts} experts and {found.shared} "
                f"shared neurons, got {num_experts} and {shared}"
            )
        num_experts, shared = found.num_experts, found.shared
    default_experts, default_shared = default_widths(shape.intermediate_size, num_experts)
    num_experts = default_experts if num_experts is None else num_experts
    shared = default_shared if shared is None else shared
    active = max(1, 2 * num_experts // 3) if active is None else active
    _check_widths(shape.intermediate_size, num_experts, shared, active)
    if update is None:
        found = _calibrated(dense, shape, num_experts, shared, calibration, progress)
    return CarvedCheckpoint(dense, shape, found, active)


class CarvedCheckpoint:
    """A dense checkpoint presented as a Qwen2-MoE one; implements `Checkpoint`.

    Keeps labels, routers and corrections in memory, and the corrected FFN matrices of the layer that was read last.
    Only one thread may use it at a time.
    """

    def __init__(
        self, dense: Checkpoint, shape: LlamaShape, update: CarveUpdate, active: int
    ) -> None:
        self._dense = dense
        self._update = update
        self._matrices: dict[tuple[int, str], Array] = {}
        width = (shape.intermediate_size - update.shared) // update.num_experts
        self.name = f"{dense.name} carved into {update.shared} + {update.num_experts} x {width}"
        self.identity = dense.identity
        self.files = dense.files
        self.config: Mapping[str, Any] = _config(dense.config, shape, update, width, active)
        self.shapes: Mapping[str, tuple[int, ...]] = _shapes(shape, update, width)

    def tensor(self, name: str) -> Array:
        """Makes one tensor.

        Raises:
            FormatError: there is no such tensor, or the dense checkpoint's is broken.
        """
        if name not in self.shapes:
            raise FormatError(f"{self.name}: no tensor {name}")
        if match := _FFN.fullmatch(name):
            expert = 0 if match[2] is None else int(match[2]) + 1
            return self._part(int(match[1]), expert, match[3])
        if match := _ROUTER.fullmatch(name):
            return self._update.partitions[int(match[1])].router
        if _ZERO.fullmatch(name):
            return np.zeros(self.shapes[name], np.float32)
        norm = self._update.norms.get(name)
        return self._dense.tensor(name) if norm is None else norm

    def _part(self, layer: int, expert: int, matrix: str) -> Array:
        """Returns the rows (of w_down, the columns) of one expert; expert 0 is the shared one."""
        neurons = np.flatnonzero(self._update.partitions[layer].labels == expert)
        whole = self._matrix(layer, matrix)
        if matrix != "down":
            return whole[neurons]
        scale = 2 if expert == 0 else self._update.num_experts
        return np.ascontiguousarray(whole[:, neurons] * np.float32(scale))

    def _matrix(self, layer: int, matrix: str) -> Array:
        """Returns a whole FFN matrix of the dense model with its correction; caches the matrices of one layer."""
        if (layer, matrix) not in self._matrices:
            self._matrices = {k: v for k, v in self._matrices.items() if k[0] == layer}
            values = self._dense.tensor(f"model.layers.{layer}.mlp.{matrix}_proj.weight")
            correction = self._update.corrections.get((layer, matrix))
            if correction is not None:
                values = values + correction[0] @ correction[1]
            self._matrices[layer, matrix] = values
        return self._matrices[layer, matrix]


def default_widths(intermediate: int, num_experts: int | None = None) -> tuple[int, int]:
    """Returns the default numbers of routed experts and of shared neurons for an FFN of `intermediate` neurons.

    There are 16 experts, and about a third of the neurons are shared. Experts have a multiple of 64 neurons, the width
    of a tile, or of a smaller power of two if the FFN is narrow.
    """
    num_experts = 16 if num_experts is None else num_experts
    ideal = intermediate * 2 / 3 / max(1, num_experts)
    step = 64
    while step > 1 and ideal < step:
        step //= 2
    width = max(1, round(ideal / step)) * step
    return num_experts, intermediate - width * num_experts


def _check_widths(intermediate: int, num_experts: int, shared: int, active: int) -> None:
    if num_experts < 2 or num_experts & (num_experts - 1):
        raise ValueError(f"carve: num_experts must be a power of two from 2, got {num_experts}")
    routed = intermediate - shared
    if shared < 1 or routed < num_experts or routed % num_experts:
        raise ValueError(
            f"carve: of {intermediate} neurons, {shared} shared leave {routed}, which "
            f"{num_experts} experts cannot divide evenly"
        )
    if not 1 <= active <= num_experts:
        raise ValueError(f"carve: active must be from 1 to {num_experts}, got {active}")


def _calibrated(
    dense: Checkpoint,
    shape: LlamaShape,
    num_experts: int,
    shared: int,
    calibration: str | Sequence[int] | None,
    progress: Progress | None,
) -> CarveUpdate:
    require_scipy()
    partitions: list[Partition] = []

    def look(layer: int, x: Array, inner: Array, down: Array) -> None:
        if not (np.isfinite(x).all() and np.isfinite(inner).all()):
            raise FormatError(f"{dense.name}: layer {layer} computes NaN or infinity")
        partitions.append(
            partition(x, inner, down, num_experts=num_experts, shared=shared, seed=layer)
        )
        if progress is not None:
            progress(layer + 1, shape.num_layers)

    hidden_states(dense, _calibration_ids(dense, shape, calibration), on_ffn=look)
    return CarveUpdate(num_experts, shared, tuple(partitions), norms={}, corrections={})


def _calibration_ids(
    dense: Checkpoint, shape: LlamaShape, calibration: str | Sequence[int] | None
) -> NDArray[np.int64]:
    """Returns N sequences of S token ids, [N, S], spread evenly over the text."""
    if calibration is None:
        calibration = _CALIBRATION.read_text(encoding="utf-8")
    if isinstance(calibration, str):
        if "tokenizer.json" not in dense.files:
            raise FormatError(f"{dense.name}: no tokenizer.json to read the calibration text with")
        tokenizer = Tokenizer.from_files(dense.files)
        calibration = tokenizer.encode(calibration, add_special=False)
    ids = np.asarray(calibration, np.int64)
    length = min(_LENGTH, shape.context_length, len(ids))
    if length < 1 or ids.min() < 0 or ids.max() >= shape.vocab_size:
        raise ValueError(f"carve: calibration must be token ids from 0 to {shape.vocab_size - 1}")
    count = min(_SEQUENCES, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    chosen: NDArray[np.int64] = ids[starts[:, None] + np.arange(length)]
    return chosen


def _config(
    dense: Mapping[str, Any], shape: LlamaShape, update: CarveUpdate, width: int, active: int
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "qkv_bias": True,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": update.num_experts,
        "num_experts_per_tok": active,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": update.shared,
        "norm_topk_prob": False,
        "rope_theta": DEFAULT_THETA,
    }
    return config | {k: dense[k] for k in (*_ROPE_KEYS, *_TOKEN_KEYS) if dense.get(k) is not None}


def _shapes(shape: LlamaShape, update: CarveUpdate, width: int) -> dict[str, tuple[int, ...]]:
    d = shape.hidden_size
    out = {name: size for name, size in shape.tensors().items() if ".mlp." not in name}
    for layer in range(shape.num_layers):
        p = f"model.layers.{layer}."
        for name in "qkv":
            out[f"{p}self_attn.{name}_proj.bias"] = out[f"{p}self_attn.{name}_proj.weight"][:1]
        out[p + "mlp.gate.weight"] = (update.num_experts, d)
        out[p + "mlp.shared_expert_gate.weight"] = (1, d)
        experts = {f"experts.{e}": width for e in range(update.num_experts)}
        for expert, size in {**experts, "shared_expert": update.shared}.items():
            out[f"{p}mlp.{expert}.gate_proj.weight"] = (size, d)
            out[f"{p}mlp.{expert}.up_proj.weight"] = (size, d)
            out[f"{p}mlp.{expert}.down_proj.weight"] = (d, size)
    return out
