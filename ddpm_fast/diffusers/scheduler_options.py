"""Supported schedulers of diffusers and their options, in the terms of this package."""

from __future__ import annotations

import inspect
import math
import warnings
from functools import cache
from typing import Any, Literal, cast

import diffusers

from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, DynamicThreshold
from ddpm_fast.models.checkpoint.scheduler_config import PREDICTIONS, SPECS, parse_scheduler
from ddpm_fast.utils import checks

Compat = Literal["diffusers", "corrected"]
COMPATS = ("diffusers", "corrected")

_SUPPORTED: dict[type, Any] = {
    getattr(diffusers, name): spec for name, spec in SPECS.items() if spec.drop_in is not None
}
_NAMES = ", ".join(kind.__name__ for kind in _SUPPORTED)


def check_compat(compat: Any) -> Compat:
    """Return `compat`, "diffusers" or "corrected"; raise ValueError for anything else."""
    return cast(Compat, checks.choice("compat", compat, COMPATS))


def base_class(scheduler: Any) -> type:
    """Return the class of diffusers whose steps a scheduler computes.

    Raises:
        TypeError: The scheduler is of another class.
        ValueError: An option has a value that is not supported.
    """
    base = _base_class(scheduler)
    for name, value in get_options(scheduler).items():
        accepted = _SUPPORTED[base].accepted_values(name, _defaults(base)[name])
        off = not value and not all(accepted)  # null is as good as false
        if accepted and value not in accepted and not off:
            raise ValueError(
                f"scheduler option {name} of {base.__name__} must be"
                f" {' or '.join(map(repr, accepted))}; got {value!r}"
            )
    return base


def reject_subclass(scheduler: Any) -> None:
    """Raise TypeError for a subclass of a supported scheduler, whose steps are not known."""
    kind = type(scheduler)
    if kind not in _SUPPORTED and "replaces" not in vars(kind):
        raise TypeError(
            f"scheduler must be one of {_NAMES} or a drop-in of ddpm_fast;"
            f" got {kind.__name__}, whose steps may differ"
        )


def get_options(scheduler: Any) -> dict[str, Any]:
    """Return the options of a scheduler's class; its configuration may have those of others."""
    return {name: scheduler.config[name] for name in _defaults(_base_class(scheduler))}


def get_compat(scheduler: Any) -> Compat:
    """Return the option compat of a drop-in, and "diffusers" for a scheduler of diffusers."""
    return scheduler.config.compat if hasattr(type(scheduler), "replaces") else "diffusers"


def _base_class(scheduler: Any) -> type:
    base = getattr(type(scheduler), "replaces", type(scheduler))
    if base not in _SUPPORTED:
        raise TypeError(f"scheduler must be one of {_NAMES}; got {type(scheduler).__name__}")
    return base


@cache
def _defaults(base: Any) -> dict[str, Any]:
    parameters = list(inspect.signature(base.__init__).parameters.items())[1:]
    return {name: parameter.default for name, parameter in parameters}


def get_prediction(scheduler: Any) -> Prediction:
    """Return the model output that a scheduler expects: "epsilon", "x0" or "v"."""
    return cast(Prediction, PREDICTIONS[scheduler.config.prediction_type])


def warn_of_ignored_prediction(scheduler: Any) -> None:
    """Warn if a configuration of an old release says x0, and diffusers reads it as epsilon."""
    if scheduler.config.get("predict_epsilon") is False and get_prediction(scheduler) == "epsilon":
        warnings.warn(
            "scheduler option predict_epsilon=False is ignored by this release of diffusers, which"
            " samples with prediction_type 'epsilon'; set prediction_type='sample'",
            stacklevel=4,
        )


def has_learned_variance(scheduler: Any) -> bool:
    """Return True if a scheduler expects a variance in the model output."""
    return get_options(scheduler).get("variance_type") in ("learned", "learned_range")


def get_clip(scheduler: Any) -> Clip:
    """Return the clip of x0; as in diffusers, thresholding precedes clip_sample."""
    config = get_options(scheduler)
    if config["thresholding"]:
        quantile, cap = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        quantile = checks.real("dynamic_thresholding_ratio", quantile, 0, 1, "(]")
        if cap is None:
            return DynamicThreshold(quantile)
        return DynamicThreshold(quantile, checks.real("sample_max_value", cap, 0, math.inf, "()"))
    if not config.get("clip_sample"):
        return None
    return checks.real("clip_sample_range", config["clip_sample_range"], 0, math.inf, "()")


def exact_schedule(scheduler: Any) -> NoiseSchedule:
    """Return the schedule of a scheduler's configuration, in float64.

    Raises:
        ValueError: The schedule is not supported.
    """
    kind = base_class(scheduler)
    return parse_scheduler(get_options(scheduler) | {"_class_name": kind.__name__}).schedule
