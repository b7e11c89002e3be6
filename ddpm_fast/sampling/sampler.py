"""Sampling: the chains of any number of samples, micro-batch by micro-batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, cast, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_fast.ops import get_backend
from ddpm_fast.ops.philox import STREAM_START, random_words
from ddpm_fast.sampling.labels import as_null_label
from ddpm_fast.sampling.loop_cache import CachedLoop, Graph, LoopCache
from ddpm_fast.sampling.noise_source import GeneratorNoise, as_noise, source_of
from ddpm_fast.sampling.step_loop import Model, StepLoop
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.utils import checks
from ddpm_fast.utils.batching import MicroBatch, micro_batches

Noise = Literal["philox"] | torch.Generator | Sequence[torch.Generator] | GeneratorNoise | Tensor


class Progress(Protocol):
    """A bar that is told of the steps that were taken, such as tqdm's."""

    def update(self, n: int) -> object:
        """``n`` more steps were taken."""


class Sampler:
    """Runs a step table with a model.

    model: any callable ``model(x, t)``, or ``model(x, t, labels)`` where `sample` gets labels: x
    [B, *sample_shape] in ``dtype``, channels-last in memory for images, t int64 [B], labels
    [B, ...]; returns the prediction that the table was made for, of x's shape, or with twice the
    channels, the second half a learned variance (float32, float16 or bfloat16; or an object whose
    ``.sample`` is that tensor). Under guidance B is twice the micro-batch: one call for both. It
    must not write to x. Switching it to eval mode is the caller's.
    sample_shape: the shape of one sample, such as (3, 32, 32).
    null_label: the label of the unconditional model, for tables with guidance: an int, or a tensor
    of the shape of one sample's label.
    micro_batch: how many samples go through the model together. It is part of a sample's identity:
    sample k always sits in slot k % micro_batch, beside the samples that belong there, because the
    slot and the batch size change the last bits of a convolution.
    device, dtype: default to those of the model's parameters, or to its attributes `device` and
    `dtype` where it is no nn.Module. The state is float32 whatever dtype
    the model reads; with dtype float64 all is float64 (backends reference and cpu).
    backend: "auto" or one of reference, cpu, triton, cuda.
    noise: "philox": counter-based, so that sample k of a seed is the same in any batch.
    torch.Generator, or one for each sample of a call: drawn from in diffusers' order, micro-batch
    after micro-batch; `GeneratorNoise` says how, and takes dtypes. A tensor
    [steps, num, *sample_shape]: row i of the table adds noise[i].
    graph: "auto" captures the step in a CUDA graph on a GPU, and warns and goes on without where
    the model cannot be captured; True insists; False never does. The bits are the same.
    pad: False skips the samples that were not asked for, for fewer forwards of a last, smaller
    micro-batch; the last bits of its samples then depend on its size.
    loops_kept: how many loops, each with its buffers and its captured graph, are kept for later
    calls: one for each batch size and kind of table (see `with_table`).

    Raises TypeError or ValueError naming the argument, RuntimeError where the backend cannot run.
    """

    def __init__(
        self,
        model: Model,
        table: StepTable,
        sample_shape: Sequence[int],
        micro_batch: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        noise: Noise = "philox",
        graph: Graph = "auto",
        pad: bool = True,
        loops_kept: int = 2,
        null_label: int | Tensor | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t); got {type(model).__name__}")
        checks.instance("table", table, StepTable)
        if graph not in ("auto", True, False):
            raise ValueError(f"graph must be 'auto', True or False; got {graph!r}")
        self._model, self._table, self.pad = model, table, bool(pad)
        self._noise = as_noise(noise)
        self._null_label = null_label
        self.sample_shape = checks.sample_shape("sample_shape", sample_shape)
        self.micro_batch = checks.integer("micro_batch", micro_batch, 1, 1 << 31)
        self.device, self.dtype = _placement(model, device, dtype)
        self.state_dtype = checks.compute_dtype(self.dtype)
        self.backend = get_backend(backend, self.device, self.state_dtype).name
        if graph is True and self.device.type != "cuda":
            raise ValueError(f"graph=True needs a CUDA device; the sampler is on {self.device}")
        self._graph: Graph = graph if self.device.type == "cuda" else False
        self._loops_kept = checks.integer("loops_kept", loops_kept, 1, 1 << 20)
        self._loops = LoopCache(model, self.device, self._graph, self._loops_kept)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: buffers and graphs are made anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_loops"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._loops = LoopCache(self._model, self.device, self._graph, self._loops_kept)

    def with_table(self, table: StepTable) -> Sampler:
        """A sampler of the same model and options for another table, sharing buffers and graphs.

        A table of the same length and the same terms replays the graph that is already captured.
        Both samplers may be used from any thread; they take turns.
        """
        return self._with(_table=checks.instance("table", table, StepTable))

    def with_noise(self, noise: Noise) -> Sampler:
        """As `with_table`, for another source of noise."""
        return self._with(_noise=as_noise(noise))

    def _with(self, **changed: Any) -> Sampler:
        other = object.__new__(Sampler)
        other.__dict__.update(self.__dict__ | changed)
        return other

    @property
    def model(self) -> Model:
        """The model; fixed, because captured graphs hold it."""
        return self._model

    @property
    def table(self) -> StepTable:
        """The step table; fixed."""
        return self._table

    @property
    def noise(self) -> str | GeneratorNoise | Tensor:
        """The source of noise; fixed."""
        return self._noise

    @overload
    def sample(
        self,
        num: int,
        seed: int = ...,
        first_sample: int = ...,
        x_T: Tensor | None = ...,
        progress: bool | Progress = ...,
        return_steps: None = ...,
        labels: Tensor | int | None = ...,
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        num: int,
        seed: int = ...,
        first_sample: int = ...,
        x_T: Tensor | None = ...,
        progress: bool | Progress = ...,
        *,
        return_steps: Sequence[int],
        labels: Tensor | int | None = ...,
    ) -> tuple[Tensor, Tensor]: ...

    @torch.inference_mode(False)  # the buffers serve calls inside and outside of it
    @torch.no_grad()
    def sample(
        self,
        num: int,
        seed: int = 0,
        first_sample: int = 0,
        x_T: Tensor | None = None,
        progress: bool | Progress = True,
        return_steps: Sequence[int] | None = None,
        labels: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Samples first_sample .. first_sample + num - 1 of a seed, float32 [num, *sample_shape].

        With the noise "philox", ``sample(10)[7]`` and ``sample(1, first_sample=7)[0]`` are the same
        bits, and so is any other cut of the same samples. Values are as the chain leaves them,
        about [-1, 1] for images; nothing is clamped afterwards. A NaN that the model makes stays.

        x_T: the starting states, float32 [num, *sample_shape]; by default made from the seed (or
        drawn from the generator), times the table's init_scale. A table that begins at data needs
        them. labels: for a conditional model, [num, ...], or an int for all. progress: shows a bar,
        which never waits for the GPU; or a bar of the caller's own.
        return_steps: numbers of steps in 0 .. table.steps; returns also the states after so many
        steps, float32 [len(return_steps), num, *sample_shape], 0 being x_T.

        One call at a time uses the buffers: calls from other threads wait, and on a GPU the work of
        a call on another stream begins where that of the last one ends.
        Raises TypeError or ValueError naming the argument, also for what the model returns.
        """
        num = checks.integer("num", num, 0, 1 << 40)
        checks.integer("seed", seed, 0, checks.SEED_END)
        first_sample = checks.integer("first_sample", first_sample, 0, checks.SAMPLE_END - num)
        wanted = self._check_return_steps(return_steps)
        shape = (num, *self.sample_shape)
        if x_T is not None:
            _check_given("x_T", x_T, shape)
        elif self.table.start == "data":
            raise ValueError("x_T: this table begins at data, which x_T must give; got None")
        classes, null = self._check_labels(labels, num)
        if isinstance(self.noise, Tensor):
            _check_given("noise", self.noise, (self.table.steps, *shape))
        if isinstance(self.noise, GeneratorNoise) and not self.noise.serves(num):
            raise ValueError(f"noise must have one generator, or one for each of {num} samples")
        result = checks.empty_samples(num, self.sample_shape, self.state_dtype, self.device)
        states = result.new_empty((len(return_steps), *shape)) if return_steps is not None else None
        batches = list(micro_batches(num, first_sample, self.micro_batch, self.pad))
        with self._loops.acquire(), _bar(progress, len(batches) * self.table.steps) as bar:
            for batch in batches:
                cached = self._loop(batch.size, classes)
                if cached.warning is not None:
                    # The caller's line: above it are the two decorators of this method.
                    warnings.warn(cached.warning, stacklevel=4)
                if classes is not None:
                    cached.loop.label(batch.take(classes, num), null)
                result[batch.samples] = self._run_batch(
                    cached, batch, seed, x_T, wanted or {}, states, bar
                )
        return result if states is None else (result, states)

    def _run_batch(
        self,
        cached: CachedLoop,
        batch: MicroBatch,
        seed: int,
        x_T: Tensor | None,
        wanted: dict[int, list[int]],
        states: Tensor | None,
        bar: Progress,
    ) -> Tensor:
        loop, stride = cached.loop, cached.stride
        rows = self._start_rows(batch, seed)
        loop.start(seed, batch.first_sample, rows)
        x = loop.x[batch.slots]
        source = source_of(self.noise, self.table)
        given = x_T[batch.samples] if x_T is not None else None
        drawn = source.x_T(x, batch.samples) if source is not None and given is None else None
        if drawn is not None:
            given = drawn * self.table.init_scale
        if given is not None:
            x.copy_(given)
            loop.refresh_input()
        first_rows = [0] * x.shape[0] if rows is None else rows[batch.slots].tolist()
        count = self.table.steps - min(first_rows)

        def record(steps: int) -> None:
            for i in wanted.get(steps, ()):
                cast(Tensor, states)[i, batch.samples] = x

        stride = stride if loop.noise is None else 1
        done = 0
        record(done)
        while done < count:
            if source is not None and loop.noise is not None:
                source.fill(loop.noise[batch.slots], batch.samples, done, first_rows)
            stop = min([count, done + stride, *(steps for steps in wanted if steps > done)])
            cached.advance(stop - done)
            bar.update(stop - done)
            done = stop
            record(done)
        for steps in wanted:
            if steps > count:  # chains of random length, all ended
                record(steps)
        bar.update(self.table.steps - count)
        return x

    def _loop(self, batch: int, labels: Tensor | None) -> CachedLoop:
        """The buffers of a batch size and what advances them, set to the table of this sampler."""
        makes_noise = isinstance(self.noise, str)

        def make() -> StepLoop:
            return StepLoop(
                self.model,
                self.table,
                get_backend(self.backend, self.device, self.state_dtype),
                batch,
                self.sample_shape,
                self.device,
                self.dtype,
                makes_noise=makes_noise,
                labels=labels,
            )

        of_labels = None if labels is None else (labels.dtype, tuple(labels.shape[1:]))
        key = batch, makes_noise, of_labels, StepLoop.kind(self.table)
        kept = self._loops.loop(key, make)
        kept.loop.load(self.table)
        return kept

    def _check_labels(
        self, labels: Tensor | int | None, num: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The label of each sample [num, ...], and under guidance the null label, on the device."""
        if self.table.guided and (labels is None or self._null_label is None):
            missing = "labels" if labels is None else "null_label"
            raise ValueError(f"{missing} must be given for a table with guidance; got None")
        classes = checks.sample_labels(labels, num, self.device)
        if classes is None or not self.table.guided:
            return classes, None
        return classes, as_null_label(self._null_label, classes)

    def _start_rows(self, batch: MicroBatch, seed: int) -> Tensor | None:
        """Each sample's first row for a chain of random length, uniform over the table."""
        if self.table.start != "random":
            return None
        words = random_words(seed, STREAM_START, batch.first_sample, batch.size)
        return (words * self.table.steps) >> 32

    def _check_return_steps(self, steps: Sequence[int] | None) -> dict[int, list[int]] | None:
        """Step count -> the places in the trajectory that record it."""
        if steps is None:
            return None
        if not isinstance(steps, Sequence):
            raise TypeError(f"return_steps must be a sequence of ints; got {type(steps).__name__}")
        places: dict[int, list[int]] = {}
        for i, value in enumerate(steps):
            count = checks.integer(f"return_steps[{i}]", value, 0, self.table.steps + 1)
            places.setdefault(count, []).append(i)
        return places


def _bar(progress: bool | Progress, steps: int) -> AbstractContextManager[Progress]:
    """The bar of a call, shown, silent or the caller's own."""
    if not isinstance(progress, bool):
        return nullcontext(progress)
    return tqdm(total=steps, desc="sampling", unit="step", disable=not progress)


def _placement(
    model: Model, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """The device and dtype asked for, else the model's: of its parameters or its attributes."""
    of_model: Any = model
    if isinstance(model, torch.nn.Module):
        of_model = next((p for p in model.parameters() if p.is_floating_point()), None)
    of_device, of_dtype = getattr(of_model, "device", None), getattr(of_model, "dtype", None)
    if device is None:
        fallback = "cuda" if torch.cuda.is_available() else "cpu"
        device = of_device if isinstance(of_device, torch.device) else fallback
    device = checks.device("device", device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if dtype is None:
        dtype = of_dtype if isinstance(of_dtype, torch.dtype) else torch.float32
    if dtype not in checks.FLOATS:
        accepted = ", ".join(checks.dtype_name(d) for d in checks.FLOATS)
        raise TypeError(f"dtype must be {accepted}; got {dtype}")
    return device, dtype


def _check_given(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    checks.floating(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}; got {checks.shape_text(value)}")
