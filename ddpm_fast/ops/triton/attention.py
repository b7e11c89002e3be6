"""Triton backend of `attention_`, which reads q, k and v from the fused buffer.

Up to SHORT keys, a program keeps the scores of its queries with all keys in registers, summed over
chunks of the head's dimensions, and then computes the output chunk by chunk: any number of
dimensions fits, and nothing is computed twice. More keys are processed block by block (online
softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) with one chunk of the output
in registers. If a head has several chunks, each has a program, which computes the scores again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.triton.launch import after_previous, launch, wide

# Not tuned on a GPU yet.
SHORT = 256  # keys
LOG2_E = 1.4426950408889634
_LEAST = 16  # smallest rows, columns and depth of a product on tensor cores


class Heads(NamedTuple):
    """Sizes and strides of qkv [N, T, 3 * heads * D] and out [N, T, heads * D]."""

    qkv: Any
    sample: int
    token: int
    out: Any
    out_sample: int
    out_token: int
    heads: int
    tokens: int
    dims: int
    scale: float  # of the scores, for exponentials of base 2


class Tiles(NamedTuple):
    """Compile-time sizes of a kernel, powers of two."""

    queries: int
    keys: int
    dims: int  # a chunk of the sum over the head's dimensions
    part: int  # a chunk of the output's
    chunks: int  # of dims
    wide: bool  # offsets in a sample need 64 bits


class AttentionPlan(NamedTuple):
    """Launch of an operation; `online` is False if all keys are one block."""

    tiles: Tiles
    online: bool
    blocks: int  # of queries
    chunks: int  # of values
    num_warps: int
    num_stages: int


@triton.jit
def _block(
    of: Heads,
    sample: tl.tensor,
    column: tl.tensor,
    token: tl.tensor,
    dim: tl.tensor,
    TILES: tl.constexpr,
) -> tl.tensor:
    """Load qkv[sample, token, column + dim] as [tokens, dims]; zeros beyond either end."""
    pointers = of.qkv + sample * of.sample + column
    if TILES.wide:
        token = token.to(tl.int64)
    pointers = pointers + (token * of.token)[:, None] + dim[None, :]
    mask = (token < of.tokens)[:, None] & (dim < of.dims)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _scores(
    q: tl.tensor | None,
    of: Heads,
    sample: tl.tensor,
    head: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    TILES: tl.constexpr,
) -> tl.tensor:
    """Compute float32 scores [queries, keys], in units of ln 2; keys beyond the last are -inf.

    q: [queries, dims] if the head's dimensions are one chunk, else None: loaded here.
    """
    QUERIES: tl.constexpr = TILES.queries  # Triton 3.6 accepts no shape from a tuple
    KEYS: tl.constexpr = TILES.keys
    scores = tl.zeros((QUERIES, KEYS), tl.float32)
    if q is not None:
        dim = tl.arange(0, TILES.dims)
        k = _block(of, sample, (of.heads + head) * of.dims, key, dim, TILES)
        scores = tl.dot(q, k.T, scores, input_precision="ieee")
    else:
        for chunk in range(TILES.chunks):
            dim = chunk * TILES.dims + tl.arange(0, TILES.dims)
            part = _block(of, sample, head * of.dims, query, dim, TILES)
            k = _block(of, sample, (of.heads + head) * of.dims, key, dim, TILES)
            scores = tl.dot(part, k.T, scores, input_precision="ieee")
    return tl.where((key < of.tokens)[None, :], scores * of.scale, float("-inf"))


@triton.jit
def _store(
    of: Heads,
    sample: tl.tensor,
    head: tl.tensor,
    token: tl.tensor,
    dim: tl.tensor,
    value: tl.tensor,
    TILES: tl.constexpr,
) -> None:
    pointers = of.out + sample * of.out_sample + head * of.dims
    if TILES.wide:
        token = token.to(tl.int64)
    pointers = pointers + (token * of.out_token)[:, None] + dim[None, :]
    mask = (token < of.tokens)[:, None] & (dim < of.dims)[None, :]
    tl.store(pointers, value.to(of.out.type.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def _short_kernel(of: Heads, blocks: tl.tensor, TILES: tl.constexpr, OVERLAP: tl.constexpr) -> None:
    program = tl.program_id(0)
    head = program // blocks % of.heads
    sample = (program // blocks // of.heads).to(tl.int64)
    query = program % blocks * TILES.queries + tl.arange(0, TILES.queries)
    key = tl.arange(0, TILES.keys)
    after_previous(OVERLAP)
    scores = _scores(None, of, sample, head, query, key, TILES)
    weight = tl.exp2(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weight, 1)
    weight = weight.to(of.qkv.type.element_ty)
    for first in range(0, of.dims, TILES.part):
        dim = first + tl.arange(0, TILES.part)
        v = _block(of, sample, (2 * of.heads + head) * of.dims, key, dim, TILES)
        value = tl.dot(weight, v, input_precision="ieee")
        _store(of, sample, head, query, dim, value / total[:, None], TILES)


@triton.jit(do_not_specialize=["blocks", "chunks"])
def _online_kernel(
    of: Heads, blocks: tl.tensor, chunks: tl.tensor, TILES: tl.constexpr, OVERLAP: tl.constexpr
) -> None:
    program = tl.program_id(0)
    dim = program % chunks * TILES.part + tl.arange(0, TILES.part)
    program = program // chunks
    head = program // blocks % of.heads
    sample = (program // blocks // of.heads).to(tl.int64)
    query = program % blocks * TILES.queries + tl.arange(0, TILES.queries)
    after_previous(OVERLAP)
    q = None
    if TILES.chunks == 1:
        q = _block(of, sample, head * of.dims, query, tl.arange(0, TILES.dims), TILES)
    # Finite, so that a block of scores of -inf does not make a NaN.
    QUERIES: tl.constexpr = TILES.queries
    PART: tl.constexpr = TILES.part
    largest = tl.full((QUERIES,), -3.4e38, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    value = tl.zeros((QUERIES, PART), tl.float32)
    for first in range(0, of.tokens, TILES.keys):
        key = first + tl.arange(0, TILES.keys)
        scores = _scores(q, of, sample, head, query, key, TILES)
        larger = tl.maximum(largest, tl.max(scores, 1))
        weight = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        largest = larger
        total = total * shrink + tl.sum(weight, 1)
        v = _block(of, sample, (2 * of.heads + head) * of.dims, key, dim, TILES)
        value = value * shrink[:, None]
        value = tl.dot(weight.to(v.dtype), v, value, input_precision="ieee")
    _store(of, sample, head, query, dim, value / total[:, None], TILES)


def _power(size: int, most: int) -> int:
    """Return the next power of two of `size`, between _LEAST and `most`."""
    return min(most, max(_LEAST, triton.next_power_of_2(size)))


@lru_cache(maxsize=4096)
def _plan(tokens: int, dims: int, itemsize: int, needs_wide: bool) -> AttentionPlan:
    """Return the tiles for heads of one shape."""
    single = itemsize == 4  # without tensor cores: operands pass through registers
    online = tokens > SHORT
    queries = _power(tokens, _LEAST if single else 64)
    if not online:
        keys, values = _power(tokens, SHORT), _power(dims, 32 if single else 64)
        depth = values
    else:
        keys, values = _power(tokens, 32 if single else 64), _power(dims, 64 if single else 256)
        depth = values if dims <= values and not single else min(values, 32 if single else 64)
    chunks = triton.cdiv(dims, depth)
    tiles = Tiles(queries, keys, depth, values, chunks, needs_wide)
    num_warps = 4 if single else max(1, queries // 16)
    blocks = triton.cdiv(tokens, queries)
    of_output = triton.cdiv(dims, values) if online else 1
    return AttentionPlan(tiles, online, blocks, of_output, num_warps, 2)


def attention_(out: Tensor, qkv: Tensor, heads: int, scale: float) -> None:
    """Apply self-attention in each head; `reference.attention_` has the equation and the arguments.

    The tensors have one dtype, float32, float16 or bfloat16, and last strides of 1. Scores and
    softmax are float32; the weights of the values are rounded to the dtype.
    """
    if out.numel() == 0:
        return
    samples, tokens, columns = out.shape
    dims = columns // heads
    plan = _plan(tokens, dims, qkv.element_size(), wide(qkv, out, first=1))
    of = Heads(
        *(qkv, qkv.stride(0), qkv.stride(1), out, out.stride(0), out.stride(1)),
        *(heads, tokens, dims, scale * LOG2_E),
    )
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    programs = samples * heads * plan.blocks
    if plan.online:
        grid, counts = (programs * plan.chunks,), (plan.blocks, plan.chunks)
        launch(_online_kernel, grid, out, of, *counts, plan.tiles, **options)
    else:
        launch(_short_kernel, (programs,), out, of, plan.blocks, plan.tiles, **options)
