"""Names of models on a hub: `user/repo`, and optionally a revision, and bits or one of its GGUF quants."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

__all__ = ["HubName"]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(
    rf"(?:https://huggingface\.co/|hf\.co/)?({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,95}}))?(?::({_PART}))?/?"
)


@dataclass(frozen=True, slots=True)
class HubName:
    """The model that a user asks a hub for."""

    repo: str
    revision: str | None = None
    bits: int | None = None
    """The highest level of the `.moe` file to make; None for all."""
    quant: str = ""
    """Which of a repository's GGUF files, such as Q4_K_M; "" for its safetensors, or for a choice by `choose`."""

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Reads `user/repo[@revision][:bits or quant]`.

        Raises:
            ValueError: the text is no such name.
        """
        match = _NAME.fullmatch(text)
        if match is None or ".." in text:
            raise ValueError(
                f"expected user/repo, user/repo:BITS or user/repo:QUANT, got {text[:200]!r}"
            )
        repo, revision, tag = match[1], match[2], match[3] or ""
        if tag.isdecimal():
            return cls(repo, revision, bits=int(tag))
        return cls(repo, revision, quant=tag)

    def with_bits(self, bits: int | None) -> HubName:
        """Returns the same name with other bits; None changes nothing."""
        return self if bits is None else replace(self, bits=bits)

    @property
    def kept(self) -> str:
        """The name under which the model is kept; models that differ have different names."""
        name = self.repo
        if self.revision is not None:
            name += "@" + self.revision.replace("/", "-")
        if self.quant:
            name += "-" + self.quant.upper()
        return name if self.bits is None else f"{name}-{self.bits}bit"

    def __str__(self) -> str:
        tag = self.quant or ("" if self.bits is None else str(self.bits))
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{revision}{':' * bool(tag)}{tag}"
