"""Division of a sample into slabs and shares for the Triton kernels of `group_norm_`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import triton

# Not tuned on a GPU yet.
HELD_ELEMENTS = 32768  # largest slab in registers
TILE_ELEMENTS = 8192  # tile of a slab that does not fit
MAX_CHANNELS = 128  # of a slab: 256 bytes of float16
MIN_BYTES = 32  # smallest width of a slab in a pixel, if the pixel has as many
WANTED_PROGRAMS = 128  # about one on each multiprocessor of an H100
MAX_SHARES = 128  # of a sample's pixels


class Slab(NamedTuple):
    """Compile-time sizes of a tile, powers of two, and its valid channels."""

    pixels: int
    channels: int
    groups: int
    valid: int  # channels, in whole groups
    group_size: int
    linear: bool  # the pixels of each tensor are one dimension
    wide: bool  # offsets in a sample need 64 bits


class GroupNormPlan(NamedTuple):
    """Launch of an operation; `shares` is 0 if one kernel suffices."""

    slab: Slab
    slabs: int
    num_warps: int
    shares: int
    share: int  # pixels of a share, in whole tiles


@lru_cache(maxsize=4096)
def plan_of(
    samples: int,
    channels: int,
    pixels: int,
    groups: int,
    itemsize: int,
    linear: bool,
    needs_wide: bool,
) -> GroupNormPlan:
    """Return slabs that fit into registers and occupy all multiprocessors."""
    size = channels // groups
    rows = max(1, triton.next_power_of_2(pixels))

    def columns(of: int) -> int:
        return triton.next_power_of_2(of * size)

    narrow = MIN_BYTES // itemsize
    allowed = [g for g in range(1, groups + 1) if g == 1 or columns(g) <= max(MAX_CHANNELS, narrow)]
    held = [g for g in allowed if rows * columns(g) <= HELD_ELEMENTS]
    if not any(columns(g) >= min(narrow, columns(groups)) for g in held):
        held = []

    def cost(of: int) -> tuple[Any, ...]:
        slabs = triton.cdiv(groups, of)
        padded = slabs * columns(of)  # computed channels, padding included
        short = columns(of) < min(narrow, columns(groups))
        idle = bool(held) and samples * slabs < WANTED_PROGRAMS
        unaligned = slabs > 1 and of * size * itemsize % 16 != 0
        # No narrower than needed to occupy every multiprocessor.
        return (short, unaligned, padded > 1.5 * channels, idle, -of if not idle else of)

    of = min(held or allowed, key=cost)
    slabs = triton.cdiv(groups, of)
    tile = rows if held else max(1, min(rows, TILE_ELEMENTS // columns(of)))
    slab = Slab(tile, columns(of), triton.next_power_of_2(of), of * size, size, linear, needs_wide)
    num_warps = max(1, min(16, tile * columns(of) // 1024))
    if held:
        return GroupNormPlan(slab, slabs, num_warps, 0, 0)
    tiles = triton.cdiv(pixels, tile)
    shares = min(MAX_SHARES, tiles, triton.cdiv(4 * WANTED_PROGRAMS, samples * slabs))
    share = triton.cdiv(tiles, shares) * tile
    return GroupNormPlan(slab, slabs, num_warps, triton.cdiv(pixels, share), share)
