"""scheduler_config.json of diffusers' schedulers, in this package's terms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ddpm_fast.diffusion.schedule import NoiseSchedule, ScheduleWarning
from ddpm_fast.diffusion.thresholding import Clip, DynamicThreshold

# diffusers has no name for a score, and its schedulers refuse ours.
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
_CLIP = ("clip_sample", "clip_sample_range")
_THRESHOLD = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")


@dataclass(frozen=True)
class _Kind:
    """What a scheduler of diffusers reads.

    lacks: options of `_DEFAULTS` that it has not; it samples as if they were off.
    spacing: its default.
    own: options that say how it steps, and nothing of the chain.
    fixed: options that would move the steps or change what the network returns, and the one
        value that leaves both alone.
    """

    lacks: tuple[str, ...] = ()
    spacing: str = "leading"
    own: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


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
_ANCESTRAL = _Kind(own=("set_alpha_to_one",))
_KINDS = {
    "DDPMScheduler": _ANCESTRAL,
    "DDIMScheduler": _ANCESTRAL,
    "DPMSolverMultistepScheduler": _Kind(
        lacks=_CLIP,
        spacing="linspace",
        own=(*_MULTISTEP, "algorithm_type", "euler_at_final"),
        fixed={**_SIGMAS, "use_lu_lambdas": False, "lambda_min_clipped": -math.inf},
    ),
    "UniPCMultistepScheduler": _Kind(
        lacks=_CLIP,
        spacing="linspace",
        own=(*_MULTISTEP, "predict_x0", "disable_corrector", "solver_p"),
        fixed={**_SIGMAS, "sigma_min": None, "sigma_max": None, "shift_terminal": None},
    ),
    "PNDMScheduler": _Kind(
        lacks=(*_CLIP, *_THRESHOLD, "rescale_betas_zero_snr"),
        own=("skip_prk_steps", "set_alpha_to_one"),
    ),
}
_REPLACEMENTS = {"FastDDPMScheduler": "DDPMScheduler", "FastDDIMScheduler": "DDIMScheduler"}
SCHEDULERS = (*_KINDS, *_REPLACEMENTS)


def diffusers_scheduler(kind: str) -> str:
    """The class of diffusers that reads the config of `kind`, one of `SCHEDULERS`."""
    return _REPLACEMENTS.get(kind, kind)


@dataclass(frozen=True)
class SchedulerOptions:
    """What a scheduler config says about the chain.

    schedule: from beta_schedule or trained_betas, rescaled where rescale_betas_zero_snr is on (its
        last alphas_cumprod is then 0; diffusers' DPM-Solver++ and UniPC step from 2^-24 instead).
    prediction: what the network returns, "epsilon", "x0", "v" or "score".
    variance: "posterior" (fixed_small), "beta" (fixed_large), "learned" or "learned_range".
    clip: x0 is clipped to [-clip, clip]; None leaves it; a `DynamicThreshold` thresholds it.
    spacing: "linspace", "leading" or "trailing", with steps_offset added to leading timesteps.
    """

    schedule: NoiseSchedule
    prediction: str
    variance: str
    clip: Clip
    spacing: str
    steps_offset: int


def _reject(option: str, value: object, accepted: str) -> NoReturn:
    raise ValueError(f"scheduler option {option}={value!r} is not supported; accepted: {accepted}")


def parse_scheduler(config: Mapping[str, Any]) -> SchedulerOptions:
    """Options of a parsed scheduler_config.json; missing ones have diffusers' defaults.

    Options that say how a solver steps are left to it. Options that the scheduler does not have
    are ignored with a warning, as diffusers does.

    Raises:
        ValueError: another scheduler, or a value that is not supported; the message names both.
    """
    name = config.get("_class_name", "DDPMScheduler")
    if name not in SCHEDULERS:
        _reject("_class_name", name, ", ".join(SCHEDULERS))
    kind = _KINDS[diffusers_scheduler(name)]
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    for option, value in kind.fixed.items():
        if option in given and given.pop(option) != value:
            _reject(option, config[option], repr(value))
    read = _DEFAULTS.keys() - set(kind.lacks)
    if unread := sorted(given.keys() - read - set(kind.own)):
        warnings.warn(f"scheduler options ignored: {', '.join(unread)}", stacklevel=2)
    options = {
        **_DEFAULTS,
        "timestep_spacing": kind.spacing,
        **dict.fromkeys({"clip_sample"} & set(kind.lacks), False),
        **{option: given[option] for option in given.keys() & read},
    }
    # null is DPM-Solver's, and DDPM's variance is then fixed_small's.
    if options["variance_type"] is None:
        options["variance_type"] = _DEFAULTS["variance_type"]
    for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if not isinstance(options[name], bool):
            _reject(name, options[name], "true or false")
    for name, accepted in (
        ("prediction_type", tuple(PREDICTIONS)),
        ("variance_type", tuple(VARIANCES)),
        ("timestep_spacing", SPACINGS),
    ):
        if options[name] not in accepted:
            _reject(name, options[name], ", ".join(accepted))
    offset = options["steps_offset"]
    if not isinstance(offset, int) or isinstance(offset, bool) or offset < 0:
        _reject("steps_offset", offset, "an integer >= 0")
    return SchedulerOptions(
        schedule=_schedule(options),
        prediction=PREDICTIONS[options["prediction_type"]],
        variance=VARIANCES[options["variance_type"]],
        clip=_clip(options),
        spacing=options["timestep_spacing"],
        steps_offset=offset,
    )


def _clip(options: Mapping[str, Any]) -> Clip:
    """As diffusers' step: thresholding comes before clip_sample."""
    bound, ratio, cap = (
        options[name]
        for name in ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value")
    )
    if not _is_number(bound) or bound <= 0:
        _reject("clip_sample_range", bound, "a finite number > 0")
    if not _is_number(ratio) or not 0 < ratio <= 1:
        _reject("dynamic_thresholding_ratio", ratio, "a number in (0, 1]")
    if not _is_number(cap) or cap <= 0:
        _reject("sample_max_value", cap, "a finite number > 0")
    if options["thresholding"]:
        return DynamicThreshold(float(ratio), float(cap))
    return float(bound) if options["clip_sample"] else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _schedule(options: Mapping[str, Any]) -> NoiseSchedule:
    steps, betas = options["num_train_timesteps"], options["trained_betas"]
    kind, ends = options["beta_schedule"], (options["beta_start"], options["beta_end"])
    try:
        if betas is not None:
            schedule = NoiseSchedule.from_betas(betas)
            if steps != schedule.T:
                _reject("num_train_timesteps", steps, f"{schedule.T}, as many as trained_betas")
        elif kind == "linear":
            schedule = NoiseSchedule.linear(steps, *ends)
        elif kind == "scaled_linear":
            schedule = NoiseSchedule.scaled_linear(steps, *ends)
        elif kind == "squaredcos_cap_v2":
            schedule = NoiseSchedule.cosine(steps)
        elif kind == "sigmoid":
            schedule = NoiseSchedule.sigmoid(steps, *ends)
        else:
            _reject("beta_schedule", kind, "linear, scaled_linear, squaredcos_cap_v2, sigmoid")
        if options["rescale_betas_zero_snr"]:
            schedule = schedule.rescale_zero_terminal_snr()
    except TypeError as error:
        raise ValueError(str(error)) from error
    return schedule


def describe_schedule(
    schedule: NoiseSchedule, *, prediction: str, variance: str, clip: Clip, spacing: str
) -> dict[str, Any]:
    """A DDPMScheduler config for these options, the inverse of `parse_scheduler`.

    A schedule that diffusers can make by name is named; any other is given by its betas.

    Raises:
        TypeError: `schedule` is something else.
        ValueError: an option is none that `parse_scheduler` gives.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule; got {type(schedule).__name__}")
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    variances = {
        "posterior": "fixed_small",
        "posterior_log": "fixed_small_log",
        "beta": "fixed_large",
        "beta_log": "fixed_large_log",
        "learned": "learned",
        "learned_range": "learned_range",
    }
    for name, value, accepted in (
        ("prediction", prediction, tuple(predictions)),
        ("variance", variance, tuple(variances)),
        ("spacing", spacing, SPACINGS),
    ):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")
    threshold = clip if isinstance(clip, DynamicThreshold) else None
    bound = clip if isinstance(clip, float | int) else None
    if clip is not threshold and (bound is None or not _is_number(bound) or bound <= 0):
        raise ValueError(f"clip must be None, a finite number > 0 or a threshold; got {clip!r}")
    if threshold and math.isinf(threshold.cap):
        raise ValueError(f"clip must be a threshold with a finite cap; got {clip!r}")
    return {
        "_class_name": "DDPMScheduler",
        **_DEFAULTS,
        **_describe_betas(schedule),
        "prediction_type": predictions[prediction],
        "variance_type": variances[variance],
        "clip_sample": bound is not None,
        "clip_sample_range": 1.0 if bound is None else float(bound),
        "thresholding": threshold is not None,
        "dynamic_thresholding_ratio": threshold.quantile if threshold else 0.995,
        "sample_max_value": threshold.cap if threshold else 1.0,
        "timestep_spacing": spacing,
    }


def _describe_betas(schedule: NoiseSchedule) -> dict[str, Any]:
    betas = schedule.betas.tolist()
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
    named = {
        "num_train_timesteps": schedule.T,
        "beta_schedule": names.get(schedule.name, "linear"),
        "beta_start": betas[0],
        "beta_end": betas[-1],
    }
    if schedule.name in names:
        if schedule.name == "cosine":
            del named["beta_start"], named["beta_end"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ScheduleWarning)
            if _schedule({**_DEFAULTS, **named}) == schedule:
                return named
    return {"num_train_timesteps": schedule.T, "trained_betas": betas}
