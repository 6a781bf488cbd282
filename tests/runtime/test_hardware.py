"""Limits of control groups are found in every group that contains the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemoe import hardware

GIB = 1 << 30
NO_QUOTA = 1 << 20


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    (tmp_path / "membership").write_text("0::/user.slice/chat.scope\n")
    return tmp_path / "cgroup"


def test_version_2(v2: Path) -> None:
    membership = v2.parent / "membership"
    stat = f"anon {GIB}\ninactive_file {GIB}"
    write(
        v2 / "user.slice",
        memory__max=8 * GIB,
        memory__high="max",
        memory__current=3 * GIB,
        memory__stat=stat,
    )
    assert hardware._cgroup_rooms(membership, v2) == [6 * GIB]
    # systemd's MemoryHigh= slows down processes that exceed it.
    write(
        v2 / "user.slice/chat.scope",
        memory__max="max", memory__high=4 * GIB, memory__current=2 * GIB, memory__stat=stat,
    )  # fmt: skip
    assert sorted(hardware._cgroup_rooms(membership, v2)) == [3 * GIB, 6 * GIB]
    assert hardware._cpu_quota(membership, v2) == NO_QUOTA
    write(v2 / "user.slice", cpu__max="max 100000")
    assert hardware._cpu_quota(membership, v2) == NO_QUOTA
    write(v2 / "user.slice/chat.scope", cpu__max="250000 100000")
    assert hardware._cpu_quota(membership, v2) == 3


def test_version_1(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("5:cpu,cpuacct:/box\n4:memory:/box\n1:name=systemd:/box\n")
    write(
        tmp_path / "memory/box",
        memory__limit_in_bytes=2 * GIB, memory__usage_in_bytes=GIB, memory__stat="total_inactive_file 4096",
    )  # fmt: skip
    assert hardware._cgroup_rooms(membership, tmp_path) == [GIB + 4096]
    write(tmp_path / "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100_000)
    assert hardware._cpu_quota(membership, tmp_path) == NO_QUOTA
    write(tmp_path / "cpu/box", cpu__cfs_quota_us=150_000, cpu__cfs_period_us=100_000)
    assert hardware._cpu_quota(membership, tmp_path) == 2


def test_no_control_groups(tmp_path: Path) -> None:
    assert hardware._cgroup_rooms(tmp_path / "absent", tmp_path) == []
    assert hardware._cpu_quota(tmp_path / "absent", tmp_path) == NO_QUOTA
