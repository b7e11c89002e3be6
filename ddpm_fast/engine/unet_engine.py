"""`UNetEngine`: weights, plan and memory of a compiled `UNet`."""

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
from ddpm_fast.engine.stand_in import needs_gradient
from ddpm_fast.models import UNet
from ddpm_fast.models.inputs import reject_labels
from ddpm_fast.ops import unavailable_reason
from ddpm_fast.ops.aten import no_autocast
from ddpm_fast.ops.dispatch import BACKENDS
from ddpm_fast.utils import checks

_ALIGNED = 16  # bytes; alignment required by vectorised kernels
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UNetEngine:
    """A `UNet` as a flat plan of fused channels_last operations, for one batch and image size.

    Call `engine(x, t)` in place of the network, also inside a `Sampler` or a CUDA graph. The
    weights are copied: later changes of the network do not affect the engine.

    A call allocates all intermediate values as one block, whose layout is planned in advance; some
    of torch's kernels allocate workspaces in addition. Concurrent calls, on other threads and
    streams, allocate a block each.

    Args:
        unet: the network, on the device to use; dropout is disabled.
        batch: images in a batch, at least 1.
        image_size: side of the images, or (height, width).
        dtype: dtype of weights and activations: float16, bfloat16 or float32; float64 with backend
            "reference". GroupNorm statistics, softmax and embeddings are computed in float32 or
            more.
        backend: "auto" for the fastest implementations, as timed by the tuner; "reference" for
            plain PyTorch; "cpu", "triton" or "cuda" for the kernels of normalisation and attention.
        num_timesteps: timesteps are 0 .. num_timesteps - 1; None for the network's number, or 1000.
        norms_add: add a block's residual in the next normalisation (True) or in the convolution
            (False); None for the convolution if it can fuse the sum.
        tuner: chooses implementations; None for one that records its choices on disk.

    Attributes:
        config: options of the network.
        device: device of the engine.
        dtype: dtype of weights and activations.

    Raises:
        TypeError: an argument has the wrong type or an unsupported dtype.
        ValueError: an argument is out of range.
        RuntimeError: the backend cannot run here.
        MemoryError: the batch does not fit into the free memory.
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
        self.num_timesteps = resolve_num_timesteps(unet, num_timesteps)
        self.tuner = tuner if tuner is not None else Tuner(self.device)
        if self.tuner.device.type != self.device.type:
            raise ValueError(
                f"tuner must be for {self.device.type}, the device of unet; got {self.tuner.device}"
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
                # Calls on other streams read the weights.
                torch.cuda.current_stream().synchronize()
        self._free: list[Slots] = []  # CPU only: memory of finished calls

    @property
    def batch(self) -> int:
        """Images in a batch."""
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
        """Return every operation with shapes, bytes, FLOPs and implementation."""
        table = self._table.nbytes if self._table is not None else 0
        offsets = {id(value): self._offsets[slot] for slot, value in self._values.items()}
        return describe(self._program, self._steps, offsets, self._arena_bytes, table)

    def identity(self) -> dict[str, Any]:
        """Return what determines the bits of a result, for JSON: versions, device and kernels."""
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

    def __call__(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """Predict the network's output for noisy images.

        Args:
            x: [batch, in_channels, height, width], any floating dtype and memory format, on the
                engine's device; channels_last images in the engine's dtype are not copied.
            t: 0-based timesteps, int64 [batch], or a single value (0-d or int), in [0,
                num_timesteps). On a GPU, where a check would synchronize, the output for a timestep
                out of range is NaN.
            class_labels: class labels, as for `UNet`.

        Returns:
            [batch, out_channels, height, width] in the dtype of `x`, channels_last, newly
            allocated.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: an argument has the wrong shape, device or range, or requires a gradient
                while grad mode is on.
        """
        if needs_gradient(x, class_labels):
            raise ValueError(
                "x must not require a gradient, which an engine does not compute (call the network,"
                " or run under torch.no_grad()); got a tensor that does"
            )
        # The memory is used inside and outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            row = self._checked(x, t)
            with self._here():
                return self._run(x, row, self._labels(x, class_labels)).to(x.dtype)

    def _run(self, x: Tensor, row: Tensor, labels: Tensor | None) -> Tensor:
        # `to` keeps views with a larger pixel stride, but some kernels read by address and shape.
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
            # New pages cost more than the arithmetic. CUDA's caching allocator reuses its own.
            slots[self._x_slot] = slots[self._out_slot] = None
            self._free.append(slots)
        return out

    @contextmanager
    def _here(self) -> Iterator[None]:
        """Set the engine's device and disable autocast."""
        device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with device, no_autocast(self.device):
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> UNetEngine:
        """Return the engine itself, which is immutable."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a UNetEngine cannot be pickled; pickle the UNet and create the engine from it"
        )

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
        """Reuse the memory of a finished call, or allocate new memory."""
        try:
            return self._free.pop()
        except IndexError:
            return self._new_slots()

    def _new_slots(self) -> Slots:
        """Allocate the memory of a call: one block, and a view of it for each value."""
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
        """Check the arguments; return the row of the embedding table for each image."""
        checks.floating("x", x)
        if tuple(x.shape) != self._shape:
            raise ValueError(
                f"x must be {list(self._shape)}, as the engine was planned;"
                f" got {checks.shape_text(x)}"
            )
        if x.device != self.device:
            raise ValueError(f"x must be on {self.device}, as the engine; got {x.device}")
        return checks.index("t", t, x, self.num_timesteps)


def resolve_num_timesteps(unet: UNet, num_timesteps: int | None) -> int:
    """Return the number of timesteps: `num_timesteps`, the network's own number, or 1000."""
    if num_timesteps is None:
        num_timesteps = unet.config.num_train_timesteps or 1000
    return checks.integer("num_timesteps", num_timesteps, 1, 1 << 24)


class _Labels:
    """Check class labels as the network does, and embed them with copies of its weights."""

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
    """Check the arguments that need no memory; return height and width."""
    if not isinstance(unet, UNet):
        raise TypeError(f"unet must be a ddpm_fast.UNet; got {type(unet).__name__}")
    if dtype not in DTYPES or (dtype == torch.float64 and backend != "reference"):
        got = checks.dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise TypeError(
            "dtype must be float16, bfloat16 or float32, or float64 with backend 'reference';"
            f" got {got}"
        )
    if backend != "auto":
        checks.choice("backend", backend, ("auto", *BACKENDS))
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
