"""Options of schedulers that are null: accepted where diffusers samples with them."""

import inspect

import diffusers
import pytest
import torch

from ddpm_fast.diffusers import FastDDPMScheduler, step_table
from ddpm_fast.models.checkpoint.scheduler_config import SPECS, parse_scheduler
from pipeline_cases import ddpm, fast

KINDS = [name for name, spec in SPECS.items() if spec.drop_in is not None]


def samples(scheduler):
    """Return True if a scheduler of diffusers runs three steps without an error."""
    try:
        scheduler.set_timesteps(3)
        x = torch.linspace(-2, 2, 16).view(1, 1, 4, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(x / 2, t, x).prev_sample
    except (TypeError, ValueError, AttributeError):
        return False
    return bool(x.isfinite().all())


def table_of(scheduler):
    scheduler.set_timesteps(5)
    return step_table(scheduler)


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("thresholding", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_null_is_accepted_where_diffusers_accepts_it(kind, thresholding):
    cls = getattr(diffusers, kind)
    accepted = set()
    for option in list(inspect.signature(cls.__init__).parameters)[1:]:
        options = {"thresholding": thresholding, option: None}
        try:
            scheduler = cls(**options)
        except (TypeError, ValueError, NotImplementedError):
            continue
        if samples(scheduler):
            parse_scheduler({"_class_name": kind, **options})
            table_of(scheduler)
            accepted.add(option)
    always = {"rescale_betas_zero_snr", "thresholding", "sample_max_value", "trained_betas"}
    assert always <= accepted


def test_null_switches_off():
    def rows(**options):
        return table_of(diffusers.DDPMScheduler(**options))

    off = {"clip_sample": False, "rescale_betas_zero_snr": False, "thresholding": False}
    assert rows(**off) == rows(**dict.fromkeys(off))
    no_cap = rows(thresholding=True, sample_max_value=None)
    assert no_cap.threshold.cap == float("inf")


@pytest.mark.parametrize("make", [diffusers.DDPMScheduler, FastDDPMScheduler])
def test_fewer_betas_than_timesteps(make):
    scheduler = make(trained_betas=[0.05] * 100)
    match = "^num_train_timesteps must be 100, as many as trained_betas .*; got 1000$"
    with pytest.raises(ValueError, match=match):
        table_of(scheduler)


def test_predict_epsilon_that_diffusers_ignores():
    scheduler = diffusers.DDPMScheduler.from_config({"predict_epsilon": False})
    with pytest.warns(
        UserWarning, match="predict_epsilon=False is ignored .* prediction_type='sample'"
    ):
        fast(ddpm(scheduler))
