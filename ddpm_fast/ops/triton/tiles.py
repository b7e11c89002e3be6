"""Tiles of the Triton kernels of the updates, memory access and launch.

An operation visits the elements of a sample in one order for all its tensors: channels-last if it
generates noise (the order in which noise is numbered), else the memory order of the tensor that is
written. A tensor that is contiguous in that order needs no index arithmetic; the others share one
computation of indices.

A program processes a tile: consecutive elements of one sample or, if samples are shorter than a
tile, several samples (rows) with all their elements (columns).
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.triton import arithmetic as core

Ints = tuple[int, ...]

# 128 threads with 8 elements each: two vectors of float32, one of float16, two Philox blocks.
TILE_ELEMENTS = 1024
NUM_WARPS = 4
VECTOR_BYTES = 16

_QUAD = 4  # normals of a Philox block
_MAX_NARROW = 2**31 - TILE_ELEMENTS  # largest sample for 32-bit offsets


class View(NamedTuple):
    """A tensor [samples, ...]; strides are empty if element e of a sample is at offset e."""

    data: Any
    sample_stride: int
    strides: Ints


class Walk(NamedTuple):
    """Dimensions of a sample, outermost first, that tensors with strides share; its extent."""

    sizes: Ints
    elements: int
    tiles: int


class Lookup(NamedTuple):
    """Row of the table of each sample n: row[n * stride], of `rows`."""

    row: Any
    stride: int
    table: Any
    rows: int


class Shape(NamedTuple):
    """Shape of a tile, and other compile-time properties of its kernel."""

    rows: int
    columns: int
    vector: int  # adjacent elements that one thread loads at once
    wide: bool  # offsets in a sample need 64 bits


class Tile(NamedTuple):
    """Elements of a program; sample and its mask are scalars for one sample, else [rows, 1]."""

    sample: tl.tensor
    first: tl.tensor  # the first element, a scalar
    element: tl.tensor
    sizes: tl.tuple
    sample_mask: tl.tensor
    mask: tl.tensor


@triton.jit
def tile_of(walk: Walk, samples: tl.tensor, SHAPE: tl.constexpr) -> Tile:
    """Return the tile of this program."""
    program = tl.program_id(0)
    sample = (program // walk.tiles).to(tl.int64)
    first = program % walk.tiles
    if SHAPE.wide:
        first = first.to(tl.int64)
    first = first * SHAPE.columns
    # One vector width for tensors of every dtype: no exchange between threads.
    VECTOR: tl.constexpr = SHAPE.vector
    element = first + tl.max_contiguous(tl.arange(0, SHAPE.columns), VECTOR)
    if SHAPE.rows > 1:
        sample = (sample * SHAPE.rows + tl.arange(0, SHAPE.rows))[:, None]
        element = element[None, :]
    sample_mask = sample < samples
    mask = sample_mask & (element < walk.elements)
    return Tile(sample, first, element, walk.sizes, sample_mask, mask)


@triton.jit
def pointers(view: View, tile: Tile) -> tl.tensor:
    """Return the offsets of the elements of a tile in a tensor."""
    pointers = view.data + tile.sample * view.sample_stride
    remainder = tile.element
    for i in tl.static_range(1, len(view.strides)):
        size = tile.sizes[len(view.strides) - i]
        pointers = pointers + (remainder % size).to(tl.int64) * view.strides[len(view.strides) - i]
        remainder = remainder // size
    if len(view.strides) > 0:
        remainder = remainder.to(tl.int64) * view.strides[0]
    return pointers + remainder


@triton.jit
def load(view: View, tile: Tile) -> tl.tensor:
    """Load the elements of a tile as float32."""
    return tl.load(pointers(view, tile), mask=tile.mask).to(tl.float32)


@triton.jit
def store(view: View, tile: Tile, mask: tl.tensor, value: tl.tensor) -> None:
    """Store the elements of a tile that a mask selects, in the dtype of the tensor."""
    tl.store(pointers(view, tile), value.to(view.data.dtype.element_ty), mask=mask)


@triton.jit
def index_of(lookup: Lookup, tile: Tile) -> tl.tensor:
    """Return the row of each sample, -1 beyond the last sample."""
    return tl.load(lookup.row + tile.sample * lookup.stride, mask=tile.sample_mask, other=-1)


@triton.jit
def clamped_row(lookup: Lookup, tile: Tile, WIDTH: tl.constexpr) -> tl.tensor:
    """Return the offset of the row of each sample, clamped to the table."""
    index = tl.minimum(tl.maximum(index_of(lookup, tile), 0), lookup.rows - 1)
    return lookup.table + index * WIDTH


@triton.jit
def normals(rng: tl.tensor, row: tl.tensor, tile: Tile, SHAPE: tl.constexpr) -> tl.tensor:
    """Generate the noise of a tile, of stream rng[1] + row."""
    block = (tile.first // 4).to(tl.uint32) + tl.arange(0, SHAPE.columns // 4).to(tl.uint32)
    if SHAPE.rows > 1:
        block = block[None, :]
    stream = (tl.load(rng + 1) + row).to(tl.uint32)
    sample = (tl.load(rng + 2) + tile.sample).to(tl.uint64)
    return core.normal4(block, stream, sample, tl.load(rng).to(tl.uint64))


class LaunchPlan(NamedTuple):
    """Launch of an operation; `layouts` are the (sample_stride, strides) of its tensors."""

    layouts: tuple[tuple[int, Ints], ...]
    grid: tuple[int]
    walk: Walk
    samples: int
    tile: Shape


def _merged(sizes: Ints, *strides: Ints) -> list[Ints]:
    """Return (size, stride of each tensor) by dimension, adjacent dimensions merged if possible."""
    merged: list[Ints] = []
    for size, *steps in zip(sizes, *strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1:] == tuple(size * step for step in steps):
            size *= merged.pop()[0]
        merged.append((size, *steps))
    return merged


@lru_cache(maxsize=4096)
def plan_of(
    shape: Ints, strides: tuple[Ints, ...], generated_noise: bool, itemsize: int
) -> LaunchPlan:
    """Return the launch for tensors of one shape.

    Args:
        shape: Shape of the tensors.
        strides: Strides of each tensor; the first is written.
        generated_noise: Visit elements channels-last, as noise is numbered.
        itemsize: Bytes of an element of the widest tensor.
    """
    samples, elements = shape[0], prod(shape[1:])
    dims = range(1, len(shape)) if elements else range(0)
    order = (
        [*dims[1:], *dims[:1]] if generated_noise else sorted(dims, key=lambda d: -strides[0][d])
    )
    sizes = tuple(shape[d] for d in order)
    steps = [tuple(s[d] for d in order) for s in strides]
    strided = [s for s in dict.fromkeys(steps) if _merged(sizes, s) not in ([], [(elements, 1)])]
    shared, *merged = zip(*_merged(sizes, *strided), strict=True) if strided else [()]
    of_steps = dict(zip(strided, merged, strict=True))
    layouts = tuple((s[0], of_steps.get(t, ())) for s, t in zip(strides, steps, strict=True))

    columns = max(_QUAD, min(TILE_ELEMENTS, triton.next_power_of_2(elements)))
    rows = min(TILE_ELEMENTS // columns, triton.next_power_of_2(samples))
    tiles = max(1, triton.cdiv(elements, columns))
    grid = (triton.cdiv(samples, rows) * tiles,)
    vector = _QUAD if generated_noise else min(columns, VECTOR_BYTES // itemsize)
    tile = Shape(rows, columns, vector, elements > _MAX_NARROW)
    return LaunchPlan(layouts, grid, Walk(shared, elements, tiles), samples, tile)


def launch(
    kernel: Any, plan: LaunchPlan, tensors: tuple[Tensor | None, ...], *args: object
) -> None:
    """Launch a kernel on the device and current stream of its first tensor."""
    layouts = iter(plan.layouts)
    views = [None if tensor is None else View(tensor, *next(layouts)) for tensor in tensors]
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(tensors[0]):
        kernel[plan.grid](*views, *args, plan.walk, plan.samples, plan.tile, **options)
