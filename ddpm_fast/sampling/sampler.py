"""Sampling of any number of images, in micro-batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from ddpm_fast.diffusion.model_call import check_eval_mode
from ddpm_fast.diffusion.model_output import model_placement
from ddpm_fast.ops import get_backend
from ddpm_fast.ops.philox import STREAM_START, random_words
from ddpm_fast.sampling.labels import as_null_label
from ddpm_fast.sampling.loop_cache import CachedLoop, Graph, LoopCache
from ddpm_fast.sampling.noise_source import GeneratorNoise, as_noise, source_of
from ddpm_fast.sampling.progress import Progress, step_bar
from ddpm_fast.sampling.step_loop import Model, StepLoop
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.utils import checks
from ddpm_fast.utils.batching import MicroBatch, micro_batches
from ddpm_fast.utils.run_scope import run_scope

Noise = Literal["philox"] | torch.Generator | Sequence[torch.Generator] | GeneratorNoise | Tensor


class Sampler:
    """Run a step table with a model.

    Args:
        model: Callable `model(x, t)`, or `model(x, t, labels)` when `sample` gets labels: x [B,
            *sample_shape] in `dtype`, channels-last in memory for images, t int64 [B], labels [B,
            ...]. Returns the prediction of the table, or an object whose `sample` is it, with the
            shape of x, or with twice the channels, the second half a learned variance; float32,
            float16 or bfloat16. Under guidance B is twice the micro-batch. The model must not write
            to its inputs, and must be in evaluation mode where it has dropout.
        table: The step table.
        sample_shape: Shape of one sample, such as (3, 32, 32).
        micro_batch: Number of samples in a forward pass. It determines the last bits of a sample:
            sample k is always in slot k % micro_batch, beside the same samples, because slot and
            batch size change the last bits of a convolution.
        device: Device of the chains. None: that of the model's parameters, or its attribute
            `device`.
        dtype: Dtype of the model input. None: that of the model's parameters, or its attribute
            `dtype`. The state is float32, or float64 for float64 (backends reference and cpu).
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        noise: "philox": counter-based, so sample k of a seed is the same in any batch. A
            torch.Generator, one for each sample of a call, or a `GeneratorNoise`: drawn in the
            order of diffusers. A tensor [steps, num, *sample_shape]: row i of the table adds
            noise[i].
        graph: "auto": capture the step in a CUDA graph on a GPU; if the model cannot be captured,
            warn and run eagerly. True: raise instead. False: run eagerly. The bits are the same.
        pad: Pad micro-batches with samples that were not requested. False: fewer forward passes;
            the last bits of the samples in a smaller micro-batch depend on its size.
        loops_kept: Number of loops, with their buffers and graphs, that are cached between calls:
            one for each batch size and kind of table (`with_table`).
        null_label: Label of the unconditional model, for tables with guidance: an int, or a tensor
            of the shape of one label.

    Attributes:
        sample_shape: Shape of one sample.
        micro_batch: Number of samples in a forward pass.
        device: Device of the chains.
        dtype: Dtype of the model input.
        state_dtype: Dtype of the state.
        backend: Name of the backend.
        pad: Micro-batches are padded.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range.
        RuntimeError: The backend cannot run.
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
        """Return the state without buffers and graphs."""
        return {name: value for name, value in self.__dict__.items() if name != "_loops"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._loops = LoopCache(self._model, self.device, self._graph, self._loops_kept)

    def with_table(self, table: StepTable) -> Sampler:
        """Return a sampler with another table, which shares buffers and graphs with this one.

        A table of the same length and the same terms replays the graph that is already captured.
        Both samplers may be used from any thread; their calls run one at a time.

        Args:
            table: The step table.

        Raises:
            TypeError: `table` is not a StepTable.
        """
        return self._with(_table=checks.instance("table", table, StepTable))

    def with_noise(self, noise: Noise) -> Sampler:
        """Return a sampler with another source of noise; otherwise as `with_table`.

        Args:
            noise: As for the constructor.

        Raises:
            TypeError: `noise` is of another type.
        """
        return self._with(_noise=as_noise(noise))

    def _with(self, **changed: Any) -> Sampler:
        other = object.__new__(Sampler)
        other.__dict__.update(self.__dict__ | changed)
        return other

    @property
    def model(self) -> Model:
        """The model. It cannot be replaced: captured graphs refer to it."""
        return self._model

    @property
    def table(self) -> StepTable:
        """The step table; read-only."""
        return self._table

    @property
    def noise(self) -> str | GeneratorNoise | Tensor:
        """The source of noise; read-only."""
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
        """Sample images.

        With Philox noise, `sample(10)[7]` and `sample(1, first_sample=7)[0]` are the same bits, and
        so is any other division into calls. One call at a time uses the buffers: calls from other
        threads wait, and on a GPU the work of a call starts after that of the previous call, on any
        stream.

        Args:
            num: Number of samples.
            seed: Seed in [0, 2^64).
            first_sample: Index of the first sample of the seed.
            x_T: Starting states, floating-point [num, *sample_shape]. Default: noise from the seed
                or the generator, times the table's init_scale. Required by a table that begins at
                data.
            progress: Show a progress bar, which does not synchronise with the GPU; or a `Progress`.
            return_steps: Numbers of steps in [0, table.steps]; also return the states after them.
            labels: Labels of a conditional model, [num, ...], or one int for all samples.

        Returns:
            Samples first_sample .. first_sample + num - 1, float32 (float64 for float64 samplers)
            [num, *sample_shape]: for images about [-1, 1], not clamped. NaN from the model is kept.
                With
            `return_steps` also the states [len(return_steps), num, *sample_shape]; 0 is x_T.

        Raises:
            TypeError: An argument or the model's return value has another type or dtype.
            ValueError: An argument or the model's return value has another shape or device, or is
                out of range. The model is in training mode, with dropout.
            RuntimeError: The model wrote to its inputs, or this sampler is used within its own run.
        """
        check_eval_mode(self._model)
        num = checks.integer("num", num, 0, 1 << 40)
        checks.integer("seed", seed, 0, checks.SEED_END)
        first_sample = checks.integer("first_sample", first_sample, 0, checks.SAMPLE_END - num)
        wanted = self._check_return_steps(return_steps)
        shape = (num, *self.sample_shape)
        if x_T is not None:
            _check_shape("x_T", x_T, shape)
        elif self.table.start == "data":
            raise ValueError("x_T must be given for a table that begins at data; got None")
        classes, null = self._check_labels(labels, num)
        if isinstance(self.noise, Tensor):
            _check_shape("noise", self.noise, (self.table.steps, *shape))
        if isinstance(self.noise, GeneratorNoise) and not self.noise.serves(num):
            raise ValueError(
                f"noise must have one generator, or one for each of {num} samples; got"
                f" {len(cast(Sequence[Any], self.noise.generators))}"
            )
        result = checks.empty_samples(num, self.sample_shape, self.state_dtype, self.device)
        states = result.new_empty((len(return_steps), *shape)) if return_steps is not None else None
        batches = list(micro_batches(num, first_sample, self.micro_batch, self.pad))
        total = len(batches) * self.table.steps
        with run_scope(), self._loops.acquire(), step_bar(progress, total) as bar:
            for batch in batches:
                cached = self._loop(batch.size, classes)
                if cached.warning is not None:
                    # Attributed to the caller of this method and its two decorators.
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
        start = x_T[batch.samples] if x_T is not None else None
        drawn = source.x_T(x, batch.samples) if source is not None and start is None else None
        if drawn is not None:
            start = drawn * self.table.init_scale
        if start is not None:
            x.copy_(start)
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
            if steps > count:  # random starts: all chains have ended
                record(steps)
        bar.update(self.table.steps - count)
        return x

    def _loop(self, batch: int, labels: Tensor | None) -> CachedLoop:
        """Return the cached loop of a batch size, with the table of this sampler."""
        generates_noise = isinstance(self.noise, str)

        def make() -> StepLoop:
            return StepLoop(
                self.model,
                self.table,
                get_backend(self.backend, self.device, self.state_dtype),
                batch,
                self.sample_shape,
                self.device,
                self.dtype,
                generates_noise=generates_noise,
                labels=labels,
            )

        labels_key = None if labels is None else (labels.dtype, tuple(labels.shape[1:]))
        key = batch, generates_noise, labels_key, StepLoop.kind(self.table)
        cached = self._loops.loop(key, make)
        cached.loop.load(self.table)
        return cached

    def _check_labels(
        self, labels: Tensor | int | None, num: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the label of each sample, and under guidance the null label."""
        if self.table.guided and (labels is None or self._null_label is None):
            missing = "labels" if labels is None else "null_label"
            raise ValueError(f"{missing} must be given for a table with guidance; got None")
        classes = checks.sample_labels(labels, num, self.device)
        if classes is None or not self.table.guided:
            return classes, None
        return classes, as_null_label(self._null_label, classes)

    def _start_rows(self, batch: MicroBatch, seed: int) -> Tensor | None:
        """Return the first row of each sample of a random start, uniform over the table."""
        if self.table.start != "random":
            return None
        words = random_words(seed, STREAM_START, batch.first_sample, batch.size)
        return (words * self.table.steps) >> 32

    def _check_return_steps(self, steps: Sequence[int] | None) -> dict[int, list[int]] | None:
        """Return the positions in the trajectory that record each number of steps."""
        if steps is None:
            return None
        if not isinstance(steps, Sequence):
            raise TypeError(f"return_steps must be a sequence of ints; got {type(steps).__name__}")
        positions: dict[int, list[int]] = {}
        for i, value in enumerate(steps):
            count = checks.integer(f"return_steps[{i}]", value, 0, self.table.steps + 1)
            positions.setdefault(count, []).append(i)
        return positions


def _placement(
    model: Model, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Return the given device and dtype, by default those of the model."""
    model_device, model_dtype = model_placement(model)
    if device is None:
        device = model_device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = checks.device("device", device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if dtype is None:
        dtype = model_dtype or torch.float32
    if dtype not in checks.FLOATS:
        accepted = ", ".join(checks.dtype_name(d) for d in checks.FLOATS)
        raise TypeError(f"dtype must be {accepted}; got {dtype}")
    return device, dtype


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    checks.floating(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}; got {checks.shape_text(value)}")
