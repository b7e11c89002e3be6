"""`UNetEngine`: a network's weights and plan, and the memory that a call takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from ddpm_fast.engine.autotune.tuner import Tuner
from ddpm_fast.engine.convolution.candidates import adds_residuals
from ddpm_fast.engine.plan import memory_check
from ddpm_fast.engine.plan.binding import Binder, Slots
from ddpm_fast.engine.plan.embeddings import LabelledEmbeddings, time_table
from ddpm_fast.engine.plan.lowering import lower
from ddpm_fast.engine.plan.memory import Lifetime, plan_offsets
from ddpm_fast.engine.plan.operations import Program
from ddpm_fast.engine.plan.report import EnginePlan, describe
from ddpm_fast.models import UNet
from ddpm_fast.models.inputs import reject_labels
from ddpm_fast.ops import unavailable_reason
from ddpm_fast.ops.aten import no_autocast
from ddpm_fast.ops.dispatch import BACKENDS
from ddpm_fast.utils import checks

_ALIGNED = 16  # bytes; what kernels that read in vectors ask of an image's address
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UNetEngine:
    """A `UNet` as a flat plan of fused channels-last operations, for one batch and image size.

    Called as ``engine(x, t)`` in place of the network, also inside a `Sampler` and inside a CUDA
    graph. The weights are copied: later changes of the network do not reach the engine.

    A call takes the memory of all values as one block, whose inner layout is planned here; beside
    it comes what some of torch's own kernels allocate for a moment. Concurrent calls, on other
    threads and streams, each have their own.

    unet: the network; dropout counts as off. Its device is the engine's.
    batch, image_size: what every call has; image_size is a side or (height, width).
    dtype: of weights and activations: float16, bfloat16 or float32; float64 with backend
        "reference". GroupNorm's statistics, softmax and embeddings are float32 in any case.
    backend: "auto" takes the fastest of what can run, as timed by the tuner; "reference" runs the
        plan in plain PyTorch; "cpu", "triton" and "cuda" name the kernels of normalisation and
        attention.
    num_timesteps: the timesteps are 0 .. num_timesteps - 1; None takes the network's own number, or
        1000.
    norms_add: where a block's residual is added: by the next normalisation (True) or by the
        convolution (False). None: by the convolution where it can do that on its way out.
    tuner: what chooses implementations; None makes one that keeps its choices on disk.

    Raises:
        TypeError, ValueError: an argument, named.
        RuntimeError: the backend cannot run here.
        MemoryError: the batch does not fit; the message says what it needs and what would fit.
    """

    def __init__(
        self,
        unet: UNet,
        batch: int,
        image_size: int | tuple[int, int],
        dtype: torch.dtype = torch.float16,
        *,
        backend: str = "auto",
        num_timesteps: int | None = None,
        norms_add: bool | None = None,
        tuner: Tuner | None = None,
    ) -> None:
        height, width = _check(unet, image_size, dtype, backend)
        self._batch = checks.integer("batch", batch, 1, 1 << 20)
        self.device, self.dtype, self.backend = unet.device, dtype, backend
        self.config = unet.config
        self.num_timesteps = chain_length(unet, num_timesteps)
        self.tuner = tuner if tuner is not None else Tuner(self.device)
        if self.tuner.device.type != self.device.type:
            raise ValueError(
                f"tuner must be one for {self.device.type}, where the network is; it is for"
                f" {self.tuner.device}"
            )
        if norms_add is None:
            norms_add = not adds_residuals(self.device)

        def lowered(batch: int) -> Program:
            return lower(unet, batch, height, width, dtype, norms_add=norms_add)[0]

        self._program, projections = lower(
            unet, self._batch, height, width, dtype, norms_add=norms_add
        )
        table_bytes = 4 * self.num_timesteps * projections.width
        memory_check.check(self._program, lowered, self.device, table_bytes)
        with torch.no_grad(), self._here():
            wide = checks.compute_dtype(dtype)
            like = torch.empty(0, dtype=wide, device=self.device)
            self._embed: LabelledEmbeddings | None = None
            self._table: Tensor | None = None
            if unet.class_embedding is None:
                self._table = time_table(unet, projections, self.num_timesteps, like)
            else:
                self._embed = LabelledEmbeddings(unet, projections, self.num_timesteps, like)
            self._labels = _Labels(unet)
            self._shape = (self._batch, self.config.in_channels, height, width)
            self._bind()
            if self.device.type == "cuda":
                # Calls on any stream find the weights written.
                torch.cuda.current_stream().synchronize()
        self._free: list[Slots] = []  # on the CPU: the memory of calls that have ended

    @property
    def batch(self) -> int:
        """How many images a call has."""
        return self._batch

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self._shape[2], self._shape[3]

    def __repr__(self) -> str:
        height, width = self.image_size
        return (
            f"UNetEngine({self._batch} x {height}x{width}, {checks.dtype_name(self.dtype)} on"
            f" {self.device}, {len(self._steps)} operations,"
            f" {self._arena_bytes / 1e6:.1f} MB a call)"
        )

    def plan(self) -> EnginePlan:
        """Every operation with shapes, bytes, FLOPs and implementation; printing it is a table."""
        table = self._table.nbytes if self._table is not None else 0
        offsets = {id(value): self._offsets[slot] for slot, value in self._values.items()}
        return describe(self._program, self._steps, offsets, self._arena_bytes, table)

    def identity(self) -> dict[str, Any]:
        """What a run's last bits depend on, ready for JSON: versions, device and chosen kernels."""
        return {
            "environment": self.tuner.environment,
            "dtype": checks.dtype_name(self.dtype),
            "batch": self._batch,
            "image_size": list(self.image_size),
            "operations": [
                [step.operation.name, step.operation.kind, step.implementation]
                for step in self._steps
            ],
        }

    @torch.inference_mode(False)  # the memory serves calls inside and outside of it
    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """The network's prediction for noisy images ``x`` at 0-based timesteps ``t``.

        x: [batch, in_channels, height, width], any floating dtype and layout, on the engine's
            device; no copy is made of channels_last images in the engine's dtype.
        t: int64, [batch] or a single value (0-d or an int) in [0, num_timesteps). On a GPU, where
            looking would wait, the prediction for a timestep outside is NaN.
        class_labels: as `UNet` takes them.

        Returns [batch, out_channels, height, width] in the dtype of x, channels_last, new memory.
        Raises TypeError or ValueError, naming the argument.
        """
        row = self._checked(x, t)
        with self._here():
            return self._run(x, row, self._labels(x, class_labels)).to(x.dtype)

    def _run(self, x: Tensor, row: Tensor, labels: Tensor | None) -> Tensor:
        # `to` lets views of wider pixels pass; some kernels read by address and shape alone.
        channels_last = x.to(self.dtype, memory_format=torch.channels_last)
        dense = channels_last.is_contiguous(memory_format=torch.channels_last)
        if not dense or channels_last.data_ptr() % _ALIGNED:
            channels_last = channels_last.clone(memory_format=torch.channels_last)
        out = torch.empty(
            self._program.out.shape,
            dtype=self.dtype,
            device=self.device,
            memory_format=torch.channels_last,
        )
        slots = self._memory()
        slots[Binder.ROW], slots[Binder.LABELS] = row, labels
        slots[self._x_slot], slots[self._out_slot] = channels_last, out
        for step in self._steps:
            step.run(slots)
        if self.device.type == "cpu":
            # A CPU's new pages cost more than the arithmetic; CUDA's allocator keeps its own, for
            # each stream and each graph.
            slots[self._x_slot] = slots[self._out_slot] = None
            self._free.append(slots)
        return out

    @contextmanager
    def _here(self) -> Iterator[None]:
        """On the engine's device, with nothing computed in another dtype than is said."""
        device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with device, no_autocast(self.device):
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> UNetEngine:
        """Itself: an engine never changes."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a UNetEngine cannot be pickled; pickle the UNet and make the engine anew")

    def _bind(self) -> None:
        """Choose implementations, then plan the memory that they need."""
        program = self._program
        binder = Binder(program.values, self.backend, self.tuner, self._embed, self._table)
        self._steps = []
        for operation in program.operations:
            self._steps.append(binder.step(operation))
            operation.release()
        self._x_slot, self._out_slot = binder.slot(program.x), binder.slot(program.out)
        lifetimes = program.lifetimes()
        for number, step in enumerate(self._steps):
            if step.scratch is not None:
                lifetimes[id(step.scratch)] = Lifetime(step.scratch.nbytes, number, number)
        self._values = {binder.slot(v): v for v in binder.values if not v.external}
        offsets, self._arena_bytes = plan_offsets(
            {slot: lifetimes[id(value)] for slot, value in self._values.items()}
        )
        self._offsets = offsets
        self._num_slots, self._num_locks = binder.slots, binder.split_k_locks

    def _memory(self) -> Slots:
        """That of a call that has ended, or new."""
        try:
            return self._free.pop()
        except IndexError:
            return self._new_slots()

    def _new_slots(self) -> Slots:
        """A call's memory: one block, and a view of it for each value."""
        block = torch.empty(self._arena_bytes, dtype=torch.uint8, device=self.device)
        slots: Slots = [None] * self._num_slots
        slots[Binder.TABLE] = self._table
        if self._num_locks:
            slots[Binder.LOCKS] = torch.zeros(
                self._num_locks, dtype=torch.int32, device=self.device
            )
        for slot, value in self._values.items():
            offset = self._offsets[slot]
            flat = block[offset : offset + value.nbytes].view(value.dtype)
            _, channels, height, width = value.shape
            strides = (height * width * channels, 1, width * channels, channels)
            slots[slot] = flat.as_strided(value.shape, strides)
        return slots

    def _checked(self, x: Tensor, t: Tensor | int) -> Tensor:
        """The arguments, checked; the row of the embeddings of each image."""
        checks.floating("x", x)
        if tuple(x.shape) != self._shape:
            raise ValueError(
                f"x must be {list(self._shape)}, as the engine was planned;"
                f" got {checks.shape_text(x)}"
            )
        if x.device != self.device:
            raise ValueError(f"x must be on {self.device}, as the engine; got {x.device}")
        return checks.index("t", t, x, self.num_timesteps)


