"""`.moe` files with an edited index and correct checksums."""

from __future__ import annotations

import json

from edgemoe.file.format import PREAMBLE, pack_preamble


def edit(data, change):
    """Returns the file with `change` applied to its index, and correct checksums."""
    _, _, _, _, offset, length, _ = PREAMBLE.unpack(data[:64])
    index = json.loads(data[offset : offset + length])
    index = change(index) or index
    text = json.dumps(index).encode() if not isinstance(index, bytes) else index
    out = bytearray(data[:offset]) + text
    out[:64] = pack_preamble(len(out), offset, text)
    return out


def setter(*path):
    """Returns a change that sets a value; the arguments are the keys that lead to it, and then the value."""
    *way, last, value = path

    def change(index):
        for key in way:
            index = index[key]
        index[last] = value

    return change
