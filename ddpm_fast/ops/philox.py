"""Counter-based Gaussian noise: the same numbers whatever the batch, layout, backend or device.

Philox4x32-10 (Salmon et al. 2011) with the 64-bit seed as its key and the counter (element block,
stream, sample index low, sample index high). Elements are numbered channels-last inside a sample,
four normals a block, by Box and Muller. So sample k of a seed gets the same noise wherever it sits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast.ops import get_backend
from ddpm_fast.ops.reference.diffusion import philox4x32_10
from ddpm_fast.utils import checks

STREAM_X_T = 0  # the chain's starting point x_T
STREAM_STEPS = 1  # row i of a step table uses stream STREAM_STEPS + i
STREAM_PARTNER = 0x7FFF_FFFE  # the forward noise of the second image of a pair
STREAM_START = 0x7FFF_FFFF  # where a chain of random length begins
STREAM_TRAINING = 0x8000_0000  # training uses the streams from here on
STREAM_OFFSET = 0xC000_0000  # from here on the offsets of training noise, 2^30 above its streams


def philox_rng(
    seed: int,
    stream: int = STREAM_STEPS,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The int64 tensor [3] = (seed, stream, first_sample) that the kernels make their noise from.

    seed lies in [0, 2^64), stream in [0, 2^32), first_sample, the index of the batch's first
    sample, in [0, 2^63). Raises TypeError or ValueError where one does not.
    """
    seed = checks.integer("seed", seed, 0, checks.SEED_END)
    stream = checks.integer("stream", stream, 0, checks.STREAM_END)
    first_sample = checks.integer("first_sample", first_sample, 0, checks.SAMPLE_END)
    signed = seed - checks.SEED_END if seed >= checks.SEED_END // 2 else seed
    words = torch.tensor([signed, stream, first_sample], dtype=torch.int64, device="cpu")
    # Three words travel with the command itself; a blocking copy would wait for the stream.
    return words.to(checks.device("device", device), non_blocking=True)


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
    """Standard normals for samples first_sample .. first_sample + num - 1 of a seed and stream.

    Returns float32 [num, *sample_shape], channels-last in memory for images. The backends cpu,
    triton and cuda give the same bits; reference evaluates the logarithm and the sine in float64
    and agrees with them to a few units in the last place.

    Raises TypeError or ValueError naming the argument, RuntimeError where the backend cannot run.
    """
    num = checks.integer("num", num, 0, checks.SAMPLE_END)
    shape = checks.sample_shape("sample_shape", sample_shape)
    out = checks.empty_samples(num, shape, torch.float32, checks.device("device", device))
    rng = philox_rng(seed, stream, first_sample, out.device)
    get_backend(backend, out.device, out.dtype).philox_normal_(out, rng)
    return out