def chain_length(unet: UNet, num_timesteps: int | None) -> int:
    """The number of timesteps asked for, else the network's own, else 1000."""
    if num_timesteps is None:
        num_timesteps = unet.config.num_train_timesteps or 1000
    return checks.integer("num_timesteps", num_timesteps, 1, 1 << 24)


class _Labels:
    """Checks class labels as the network does, and embeds them with copies of its weights."""

    def __init__(self, unet: UNet) -> None:
        self._network: UNet | None = None
        if unet.class_embedding is not None:
            with torch.device("meta"):
                self._network = UNet(unet.config).to(unet.dtype)
            self._network.time_proj = copy.deepcopy(unet.time_proj)
            self._embedding = copy.deepcopy(unet.class_embedding)

    def __call__(self, x: Tensor, labels: Tensor | None) -> Tensor | None:
        if self._network is not None:
            return self._network.embed_labels(self._embedding, x, labels)
        reject_labels(labels)
        return None


def _check(unet: Any, image_size: Any, dtype: Any, backend: str) -> tuple[int, int]:
    """Height and width, after checks of the arguments that need no memory."""
    if not isinstance(unet, UNet):
        raise TypeError(f"unet must be a ddpm_fast.UNet; got {type(unet).__name__}")
    if dtype not in DTYPES or (dtype == torch.float64 and backend != "reference"):
        got = checks.dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise TypeError(
            "dtype must be float16, bfloat16 or float32, or float64 with backend 'reference';"
            f" got {got}"
        )
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}; got {backend!r}")
        if reason := unavailable_reason(backend, unet.device):
            raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(sides) != 2:
        raise ValueError(f"image_size must be a side or (height, width); got {image_size!r}")
    height, width = (checks.integer("image_size", side, 1, 1 << 16) for side in sides)
    multiple = unet.config.size_multiple
    if height % multiple or width % multiple:
        raise ValueError(f"image_size must be multiples of {multiple}; got {image_size!r}")
    return height, width
