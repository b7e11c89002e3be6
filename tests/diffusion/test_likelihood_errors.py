"""The variational bound: bad arguments and bad model outputs."""

from __future__ import annotations

import math

import pytest
import torch

from cases import SCHEDULE, assert_named
from ddpm_fast.diffusion.likelihood import variational_bound
from sampler_cases import smooth

GOOD = {
    "model": smooth,
    "schedule": SCHEDULE,
    "x0": torch.zeros(2, 3, 4, 4),
    "steps": 2,
    "progress": False,
}


@pytest.mark.parametrize(
    "bad",
    [
        ("model", None, TypeError, "callable", "NoneType"),
        ("schedule", [0.1], TypeError, "NoiseSchedule", "list"),
        ("x0", torch.zeros(2, 3, dtype=torch.uint8), TypeError, "float32", "uint8", "127.5"),
        ("x0", torch.zeros(2, 3, dtype=torch.float16), TypeError, "float64", "float16"),
        ("x0", torch.full((2, 3), 1.01), ValueError, "[-1, 1]", "1.01", "127.5"),
        ("x0", torch.full((2, 3), math.nan), ValueError, "finite", "NaN"),
        ("x0", torch.zeros(3), ValueError, "[N, C, ...]", "[3]"),
        ("x0", torch.zeros(0, 3), ValueError, "no empty dimension", "[0, 3]"),
        ("decoder", "exact", ValueError, "discretised, gaussian", "exact"),
        ("variance", "huge", ValueError, "learned_range", "huge"),
        ("prediction", "noise", ValueError, "epsilon, x0", "noise"),
        ("log_variance", "drop", ValueError, "repeat", "drop"),
        ("clip", 0, ValueError, "(0, inf)", "0"),
        ("steps", 0, ValueError, "[1, 1000]", "0"),
        ("seed", -1, ValueError, "[0,", "-1"),
        ("micro_batch", 0, ValueError, "[1,", "0"),
        ("first_sample", 1.5, TypeError, "int", "float"),
    ],
    ids=lambda bad: f"{bad[0]}-{bad[-1]}",
)
def test_a_bad_argument_is_named(bad) -> None:
    assert_named(lambda **wrong: variational_bound(**(GOOD | wrong)), bad)


def test_a_density_takes_data_of_any_range() -> None:
    x0 = torch.full((2, 3), 7.0)
    found = variational_bound(**(GOOD | {"x0": x0, "decoder": "gaussian"}))
    assert found.total_bpd.isfinite().all()


@pytest.mark.parametrize(
    ("model", "variance", "error", "words"),
    [
        pytest.param(smooth, "learned_range", ValueError,
                     ["the model's output", "2C channels", "[2, 6, 4, 4]", "[2, 3, 4, 4]"],
                     id="too-few-channels"),
        pytest.param(lambda x, t: torch.cat([x, x, x], 1), "posterior", ValueError,
                     ["the model's output", "[2, 3, 4, 4]", "[2, 9, 4, 4]"],
                     id="too-many-channels"),
        pytest.param(lambda x, t: (x,), "beta", TypeError, ["model", "tuple"], id="tuple"),
        pytest.param(lambda x, t: x.long(), "beta", TypeError, ["model", "int64"], id="integers"),
    ],
)  # fmt: skip
def test_invalid_model_outputs_are_named(model, variance, error, words) -> None:
    options = GOOD | {"model": model, "variance": variance, "micro_batch": 2}
    with pytest.raises(error) as raised:
        variational_bound(**options)
    assert [word for word in words if word not in str(raised.value)] == []


def test_an_epsilon_without_signal_is_rejected() -> None:
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    with pytest.raises(ValueError, match="prediction must be 'x0' or 'v' for a schedule of zero"):
        variational_bound(**(GOOD | {"schedule": schedule}))
    with pytest.raises(ValueError, match="'clamp' for T = 1; got 'repeat'"):
        variational_bound(**(GOOD | {"steps": 1}))
    assert variational_bound(**(GOOD | {"steps": 1, "variance": "beta"})).vb.shape == (2, 1)
