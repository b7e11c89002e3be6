"""What a scheduler's configuration asks for in this package's terms, and what it may not ask."""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any, Literal, cast

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, DynamicThreshold
from ddpm_fast.models.checkpoint.scheduler_config import PREDICTIONS, parse_scheduler
from ddpm_fast.utils import checks

Compat = Literal["diffusers", "corrected"]
COMPATS = ("diffusers", "corrected")

_ANY: tuple[Any, ...] = ()
_SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "timestep_spacing", "steps_offset"),
    *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
)
_SIGMAS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "final_sigmas_type"),
    *("solver_type", "lower_order_final", "time_shift_type", "flow_shift"),
)
_PREDICTED = {"prediction_type": ("epsilon", "sample", "v_prediction")}
_OWN_SIGMAS = {"use_flow_sigmas": (False,), "use_dynamic_shifting": (False,)}
# By scheduler: each option that is known, and the values that are accepted where not all are.
_ACCEPTED: dict[type, dict[str, tuple[Any, ...]]] = {
    DDPMScheduler: dict.fromkeys(
        (*_SCHEDULE, "variance_type", "clip_sample", "clip_sample_range"), _ANY
    )
    | _PREDICTED,
    DDIMScheduler: dict.fromkeys(
        (*_SCHEDULE, "set_alpha_to_one", "clip_sample", "clip_sample_range"), _ANY
    )
    | _PREDICTED,
    DPMSolverMultistepScheduler: dict.fromkeys(
        (
            *_SCHEDULE,
            *_SIGMAS,
            "euler_at_final",
            "use_lu_lambdas",
            "lambda_min_clipped",
            "variance_type",
        ),
        _ANY,
    )
    | _PREDICTED
    | _OWN_SIGMAS
    | {"solver_order": (1, 2), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
    UniPCMultistepScheduler: dict.fromkeys(
        (*_SCHEDULE, *_SIGMAS, "disable_corrector", "sigma_min", "sigma_max"), _ANY
    )
    | _PREDICTED
    | _OWN_SIGMAS
    | {
        "solver_order": (1, 2),
        "predict_x0": (True,),
        "solver_p": (None,),
        "shift_terminal": (None,),
    },
}


def check_compat(compat: Any) -> Compat:
    """``compat``, "diffusers" or "corrected". Raises ValueError for anything else."""
    if compat not in COMPATS:
        raise ValueError(f"compat must be 'diffusers' or 'corrected'; got {compat!r}")
    return compat


def base_class(scheduler: Any) -> type:
    """The class of diffusers whose steps a scheduler takes.

    Raises TypeError for another scheduler, ValueError for an option that is not supported.
    """
    base = _base(scheduler)
    for name, value in get_options(scheduler).items():
        accepted = _ACCEPTED[base].get(name, (_defaults(base)[name],))
        if accepted and value not in accepted:
            raise ValueError(
                f"scheduler option {name}={value!r} of {base.__name__} is not supported; accepted:"
                f" {', '.join(map(repr, accepted))}"
            )
    return base


def reject_subclass(scheduler: Any) -> None:
    """That a scheduler steps as its class is known to. Raises TypeError."""
    kind = type(scheduler)
    if kind not in _ACCEPTED and "replaces" not in vars(kind):
        raise TypeError(
            f"scheduler must be one of {', '.join(k.__name__ for k in _ACCEPTED)}, or one of ours;"
            f" got {kind.__name__}, whose own steps are not known"
        )


def get_options(scheduler: Any) -> dict[str, Any]:
    """The options of a scheduler's own class: a configuration may hold those of others too."""
    return {name: scheduler.config[name] for name in _defaults(_base(scheduler))}


def get_compat(scheduler: Any) -> Compat:
    """What a scheduler of ours was made with; "diffusers" for the library's."""
    return scheduler.config.compat if hasattr(type(scheduler), "replaces") else "diffusers"


def _base(scheduler: Any) -> type:
    base = getattr(type(scheduler), "replaces", type(scheduler))
    if base not in _ACCEPTED:
        accepted = ", ".join(kind.__name__ for kind in _ACCEPTED)
        raise TypeError(f"scheduler must be one of {accepted}; got {type(scheduler).__name__}")
    return base


@cache
def _defaults(base: Any) -> dict[str, Any]:
    parameters = list(inspect.signature(base.__init__).parameters.items())[1:]
    return {name: parameter.default for name, parameter in parameters}


def get_prediction(scheduler: Any) -> Prediction:
    """What a scheduler's network returns: "epsilon", "x0" or "v"."""
    return cast(Prediction, PREDICTIONS[scheduler.config.prediction_type])


def has_learned_variance(scheduler: Any) -> bool:
    """Whether a scheduler's network returns a variance beside its prediction."""
    return get_options(scheduler).get("variance_type") in ("learned", "learned_range")


def get_clip(scheduler: Any) -> Clip:
    """What a step does to x0: thresholding comes before clip_sample, which not all have."""
    config = get_options(scheduler)
    if config["thresholding"]:
        quantile, cap = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        return DynamicThreshold(
            checks.real("dynamic_thresholding_ratio", quantile, 0, 1, "(]"),
            checks.real("sample_max_value", cap, 0, math.inf, "()"),
        )
    if not config.get("clip_sample"):
        return None
    return checks.real("clip_sample_range", config["clip_sample_range"], 0, math.inf, "()")


def exact_schedule(scheduler: Any) -> NoiseSchedule:
    """The schedule of a scheduler's configuration, in float64.

    Raises ValueError for one that `NoiseSchedule` does not have.
    """
    kind = base_class(scheduler)
    return parse_scheduler(get_options(scheduler) | {"_class_name": kind.__name__}).schedule
