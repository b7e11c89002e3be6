"""Choice of the fastest implementation of a U-Net for each image size."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ddpm_fast.engine.autotune.tuner import Tuner
from ddpm_fast.engine.choice import Choice, Run, choose
from ddpm_fast.engine.graphed_model import GraphedModel
from ddpm_fast.engine.stand_in import (
    EvalMode,
    ModelOutput,
    StandIn,
    as_timesteps,
    needs_gradient,
    one_of,
)
from ddpm_fast.engine.unet_engine import UNetEngine, resolve_num_timesteps
from ddpm_fast.engine.weight_watch import WeightWatcher
from ddpm_fast.models import UNet, UNetConfig
from ddpm_fast.utils import checks
from ddpm_fast.utils.cuda_graphs import CAPTURE_LOCK, is_capturing, retain_for_graph
from ddpm_fast.utils.fork import ForkSafeLock, runs_on_thread_pool
from ddpm_fast.utils.run_scope import current_run

_log = logging.getLogger("ddpm_fast")
_MAX_RUNNERS = 4  # shapes whose engines are kept; the least recently used is dropped


@dataclass(frozen=True)
class _Runner:
    """Implementation of a shape, and its engine if it is one."""

    run: Run
    chosen: Choice
    engine: UNetEngine | None


class AcceleratedUNet(StandIn):
    """A U-Net run by the fastest available implementation, called as `model(x, t)`.

    On a GPU that is a `UNetEngine` in float16, whose calls replay a CUDA graph. On a CPU the engine
    and the network itself are timed at the first call with a shape, and the fastest is used. The
    logger "ddpm_fast" reports each choice, and `report` lists them. Calls are thread-safe. A copy
    or pickle holds the network, without the choices.

    Engines and graphs are rebuilt when the contents of the weights have changed, whatever wrote
    them. A `Sampler`, a pipeline or a bound compares them once, before the first step of each run.
    A direct call on a CPU compares before it answers. A direct call on a GPU starts a comparison
    and reads the result of the previous one: the first call after a change may use the old weights,
    unless `refresh` was called.

    It replaces a UNet2DModel of diffusers in a loop or a pipeline of its own, `pipe.unet = model`:
    it is a module with the parameters, state dict, mode and methods of `unet`, which is moved by
    `to`. Calls give no gradient of the weights: train `unet`.

    Args:
        unet: A `UNet` or a UNet2DModel of diffusers. It is not changed. Dropout is not applied.
        dtype: float16, bfloat16 or float32, in which the engine computes. None: float16 on a GPU,
            the dtype of `unet` on a CPU. On a CPU another dtype than that of `unet` is used only
            where it is faster, and its deviation is reported.
        num_timesteps: Timesteps are in [0, num_timesteps). None: the number in the configuration
            of `unet`, or 1000.
        tuner: Measures and caches choices. None: a `Tuner` with its cache on disk.
        check_weights: Compare the weights. False saves one pass over their memory in each direct
            call; call `refresh` after each change.

    Attributes:
        network: The network.
        config: Its options.
        device: Device of the network.
        dtype: Dtype of the network.
        input_dtype: Dtype of images that are read without a copy.
        num_timesteps: Number of timesteps.
        training: False: calls never apply dropout, whatever the mode of the network.

    Raises:
        TypeError: `unet` is no such network or is float64, or `dtype` is another dtype.
        ValueError: `UNet` does not support an option of the network, or `num_timesteps` is below 1.
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        num_timesteps: int | None = None,
        tuner: Tuner | None = None,
        check_weights: bool = True,
    ) -> None:
        if dtype is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32):
            got = checks.dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
            raise TypeError(f"dtype must be float16, bfloat16 or float32; got {got}")
        converted = _as_unet(unet)
        super().__init__(unet)
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "num_timesteps": num_timesteps,
            "check_weights": bool(check_weights),
        }
        self._unet, self.config = converted, converted.config
        self._plain = EvalMode(unet)
        self.num_timesteps = resolve_num_timesteps(converted, num_timesteps)
        self._place()
        self._tuner = tuner if tuner is not None else Tuner(self.device)
        self._lock = ForkSafeLock()
        self._runners: dict[tuple[int, ...], _Runner] = {}
        self._pinned: list[_Runner] = []
        self._weights: WeightWatcher | None = WeightWatcher(unet)
        self._generation = 0  # of the weights

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._options), (self.network,)

    def forward(
        self,
        x: Tensor | None = None,
        t: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool | None = None,
        *,
        sample: Tensor | None = None,
        timestep: Tensor | float | None = None,
    ) -> Tensor | ModelOutput:
        """Predict the network's output for any batch and image size.

        Where a gradient is asked for (`x` or labels require it and grad mode is on, torch.func,
        forward-mode differentiation), the network itself runs, in evaluation mode.

        Args:
            x: Noisy images, as for `UNetEngine`.
            t: Timesteps, as for `UNetEngine`. They may be floating-point numbers without a
                fraction, and a single one may be in CPU memory.
            class_labels: Class labels, as for `UNet`.
            return_dict: True or False: return a tuple of the output, named `sample`. None: return
                the output.
            sample: Another name of `x`, as in diffusers.
            timestep: Another name of `t`, as in diffusers.

        Returns:
            [N, out_channels, H, W] in the dtype of `x`, channels_last. Its attribute `sample` is
            the same tensor, as in the output of a diffusers model.

        Raises:
            TypeError: An argument has the wrong type or dtype, or was given twice or not at all.
            ValueError: An argument has the wrong shape, device or range.
        """
        x = self._checked(one_of("x", x, "sample", sample))
        t = as_timesteps(one_of("t", t, "timestep", timestep), x, self.num_timesteps)
        runs_on_thread_pool(self.device)
        if needs_gradient(x, class_labels):
            out = self._plain(x, t, class_labels)
        elif x.shape[0] == 0:
            out = x.new_empty(0, self.config.out_channels, *x.shape[2:])
        else:
            with torch.no_grad():
                out = self._runner(tuple(x.shape)).run(x, t, class_labels)
        if return_dict is not None:
            return ModelOutput(out)
        # A view: a reference to itself would keep the memory until the garbage collection.
        out.sample = out.view_as(out)  # type: ignore[attr-defined]
        return out

    @property
    def chosen(self) -> dict[tuple[int, ...], Choice]:
        """Choices by shape [N, C, H, W], the most recently used last."""
        with self._lock:
            return {shape: runner.chosen for shape, runner in self._runners.items()}

    def report(self) -> str:
        """Return the choices of all shapes, with the measured times and drift."""
        lines = [f"{type(self.network).__name__} on {self.device}"]
        for shape, choice in self.chosen.items():
            times = ", ".join(f"{name} {s * 1e3:.3g} ms" for name, s in choice.seconds.items())
            drift = "" if choice.drift is None else f"; differs by {choice.drift:.1e}"
            lines.append(
                f"{'x'.join(map(str, shape))}: {choice.name}"
                + (f" ({times})" if times else "")
                + drift
                + "".join(f"; {name} failed" for name in choice.failed)
            )
        return "\n".join(lines if len(lines) > 1 else [*lines, "no shape has run yet"])

    def identity(self) -> dict[str, Any]:
        """Return what determines the bits of a result, for JSON: the choice for each shape."""
        with self._lock:
            runners = dict(self._runners)
        return {
            "x".join(map(str, shape)): {
                "chosen": runner.chosen.name,
                "engine": runner.engine.identity() if runner.engine is not None else None,
                "environment": self._tuner.environment,
            }
            for shape, runner in runners.items()
        }

    def refresh(self) -> None:
        """Rebuild everything at the next call, from the network's current weights."""
        with self._lock:
            self._weights = None

    def captured_state(self) -> object:
        """Compare the weights; return a value that changes when a graph must be captured again."""
        with self._locked():
            self._check_weights(wait=True)
            return self._generation

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the network, as `to`, `cuda` and `half` do."""
        super()._apply(fn, recurse)
        parameter = next(self.network.parameters())
        if (parameter.device, parameter.dtype) != (self.device, self.dtype):
            with self._locked():
                self._let_go(list(self._runners))
                self._place()
                if self._tuner.device.type != self.device.type:
                    self._tuner = Tuner(self.device)
                self._weights = None
        return self

    def _place(self) -> None:
        """Read the device and the dtype of the network."""
        parameter = next(self.network.parameters())
        if parameter.dtype == torch.float64:
            raise TypeError("unet must be float16, bfloat16 or float32; got float64")
        self.device, self.dtype = parameter.device, parameter.dtype
        on_gpu = self.device.type == "cuda"
        default = torch.float16 if on_gpu else self.dtype
        self._engine_dtype: torch.dtype = self._options["dtype"] or default
        # On a CPU the network itself may run, which reads images in its own dtype.
        self.input_dtype = self._engine_dtype if on_gpu else self.dtype

    def _checked(self, x: Any) -> Tensor:
        checks.floating("x", x)
        channels, multiple = self.config.in_channels, self.config.size_multiple
        if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < 1:
            raise ValueError(f"x must be [N, {channels}, H, W]; got {checks.shape_text(x)}")
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(
                f"x must have a height and width that are multiples of {multiple};"
                f" got {checks.shape_text(x)}"
            )
        if x.device != self.device:
            raise ValueError(f"x must be on {self.device}, as the network; got {x.device}")
        return x

    def _runner(self, shape: tuple[int, ...]) -> _Runner:
        """Return the runner of a shape; build it at first use and after changes of the weights."""
        with self._locked():
            self._check_weights()
            found = self._runners.pop(shape, None)
            if found is None:
                found = self._choose(shape)
                self._let_go(list(self._runners)[: 1 - _MAX_RUNNERS])
            self._runners[shape] = found
            on_gpu = self.device.type == "cuda"
            if on_gpu and is_capturing():
                retained = retain_for_graph(found)
                retain_for_graph(self)  # the graph is outdated when the weights change
                if not retained:
                    self._pin(found)
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Lock order: a capture's warm-up holds the capture lock when it calls the network.
        with CAPTURE_LOCK if self.device.type == "cuda" else nullcontext(), self._lock:
            yield

    def _check_weights(self, wait: bool = False) -> None:
        """Drop all engines if the weights have changed, or `refresh` was called.

        Args:
            wait: Wait for the comparison. False: wait on a CPU and in a run, which compares once.
        """
        run, stale = current_run(), self._weights is None
        if not stale and self._options["check_weights"]:
            if run is not None and self in run.checked:
                return
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return
            deferred = self.device.type == "cuda" and run is None and not wait
            watcher = cast(WeightWatcher, self._weights)
            stale = watcher.changed_before() if deferred else watcher.changed()
        if stale:
            self._let_go(list(self._runners))
            self._pinned.clear()
            self._unet = _as_unet(self.network)
            self._weights = WeightWatcher(self.network)
            self._generation += 1
        if run is not None:
            run.checked.add(self)

    def _pin(self, runner: _Runner) -> None:
        """Keep what a graph of the caller reads, which may outlive the runner."""
        if not any(other is runner for other in self._pinned):
            self._pinned.append(runner)

    def _let_go(self, shapes: list[tuple[int, ...]]) -> None:
        """Drop the runners of these shapes after all streams have finished."""
        if shapes and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for shape in shapes:
            del self._runners[shape]

    def _choose(self, shape: tuple[int, ...]) -> _Runner:
        batch, _, height, width = shape

        def engine(dtype: torch.dtype) -> UNetEngine:
            return UNetEngine(
                self._unet,
                batch,
                (height, width),
                dtype,
                num_timesteps=self.num_timesteps,
                tuner=self._tuner,
            )

        engines = {f"engine {checks.dtype_name(self._engine_dtype)}": engine(self._engine_dtype)}
        if self.device.type == "cuda":
            ((name, only),) = engines.items()
            _log.info("accelerate: %s for %s", name, list(shape))
            return _Runner(GraphedModel(only, only.device), Choice(name, {}, None), only)
        if self._engine_dtype != self._unet.dtype:
            exact = {f"engine {checks.dtype_name(self._unet.dtype)}": engine(self._unet.dtype)}
            engines = exact | engines
        runs: dict[str, Run] = {"module": self._plain}
        if self.network is not self._unet:
            runs["channels_last"] = EvalMode(self._unet)
        runs |= engines
        chosen = choose(self._tuner, self._unet, shape, runs)
        return _Runner(runs[chosen.name], chosen, engines.get(chosen.name))


def _as_unet(module: nn.Module) -> UNet:
    """Return the network itself, or diffusers' UNet2DModel as a `UNet`."""
    if isinstance(module, UNet):
        return module
    if type(module).__name__ != "UNet2DModel" or not isinstance(module, nn.Module):
        raise TypeError(
            "unet must be a ddpm_fast.UNet or diffusers' UNet2DModel; got"
            f" {type(module).__name__}. Any other module: ddpm_fast.optimize_module"
        )
    # diffusers keeps keys of a file in `config` that its class does not read.
    read = inspect.signature(type(module).__init__).parameters
    options: Any = module.config
    config = UNetConfig.from_dict({key: options[key] for key in options if key in read})
    parameter = next(module.parameters())
    with torch.device("meta"):
        unet = UNet(config)
    unet = unet.to_empty(device=parameter.device).to(parameter.dtype)
    unet.load_state_dict(module.state_dict())
    return unet.train(module.training)
