"""scheduler_config.json of diffusers' DDPMScheduler and DDIMScheduler, in this package's terms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ddpm_fast.schedules import NoiseSchedule, ScheduleWarning

SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
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
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
# Read by diffusers, but without a bearing on the chain unless thresholding is on, or (the last)
# on the final step of DDIM alone.
_UNREAD = ("dynamic_thresholding_ratio", "sample_max_value", "set_alpha_to_one")


@dataclass(frozen=True)
class SchedulerOptions:
    """What a scheduler config says about the chain.

    schedule: from beta_schedule or trained_betas, rescaled where rescale_betas_zero_snr is on.
    prediction: what the network returns, "epsilon", "x0" or "v".
    variance: "posterior" (fixed_small), "beta" (fixed_large), "learned" or "learned_range".
    clip: x0 is clipped to [-clip, clip]; None leaves it.
    spacing: "linspace", "leading" or "trailing", with steps_offset added to leading timesteps.
    thresholding: x0 is meant to be thresholded per sample (Saharia et al. 2022).
    """

    schedule: NoiseSchedule
    prediction: str
    variance: str
    clip: float | None
    spacing: str
    thresholding: bool
    steps_offset: int


def _refuse(option: str, value: object, accepted: str) -> NoReturn:
    raise ValueError(f"scheduler option {option}={value!r} is not supported; accepted: {accepted}")


def parse_scheduler(config: Mapping[str, Any]) -> SchedulerOptions:
    """Options of a parsed scheduler_config.json; missing ones have diffusers' defaults.

    Options without a meaning here are ignored with a warning, as diffusers does.

    Raises:
        ValueError: another scheduler, or a value that is not supported; the message names both.
    """
    kind = config.get("_class_name", "DDPMScheduler")
    if kind not in SCHEDULERS:
        _refuse("_class_name", kind, ", ".join(SCHEDULERS))
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    if unread := sorted(given.keys() - _DEFAULTS.keys() - set(_UNREAD)):
        warnings.warn(f"scheduler options ignored: {', '.join(unread)}", stacklevel=2)
    options = {**_DEFAULTS, **given}
    for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if not isinstance(options[name], bool):
            _refuse(name, options[name], "true or false")
    for name, accepted in (
        ("prediction_type", tuple(PREDICTIONS)),
        ("variance_type", tuple(VARIANCES)),
        ("timestep_spacing", SPACINGS),
    ):
        if options[name] not in accepted:
            _refuse(name, options[name], ", ".join(accepted))
    clip, offset = options["clip_sample_range"], options["steps_offset"]
    if not _is_number(clip) or clip <= 0:
        _refuse("clip_sample_range", clip, "a finite number > 0")
    if not isinstance(offset, int) or isinstance(offset, bool) or offset < 0:
        _refuse("steps_offset", offset, "an integer >= 0")
    return SchedulerOptions(
        schedule=_schedule(options),
        prediction=PREDICTIONS[options["prediction_type"]],
        variance=VARIANCES[options["variance_type"]],
        clip=float(clip) if options["clip_sample"] else None,
        spacing=options["timestep_spacing"],
        thresholding=options["thresholding"],
        steps_offset=offset,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _schedule(options: Mapping[str, Any]) -> NoiseSchedule:
    steps, betas = options["num_train_timesteps"], options["trained_betas"]
    kind, ends = options["beta_schedule"], (options["beta_start"], options["beta_end"])
    try:
        if betas is not None:
            schedule = NoiseSchedule.from_betas(betas)
            if steps != schedule.T:
                _refuse("num_train_timesteps", steps, f"{schedule.T}, as many as trained_betas")
        elif kind == "linear":
            schedule = NoiseSchedule.linear(steps, *ends)
        elif kind == "scaled_linear":
            schedule = NoiseSchedule.scaled_linear(steps, *ends)
        elif kind == "squaredcos_cap_v2":
            schedule = NoiseSchedule.cosine(steps)
        elif kind == "sigmoid":
            schedule = NoiseSchedule.sigmoid(steps, *ends)
        else:
            _refuse("beta_schedule", kind, "linear, scaled_linear, squaredcos_cap_v2, sigmoid")
        if options["rescale_betas_zero_snr"]:
            schedule = schedule.rescale_zero_terminal_snr()
    except TypeError as error:
        raise ValueError(str(error)) from error
    return schedule


def describe_schedule(
    schedule: NoiseSchedule, *, prediction: str, variance: str, clip: float | None, spacing: str
) -> dict[str, Any]:
    """A DDPMScheduler config for these options, the inverse of `parse_scheduler`.

    A schedule that diffusers can make by name is named; any other is given by its betas.

    Raises:
        TypeError: `schedule` is something else.
        ValueError: an option is none that `parse_scheduler` gives.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    variances = {
        "posterior": "fixed_small",
        "beta": "fixed_large",
        "learned": "learned",
        "learned_range": "learned_range",
    }
    for name, value, accepted in (
        ("prediction", prediction, tuple(predictions)),
        ("variance", variance, tuple(variances)),
        ("spacing", spacing, SPACINGS),
    ):
        if value not in accepted:
            raise ValueError(f"{name}: expected one of {', '.join(accepted)}, got {value!r}")
    if clip is not None and (not _is_number(clip) or clip <= 0):
        raise ValueError(f"clip: expected None or a finite number > 0, got {clip!r}")
    return {
        "_class_name": "DDPMScheduler",
        **_DEFAULTS,
        **_describe_betas(schedule),
        "prediction_type": predictions[prediction],
        "variance_type": variances[variance],
        "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else float(clip),
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
