"""`.moe` files whose index says something else, with all sums right."""

from __future__ import annotations

import json

from edgemoe.file.format import PREAMBLE, pack_preamble


def edit(data, change):
    """Returns the file with an index that `change` was applied to, all sums right."""
    _, _, _, _, offset, length, _ = PREAMBLE.unpack(data[:64])
    index = json.loads(data[offset : offset + length])
    index = change(index) or index
    text = json.dumps(index).encode() if not isinstance(index, bytes) else index
    out = bytearray(data[:offset]) + text
    out[:64] = pack_preamble(len(out), offset, text)
    return out


def setter(*path):
    """Returns a change: the value that comes last, put where the keys before it lead."""
    *way, last, value = path

    def change(index):
        for key in way:
            index = index[key]
        index[last] = value

    return change
