"""`python -m edgemoe` is the program `edgemoe`."""

from __future__ import annotations

import sys

from edgemoe.cli.entry import edgemoe

if __name__ == "__main__":
    sys.exit(edgemoe())
