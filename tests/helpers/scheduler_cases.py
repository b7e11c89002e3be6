"""Schedulers of diffusers and their drop-ins: options, models in closed form, trajectories."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from ddpm_fast.diffusers import FastDDIMScheduler, FastDDPMScheduler
from diffusers_pairs import closed_form, rough

SHAPE = (2, 3, 6, 5)
FAST = {"ddpm": FastDDPMScheduler, "ddim": FastDDIMScheduler}
THEIRS = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}
PREDICTION_NAMES = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}

PREDICTIONS = {name: {"prediction_type": name} for name in PREDICTION_NAMES}
COMMON: dict[str, dict[str, Any]] = {
    **PREDICTIONS,
    "unclipped": {"clip_sample": False},
    "clipped-to-half": {"clip_sample_range": 0.5},
    "thresholded": {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 2},
    "threshold-below-1": {"thresholding": True, "sample_max_value": 0.5},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "offset": {"steps_offset": 1},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "cosine-unclipped": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_end": 0.012},
    "betas-given": {"trained_betas": torch.linspace(1e-3, 0.05, 400).tolist()},
    "zero-snr-v": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
    "zero-snr-x0": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "sample",
    },
}
COMMON["betas-given"]["num_train_timesteps"] = 400
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "ddpm": COMMON
    | {
        name: {"variance_type": name}
        for name in ("fixed_small_log", "fixed_large", "learned", "learned_range", "other")
    }
    | {
        "sigmoid": {"beta_schedule": "sigmoid"},
        "laplace": {"beta_schedule": "laplace"},
        "fixed-large-trailing": {"variance_type": "fixed_large", "timestep_spacing": "trailing"},
        "learned-range-v": {"variance_type": "learned_range", "prediction_type": "v_prediction"},
    },
    "ddim": COMMON | {"alpha-0-at-the-end": {"set_alpha_to_one": False}},
}


def normals(seed: int, shape=SHAPE, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learned(options: dict[str, Any]) -> bool:
    return str(options.get("variance_type")).startswith("learned")


def model_of(scheduler: Any) -> Any:
    """Return the exact network for N(0.2, 0.25) plus waves, and a variance if one is learned."""
    schedule = SimpleNamespace(alphas_cumprod=scheduler.alphas_cumprod.double())
    network = rough(closed_form(schedule, PREDICTION_NAMES[scheduler.config.prediction_type]))

    def model(x: Tensor, t: Tensor) -> Tensor:
        out = network(x, t.expand(len(x)))
        if not learned(scheduler.config):
            return out
        variance = torch.sin(7 * x)
        if scheduler.config.variance_type == "learned":
            variance = variance.abs() / 100  # diffusers takes its square root
        return torch.cat([out, variance], dim=1)

    return model


def trajectory(scheduler: Any, x: Tensor, **step_options: Any) -> list[tuple[Tensor, Tensor, Any]]:
    """Return (state, output, result of the step) along a chain of diffusers."""
    model, found = model_of(scheduler), []
    for row, t in enumerate(scheduler.timesteps):
        out = model(x, t)
        result = scheduler.step(out, t, x, generator=generator(row), **step_options)
        found.append((x, out, result))
        x = result.prev_sample
    return found


def assert_near(ours: Tensor, theirs: Tensor, relative: float = 1e-5, plus: float = 0.0) -> None:
    """Compare up to a share of the largest value plus an absolute error."""
    assert ours.dtype == theirs.dtype
    scale = float(theirs.nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * scale + plus, equal_nan=True)
