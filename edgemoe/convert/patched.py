"""A checkpoint with some tensors replaced or changed, for fine-tunes that store only what they have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.folder import exists
from edgemoe.convert.lora import CONFIG, lora_patches
from edgemoe.convert.safetensors_file import StoredTensor, read_header, require_floats
from edgemoe.errors import FormatError, shortened

__all__ = ["Patch", "PatchedCheckpoint", "is_partial", "patched"]

Array = NDArray[np.float32]
Patch = Callable[[Array], Array]
"""A function that returns the new values of a tensor. It may overwrite the old values that it is given."""

_WHOLE, _ESFT = "config.json", "expert_cfg.json"


class PatchedCheckpoint:
    """A checkpoint with some of its tensors changed; implements `Checkpoint`. Immutable."""

    def __init__(self, name: str, original: Checkpoint, patches: Mapping[str, Patch]) -> None:
        """Takes the original, and a patch for each of its tensors that changes, by name."""
        self.name, self.identity = name, original.identity
        self.config: Mapping[str, Any] = original.config
        self.files: Mapping[str, bytes] = original.files
        self.shapes: Mapping[str, tuple[int, ...]] = original.shapes
        self.patches = patches
        self._original = original

    def tensor(self, name: str) -> Array:
        """See `Checkpoint.tensor`."""
        values, patch = self._original.tensor(name), self.patches.get(name)
        return values if patch is None else np.ascontiguousarray(patch(values), np.float32)


def is_partial(path: Path) -> bool:
    """Returns whether a directory holds only what a fine-tune has changed: a LoRA of peft, or some tensors."""
    if not path.is_dir():
        return False
    if exists(path / CONFIG) or exists(
        path / _ESFT
    ):  # the model's config.json may be there as well
        return True
    return not exists(path / _WHOLE) and any(path.glob("*.safetensors"))


def patched(path: Path, original: Checkpoint) -> PatchedCheckpoint:
    """Returns a checkpoint with the changes of a fine-tune's directory applied; see `is_partial`.

    Raises:
        FormatError: the directory is broken, for another model, or uses something that is not supported.
    """
    name = path.resolve().name
    patches = (
        lora_patches(path, original) if exists(path / CONFIG) else _replacements(path, original)
    )
    return PatchedCheckpoint(name, original, patches)


def _replacements(path: Path, original: Checkpoint) -> dict[str, Patch]:
    """Returns patches that replace the tensors in a directory, by name; ESFT's checkpoints omit the prefix `model.`."""
    out: dict[str, Patch] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in read_header(file).items():
            require_floats(tensor)
            meant = f"model.{name}" if name.startswith("layers.") else name
            if meant not in original.shapes:
                raise FormatError(f"{file}: {shortened(name)}: {original.name} has no such tensor")
            if tensor.shape != original.shapes[meant]:
                raise FormatError(
                    f"{file}: {shortened(name)}: has shape {list(tensor.shape)}; "
                    f"{original.name} has {list(original.shapes[meant])}"
                )
            if meant in out:
                raise FormatError(f"{file}: {shortened(name)}: is there twice")
            out[meant] = _replacing(tensor)
    return out


def _replacing(tensor: StoredTensor) -> Patch:
    return lambda _: tensor.read()
