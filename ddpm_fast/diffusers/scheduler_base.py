"""Base class of the drop-in schedulers: cached tables, timesteps, add_noise and get_velocity."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_fast.diffusers.add_noise import ForwardScales
from ddpm_fast.diffusers.fused_step import StepPosition, TimestepRows
from ddpm_fast.diffusers.scheduler_options import (
    base_class,
    check_compat,
    get_clip,
    has_learned_variance,
)
from ddpm_fast.diffusers.step_tables import alphas_cumprod, chain_timesteps
from ddpm_fast.utils import checks

Generators = torch.Generator | list[torch.Generator] | None

_MAX_TABLES = 8  # for different eta, clipping and dtype


class _CachedTables(NamedTuple):
    """Tables of a scheduler, and the attributes from which they were computed.

    Attributes:
        objects: Attributes that must be identical.
        values: Attributes that must be equal.
        chain: The timesteps, on the host.
        learned: The model output contains a variance.
        tables: Tables by name and options.
    """

    objects: tuple[Any, ...]
    values: tuple[Any, ...]
    chain: list[int]
    learned: bool
    tables: dict[Any, Any]


def _make_init(base: Any) -> Callable[..., None]:
    """Return an __init__ with the options of a scheduler of diffusers, and compat."""

    def __init__(self: Any, *args: Any, compat: str = "diffusers", **options: Any) -> None:
        check_compat(compat)
        base.__init__(self, *args, **options)
        self.register_to_config(compat=compat)
        base_class(self)
        self._tables = None
        self._table("scales", "float32").prepare("cpu")

    # diffusers reads the names of the options from the signature.
    signature = inspect.signature(base.__init__)
    last = inspect.Parameter("compat", inspect.Parameter.KEYWORD_ONLY, default="diffusers")
    options = [*signature.parameters.values(), last]
    __init__.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return __init__


class FusedScheduler(SchedulerMixin, ConfigMixin):
    """Base class of the drop-in schedulers.

    Attributes:
        replaces: The scheduler of diffusers that the class replaces.
    """

    replaces: ClassVar[type]
    _default_options: ClassVar[tuple[Any, ...]] = ()  # of `_make_rows`, for the defaults of `step`
    config: Any
    timesteps: Tensor
    num_inference_steps: int | None
    alphas_cumprod: Tensor
    _tables: _CachedTables | None

    def __init_subclass__(cls, replaces: type | None = None) -> None:
        if replaces is not None:
            cls.replaces = replaces
            cls.__init__ = _make_init(replaces)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which computes its own tables."""
        return self.__dict__ | {"_tables": None}

    @property
    def _corrected(self) -> bool:
        return self.config.compat == "corrected"

    def _cached(self) -> _CachedTables:
        """Return the tables, without contents if the scheduler has changed since."""
        end = getattr(self, "final_alpha_cumprod", None)
        objects = (self.config, self.timesteps, self.alphas_cumprod, end)
        values: tuple[Any, ...] = (
            self.num_inference_steps,
            getattr(self, "custom_timesteps", None),
        )
        if not torch.compiler.is_compiling():
            values += tuple(_version(x) for x in (self.timesteps, self.alphas_cumprod))
        cached = self._tables
        if (
            cached is None
            or cached.values[: len(values)] != values
            or any(a is not b for a, b in zip(cached.objects, objects, strict=True))
        ):
            chain = [int(t) for t in self.timesteps.tolist()]
            cached = self._tables = _CachedTables(
                objects, values, chain, has_learned_variance(self), {}
            )
        return cached

    def _table(self, name: str, *options: Any) -> Any:
        """Return the result of `_make_<name>`, cached until the scheduler changes."""
        tables, key = self._cached().tables, (name, *options)
        table = tables.get(key)
        if table is None:
            table = self._make(name, *options)
            # Each operation is atomic: other threads may change the dictionary.
            for old in list(tables)[: 1 - _MAX_TABLES]:
                tables.pop(old, None)
            tables[key] = table
        return table

    @partial(
        torch.compiler.disable,
        reason="the scheduler computes a table here: call it once with these options outside of"
        " compiled code (set_timesteps computes the tables of the default options)",
    )
    def _make(self, name: str, *options: Any) -> Any:
        return getattr(self, f"_make_{name}")(*options)

    def _set(self, set_timesteps: Callable[[], None], device: torch.device | str | None) -> None:
        """Set the timesteps of the chain; after an error the scheduler is unchanged."""
        before = dict(self.__dict__)
        try:
            # Training may read the tables: they are neither inference tensors nor on a GPU.
            with torch.device("cpu"), torch.inference_mode(False):
                set_timesteps()
                self.timesteps = torch.tensor(
                    chain_timesteps(self, self._corrected), dtype=torch.int64
                )
                # Compiled code needs tables that exist.
                self._table("scales", "float32").prepare(device)
                self._table("rows", *self._default_options).prepare(device)
                cached, self.timesteps = self._cached(), self.timesteps.to(device)
                objects = (cached.objects[0], self.timesteps, *cached.objects[2:])
                values = (*cached.values[:2], _version(self.timesteps), *cached.values[3:])
                self._tables = cached._replace(objects=objects, values=values)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _position(self, timestep: Any, rows: TimestepRows, sample: Tensor) -> StepPosition:
        """Return the position of a step, without synchronisation.

        A timestep that is an element of `self.timesteps` is identified by its storage offset.
        """
        if isinstance(timestep, Tensor):
            if timestep.dtype not in (torch.int64, torch.int32):
                got = checks.dtype_name(timestep.dtype)
                raise TypeError(f"timestep must be an int or an int64 or int32 tensor; got {got}")
            value = None if torch.compiler.is_compiling() else self._host_value(timestep)
            if value is None:
                at = timestep.to(sample.device, torch.int64, non_blocking=True)
                return StepPosition(None, checks.index("timestep", at, sample, len(rows.in_chain)))
            timestep = value
        t = checks.integer("timestep", timestep, 0, len(rows.in_chain))
        if not rows.in_chain[t]:
            raise ValueError(f"timestep must be one of scheduler.timesteps; got {t}")
        return StepPosition(t, None)

    def _host_value(self, timestep: Tensor) -> int | None:
        """Return the value of a timestep if it can be read without synchronisation, else None."""
        if timestep.numel() != 1:
            return None
        if _on_host(timestep):
            return int(timestep)
        if timestep.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # the graph may be replayed with other timesteps
        chain = self.timesteps
        storages = timestep.untyped_storage(), chain.untyped_storage()
        if timestep.dtype != chain.dtype or storages[0].data_ptr() != storages[1].data_ptr():
            return None
        stride = max(chain.stride(0), 1)
        index, remainder = divmod(int(timestep.storage_offset() - chain.storage_offset()), stride)
        values = self._cached().chain
        return values[index] if remainder == 0 and 0 <= index < len(values) else None

    def _by_timestep(self, rows: Tensor, timesteps: list[int]) -> TimestepRows:
        return TimestepRows(rows, timesteps, len(self.alphas_cumprod), get_clip(self))

    def _noise(self, out: Tensor, generator: Generators) -> Tensor:
        """Draw standard normal noise like the prediction, in the order of diffusers."""
        return randn_tensor(out.shape, generator=generator, device=out.device, dtype=out.dtype)

    def _make_scales(self, dtype: str) -> ForwardScales:
        if self._corrected:
            return ForwardScales(alphas_cumprod(self, True))
        return ForwardScales(self.alphas_cumprod.cpu().to(getattr(torch, dtype)))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return sqrt(abar) x_0 + sqrt(1 - abar) noise (Eq. 4, Ho et al. 2020).

        Differentiable in both tensors, which broadcast to each other and to the timesteps.

        Args:
            original_samples: Images x_0, floating-point [N, ...].
            noise: Standard normal noise, floating-point [N, ...].
            timesteps: Integer tensor, [N] or of one element, in [0, num_train_timesteps). Values on
                a GPU are clamped.

        Returns:
            Noisy images, of the dtype to which the two promote.

        Raises:
            TypeError: An argument is no tensor or of another dtype.
            ValueError: Shapes do not broadcast, devices differ, or a timestep is out of range.
        """
        scales = self._table("scales", _promoted(original_samples, noise))
        return scales.noisy(original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = sqrt(abar) noise - sqrt(1 - abar) x_0 (Salimans & Ho 2022).

        Args:
            sample: Images x_0, floating-point [N, ...].
            noise: Standard normal noise, floating-point [N, ...].
            timesteps: As for `add_noise`.

        Returns:
            v, of the dtype to which the two promote.

        Raises:
            TypeError: As `add_noise`.
            ValueError: As `add_noise`.
        """
        scales = self._table("scales", _promoted(sample, noise))
        return scales.velocity(sample, noise, timesteps)


def check_steps(name: str, value: Any, scheduler: Any) -> None:
    """Check a number of inference steps; raise TypeError or ValueError."""
    T = scheduler.config.num_train_timesteps
    if isinstance(value, int) and value > T:
        raise ValueError(f"{name} must be at most num_train_timesteps, {T}; got {value}")
    checks.integer(name, value, 1, T + 1)


def _version(tensor: Tensor) -> int:
    """Return the number of in-place writes to a tensor."""
    return 0 if tensor.is_inference() else tensor._version


def _on_host(timestep: Tensor) -> bool:
    return timestep.device.type == "cpu"


def _promoted(a: Any, b: Any) -> str:
    """Return the name of the dtype to which two tensors promote; others are rejected later."""
    dtypes = [x.dtype for x in (a, b) if isinstance(x, Tensor) and x.is_floating_point()]
    return checks.dtype_name(torch.promote_types(dtypes[0], dtypes[-1])) if dtypes else "float32"
