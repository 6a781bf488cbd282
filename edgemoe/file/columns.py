"""The column scales of a file, for code that compares the file with its checkpoint."""

from __future__ import annotations

from edgemoe.errors import FormatError
from edgemoe.file.format import MoeFile
from edgemoe.quant.columns import COLUMN_SCALES, ColumnScales

__all__ = ["column_scales"]


def column_scales(moe: MoeFile) -> ColumnScales | None:
    """Returns the scales of a file's columns; None if the columns are as in the checkpoint.

    Raises:
        FormatError: the section is damaged.
    """
    content = moe.sections.get(COLUMN_SCALES)
    if content is None:
        return None
    try:
        return ColumnScales.from_section(moe.config, content)
    except FormatError as error:
        raise FormatError(f"{moe.path}: {error}") from None
