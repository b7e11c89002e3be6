"""Cases of a benchmark: preparation, and the columns that every row of results has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddpm_fast.bench import networks
from ddpm_fast.bench.baselines import MissingError
from ddpm_fast.bench.timing import quantiles
from ddpm_fast.models import UNet
from ddpm_fast.utils import checks
from ddpm_fast.utils.cuda_graphs import GraphedStep

TIMESTEP = 500
Run = Callable[[], Any]
Say = Callable[[str], None]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Prepared:
    """A case that is ready to be timed.

    Attributes:
        run: the call to time.
        note: remark for the table and the CSV.
        forward: the network's forward pass as `run` executes it, to be timed beside it.
        columns: further columns of the case's row.
    """

    run: Run
    note: str = ""
    forward: Run | None = None
    columns: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One implementation.

    Attributes:
        name: name in the table and the CSV.
        prepare: builds the implementation.
        dtype: dtype it computes in.
        baseline: an implementation that this package replaces; left out if it fails.
        graph: replay the calls as a CUDA graph.
        compiled: uses torch.compile.
        wave: cases of a later wave take minutes to build; they are built after the earlier waves
            have been measured.
    """

    name: str
    prepare: Callable[[], Prepared]
    dtype: torch.dtype
    baseline: bool = False
    graph: bool = False
    compiled: bool = False
    wave: int = 0

    @property
    def role(self) -> str:
        """Value of the column `role`."""
        return "peer" if self.baseline else "ours"


class Benchmark:
    """A network, a batch size and a dtype, and the cases measured on them.

    Args:
        name: name of the network in the results.
        unet: the network, in evaluation mode, on the device to measure.
        batch: images in a batch, at least 1.
        dtype: dtype of this package's cases, and of the baselines on a GPU. Baselines are float32
            on a CPU.
        with_baselines: measure baselines too.
        size: height and width of the images; None for the size that the network was made for.
        say: receives progress messages.

    Attributes:
        left_out: names of cases that were not measured, and the reasons.

    Raises:
        ValueError: `batch` is below 1, or the network has no image size and none is given.
    """

    def __init__(
        self,
        name: str,
        unet: UNet,
        batch: int,
        dtype: torch.dtype,
        *,
        with_baselines: bool = True,
        size: tuple[int, int] | None = None,
        say: Say = lambda text: None,
    ) -> None:
        self.name, self.unet, self.dtype = name, unet, dtype
        self.batch = checks.integer("batch", batch, 1, 1 << 20)
        self.device, self.size = unet.device, size or networks.image_size(unet)
        self.gpu = torch.cuda.get_device_name(self.device) if self.on_gpu else ""
        self.left_out: dict[str, str] = {}
        self._with_baselines, self._say = with_baselines, say
        self._t = torch.full((batch,), TIMESTEP, device=self.device)

    @property
    def on_gpu(self) -> bool:
        """True for a CUDA device."""
        return self.device.type == "cuda"

    @property
    def baseline_dtype(self) -> torch.dtype:
        """Dtype of the baselines."""
        return self.dtype if self.on_gpu else torch.float32

    def subject(self, dtype: torch.dtype, **extra: object) -> dict[str, Any]:
        """Return the first columns of a row; `extra` follows the batch size."""
        return {
            "network": self.name,
            "batch": self.batch,
            **extra,
            "device": self.device.type,
            "dtype": checks.dtype_name(dtype),
        }

    def attempt(self, case: Case, build: Callable[[], _T], out_of_time: bool) -> _T | None:
        """Build a case; None if it is left out.

        Args:
            case: the case.
            build: builds it.
            out_of_time: leave the case out.

        Raises:
            Exception: raised by a case of this package, other than `MissingError`.
        """
        if out_of_time:
            self.left_out[case.name] = "no time left"
            return None
        self._say(f"building {case.name}")
        try:
            return build()
        except MissingError as error:
            self.left_out[case.name] = str(error)
        except Exception as error:
            if not case.baseline:
                raise
            self.left_out[case.name] = first_line(error)
        return None


def timing_columns(seconds: Sequence[float], digits: int, calls: int = 1) -> dict[str, float]:
    """Return the columns of the timings; each of `seconds` is the time of `calls` calls."""
    times = {name: round(us / calls, digits) for name, us in quantiles(seconds).items()}
    return {"rounds": len(seconds), **times}


def relative_rms(result: Tensor, expected: Tensor) -> float:
    """Return the rms of the first sample's difference, relative to the rms of `expected`."""
    difference = result[:1].double() - expected
    return float((difference.square().mean() / expected.square().mean()).sqrt())


def graphed(run: Run, device: torch.device) -> Run:
    """Capture a call in a CUDA graph; every replay returns the same tensor."""
    run()  # builds and captures of its own come before this capture
    out: list[Tensor] = []

    def step() -> None:
        out[:] = [run()]

    graph = GraphedStep(step, lambda: None, device, unrolled=False)

    def replay() -> Tensor:
        graph()
        return out[0]

    return replay


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
