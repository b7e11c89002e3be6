"""Configurations of the schedulers of diffusers: options that are read, ignored and rejected."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch

from checkpoint_cases import OPTIONS, SCHEDULER, edit
from ddpm_fast import DynamicThreshold
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.models import UNet
from ddpm_fast.models.checkpoint.checkpoint import load, save
from ddpm_fast.models.checkpoint.scheduler_config import parse_scheduler

DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
PNDM = "PNDMScheduler"


@pytest.fixture(scope="module")
def theirs(diffusers):
    return diffusers.UNet2DModel(**OPTIONS).eval()


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model", UNet(**OPTIONS), NoiseSchedule.linear())


def save_pipeline(diffusers, theirs, folder, kind, **options):
    scheduler = getattr(diffusers, kind)(**options)
    diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(folder)
    return scheduler


CASES = [
    pytest.param("DDPMScheduler", {}, id="ddpm"),
    pytest.param("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}, id="ddim"),
    pytest.param(DPM, {}, id="dpm"),
    pytest.param(
        DPM,
        {
            "solver_order": 3,
            "algorithm_type": "sde-dpmsolver++",
            "solver_type": "heun",
            "euler_at_final": True,
            "lower_order_final": False,
            "final_sigmas_type": "sigma_min",
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
            "beta_schedule": "squaredcos_cap_v2",
            "variance_type": "learned_range",
        },
        id="dpm-options",
    ),
    pytest.param(DPM, {"rescale_betas_zero_snr": True}, id="dpm-zero-snr"),
    pytest.param(UNIPC, {}, id="unipc"),
    pytest.param(UNIPC, {"rescale_betas_zero_snr": True}, id="unipc-zero-snr"),
    pytest.param(
        UNIPC,
        {"predict_x0": False, "solver_type": "bh1", "disable_corrector": [0, 1]},
        id="unipc-options",
    ),
    pytest.param(PNDM, {}, id="pndm"),
    pytest.param(
        PNDM,
        {"skip_prk_steps": True, "set_alpha_to_one": True, "beta_end": 0.01},
        id="pndm-options",
    ),
]
PREDICTION = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}


@pytest.mark.filterwarnings("error:scheduler options")
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_scheduler_of_diffusers(diffusers, theirs, tmp_path, kind, options):
    scheduler = save_pipeline(diffusers, theirs, tmp_path / "a", kind, **options)
    ours, config = load(tmp_path / "a"), scheduler.config
    assert torch.allclose(ours.schedule.betas.float(), scheduler.betas, rtol=1e-5, atol=1e-6)
    assert ours.prediction == PREDICTION[config.prediction_type]
    assert (ours.spacing, ours.steps_offset) == (config.timestep_spacing, config.steps_offset)
    assert ours.clip == (1.0 if config.get("clip_sample") else None)
    assert ours.variance == (options.get("variance_type") or "posterior")
    assert {"_class_name": kind, **options}.items() <= ours.scheduler_config.items()

    again = save(tmp_path / "b", ours.unet, scheduler_config=ours.scheduler_config)
    assert load(again).scheduler_config == ours.scheduler_config
    pipelines = {"DDIMScheduler": "DDIMPipeline", PNDM: "PNDMPipeline"}
    pipeline = pipelines.get(kind, "DDPMPipeline")
    assert json.loads((again / "model_index.json").read_text())["_class_name"] == pipeline
    back = getattr(diffusers, pipeline).from_pretrained(again).scheduler
    assert type(back) is type(scheduler)
    assert dict(back.config) | {"_use_default_values": 0} == dict(config) | {
        "_use_default_values": 0
    }


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_fixed_variance_is_that_of_diffusers(diffusers, kind):
    scheduler = diffusers.DDPMScheduler(variance_type=kind)
    options = parse_scheduler({"_class_name": "DDPMScheduler", **scheduler.config})
    schedule = options.schedule
    ours = {"posterior": schedule.posterior_variance, "beta": schedule.betas}[options.variance]
    assert float(ours[3]) == pytest.approx(float(scheduler._get_variance(3)), rel=1e-3)  # float32


@pytest.mark.parametrize("kind", [DPM, UNIPC])
def test_threshold_of_a_multistep_solver(diffusers, theirs, tmp_path, kind):
    save_pipeline(diffusers, theirs, tmp_path, kind, thresholding=True, sample_max_value=2.0)
    assert load(tmp_path).clip == DynamicThreshold(0.995, 2.0)


@pytest.mark.parametrize(
    ("kind", "options", "ignored"),
    [
        (DPM, {"clip_sample": True, "clip_sample_range": 2.0}, "clip_sample, clip_sample_range"),
        (UNIPC, {"clip_sample": True}, "clip_sample"),
        (PNDM, {"thresholding": True, "clip_sample": True}, "clip_sample, thresholding"),
        (PNDM, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("DDPMScheduler", {"solver_order": 2}, "solver_order"),
        ("DDIMScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ],
)
def test_options_that_a_scheduler_lacks_are_off_with_a_warning(kind, options, ignored):
    with pytest.warns(UserWarning, match=f"ignored: {ignored}$"):
        found = parse_scheduler({"_class_name": kind, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found == parse_scheduler({"_class_name": kind})


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({"clip_sample": None}, None),
        ({"clip_sample": False, "clip_sample_range": None}, None),
        ({"thresholding": None, "sample_max_value": None}, 1.0),
        ({"thresholding": False, "dynamic_thresholding_ratio": 0}, 1.0),
        ({"thresholding": True, "sample_max_value": None}, DynamicThreshold(0.995)),
        ({"thresholding": True, "sample_max_value": 2, "clip_sample_range": 0},
         DynamicThreshold(0.995, 2.0)),
        ({"rescale_betas_zero_snr": None, "steps_offset": None, "trained_betas": None}, 1.0),
    ],
)  # fmt: skip
def test_options_that_are_null_or_off(options, clip):
    assert parse_scheduler(options) == replace(parse_scheduler({}), clip=clip)


@pytest.mark.parametrize("option", ["clip_sample_range", "dynamic_thresholding_ratio"])
def test_a_bound_that_is_needed_is_not_null(option):
    with pytest.raises(ValueError, match=f"^scheduler option {option} must be .*; got None$"):
        parse_scheduler({option: None, "thresholding": option != "clip_sample_range"})


def test_a_threshold_without_a_cap_is_saved(tmp_path):
    clip = DynamicThreshold(0.9)
    save(tmp_path / "model", UNet(**OPTIONS), NoiseSchedule.linear(), clip=clip)
    assert load(tmp_path / "model").clip == clip


def test_betas_and_their_number(folder):
    edit(folder / SCHEDULER, {"trained_betas": [0.02] * 300})
    match = "num_train_timesteps must be 300, as many as trained_betas .*1000.*; got 1000$"
    with pytest.raises(ValueError, match=match):
        load(folder)


@pytest.mark.filterwarnings("ignore::ddpm_fast.ScheduleWarning")
def test_laplace_schedule(diffusers, folder, tmp_path):
    edit(folder / SCHEDULER, {"beta_schedule": "laplace"})
    schedule = load(folder).schedule
    theirs = diffusers.DDPMScheduler(beta_schedule="laplace")
    torch.testing.assert_close(schedule.betas, theirs.betas.double(), rtol=1e-6, atol=1e-7)
    save(tmp_path / "again", UNet(**OPTIONS), schedule)
    assert load(tmp_path / "again").scheduler_config["beta_schedule"] == "laplace"
    assert load(tmp_path / "again").schedule == schedule


@pytest.mark.filterwarnings("error:scheduler options")
@pytest.mark.parametrize(
    ("old", "new", "prediction"),
    [
        (False, None, "x0"),
        (False, "epsilon", "x0"),
        (False, "sample", "x0"),
        (True, None, "epsilon"),
        (True, "v_prediction", "v"),
        (None, None, "epsilon"),
    ],
)
def test_predict_epsilon_of_old_releases(old, new, prediction):
    options = {"predict_epsilon": old}
    if new is not None:
        options["prediction_type"] = new
    assert parse_scheduler(options).prediction == prediction


def test_predict_epsilon_that_contradicts():
    for options, match in [
        ({"predict_epsilon": False, "prediction_type": "v_prediction"}, "'v_prediction'; got F"),
        ({"predict_epsilon": "no"}, "true, false or null; got 'no'"),
    ]:
        with pytest.raises(ValueError, match=f"^scheduler option predict_epsilon must .*{match}"):
            parse_scheduler(options)


def rejected(kind, option, value, accepted):
    short = {DPM: "dpm", UNIPC: "unipc"}.get(kind, kind)
    return pytest.param(kind, option, value, accepted, id=f"{short}-{option}")


@pytest.mark.parametrize(
    ("kind", "option", "value", "accepted"),
    [
        *(
            rejected(kind, name, True, "False")
            for kind in (DPM, UNIPC)
            for name in (
                "use_karras_sigmas",
                "use_exponential_sigmas",
                "use_beta_sigmas",
                "use_flow_sigmas",
                "use_dynamic_shifting",
            )
        ),
        *(rejected(kind, "flow_shift", 3.0, "1.0") for kind in (DPM, UNIPC)),
        *(rejected(kind, "time_shift_type", "linear", "'exponential'") for kind in (DPM, UNIPC)),
        rejected(DPM, "use_lu_lambdas", True, "False"),
        rejected(DPM, "lambda_min_clipped", -5.1, "-inf"),
        *(rejected(UNIPC, name, 0.1, "None") for name in ("sigma_min", "sigma_max")),
        rejected(UNIPC, "shift_terminal", 0.1, "None"),
        *(
            rejected(kind, "prediction_type", "flow_prediction", "epsilon, sample, v_prediction")
            for kind in (DPM, UNIPC, PNDM, "DDPMScheduler")
        ),
        *(
            rejected(kind, "beta_schedule", "laplace", "linear, scaled_linear")
            for kind in (DPM, UNIPC, PNDM, "DDIMScheduler")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:scheduler options ignored")
def test_options_that_would_change_the_timesteps(folder, kind, option, value, accepted):
    edit(folder / SCHEDULER, {"_class_name": kind, option: value})
    edit(folder / "model_index.json", {"scheduler": ["diffusers", kind]})
    match = rf"{SCHEDULER}: scheduler option {option} must be .*{accepted}.*; got {value!r}"
    with pytest.raises(ValueError, match=match):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "library"),
    [("DDPM", "ddpm_fast"), ("DDIM", "ddpm_fast.interop.schedulers"), ("DDPM", None)],
)
def test_drop_in_schedulers_are_read_and_saved_as_those_of_diffusers(
    diffusers, folder, tmp_path, kind, library
):
    name = f"Fast{kind}Scheduler"
    edit(folder / SCHEDULER, {"_class_name": name, "beta_end": 0.03})
    edit(folder / "model_index.json", {"scheduler": [library, name]})
    ours = load(folder)
    assert ours.schedule == NoiseSchedule.linear(1000, 1e-4, 0.03)
    assert ours.scheduler_config["_class_name"] == name
    again = save(tmp_path / "again", ours.unet, scheduler_config=ours.scheduler_config)
    assert load(again).scheduler_config == ours.scheduler_config
    theirs = getattr(diffusers, f"{kind}Pipeline").from_pretrained(again).scheduler
    assert isinstance(theirs, getattr(diffusers, f"{kind}Scheduler"))
    assert theirs.betas[-1] == pytest.approx(0.03)


@pytest.mark.parametrize("held", [{"_class_name": "DDPMScheduler"}, {}], ids=["other", "none"])
def test_the_class_in_the_index_decides(folder, held):
    (folder / SCHEDULER).write_text(json.dumps({**held, "use_flow_sigmas": False}))
    edit(folder / "model_index.json", {"scheduler": ["diffusers", DPM]})
    found = load(folder)
    assert (found.spacing, found.clip) == ("linspace", None)
    assert found.scheduler_config["_class_name"] == DPM


@pytest.mark.filterwarnings("ignore:scheduler options ignored")
def test_an_infinite_default_is_saved(folder, tmp_path):
    edit(folder / SCHEDULER, {"_class_name": DPM, "lambda_min_clipped": -math.inf})
    edit(folder / "model_index.json", {"scheduler": ["diffusers", DPM]})
    found = load(folder)
    again = save(tmp_path / "again", found.unet, scheduler_config=found.scheduler_config)
    assert "-Infinity" in (again / SCHEDULER).read_text()
