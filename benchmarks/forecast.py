"""What `edgemoe plan` forecasts beside what is measured: budgets for all, a half and a quarter of the experts.

    python benchmarks/forecast.py MODEL.moe[:BITS] ... [-n 64] [-r 3] [--json FILE]

The disk is probed before each row, as `plan` does, and single random tokens are measured just after, as `edgemoe bench`
does. A row is good where the median lies inside the band.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

from edgemoe.runtime.bench import measure
from edgemoe.runtime.engine import Engine
from edgemoe.runtime.forecast import Forecast
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.pace import disk_pace, pace

SHARES = (1.0, 0.5, 0.25)
_SPARE = 8 << 20  # so that "all" does not hang on a page


def rows(path: Path, bits: int | None, args: argparse.Namespace) -> list[dict[str, object]]:
    forecast = Forecast(path, context=args.context)
    bits = bits or forecast.levels[-1]
    least = forecast.smallest(bits).budget
    found: list[dict[str, object]] = []
    for share in SHARES:
        ram = least.ram + int(share * least.experts) + (_SPARE if share == 1 else 0)
        row = forecast.row(ram, bits)
        speed = pace(forecast.moe.scheme, anew=True)
        disk = disk_pace(forecast.moe, path.parent, row.read_size) if row.resident < 1 else None
        band = forecast.band(row, speed, disk)
        assert band is not None
        with Engine(path, EngineOptions(ram=ram, bits=bits, context=args.context)) as engine:
            (result,) = measure(
                engine, prompts=[], generations=[args.n], repetitions=args.repetitions
            )
        found.append({
            "model": path.stem, "bits": bits, "ram": ram, "resident": row.resident, "low": band.low,
            "high": band.high, "bound": band.bound, "measured": result.rate, "rates": result.rates,
            "hit": result.hit_rate, "read": result.read_per_token, "wait": result.wait_share, "disk": disk,
            "memory": speed.memory, "kernel": speed.kernel(bits), "layer_s": speed.layer_s,
        })  # fmt: skip
        print(_line(found[-1]), flush=True)
    return found


def _line(r: dict[str, object]) -> str:
    inside = r["low"] <= r["measured"] <= r["high"]  # type: ignore[operator]
    disk = f"{r['disk'] / 1e9:.2f}" if r["disk"] else ""  # type: ignore[operator]
    return (
        f"| {r['model']} | {r['bits']} | {r['ram'] >> 20} MiB | {100 * r['resident']:.0f}% "  # type: ignore[operator]
        f"| {r['low']:.1f} … {r['high']:.1f} | {r['bound']} | {r['measured']:.1f} | {'yes' if inside else 'NO'} "
        f"| {100 * r['hit']:.0f}% | {r['read'] / 1e6:.1f} MB | {disk} | {r['kernel'] / 1e9:.1f} "  # type: ignore[operator]
        f"| {1e6 * r['layer_s']:.0f} µs | {100 * r['wait']:.0f}% |"  # type: ignore[operator]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL.moe[:BITS]")
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("-c", "--context", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("| model | bits | --ram | resident | forecast | bound by | measured | inside | hit | read/token | disk GB/s "
          "| kernels GB/s | layer | waiting |\n" + "|---" * 14 + "|")  # fmt: skip
    found: list[dict[str, object]] = []
    for given in args.models:
        name, _, bits = given.partition(":")
        found += rows(Path(name), int(bits) if bits else None, args)
    inside = sum(r["low"] <= r["measured"] <= r["high"] for r in found)  # type: ignore[operator]
    print(f"\ninside: {inside} of {len(found)}")
    if args.json:
        head = {"command": sys.argv, "machine": platform.platform(), "cpu": platform.processor()}
        args.json.write_text(json.dumps({**head, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
