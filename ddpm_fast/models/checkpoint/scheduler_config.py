"""Options of diffusers' schedulers: which are supported, and scheduler_config.json."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from ddpm_fast.diffusion.schedule import NoiseSchedule, ScheduleWarning
from ddpm_fast.diffusion.schedule_values import capped_betas, laplace_curve
from ddpm_fast.diffusion.thresholding import Clip, DynamicThreshold
from ddpm_fast.models.base_config import is_finite, is_integer
from ddpm_fast.utils import checks

# diffusers has no name for a score, and its schedulers reject this one.
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "score": "score"}
VARIANCES = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "beta",
    "fixed_large_log": "beta",
    "learned": "learned",
    "learned_range": "learned_range",
}
SPACINGS = ("linspace", "leading", "trailing")

_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
_CLIP = ("clip_sample", "clip_sample_range")
_THRESHOLD = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")


@dataclass(frozen=True)
class SchedulerSpec:
    """Options of a scheduler of diffusers, and the supported values.

    Attributes:
        lacks: Options in `_DEFAULTS` that the scheduler does not have; it samples without them.
        beta_schedules: Values of beta_schedule.
        spacing: Default of timestep_spacing.
        solver: Options of the solver, which change neither schedule nor model output.
        fixed: Options that change the timesteps or the meaning of the model output, each with the
            only value that `parse_scheduler` accepts besides null, false and 0, which switch it
            off.
        drop_in: Options of which `ddpm_fast.diffusers` accepts only some values, and these. None:
            it does not support the scheduler.
    """

    lacks: tuple[str, ...] = ()
    beta_schedules: tuple[str, ...] = _BETA_SCHEDULES
    spacing: str = "leading"
    solver: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    drop_in: Mapping[str, tuple[Any, ...]] | None = None

    @property
    def schedule(self) -> set[str]:
        """Options that describe schedule, model output and timesteps."""
        return _DEFAULTS.keys() - set(self.lacks)

    def accepted_values(self, option: str, default: Any) -> tuple[Any, ...]:
        """Return the values of an option that `ddpm_fast.diffusers` accepts; empty for all.

        Args:
            option: Name of the option.
            default: Its default, the only accepted value if the option is not in this table.
        """
        known = {*self.schedule, *self.solver, *self.fixed}
        return (self.drop_in or {}).get(option, () if option in known else (default,))


_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_MULTISTEP = ("solver_order", "solver_type", "lower_order_final", "final_sigmas_type")
_DROP_IN = {"prediction_type": ("epsilon", "sample", "v_prediction")}
_MULTISTEP_DROP_IN = {
    **_DROP_IN,
    "solver_order": (1, 2),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}
_SINGLE_STEP = SchedulerSpec(solver=("set_alpha_to_one",), drop_in=_DROP_IN)
SPECS: Mapping[str, SchedulerSpec] = {
    "DDPMScheduler": replace(_SINGLE_STEP, beta_schedules=(*_BETA_SCHEDULES, "laplace")),
    "DDIMScheduler": _SINGLE_STEP,
    "DPMSolverMultistepScheduler": SchedulerSpec(
        lacks=_CLIP,
        spacing="linspace",
        solver=(*_MULTISTEP, "algorithm_type", "euler_at_final"),
        fixed={**_SIGMAS, "use_lu_lambdas": False, "lambda_min_clipped": -math.inf},
        drop_in={**_MULTISTEP_DROP_IN, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
    ),
    "UniPCMultistepScheduler": SchedulerSpec(
        lacks=_CLIP,
        spacing="linspace",
        solver=(*_MULTISTEP, "predict_x0", "disable_corrector", "solver_p"),
        fixed={**_SIGMAS, "sigma_min": None, "sigma_max": None, "shift_terminal": None},
        drop_in={
            **_MULTISTEP_DROP_IN,
            "predict_x0": (True,),
            "solver_p": (None,),
            "shift_terminal": (None,),
        },
    ),
    "PNDMScheduler": SchedulerSpec(
        lacks=(*_CLIP, *_THRESHOLD, "rescale_betas_zero_snr"),
        solver=("skip_prk_steps", "set_alpha_to_one"),
    ),
}
_REPLACEMENTS = {"FastDDPMScheduler": "DDPMScheduler", "FastDDIMScheduler": "DDIMScheduler"}
SCHEDULERS = (*SPECS, *_REPLACEMENTS)


def diffusers_scheduler(name: str) -> str:
    """Return the class of diffusers that reads a configuration of `name`, one of `SCHEDULERS`."""
    return _REPLACEMENTS.get(name, name)


@dataclass(frozen=True)
class SchedulerOptions:
    """Contents of a scheduler configuration.

    Attributes:
        schedule: From beta_schedule or trained_betas, rescaled if rescale_betas_zero_snr is true.
            Its last alphas_cumprod is then 0; DPM-Solver++ and UniPC of diffusers start at 2^-24
            instead.
        prediction: Output of the network: "epsilon", "x0", "v" or "score".
        variance: "posterior" (fixed_small), "beta" (fixed_large), "learned" or "learned_range".
        clip: x0 is clipped to [-clip, clip], or thresholded by a `DynamicThreshold`. None: neither.
        spacing: "linspace", "leading" or "trailing".
        steps_offset: Is added to leading timesteps.
    """

    schedule: NoiseSchedule
    prediction: str
    variance: str
    clip: Clip
    spacing: str
    steps_offset: int


def _reject(option: str, value: object, accepted: str) -> NoReturn:
    raise ValueError(f"scheduler option {option} must be {accepted}; got {value!r}")


def parse_scheduler(config: Mapping[str, Any]) -> SchedulerOptions:
    """Parse the contents of scheduler_config.json.

    Options of the solver are ignored. Options that the scheduler does not have are ignored with a
    warning, as in diffusers. As there, null switches an option off, and the bounds of a clip that
    is off may have any value.

    Args:
        config: Options by name; missing ones have their defaults in diffusers. The option
            predict_epsilon of old releases is read as their successors did: false is the
            prediction_type "sample", true is "epsilon".

    Raises:
        ValueError: The scheduler or a value is not supported.
    """
    name = config.get("_class_name", "DDPMScheduler")
    if name not in SCHEDULERS:
        _reject("_class_name", name, f"one of {', '.join(SCHEDULERS)}")
    spec = SPECS[diffusers_scheduler(name)]
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    if "predict_epsilon" in options:
        options["prediction_type"] = _prediction_type(options)
        del options["predict_epsilon"]
    for option, value in spec.fixed.items():
        given = options.pop(option, value)
        # No lower bound of lambda is off but -inf.
        if given != value and (given or value == -math.inf):
            _reject(option, given, repr(value))
    if ignored := sorted(options.keys() - spec.schedule - set(spec.solver)):
        warnings.warn(f"scheduler options ignored: {', '.join(ignored)}", stacklevel=2)
    options = {
        **_DEFAULTS,
        "timestep_spacing": spec.spacing,
        **dict.fromkeys({"clip_sample"} & set(spec.lacks), False),
        **{option: options[option] for option in options.keys() & spec.schedule},
    }
    # DPM-Solver writes null, for which the variance is that of fixed_small.
    if options["variance_type"] is None:
        options["variance_type"] = _DEFAULTS["variance_type"]
    for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if options[name] not in (True, False, None):
            _reject(name, options[name], "true or false")
        options[name] = bool(options[name])
    options["steps_offset"] = options["steps_offset"] or 0
    for name, accepted in (
        ("prediction_type", tuple(PREDICTIONS)),
        ("variance_type", tuple(VARIANCES)),
        ("timestep_spacing", SPACINGS),
        ("beta_schedule", spec.beta_schedules if options["trained_betas"] is None else ()),
    ):
        if accepted and options[name] not in accepted:
            _reject(name, options[name], f"one of {', '.join(accepted)}")
    if not is_integer(options["steps_offset"], 0):
        _reject("steps_offset", options["steps_offset"], "an integer >= 0")
    return SchedulerOptions(
        schedule=_schedule(options),
        prediction=PREDICTIONS[options["prediction_type"]],
        variance=VARIANCES[options["variance_type"]],
        clip=_clip(options),
        spacing=options["timestep_spacing"],
        steps_offset=options["steps_offset"],
    )


def _prediction_type(options: Mapping[str, Any]) -> Any:
    """Return prediction_type for options that have predict_epsilon."""
    old, new = options["predict_epsilon"], options.get("prediction_type")
    if old is None:
        return new or _DEFAULTS["prediction_type"]
    if not isinstance(old, bool):
        _reject("predict_epsilon", old, "true, false or null")
    if not old:
        # Later releases wrote their default, "epsilon", beside it.
        if new not in (None, "epsilon", "sample"):
            _reject("predict_epsilon", old, f"null or true with prediction_type {new!r}")
        return "sample"
    # Its default, true, remained in files whose prediction_type was set later.
    return new or "epsilon"


def _clip(options: Mapping[str, Any]) -> Clip:
    # As in diffusers, thresholding precedes clip_sample, and neither reads options of the other.
    if options["thresholding"]:
        ratio, cap = options["dynamic_thresholding_ratio"], options["sample_max_value"]
        if not is_finite(ratio) or not 0 < ratio <= 1:
            _reject("dynamic_thresholding_ratio", ratio, "a number in (0, 1]")
        if cap is None:
            return DynamicThreshold(float(ratio))
        if not is_finite(cap) or cap <= 0:
            _reject("sample_max_value", cap, "null or a finite number > 0")
        return DynamicThreshold(float(ratio), float(cap))
    if not options["clip_sample"]:
        return None
    bound = options["clip_sample_range"]
    if not is_finite(bound) or bound <= 0:
        _reject("clip_sample_range", bound, "a finite number > 0")
    return float(bound)


def _schedule(options: Mapping[str, Any]) -> NoiseSchedule:
    steps, betas = options["num_train_timesteps"], options["trained_betas"]
    name, ends = options["beta_schedule"], (options["beta_start"], options["beta_end"])
    try:
        if betas is not None:
            schedule = NoiseSchedule.from_betas(betas)
            if steps != schedule.T:
                accepted = f"{schedule.T}, as many as trained_betas (its default is 1000)"
                _reject("num_train_timesteps", steps, accepted)
        elif name == "linear":
            schedule = NoiseSchedule.linear(steps, *ends)
        elif name == "scaled_linear":
            schedule = NoiseSchedule.scaled_linear(steps, *ends)
        elif name == "squaredcos_cap_v2":
            schedule = NoiseSchedule.cosine(steps)
        elif name == "laplace":
            betas = capped_betas(laplace_curve(checks.integer("T", steps, 1)), 0.999)
            schedule = NoiseSchedule.from_betas(betas, name)
        else:
            schedule = NoiseSchedule.sigmoid(steps, *ends)
        if options["rescale_betas_zero_snr"]:
            schedule = schedule.rescale_zero_terminal_snr()
    except TypeError as error:
        raise ValueError(str(error)) from error
    return schedule


def make_scheduler_config(
    schedule: NoiseSchedule, *, prediction: str, variance: str, clip: Clip, spacing: str
) -> dict[str, Any]:
    """Return a DDPMScheduler configuration, the inverse of `parse_scheduler`.

    A schedule that diffusers has is written by name, and any other by its betas.

    Args:
        schedule: The noise schedule.
        prediction: "epsilon", "x0", "v" or "score".
        variance: "posterior", "posterior_log", "beta", "beta_log", "learned" or "learned_range".
        clip: Bound of x0, a `DynamicThreshold` or None.
        spacing: "linspace", "leading" or "trailing".

    Raises:
        TypeError: `schedule` is not a `NoiseSchedule`.
        ValueError: Another argument has a value that is not supported.
    """
    checks.instance("schedule", schedule, NoiseSchedule)
    prediction_types = {prediction: name for name, prediction in PREDICTIONS.items()}
    variance_types = {
        "posterior": "fixed_small",
        "posterior_log": "fixed_small_log",
        "beta": "fixed_large",
        "beta_log": "fixed_large_log",
        "learned": "learned",
        "learned_range": "learned_range",
    }
    checks.choice("prediction", prediction, prediction_types)
    checks.choice("variance", variance, variance_types)
    checks.choice("spacing", spacing, SPACINGS)
    threshold = clip if isinstance(clip, DynamicThreshold) else None
    bound = clip if isinstance(clip, float | int) else None
    if clip is not threshold and (bound is None or not is_finite(bound) or bound <= 0):
        raise ValueError(f"clip must be None, a finite number > 0 or a threshold; got {clip!r}")
    return {
        "_class_name": "DDPMScheduler",
        **_DEFAULTS,
        **_describe_betas(schedule),
        "prediction_type": prediction_types[prediction],
        "variance_type": variance_types[variance],
        "clip_sample": bound is not None,
        "clip_sample_range": 1.0 if bound is None else float(bound),
        "thresholding": threshold is not None,
        "dynamic_thresholding_ratio": threshold.quantile if threshold else 0.995,
        "sample_max_value": _finite(threshold.cap) if threshold else 1.0,
        "timestep_spacing": spacing,
    }


def _finite(cap: float) -> float | None:
    return None if math.isinf(cap) else cap


def _describe_betas(schedule: NoiseSchedule) -> dict[str, Any]:
    betas = schedule.betas.tolist()
    names = {
        "linear": "linear",
        "scaled_linear": "scaled_linear",
        "cosine": "squaredcos_cap_v2",
        "laplace": "laplace",
    }
    named = {
        "num_train_timesteps": schedule.T,
        "beta_schedule": names.get(schedule.name, "linear"),
        "beta_start": betas[0],
        "beta_end": betas[-1],
    }
    if schedule.name in names:
        if schedule.name in ("cosine", "laplace"):
            del named["beta_start"], named["beta_end"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ScheduleWarning)
            if _schedule({**_DEFAULTS, **named}) == schedule:
                return named
    return {"num_train_timesteps": schedule.T, "trained_betas": betas}
