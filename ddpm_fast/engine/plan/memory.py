"""Memory planning: one block for all values, reused after a value's last use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALIGNMENT = 256  # bytes; required by libraries, and more than a cache line


@dataclass(frozen=True)
class Lifetime:
    """Memory that is needed from operation `first` to operation `last`, both included."""

    nbytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Return True if both are needed at the same time."""
        return self.first <= other.last and other.first <= self.last


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def plan_offsets(lifetimes: Mapping[int, Lifetime]) -> tuple[dict[int, int], int]:
    """Assign offsets to blocks so that blocks needed at the same time do not overlap.

    Greedy by size (Pisarchyk and Lee 2020): largest first, each at the lowest offset that is free
    during its lifetime.

    Args:
        lifetimes: sizes and lifetimes by key. The order of the keys only breaks ties.

    Returns:
        The offsets by key, multiples of `ALIGNMENT`, and the total size in bytes.
    """
    order = sorted(lifetimes, key=lambda key: (-lifetimes[key].nbytes, lifetimes[key].first, key))
    offsets: dict[int, int] = {}
    total = 0
    for key in order:
        life = lifetimes[key]
        taken = sorted(
            (offsets[other], offsets[other] + _aligned(lifetimes[other].nbytes))
            for other in offsets
            if lifetimes[other].meets(life)
        )
        offset, size = 0, _aligned(life.nbytes)
        for begin, end in taken:
            if offset + size <= begin:
                break
            offset = max(offset, end)
        offsets[key] = offset
        total = max(total, offset + size)
    return offsets, total
