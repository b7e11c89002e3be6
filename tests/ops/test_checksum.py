"""The operator checksum: its definition, what it detects, opcheck."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cases import BF16, F16, F64, backends
from ddpm_fast.ops.checksum import checksum
from ddpm_fast.ops.reference.checksum import HIGH_KEY, LOW_KEY

ON = pytest.mark.parametrize("on", backends(), ids=str)


def tensors(device):
    torch.manual_seed(0)
    made = [
        torch.randn(3),
        torch.randn(()),
        torch.randn(4097, dtype=F16),
        torch.randn(64, 3, 3, 3, dtype=F64),
        torch.randn(100_001, dtype=BF16),  # several blocks of every kernel, and a part of a word
        torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(19, dtype=F16)[1:],  # starts within a word
        torch.randn(6, 6)[1:, ::2],
        torch.randn(3, 1).expand(3, 5),
        torch.empty(0, 4),
        torch.arange(7),
        torch.tensor([True, False, True]),
        torch.randn(5, dtype=torch.complex64),
    ]
    return [tensor.to(device) for tensor in made]


def oracle(tensor):
    """The definition, in Python's integers."""
    if tensor.numel() == 0:
        return [0, 0]
    last = sum((s - 1) * step for s, step in zip(tensor.shape, tensor.stride(), strict=True))
    raw = tensor.as_strided((last + 1,), (1,)).cpu().view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(raw + bytes(-len(raw) % 8), dtype="<u8").tolist()
    product = 0
    for i, word in enumerate(words):
        low, high = word % 2**32, word >> 32
        product += (low + LOW_KEY * i) % 2**32 * ((high + HIGH_KEY * i) % 2**32)
    return [np.uint64(n % 2**64).astype(np.int64).item() for n in (sum(words), product)]


@ON
def test_sums_are_those_of_the_definition(on):
    given = tensors(on.device)
    assert checksum(given, on.name).tolist() == [oracle(tensor) for tensor in given]
    many = [torch.full((i % 5,), i, device=on.device) for i in range(300)]  # of several launches
    assert checksum(many, on.name).tolist() == [oracle(tensor) for tensor in many]
    assert checksum([], on.name).shape == (0, 2)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(name):
    before = torch.ops.ddpm_fast.use_cpu_kernels("")
    given = tensors("cpu")
    try:
        try:
            torch.ops.ddpm_fast.use_cpu_kernels(name)
        except RuntimeError:
            pytest.skip(f"needs a processor with {name}")
        assert torch.equal(checksum(given, "cpu"), checksum(given, "reference"))
    finally:
        torch.ops.ddpm_fast.use_cpu_kernels(before)


@ON
def test_every_change_is_seen(on):
    weight = torch.randn(33, 65, device=on.device)
    first = checksum([weight], on.name)

    def seen(change):
        other = weight.clone()
        change(other.data)
        return not torch.equal(checksum([other], on.name), first)

    assert not seen(lambda w: None)
    assert seen(torch.Tensor.neg_)
    assert seen(lambda w: w.copy_(w.flip(0)))
    assert seen(lambda w: w[:2].copy_(w[:2].flip(0)))
    assert seen(lambda w: w.copy_(torch.stack([w[:, 1], w[:, 0], *w.T[2:]], 1)))
    assert seen(lambda w: w[32, 64].copy_(torch.nextafter(w[32, 64], w.new_tensor(9))))
    pairs = weight.flatten()[:2144].view(torch.int64)  # the sum of the words stays
    assert seen(lambda w: w.flatten()[:2144].view(torch.int64).copy_(pairs.flip(0)))


def test_opcheck():
    sample = ([torch.randn(3, 5), torch.randn(7, dtype=F16)],)
    torch.library.opcheck(torch.ops.ddpm_fast.checksum.default, sample)
    trained = ([torch.nn.Parameter(torch.randn(3))],)
    torch.library.opcheck(torch.ops.ddpm_fast.checksum.default, trained)


def test_tensors_on_several_devices_are_refused():
    with pytest.raises(ValueError, match="tensors must be on one device; got cpu and meta"):
        checksum([torch.empty(1), torch.empty(1, device="meta")])


@pytest.mark.slow
@pytest.mark.parametrize("on", [b for b in backends() if b.name in ("cpu", "cuda")], ids=str)
def test_words_beyond_2_31_bytes(on, sparse):
    far = sparse(torch.uint8, (1 << 31) + 24).to(on.device)
    far[-3] = 7
    index = (1 << 28) + 2
    low, high = LOW_KEY * index % 2**32, (7 * 2**8 + HIGH_KEY * index) % 2**32
    zeros = checksum([far[:-8]], on.name)[0, 1].item()
    word = 7 << 40
    expected = (zeros + low * high) % 2**64
    assert checksum([far], on.name)[0].tolist() == [word, np.uint64(expected).astype(np.int64)]
