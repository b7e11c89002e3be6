"""`ddpm-fast sample --method ...`: every solver, clips, classes and guidance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_fast
from cli_runs import SIDE, T, error_of, sample, tiny_schedule, tiny_unet
from ddpm_fast import DynamicThreshold, Sampler, StepTable

SHAPE = (1, SIDE, SIDE)
OUT = ("--num", 3, "--batch", 2, "--out", "a.npy")


def saved(scheduler: dict[str, object] | None = None, **unet: object) -> Path:
    config = {"num_train_timesteps": T, "beta_end": 0.5, **(scheduler or {})}
    return ddpm_fast.save("model", tiny_unet(**unet), scheduler_config=config)


def samples_of(model: Path, table: StepTable, **options: object) -> np.ndarray:
    """Samples of the sampler for the options OUT."""
    null_label = options.pop("null_label", None)
    sampler = Sampler(ddpm_fast.load(model).unet, table, SHAPE, 2, "cpu", null_label=null_label)
    return sampler.sample(3, progress=False, **options).numpy()


TABLES = {
    "ddpm": (("--steps", 7, "--variance", "beta"), {"steps": 7, "variance": "beta"}),
    "ddim": (("--steps", 7, "--eta", 0.5), {"steps": 7, "eta": 0.5}),
    "ve_ode": (("--steps", 7, "--clip", "none"), {"steps": 7, "clip": None}),
    "dpmpp_2m": (("--steps", 7, "--clip", 0.5), {"steps": 7, "clip": 0.5}),
    "dpmpp_2m_sde": (("--steps", 7, "--spacing", "trailing"), {"steps": 7, "spacing": "trailing"}),
    "unipc": (
        ("--steps", 7, "--clip", "dynamic:0.9:3"),
        {"steps": 7, "clip": DynamicThreshold(0.9, 3)},
    ),
    "plms": (("--start", 12), {"steps": 12, "start": 12, "clip": 1.0}),
}


@pytest.mark.parametrize("method", TABLES)
def test_a_method_samples_by_its_table(method: str) -> None:
    model = saved()
    args, options = TABLES[method]
    result = sample(model, *OUT, "--method", method, *args)
    table = getattr(StepTable, method)(tiny_schedule(), **options)
    np.testing.assert_array_equal(np.load("a.npy"), samples_of(model, table))
    assert f"method   {method}\n" in result.stdout


def test_methods_have_their_own_default_steps() -> None:
    model = saved({"num_train_timesteps": 100, "beta_end": 0.2})
    for method, steps in (("dpmpp_2m", 20), ("unipc", 20), ("ddim", 50), ("plms", 50)):
        result = sample(model, *OUT, "--method", method)
        assert f"steps    {steps} of 100" in result.stdout


def test_default_steps_with_quad_spacing() -> None:
    model = saved({"num_train_timesteps": 1000, "beta_end": 0.02})
    result = sample(model, *OUT, "--method", "ddim", "--spacing", "quad")
    assert "steps    49 of 1000 (50 of --spacing quad, without repetitions), eta 0" in result.stdout
    table = StepTable.ddim(ddpm_fast.load(model).schedule, 50, spacing="quad")
    np.testing.assert_array_equal(np.load("a.npy"), samples_of(model, table))


def test_thresholding_of_the_checkpoint_is_used() -> None:
    model = saved({"thresholding": True, "sample_max_value": 2.0})
    sample(model, *OUT)
    table = StepTable.ddpm(tiny_schedule(), clip=DynamicThreshold(0.995, 2.0))
    np.testing.assert_array_equal(np.load("a.npy"), samples_of(model, table))


def test_a_learned_variance_is_used() -> None:
    model = saved({"variance_type": "learned_range"}, out_channels=2)
    sample(model, *OUT)
    learned = samples_of(model, StepTable.ddpm(tiny_schedule(), variance="learned_range"))
    np.testing.assert_array_equal(np.load("a.npy"), learned)
    sample(model, *OUT, "--variance", "beta")
    fixed = samples_of(model, StepTable.ddpm(tiny_schedule(), variance="beta"))
    np.testing.assert_array_equal(np.load("a.npy"), fixed)
    assert np.abs(fixed - learned).max() > 0.01


def test_labels_are_cycled_and_guided() -> None:
    model = saved(num_class_embeds=3)
    table = StepTable.ddim(tiny_schedule(), 5)
    args = ("--method", "ddim", "--steps", 5, "--label", "0,1", "--first-sample", 1)
    sample(model, *OUT, *args)
    labels = torch.tensor([1, 0, 1])
    options = {"labels": labels, "first_sample": 1}
    np.testing.assert_array_equal(np.load("a.npy"), samples_of(model, table, **options))
    sample(model, *OUT, *args, "--guidance", 2.5)
    expected = samples_of(model, table.with_guidance(2.5), **options, null_label=2)
    np.testing.assert_array_equal(np.load("a.npy"), expected)
    sample(model, *OUT, *args, "--guidance", 2.5, "--null-label", 0)
    assert not np.array_equal(np.load("a.npy"), expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(("--method", "euler"), "--method must be ddpm, ddim", id="method"),
        pytest.param(("--method", "unipc", "--eta", 1), "--eta is an option of", id="eta"),
        pytest.param(("--method", "ddim", "--eta", -1), "eta must be a number in [0", id="eta-low"),
        pytest.param(
            ("--method", "ddim", "--variance", "beta"), "--variance is an option of", id="variance"
        ),
        pytest.param(("--variance", "learned_range"), "a network of C channels", id="learned"),
        pytest.param(("--variance", "small"), "variance must be one of posterior", id="which"),
        pytest.param(("--method", "plms", "--start", "random"), "start must", id="random"),
        pytest.param(("--spacing", "even"), "--spacing must be linspace", id="spacing"),
        pytest.param(("--clip", "much"), "--clip", id="clip"),
        pytest.param(("--clip", "-1"), "--clip must be none", id="clip-below-0"),
        pytest.param(("--clip", "dynamic:2"), "quantile must be a number in (0, 1]", id="quantile"),
        pytest.param(("--label", "1"), "--label must be none for this model", id="label"),
        pytest.param(("--guidance", "2"), "--guidance and --null-label need", id="guidance"),
    ],
)
def test_an_error_is_one_line(args: tuple[object, ...], message: str) -> None:
    result = sample(saved(), *OUT, *args, status=2)
    assert message in error_of(result)
    assert not Path("a.npy").exists()


@pytest.mark.parametrize("text", [None, "3", "one", "0,-1"], ids=str)
def test_labels_of_a_model_with_classes_are_checked(text: str | None) -> None:
    args = () if text is None else ("--label", text)
    result = sample(saved(num_class_embeds=3), *OUT, *args, status=2)
    assert "--label must be 0 to 2" in error_of(result)
