"""diffusers' DDPMScheduler and DDIMScheduler with a fused `step`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast.diffusers.forward import ForwardScales
from ddpm_fast.diffusers.fused import TimestepRows, Where, fused_step, step_tensors
from ddpm_fast.diffusers.options import check_compat, clip_of, kind_of, learned_variance
from ddpm_fast.diffusers.tables import alphas_cumprod, ddim_rows_of, ddpm_rows_of, visited

Generators = torch.Generator | list[torch.Generator] | None


def _init_of(kind: Any) -> Callable[..., None]:
    """An __init__ of the options of a scheduler of diffusers and compat."""

    def __init__(self: Any, *args: Any, compat: str = "diffusers", **options: Any) -> None:
        check_compat(compat)
        kind.__init__(self, *args, **options)
        self.register_to_config(compat=compat)
        kind_of(self)
        self._forget()
        self._table("scales", "float32").prepare("cpu")

    # What diffusers reads the names of the options from.
    signature = inspect.signature(kind.__init__)
    last = inspect.Parameter("compat", inspect.Parameter.KEYWORD_ONLY, default="diffusers")
    options = [*signature.parameters.values(), last]
    __init__.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return __init__


class _Fused(SchedulerMixin, ConfigMixin):
    """What the two share: their rows by timestep, and where in its chain a step is.

    diffusers loads the schedulers of a module that has its SchedulerMixin.
    """

    fast_of: ClassVar[type]
    _usual: ClassVar[tuple[Any, ...]] = ()  # what rows are made of, where nothing else is asked for
    config: Any
    timesteps: Tensor
    num_inference_steps: int | None
    alphas_cumprod: Tensor

    def __init_subclass__(cls, fast_of: type | None = None) -> None:
        if fast_of is not None:
            cls.fast_of = fast_of
            cls.__init__ = _init_of(fast_of)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: tables are made anew."""
        return {name: value for name, value in self.__dict__.items() if name not in _MADE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def _corrected(self) -> bool:
        return self.config.compat == "corrected"

    def _forget(self) -> None:
        """Make everything anew at the next call."""
        self._made_of: tuple[Any, ...] = ()
        self._tables: dict[Any, Any] = {}
        self._chain: list[int] = []

    def _table(self, name: str, *how: Any) -> Any:
        """What `_make` makes of the scheduler as it is, kept for as long as it stays so."""
        self._look()
        key = (name, *how)
        if key not in self._tables:
            while len(self._tables) >= _TABLES_KEPT:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = self._make(name, *how)
        return self._tables[key]

    @partial(
        torch.compiler.disable,
        reason="the scheduler makes a table here: call it once with these options outside of what"
        " is compiled (set_timesteps makes those of the default options)",
    )
    def _make(self, name: str, *how: Any) -> Any:
        return getattr(self, f"_make_{name}")(*how)

    def _look(self) -> None:
        """Forget what was made of a chain or a schedule that was replaced since."""
        now = (self.config, self.timesteps, self.alphas_cumprod)
        same = len(self._made_of) == len(now)
        if not (same and all(a is b for a, b in zip(self._made_of, now, strict=True))):
            self._forget()
            self._chain = [int(t) for t in self.timesteps.tolist()]
            self._made_of = now

    def _set(self, set_timesteps: Callable[[], None], device: torch.device | str | None) -> None:
        """Set the timesteps of the chain, or leave everything as it was."""
        before = dict(self.__dict__)
        try:
            set_timesteps()
            kept = visited(self, self._corrected)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        self.timesteps = torch.tensor(kept, dtype=torch.int64)
        # While the timesteps are on the host; and a compiled caller finds the tables made.
        self._table("scales", "float32").prepare(device)
        self._table("rows", *self._usual).prepare(device)
        self.timesteps = self.timesteps.to(device)
        self._made_of = (self.config, self.timesteps, *self._made_of[2:])

    def _where(self, timestep: Any, rows: TimestepRows, sample: Tensor) -> Where:
        """Where a step is, without waiting for a GPU.

        A timestep that came out of ``self.timesteps`` is known by its place in there.
        """
        if isinstance(timestep, Tensor):
            if timestep.dtype not in (torch.int64, torch.int32):
                got = checks.dtype_name(timestep.dtype)
                raise TypeError(f"timestep must be an int or an integer tensor; got {got}")
            known = None if torch.compiler.is_compiling() else self._known(timestep)
            if known is None:
                at = timestep.to(sample.device, torch.int64, non_blocking=True)
                return Where(None, checks.index("timestep", at, sample, len(rows.comes)))
            timestep = known
        t = checks.integer("timestep", timestep, 0, len(rows.comes))
        if not rows.comes[t]:
            raise ValueError(f"timestep must be one of scheduler.timesteps; got {t}")
        return Where(t, None)

    def _known(self, timestep: Tensor) -> int | None:
        """The value of a timestep, where that can be told without waiting for a GPU."""
        if timestep.numel() != 1:
            return None
        if _on_host(timestep):
            return int(timestep)
        self._look()
        chain = self.timesteps
        if timestep.untyped_storage().data_ptr() != chain.untyped_storage().data_ptr():
            return None
        place = (timestep.storage_offset() - chain.storage_offset()) // max(chain.stride(0), 1)
        return self._chain[place] if 0 <= place < len(self._chain) else None

    def _by_timestep(self, rows: Tensor, timesteps: list[int]) -> TimestepRows:
        return TimestepRows(rows, timesteps, len(self.alphas_cumprod), clip_of(self))

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


def _on_host(timestep: Tensor) -> bool:
    return timestep.device.type == "cpu"


def _promoted(a: Any, b: Any) -> str:
    """The dtype of two tensors together, by name; what is none is refused later."""
    dtypes = [x.dtype for x in (a, b) if isinstance(x, Tensor) and x.is_floating_point()]
    return checks.dtype_name(torch.promote_types(dtypes[0], dtypes[-1])) if dtypes else "float32"


_MADE = ("_made_of", "_tables", "_chain")
_TABLES_KEPT = 8  # of different eta, clipping and dtype


class FastDDPMScheduler(_Fused, DDPMScheduler, fast_of=DDPMScheduler):
    """diffusers' DDPMScheduler whose `step` is one fused kernel and waits for nothing.

    Options, attributes and methods are the library's; a configuration of either loads into the
    other. compat: "diffusers" (the default) computes the library's coefficients in float32, slips
    included; "corrected" those of the papers in float64 (docs/diffusers.md lists what differs).
    Sampling, training and saving go as with the library's own class.

    Raises ValueError for an option that is not supported, named, also at set_timesteps and step.
    """

    custom_timesteps: bool
    variance_type: str

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As DDPMScheduler.set_timesteps. Raises ValueError, with everything left as it was."""
        self._set(
            lambda: DDPMScheduler.set_timesteps(self, num_inference_steps, None, timesteps), device
        )

    def previous_timestep(self, timestep: Any) -> Any:
        """The timestep that a step leads to, -1 after the last; a tensor in a chain that is set.

        An int or an integer tensor, on a GPU without waiting for it. Raises ValueError for a
        timestep on the host that is not of the chain.
        """
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        following = torch.cat([self.timesteps[1:], self.timesteps.new_full((1,), -1)])
        known = self._known(timestep) if isinstance(timestep, Tensor) else int(timestep)
        if known is not None:
            self._look()
            if known not in self._chain:
                raise ValueError(f"timestep must be one of scheduler.timesteps; got {known}")
            return following[self._chain.index(known)]
        place = (self.timesteps == timestep).to(torch.int64).argmax()
        return following.index_select(0, place[None])[0]  # by itself it would be looked at

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the chain (Algorithm 2, Ho et al. 2020), as DDPMScheduler.step.

        model_output: the shape of sample, with twice its channels for a learned variance. timestep:
        an int, or an integer tensor of one element or one for each sample; a timestep of a tensor
        that did not come out of ``self.timesteps`` is not looked at on a GPU, so that noise is
        drawn at t = 0 too, and a value that is not of the chain gives NaN. sample: [N, ...],
        float32, float16, bfloat16 or float64. generator: one, or a list of one for each sample.

        Returns prev_sample and pred_original_sample, new tensors like sample, of the dtype that it
        and model_output promote to. Where a gradient is wanted it is recorded, by the reference
        backend. Raises TypeError, ValueError naming the argument.
        """
        rows = self._table("rows")
        learned = learned_variance(self)
        x, out, v = step_tensors(sample, model_output, learned)
        where = self._where(timestep, rows, x)
        noise = None
        if where.known is None or where.known > 0:
            noise = self._noise(out, generator)
            if self.variance_type == "learned" and not self._corrected:
                noise = cast(Tensor, v) ** 0.5 * noise
        prev, x0 = fused_step(rows, x, out, v if rows.learned else None, where, noise)
        if not return_dict:
            return prev, x0
        return DDPMSchedulerOutput(prev_sample=prev, pred_original_sample=x0)

    def _make_rows(self) -> TimestepRows:
        of_chain = self.custom_timesteps or self.num_inference_steps
        timesteps = (
            visited(self, self._corrected) if of_chain else [*range(len(self.alphas_cumprod))]
        )
        rows = ddpm_rows_of(self, timesteps, self._corrected)
        return self._by_timestep(rows, timesteps)


class FastDDIMScheduler(_Fused, DDIMScheduler, fast_of=DDIMScheduler):
    """diffusers' DDIMScheduler whose `step` is one fused kernel and waits for nothing.

    As `FastDDPMScheduler`.
    """

    _usual = (0.0, False)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """As DDIMScheduler.set_timesteps. Raises ValueError, with everything left as it was."""
        self._set(lambda: DDIMScheduler.set_timesteps(self, num_inference_steps, None), device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the chain (Eq. 12, Song et al. 2020), as DDIMScheduler.step.

        eta: 0 is deterministic, 1 has the variance of the posterior. use_clipped_model_output: the
        direction is that of the clipped x0. variance_noise: the noise, in place of a generator's.
        The other arguments, what comes back and the errors are those of `FastDDPMScheduler.step`;
        with compat="diffusers" a step may begin at any timestep of the schedule.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        rows = self._table("rows", float(eta), bool(use_clipped_model_output))
        x, out, _ = step_tensors(sample, model_output, False)
        where = self._where(timestep, rows, x)
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("generator and variance_noise: give one of them; got both")
            if variance_noise is None:
                variance_noise = self._noise(out, generator)
            noise = checks.like("variance_noise", variance_noise, "sample", x, checks.FLOATS)
        prev, x0 = fused_step(rows, x, out, None, where, noise)
        if not return_dict:
            return prev, x0
        return DDIMSchedulerOutput(prev_sample=prev, pred_original_sample=x0)

    def _make_rows(self, eta: float, use_clipped_model_output: bool) -> TimestepRows:
        timesteps = [*range(len(self.alphas_cumprod))]
        if self._corrected:
            timesteps = visited(self, True)
        rows = ddim_rows_of(self, timesteps, eta, use_clipped_model_output, self._corrected)
        return self._by_timestep(rows, timesteps)
