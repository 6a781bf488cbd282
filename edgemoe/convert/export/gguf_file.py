"""Export of a `.moe` file to GGUF, for llama.cpp, in Q8_0 or F16."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.convert.export.tokenizer import tokenizer_metadata
from edgemoe.convert.gguf import GGUFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.file.format import MoeFile
from edgemoe.file.whole import locked, named, pwrite, rename, require_new
from edgemoe.specs import AttentionSpec
from edgemoe.store.floats import checkpoint_weights, dense_weights

__all__ = ["TYPES", "export_gguf"]

Array = NDArray[np.float32]
TYPES = ("Q8_0", "F16")
_ARCHITECTURES = {
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
_WHOLE = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
_LAYER = {
    "attn_norm": "attn_norm.weight",
    **{x: f"attn_{x}.weight" for x in "qkv"},
    **{f"{x}_bias": f"attn_{x}.bias" for x in "qkv"},
    "o": "attn_output.weight",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "router": "ffn_gate_inp.weight",
    **{f"shared.{x}": f"ffn_{x}_shexp.weight" for x in MATRICES},
    "shared.sigmoid": "ffn_gate_inp_shexp.weight",
}
_UNCOMPARED = ("family", "context_length", "eos_ids")
_ALIGNMENT = 32


def export_gguf(
    moe: MoeFile,
    out: Path,
    *,
    bits: int | None = None,
    dense_bits: int | None = None,
    kind: str = "Q8_0",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a GGUF file, which appears under its name only when it is complete.

    Before any weights are written, the file's header is read back and the model in it compared with the original, so
    that a model which the format cannot represent is refused.

    Args:
        moe: the model.
        out: the file to write.
        bits: level of the experts; None for the highest.
        dense_bits: level of all other matrices; None for the highest.
        kind: GGUF type of matrices, one of `TYPES`; vectors and routers are F32.
        progress: called with the bytes written and the total.

    Raises:
        FormatError: a GGUF file cannot represent the model, or the `.moe` file is broken.
        FileExistsError: `out`, or `out` with `.part` appended, exists.
        ImportError: the package gguf is not installed.
        OSError: the disk is full, or failed.
    """
    config = moe.config
    if config.family not in _ARCHITECTURES:
        raise FormatError(
            f"{moe.path}: models of family {config.family} cannot be exported to GGUF; those of "
            f"{', '.join(_ARCHITECTURES)} can"
        )
    level, dense_level = moe.level(bits), moe.dense_level(dense_bits)
    part = out.with_name(f"{out.name}.part")
    require_new(out)
    require_new(part)  # may be another program's, such as a browser's download
    with tempfile.TemporaryDirectory(prefix="edgemoe-") as folder:
        draft = Path(folder) / out.name
        starts, kinds, end = _write_head(draft, moe, _rope_base(moe), kind)
        head = draft.read_bytes()
        os.truncate(draft, end)
        _compare(moe, draft)
    with locked(part, create=True, ours=True, busy="another process is writing it") as file:
        try:
            with named(out):
                file.truncate(0)
                pwrite(file, head, 0)
                done = 0
                for name, index, values in _weights(moe, level, dense_level):
                    data = _encoded(_turned(values, name, config), kinds[name])
                    pwrite(file, data, starts[name] + index * len(data))
                    done += len(data)
                    if progress is not None:
                        progress(done, end)
                file.truncate(end)
                os.fsync(file.fileno())
            require_new(out)
            rename(part, out)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _rope_base(moe: MoeFile) -> float:
    """Returns the base of the RoPE frequencies, which must not be scaled."""
    (spec,) = moe.config.ropes
    table = next(values for name, values in dense_weights(moe, 1) if name == spec.name)
    exponents = np.arange(0, spec.dim, 2) / spec.dim
    base = float(table[-1].astype(np.float64) ** (-1 / exponents[-1])) if len(table) > 1 else 1e4
    for guess in (float(round(base)), base):
        if (
            spec.scale == 1
            and not spec.short_length
            and np.allclose(table, guess**-exponents, rtol=1e-6)
        ):
            return guess
    raise FormatError(
        f"{moe.path}: RoPE that is scaled cannot be exported to GGUF; a directory can hold it"
    )


def _names(config: ModelConfig, name: str) -> str:
    """Returns the name of a tensor in a GGUF file."""
    if name in _WHOLE:
        return _WHOLE[name]
    kind, layer, part = name.split(".", 2)
    return (
        f"blk.{layer}.ffn_{part}_exps.weight"
        if kind == "experts"
        else f"blk.{layer}.{_LAYER[part]}"
    )


