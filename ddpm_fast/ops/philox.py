"""Counter-based Gaussian noise: the same numbers in every batch, layout, backend and device.

Philox4x32-10 (Salmon et al. 2011) with the 64-bit seed as its key and the counter (element block,
stream, sample index low, sample index high). The elements of a sample are numbered channels-last,
four normals a block, by the Box-Muller transform. Sample k of a seed therefore has the same noise
at any position of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast.ops import get_backend
from ddpm_fast.ops.reference.diffusion import philox4x32_10
from ddpm_fast.utils import checks

STREAM_X_T = 0  # the initial state x_T
STREAM_STEPS = 1  # row i of a step table uses stream STREAM_STEPS + i
STREAM_PARTNER = 0x7FFF_FFFE  # the forward noise of the second image of a pair
STREAM_START = 0x7FFF_FFFF  # the start of a chain of random length
STREAM_TRAINING = 0x8000_0000  # first stream of training
STREAM_OFFSET = 0xC000_0000  # first stream of offset noise, 2^30 above the streams of training


def philox_rng(
    seed: int,
    stream: int = STREAM_STEPS,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the state from which the kernels generate noise.

    Args:
        seed: Seed in [0, 2^64).
        stream: Stream in [0, 2^32).
        first_sample: Index of the first sample of the batch, in [0, 2^63).
        device: Device of the result. None: torch's default.

    Returns:
        int64 [3]: seed (modulo 2^64), stream and first_sample.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.
    """
    seed = checks.integer("seed", seed, 0, checks.SEED_END)
    stream = checks.integer("stream", stream, 0, checks.STREAM_END)
    first_sample = checks.integer("first_sample", first_sample, 0, checks.SAMPLE_END)
    signed = seed - checks.SEED_END if seed >= checks.SEED_END // 2 else seed
    state = torch.tensor([signed, stream, first_sample], dtype=torch.int64, device="cpu")
    # A blocking copy would wait for the stream.
    return state.to(checks.device("device", device), non_blocking=True)


def random_words(seed: int, stream: int, first: int, num: int) -> Tensor:
    """Return 32 random bits for each of the counters first .. first + num - 1.

    Args:
        seed: Seed in [0, 2^64).
        stream: Stream in [0, 2^32).
        first: First counter, such as the index of a sample, in [0, 2^63).
        num: Number of counters.

    Returns:
        The first Philox word of each counter, int64 [num] on the CPU, in [0, 2^32).
    """
    try:
        from ddpm_fast._C import philox_words
    except ImportError:  # not built
        return _reference_words(seed, stream, first, num)
    return torch.from_numpy(philox_words(num, 1, seed, stream, first)[:, 0].astype("int64"))


def _reference_words(seed: int, stream: int, first: int, num: int) -> Tensor:
    """Return random_words by the reference implementation."""
    counter = first + torch.arange(num, device="cpu")
    zero = torch.zeros_like(counter)
    key = philox_rng(seed, stream, device="cpu")
    word, *_ = philox4x32_10(
        (zero, zero + key[1], counter, counter >> 32), (key[0] + zero, (key[0] >> 32) + zero)
    )
    return word


def philox_normal(
    num: int,
    sample_shape: Sequence[int],
    seed: int,
    stream: int = STREAM_X_T,
    first_sample: int = 0,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Generate standard normals of consecutive samples of a seed and stream.

    The backends cpu, triton and cuda return the same bits. The backend reference evaluates the
    logarithm and the sine in float64, and agrees to a few units in the last place.

    Args:
        num: Number of samples.
        sample_shape: Shape of one sample, such as (3, 32, 32).
        seed: Seed in [0, 2^64).
        stream: Stream in [0, 2^32).
        first_sample: Index of the first sample, in [0, 2^63).
        device: Device of the result. None: torch's default.
        backend: Name of a backend, or "auto".

    Returns:
        float32 [num, *sample_shape], channels-last in memory for 4-D and 5-D batches.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
        RuntimeError: the backend cannot run.
    """
    num = checks.integer("num", num, 0, checks.SAMPLE_END)
    shape = checks.sample_shape("sample_shape", sample_shape)
    out = checks.empty_samples(num, shape, torch.float32, checks.device("device", device))
    rng = philox_rng(seed, stream, first_sample, out.device)
    get_backend(backend, out.device, out.dtype).philox_normal_(out, rng)
    return out
