"""Where every value lies: one block of memory, reused as soon as a value has been read last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALIGNMENT = 256  # bytes; what libraries ask of a tensor's start, and more than a cache line


@dataclass(frozen=True)
class Lifetime:
    """A block that is needed from operation ``first`` to operation ``last``, both included."""

    nbytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are needed at once."""
        return self.first <= other.last and other.first <= self.last


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def plan_offsets(lifetimes: Mapping[int, Lifetime]) -> tuple[dict[int, int], int]:
    """Offsets of blocks such that those needed at once do not overlap, and the bytes of all.

    Largest first, each at the lowest offset that is free while it lives (greedy by size, Pisarchyk
    and Lee 2020). Keys and their order do not matter but for ties.
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
