"""Pulls a model from a hub on loopback, kills the process at random moments, and checks the result.

    python benchmarks/pull.py CHECKPOINT [--kills 20] [--rate MB/s] [--seed N]

Prints how often it was killed and in which phase, the most disk space taken besides the model, and the bytes sent next
to those of the checkpoint. Fails if the model is not that of an uninterrupted conversion.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import hubs

from edgemoe.convert.convert import convert
from edgemoe.convert.open import open_checkpoint
from edgemoe.file.reader import open_moe


def main() -> None:
    args = _parser().parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        root = Path(folder)
        (root / "hub/user").mkdir(parents=True)
        (root / "hub/user/model").symlink_to(args.checkpoint.resolve())
        convert(open_checkpoint(args.checkpoint), root / "whole.moe")
        with hubs.serving(root / "hub") as hub:
            hub.rate = args.rate * 1e6
            kills, most = _pull(root, hub, args, chance)
        out = root / "models/user/model.moe"
        assert _sums(out) == _sums(root / "whole.moe"), "not the same model"
        left = sorted(p.name for p in out.parent.iterdir())
        assert left == ["model.moe"], left
        sizes = [p.stat().st_size for p in args.checkpoint.glob("*.safetensors")]
        print(f"killed {sum(kills.values())} times: {kills}; the same model, nothing left over")
        print(
            f"files {len(sizes)}, largest {max(sizes) / 1e6:.1f} MB; disk beside the model at most {most / 1e6:.1f} MB"
        )
        print(
            f"sent {sum(hub.sent.values()) / 1e6:.1f} MB for {sum(sizes) / 1e6:.1f} MB of weights"
        )


def _pull(
    root: Path, hub: hubs.Hub, args: argparse.Namespace, chance: random.Random
) -> tuple[dict[str, int], int]:
    env = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(root / "hf"),
        "EDGEMOE_MODELS": str(root / "models"),
    }  # fmt: skip
    command = [sys.executable, "-m", "edgemoe", "pull", "user/model"]
    kills: dict[str, int] = {}
    most = 0
    while True:
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
        is_last = sum(kills.values()) >= args.kills
        end = time.monotonic() + chance.uniform(0.3, args.patience)
        while process.poll() is None and (is_last or time.monotonic() < end):
            most = max(most, _taken(root / "models", ".moe.pull"))
            time.sleep(0.01)
        if process.poll() is None:
            process.kill()
            process.wait()
            folder = root / "models/user/model.moe.pull"
            what = "before" if not folder.exists() else "outline"
            if (folder / "landed").is_dir():
                parts = list((folder / "landed").glob("*.part"))
                what = "download" if parts else "conversion"
            kills[what] = kills.get(what, 0) + 1
            assert not list((root / "models").rglob("*.moe")), "a model that is not whole"
            continue
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read().decode()
        return kills, most


def _taken(folder: Path, within: str) -> int:
    total = 0
    for path in folder.rglob("*"):
        if within in str(path):
            try:
                total += path.lstat().st_blocks * 512
            except OSError:  # it has gone meanwhile
                continue
    return total


def _sums(path: Path) -> tuple[object, ...]:
    moe = open_moe(path)
    return {n: t.crcs for n, t in moe.tensors.items()}, moe.experts.crcs.tolist(), moe.sections


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rate", type=float, default=5.0, help="MB per second")
    parser.add_argument("--patience", type=float, default=4.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tmp", type=Path)
    return parser


if __name__ == "__main__":
    main()
