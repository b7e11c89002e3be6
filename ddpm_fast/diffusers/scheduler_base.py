"""What the fast schedulers share: their tables, and where in its chain a step is."""

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

_TABLES_KEPT = 8  # of different eta, clipping and dtype


class _CachedTables(NamedTuple):
    """What was made of a scheduler, and of what."""

    of: tuple[Any, ...]  # the same objects
    like: tuple[Any, ...]  # of equal value
    chain: list[int]  # the timesteps on the host
    learned: bool
    tables: dict[Any, Any]


def _init_of(kind: Any) -> Callable[..., None]:
    """An __init__ of the options of a scheduler of diffusers and compat."""

    def __init__(self: Any, *args: Any, compat: str = "diffusers", **options: Any) -> None:
        check_compat(compat)
        kind.__init__(self, *args, **options)
        self.register_to_config(compat=compat)
        base_class(self)
        self._cache = None
        self._table("scales", "float32").prepare("cpu")

    # What diffusers reads the names of the options from.
    signature = inspect.signature(kind.__init__)
    last = inspect.Parameter("compat", inspect.Parameter.KEYWORD_ONLY, default="diffusers")
    options = [*signature.parameters.values(), last]
    __init__.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return __init__


class FusedScheduler(SchedulerMixin, ConfigMixin):
    """Base of the fast schedulers. diffusers loads those of a module that has its SchedulerMixin.

    replaces: the scheduler of diffusers that one stands in for.
    """

    replaces: ClassVar[type]
    _default_how: ClassVar[
        tuple[Any, ...]
    ] = ()  # what rows are made of, where nothing else is asked for
    config: Any
    timesteps: Tensor
    num_inference_steps: int | None
    alphas_cumprod: Tensor
    _cache: _CachedTables | None

    def __init_subclass__(cls, replaces: type | None = None) -> None:
        if replaces is not None:
            cls.replaces = replaces
            cls.__init__ = _init_of(replaces)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: tables are made anew."""
        return self.__dict__ | {"_cache": None}

    @property
    def _corrected(self) -> bool:
        return self.config.compat == "corrected"

    def _cached(self) -> _CachedTables:
        """What was made of the scheduler, anew where what it was made of has changed since."""
        end = getattr(self, "final_alpha_cumprod", None)
        of = (self.config, self.timesteps, self.alphas_cumprod, end)
        like: tuple[Any, ...] = (
            self.num_inference_steps,
            getattr(self, "custom_timesteps", None),
        )
        if not torch.compiler.is_compiling():
            like += tuple(_version(x) for x in (self.timesteps, self.alphas_cumprod))
        kept = self._cache
        if (
            kept is None
            or kept.like[: len(like)] != like
            or any(a is not b for a, b in zip(kept.of, of, strict=True))
        ):
            chain = [int(t) for t in self.timesteps.tolist()]
            kept = self._cache = _CachedTables(of, like, chain, has_learned_variance(self), {})
        return kept

    def _table(self, name: str, *how: Any) -> Any:
        """What `_make` makes of the scheduler as it is, kept for as long as it stays so."""
        tables, key = self._cached().tables, (name, *how)
        table = tables.get(key)
        if table is None:
            table = self._make(name, *how)
            # One operation each: other threads may be here too.
            for old in list(tables)[: 1 - _TABLES_KEPT]:
                tables.pop(old, None)
            tables[key] = table
        return table

    @partial(
        torch.compiler.disable,
        reason="the scheduler makes a table here: call it once with these options outside of what"
        " is compiled (set_timesteps makes those of the default options)",
    )
    def _make(self, name: str, *how: Any) -> Any:
        return getattr(self, f"_make_{name}")(*how)

    def _set(self, set_timesteps: Callable[[], None], device: torch.device | str | None) -> None:
        """Set the timesteps of the chain, or leave everything as it was."""
        before = dict(self.__dict__)
        try:
            # Tables are made on the host, of tensors that training may read as well.
            with torch.device("cpu"), torch.inference_mode(False):
                set_timesteps()
                self.timesteps = torch.tensor(
                    chain_timesteps(self, self._corrected), dtype=torch.int64
                )
                # A compiled caller finds them made.
                self._table("scales", "float32").prepare(device)
                self._table("rows", *self._default_how).prepare(device)
                kept, self.timesteps = self._cached(), self.timesteps.to(device)
                of = (kept.of[0], self.timesteps, *kept.of[2:])
                like = (*kept.like[:2], _version(self.timesteps), *kept.like[3:])
                self._cache = kept._replace(of=of, like=like)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _position(self, timestep: Any, rows: TimestepRows, sample: Tensor) -> StepPosition:
        """Where a step is, without waiting for a GPU.

        A timestep that came out of ``self.timesteps`` is known by its place in there.
        """
        if isinstance(timestep, Tensor):
            if timestep.dtype not in (torch.int64, torch.int32):
                got = checks.dtype_name(timestep.dtype)
                raise TypeError(f"timestep must be an int or an int64 or int32 tensor; got {got}")
            known = None if torch.compiler.is_compiling() else self._host_value(timestep)
            if known is None:
                at = timestep.to(sample.device, torch.int64, non_blocking=True)
                return StepPosition(None, checks.index("timestep", at, sample, len(rows.in_chain)))
            timestep = known
        t = checks.integer("timestep", timestep, 0, len(rows.in_chain))
        if not rows.in_chain[t]:
            raise ValueError(f"timestep must be one of scheduler.timesteps; got {t}")
        return StepPosition(t, None)

    def _host_value(self, timestep: Tensor) -> int | None:
        """The value of a timestep, where that can be told without waiting for a GPU."""
        if timestep.numel() != 1:
            return None
        if _on_host(timestep):
            return int(timestep)
        if timestep.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # the graph may be replayed for others
        chain = self.timesteps
        storages = timestep.untyped_storage(), chain.untyped_storage()
        if timestep.dtype != chain.dtype or storages[0].data_ptr() != storages[1].data_ptr():
            return None
        stride = max(chain.stride(0), 1)
        place, rest = divmod(int(timestep.storage_offset() - chain.storage_offset()), stride)
        values = self._cached().chain
        return values[place] if rest == 0 and 0 <= place < len(values) else None

    def _by_timestep(self, rows: Tensor, timesteps: list[int]) -> TimestepRows:
        return TimestepRows(rows, timesteps, len(self.alphas_cumprod), get_clip(self))

    def _noise(self, out: Tensor, generator: Generators) -> Tensor:
        """Standard normals like the prediction, in the library's order of draws."""
        return randn_tensor(out.shape, generator=generator, device=out.device, dtype=out.dtype)

    def _make_scales(self, dtype: str) -> ForwardScales:
        if self._corrected:
            return ForwardScales(alphas_cumprod(self, True))
        return ForwardScales(self.alphas_cumprod.cpu().to(getattr(torch, dtype)))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise images to timesteps: sqrt(abar) x_0 + sqrt(1 - abar) noise (Eq. 4, Ho et al. 2020).

        original_samples, noise: [N, ...], float; they broadcast, also to the timesteps, an integer
        tensor [N] or of one element in [0, num_train_timesteps), clamped on a GPU. Returns a tensor
        like the images, of the dtype the two promote to. Differentiable in both.

        Raises TypeError, ValueError naming the argument.
        """
        scales = self._table("scales", _promoted(original_samples, noise))
        return scales.noisy(original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v of images and noise: sqrt(abar) noise - sqrt(1 - abar) x_0 (Salimans & Ho 2022).

        Arguments and errors are those of `add_noise`.
        """
        scales = self._table("scales", _promoted(sample, noise))
        return scales.velocity(sample, noise, timesteps)


def check_steps(name: str, value: Any, scheduler: Any) -> None:
    """That a number of inference steps is one. Raises TypeError, ValueError naming it."""
    T = scheduler.config.num_train_timesteps
    if isinstance(value, int) and value > T:
        raise ValueError(f"{name} cannot be larger than num_train_timesteps, {T}; got {value}")
    checks.integer(name, value, 1, T + 1)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to in place."""
    return 0 if tensor.is_inference() else tensor._version


def _on_host(timestep: Tensor) -> bool:
    return timestep.device.type == "cpu"


def _promoted(a: Any, b: Any) -> str:
    """The dtype of two tensors together, by name; what is none is refused later."""
    dtypes = [x.dtype for x in (a, b) if isinstance(x, Tensor) and x.is_floating_point()]
    return checks.dtype_name(torch.promote_types(dtypes[0], dtypes[-1])) if dtypes else "float32"
