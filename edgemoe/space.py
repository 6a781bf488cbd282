"""Checks of address space under a limit: libraries that run out of it abort without a useful message."""

from __future__ import annotations

import mmap
import resource

from edgemoe.errors import OutOfBudget

__all__ = ["expect_space"]

_LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)


def expect_space(size: int, what: str) -> None:
    """Checks that `size` bytes of address space can be had; it keeps none, and costs nothing where there is no limit.

    Args:
        size: the bytes that are needed.
        what: what needs them; errors begin with it.

    Raises:
        OutOfBudget: the system refuses them.
    """
    if all(resource.getrlimit(limit)[0] == resource.RLIM_INFINITY for limit in _LIMITS):
        return
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        raise OutOfBudget(
            f"{what}: the system refused {size >> 20} MiB of address space; `ulimit -v` is too small "
            "(what bounds memory is --ram)"
        ) from None