def _write_head(
    path: Path, moe: MoeFile, base: float, kind: str
) -> tuple[dict[str, int], dict[str, str], int]:
    """Writes everything but the weights; returns each tensor's offset and type, and the file's length in bytes."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"{path.name}: writing GGUF needs the package gguf: pip install 'edgemoe[demo]'",
            name="gguf",
        ) from error
    config, kinds, starts, at = moe.config, {}, {}, 0
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[config.family])
    for key, value in _metadata(moe, base).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    shapes: dict[str, tuple[int, ...]] = {
        n: t.spec.shape for n, t in moe.tensors.items() if not n.startswith("rope")
    }
    matrices = {n for n, t in moe.tensors.items() if t.spec.kind == "nested"}
    for layer in config.moe_layers:
        for part, matrix in zip(MATRICES, config.expert_shapes, strict=True):
            shapes[f"experts.{layer}.{part}"] = (config.num_experts, *matrix)
            matrices.add(f"experts.{layer}.{part}")
    for name, shape in shapes.items():
        kinds[name] = "F32" if name not in matrices else "F16" if shape[-1] % 32 else kind
        size = int(np.prod(shape)) * {"F32": 128, "F16": 64, "Q8_0": 34}[kinds[name]] // 32
        writer.add_tensor_info(
            _names(config, name), shape, np.dtype(np.float32), size, gguf.GGMLQuantizationType[kinds[name]]
        )  # fmt: skip
        starts[name] = at
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = -(-path.stat().st_size // _ALIGNMENT) * _ALIGNMENT
    return {name: begin + start for name, start in starts.items()}, kinds, begin + at


def _metadata(moe: MoeFile, base: float) -> dict[str, Any]:
    """Returns the file's metadata by key."""
    config = moe.config
    (mixer, *_) = config.mixers
    assert isinstance(mixer, AttentionSpec)
    shared = max(config.shared_hidden, default=0)
    out: dict[str, Any] = {
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.expert_hidden,
        "attention.head_count": mixer.num_heads,
        "attention.head_count_kv": mixer.num_kv_heads,
        "attention.key_length": mixer.head_dim,
        "attention.value_length": mixer.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": base,
        "rope.dimension_count": mixer.rope_dim,
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        "expert_feed_forward_length": config.expert_hidden,
        "vocab_size": config.vocab_size,
        **({"expert_shared_feed_forward_length": shared} if shared else {}),
        **({} if mixer.clip is None else {"attention.clamp_kqv": mixer.clip}),
    }
    arch = _ARCHITECTURES[config.family]
    return {
        "general.name": moe.path.stem.encode(errors="replace").decode(),
        **{f"{arch}.{key}": value for key, value in out.items()},
        **tokenizer_metadata(moe),
    }


def _compare(moe: MoeFile, path: Path) -> None:
    """Checks that the GGUF file, which must have all metadata and shapes, describes the same model."""
    found = SourceModel(GGUFCheckpoint(path)).config
    for field in dataclasses.fields(found):
        ours, theirs = getattr(moe.config, field.name), getattr(found, field.name)
        if field.name not in _UNCOMPARED and ours != theirs:
            raise FormatError(
                f"{moe.path}: a GGUF file of {moe.config.family} cannot hold this model: {field.name} "
                "is another one there; a directory can"
            )


def _weights(moe: MoeFile, level: int, dense_level: int) -> Iterator[tuple[str, int, Array]]:
    """Yields every tensor to be written, with its index in its stack; 0 for tensors that are no stack."""
    for name, index, values in checkpoint_weights(moe, level, dense_level):
        kind, *place = name.split(".")
        if kind == "experts":
            yield f"experts.{place[0]}.{place[2]}", index, values
        elif not name.startswith("rope"):
            yield name, 0, values


def _turned(values: Array, name: str, config: ModelConfig) -> Array:
    """Reorders the rows of Mixtral's q and k to adjacent RoPE pairs, as the architecture `llama` has them."""
    part = name.rpartition(".")[2].removesuffix("_bias")
    if config.family != "mixtral" or not name.startswith("layers.") or part not in ("q", "k"):
        return values
    _, width = config.mixer(int(name.split(".")[1])).heads
    halves = values.reshape(-1, 2, width // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _encoded(values: Array, kind: str) -> bytes:
    import gguf

    encoded = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    return np.ascontiguousarray(encoded).tobytes()
