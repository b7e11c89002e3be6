"""Options, marks and the interpreter that every test file relies on.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is
imported. The interpreter's fma, rounding and products of bfloat16 are replaced by correct ones
(triton_interpreter).
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Choices of kernels that another run has recorded must not decide what a test runs.
os.environ["DDPM_FAST_CACHE"] = "off"
# A name that is no path may be a repository's: no test asks the Hub for it.
os.environ["HF_HUB_OFFLINE"] = "1"
HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    import triton_interpreter

    triton_interpreter.install()

# The same examples in every run: a failure anywhere is a failure everywhere. On a GPU each new
# layout compiles a Triton kernel.
settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=10 if HAS_GPU else 40, database=None
)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="slow: needs --full")
    cuda = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--full"):
            item.add_marker(slow)
        if "cuda" in item.keywords and not HAS_GPU:
            item.add_marker(cuda)


@pytest.fixture
def two_threads():
    """Two of torch's threads, whatever the environment gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpu_kernels():
    """Chooses the instruction set of the CPU kernels, or skips where the processor lacks it."""

    def choose(name: str) -> None:
        from ddpm_fast import _C

        if name not in ("auto", *_C.build_info()["cpu_kernels"].split()):
            pytest.skip(f"needs a processor with {name}")
        torch.ops.ddpm_fast.use_cpu_kernels(name)

    yield choose
    torch.ops.ddpm_fast.use_cpu_kernels("auto")


@pytest.fixture
def sparse(tmp_path):
    """Makes a tensor [size] of zeros over a file of holes: only what is touched takes space."""

    def make(dtype: torch.dtype, size: int) -> torch.Tensor:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.bin"
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype)

    yield make
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.fixture
def needs_memory():
    """Skips where a device has less memory free than a test takes."""

    def check(device: str, size: int) -> None:
        if device == "cpu":
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        else:
            free, _ = torch.cuda.mem_get_info()
        if free < size + (1 << 30):
            pytest.skip(f"needs {size / 2**30:.0f} GiB and one more of memory on {device}")

    return check
