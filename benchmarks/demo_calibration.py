"""Makes the calibration that comes with the demo model, a sketch of what `edgemoe calibrate --layers` finds.

    python benchmarks/demo_calibration.py ~/.cache/edgemoe/smollm2-moe-v4.moe OUT.safetensors

The text is the beginning of the package's own calibration text: 40 windows of 256 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from edgemoe.convert.carve.sketch import write_sketch
from edgemoe.lab.bits.calibrate import calibrate, default_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / "demo.calib"
        calibrate(args.model, default_text(), whole, layers=True, window=256, count=40)
        write_sketch(whole, args.out)


if __name__ == "__main__":
    main()
