"""Reads a dense Llama-architecture GGUF file as if it were a Hugging Face checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.checkpoint import file_identity
from edgemoe.convert.folder import read_file, require_file
from edgemoe.convert.gguf.tokenizer.bpe import tokenizer_files
from edgemoe.errors import FormatError, quoted

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["BROKEN", "GGUFCheckpoint", "open_gguf"]

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_QK_NAME = re.compile(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)")

BROKEN = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    NotImplementedError,
    RecursionError,
)
"""What the gguf package raises on malformed input; every one of them is the file's fault."""


class GGUFCheckpoint:
    """A dense Llama-architecture GGUF file with Hugging Face's tensor names and layouts.

    Tensors are dequantised one at a time; the file stays mapped while the object lives. A file
    named LICENSE beside it is taken along. Implements `Checkpoint`. Immutable.

    Raises:
        FormatError: not a GGUF file, truncated, or of an architecture or tokenizer that is not
            supported.
        ImportError: the package gguf is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.name = path.name
        self.identity = file_identity([path]) if path.exists() else ""
        reader = open_gguf(path)
        try:
            self._meta = {name: field.contents() for name, field in reader.fields.items()}
        except BROKEN as error:
            raise FormatError(f"{self.name}: broken GGUF metadata: {error}") from error
        parts = self._meta.get("split.count", 0)
        if parts not in (0, 1):
            raise FormatError(
                f"{self.name}: is one of {quoted(parts)} parts of a split GGUF file; "
                "llama-gguf-split --merge makes one of them"
            )
        self._tensors = {}
        for tensor in reader.tensors:
            self._tensors[self._hf_name(tensor.name)] = tensor
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.config: Mapping[str, Any] = self._config()
        files = tokenizer_files(
            self._meta, context_length=self.config["max_position_embeddings"], where=self.name
        )
        licence = read_file(path.parent, "LICENSE")
        if licence is not None:
            files["LICENSE"] = licence
        self.files: Mapping[str, bytes] = files

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Dequantises one tensor; q and k rows are put back in the half-split order of RoPE.

        Raises:
            FormatError: there is no such tensor, or its type or shape is not what it should be.
        """
        from gguf import dequantize

        if name not in self._tensors:
            raise FormatError(f"{self.name}: no tensor {name}")
        tensor = self._tensors[name]
        try:
            with np.errstate(all="ignore"):  # what is not finite is found where it is used
                values = dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        except BROKEN as error:
            kind = tensor.tensor_type.name
            raise FormatError(f"{self.name}: cannot decode {name} ({kind}): {error}") from error
        role = _QK_NAME.fullmatch(tensor.name)
        if role:
            q = role[1] == "q"
            heads = self.config["num_attention_heads" if q else "num_key_value_heads"]
            values = self._unpermuted(name, values, heads)
        return np.array(values, np.float32, order="C")  # never a view of the mapped file

    def _unpermuted(
        self, name: str, values: NDArray[np.float32], heads: int
    ) -> NDArray[np.float32]:
        # llama.cpp rotates neighbouring rows, transformers rows half a head apart.
        half = self.config["head_dim"] // 2
        if values.shape[0] != heads * half * 2:
            raise FormatError(
                f"{self.name}: {name} must have {heads} x {2 * half} rows, got {values.shape[0]}"
            )
        split = values.reshape(heads, half, 2, *values.shape[1:])
        return np.asarray(split.swapaxes(1, 2).reshape(values.shape))

    def _hf_name(self, name: str) -> str:
        if name in _GLOBAL:
            return _GLOBAL[name]
        match = _LAYER_NAME.fullmatch(name)
        if match and match[2] in _PER_LAYER:
            return f"model.layers.{match[1]}.{_PER_LAYER[match[2]]}.{match[3]}"
        if name.startswith("rope_freqs"):
            raise FormatError(
                f"{self.name}: RoPE frequencies per position ({name}) are not supported in GGUF; "
                "convert the Hugging Face checkpoint instead"
            )
        raise FormatError(f"{self.name}: {name} is not a tensor of a dense Llama model")

    def _config(self) -> dict[str, Any]:
        arch = self._meta.get("general.architecture")
        if arch != "llama" or self._meta.get("llama.expert_count", 0):
            what = "llama with experts" if arch == "llama" else repr(arch)
            raise FormatError(
                f"{self.name}: architecture {what} is not supported in GGUF; supported: dense llama"
            )
        hidden = self._whole("llama.embedding_length")
        heads = self._whole("llama.attention.head_count")
        head_dim = self._whole("llama.attention.key_length", hidden // heads)
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            if self._whole(key, head_dim) != head_dim:
                raise FormatError(
                    f"{self.name}: {key} must be the head's {head_dim}, got {self._meta[key]}"
                )
        embedding = self.shapes.get("model.embed_tokens.weight")
        if embedding is None:
            raise FormatError(f"{self.name}: no tensor token_embd.weight")
        names = self.shapes.keys()
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": embedding[0],
            "hidden_size": hidden,
            "intermediate_size": self._whole("llama.feed_forward_length"),
            "num_hidden_layers": self._whole("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._whole("llama.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._whole("llama.context_length"),
            "rms_norm_eps": self._positive("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": self._positive("llama.rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": "lm_head.weight" not in names,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names,
        }
        return config | self._special_ids()

    def _rope_scaling(self) -> dict[str, Any] | None:
        p = "llama.rope.scaling."
        kind = self._meta.get(p + "type", "linear")  # llama.cpp's default, too
        if kind == "none":
            return None
        if kind != "linear":
            raise FormatError(
                f"{self.name}: {p}type: {quoted(kind)} is not supported in GGUF; supported: none, linear"
            )
        for key in (p + "attn_factor", p + "yarn_attn_factor"):  # llama.cpp uses it without yarn
            if self._positive(key, 1.0) != 1.0:
                raise FormatError(f"{self.name}: {key} must be 1, got {self._meta[key]}")
        # The second is the old name.
        key = p + "factor" if p + "factor" in self._meta else "llama.rope.scale_linear"
        if self._meta.get(key, 0) == 0:
            return None
        scaling: dict[str, Any] = {"rope_type": "linear", "factor": self._positive(key)}
        key = p + "original_context_length"
        if self._meta.get(key, 0) != 0:
            scaling["original_max_position_embeddings"] = self._whole(key)
        return scaling

    def _special_ids(self) -> dict[str, Any]:
        ids = {
            f"{role}_token_id": self._meta.get(f"tokenizer.ggml.{key}_token_id")
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        turn_end = self._meta.get("tokenizer.ggml.eot_token_id")
        if turn_end is not None and turn_end != ids["eos_token_id"]:
            # Either one ends a reply.
            both = (ids["eos_token_id"], turn_end)
            return ids | {"eos_token_id": [i for i in both if i is not None]}
        return ids

    def _whole(self, key: str, default: int | None = None) -> int:
        value = self._meta.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # written per layer, but the same everywhere
        if type(value) is not int or value <= 0:
            raise FormatError(
                f"{self.name}: {key} must be a positive whole number, got {quoted(value)}"
            )
        return value

    def _positive(self, key: str, default: float | None = None) -> float:
        value = self._meta.get(key, default)
        # Some writers store whole numbers as such.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FormatError(f"{self.name}: {key} must be a positive number, got {quoted(value)}")
        if not 0 < value < float("inf"):
            raise FormatError(f"{self.name}: {key} must be a positive number, got {quoted(value)}")
        return float(value)


def open_gguf(path: Path) -> GGUFReader:
    """Opens any GGUF file.

    Raises:
        FormatError: no such file, or not a readable one.
        ImportError: the package gguf is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            f"{path.name}: reading GGUF needs the package gguf: pip install 'edgemoe[demo]'",
            name="gguf",
        ) from error

    class Bounded(GGUFReader):
        """Refuses to read past the end, where the package's own reader may loop for ever."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, *rest: Any, **kw: Any) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"ends at byte {len(self.data)}, expected at least {end}")
            return super()._get(offset, dtype, count, *rest, **kw)

    require_file(path)
    try:
        with np.errstate(over="ignore"):  # sizes from a broken file may wrap; _get catches them
            reader = Bounded(path)
    except BROKEN as error:
        raise FormatError(f"{path.name}: not a readable GGUF file: {error}") from error
    if reader.byte_order == "S":  # the package swaps the metadata and not the weights
        raise FormatError(f"{path.name}: is a big-endian GGUF file; expected a little-endian one")
    return reader
