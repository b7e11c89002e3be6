"""Drop-in schedulers: configuration, timesteps, noise, copies and threads."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers

import ddpm_fast
from ddpm_fast.diffusers import FastDDIMScheduler, FastDDPMScheduler
from scheduler_cases import FAST, OPTIONS, THEIRS, assert_near, generator, normals

EACH = pytest.mark.parametrize("kind", FAST)
X, OUT = normals(0), normals(1)


def scheduled(kind="ddpm", steps=10, device=None, **options):
    scheduler = FAST[kind](**options)
    scheduler.set_timesteps(steps, device)
    return scheduler


# Configuration


@pytest.mark.slow
def test_the_module_is_imported_on_first_access():
    code = (
        "import sys, ddpm_fast; assert 'diffusers' not in sys.modules;"
        " ddpm_fast.diffusers.FastDDPMScheduler; assert 'diffusers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_packages_do_not_import_diffusers():
    root = Path(ddpm_fast.__file__).parent
    others = (path for path in root.rglob("*.py") if "diffusers" not in path.parts)
    assert not [
        path for path in others if re.search("^(import|from) diffusers", path.read_text(), re.M)
    ]
    with pytest.raises(AttributeError, match="no attribute 'diffuser'"):
        getattr(ddpm_fast, "diffuser")  # noqa: B009


def test_the_package_diffusers_is_named_if_missing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ddpm_fast.diffusers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"needs the package diffusers: `pip install 'diff.*\.\["):
        importlib.import_module("ddpm_fast.diffusers")


@EACH
def test_they_are_schedulers_of_diffusers(kind):
    ours = FAST[kind]()
    assert isinstance(ours, (THEIRS[kind], diffusers.SchedulerMixin, diffusers.ConfigMixin))
    assert len(ours) == 1000
    assert ours.order == 1
    assert ours.init_noise_sigma == 1.0
    assert ours.scale_model_input(X, 3) is X


@EACH
@pytest.mark.parametrize("compat", ["diffusers", "corrected"])
def test_configuration_round_trip(kind, compat, tmp_path):
    """A configuration passes through a dictionary, a folder, and the class of diffusers."""
    options = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "steps_offset": 1}
    ours = FAST[kind](**options, compat=compat)
    ours.save_pretrained(tmp_path)
    for again in (
        FAST[kind].from_config(ours.config),
        FAST[kind].from_pretrained(tmp_path),
        FAST[kind].from_config(THEIRS[kind].from_pretrained(tmp_path).config),
    ):
        assert type(again) is FAST[kind]
        wanted = {k: v for k, v in ours.config.items() if not k.startswith("_")}
        assert {k: again.config[k] for k in wanted} == wanted
    assert FAST[kind].from_config(THEIRS[kind](**options).config).config.compat == "diffusers"
    assert FAST[kind].from_config(ours.config, compat="corrected").config.compat == "corrected"


def test_options_of_other_schedulers_are_ignored():
    """diffusers keeps them if a scheduler is made from the configuration of another."""
    ddpm = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    ours = FastDDIMScheduler.from_config(ddpm.config)
    ours.set_timesteps(10)
    assert ours.step(OUT, 500, X).prev_sample.shape == X.shape


@EACH
def test_timesteps_equal_diffusers(kind):
    for name in ("epsilon", "linspace", "trailing", "offset", "betas-given"):
        for steps in (1, 10, 399):
            pair = [cls(**OPTIONS[kind][name]) for cls in (FAST[kind], THEIRS[kind])]
            for scheduler in pair:
                scheduler.set_timesteps(steps)
            assert pair[0].timesteps.dtype == pair[1].timesteps.dtype == torch.int64
            assert pair[0].timesteps.tolist() == pair[1].timesteps.tolist()
            assert pair[0].num_inference_steps == steps


def test_custom_timesteps_and_previous_timestep():
    ours = FastDDPMScheduler()
    assert ours.previous_timestep(5) == 4
    ours.set_timesteps(timesteps=[900, 333, 12])
    theirs = diffusers.DDPMScheduler()
    theirs.set_timesteps(timesteps=[900, 333, 12])
    for t in ours.timesteps:
        want = theirs.previous_timestep(t)
        for form in (t, int(t), t.clone()):
            assert int(ours.previous_timestep(form)) == int(want)
        step = [s.step(OUT, t, X, generator=generator(1)).prev_sample for s in (ours, theirs)]
        assert_near(*step)
    with pytest.raises(ValueError, match=r"timestep must be one of scheduler.timesteps; got 5"):
        ours.previous_timestep(5)


def test_timesteps_may_be_replaced():
    """Image-to-image pipelines take the last timesteps only."""
    ours = scheduled(steps=10)
    ours.timesteps = ours.timesteps[4:]
    theirs = diffusers.DDPMScheduler()
    theirs.set_timesteps(10)
    theirs.timesteps = theirs.timesteps[4:]
    for t in ours.timesteps:
        step = [s.step(OUT, t, X, generator=generator(1)).prev_sample for s in (ours, theirs)]
        assert_near(*step)
    with pytest.raises(ValueError, match=r"timestep must be one of scheduler.timesteps; got 900"):
        ours.step(OUT, 900, X)


@EACH
def test_attributes_may_be_replaced_or_written(kind):
    def replaced(s):
        s.alphas_cumprod = s.alphas_cumprod**1.1

    def in_place(s):
        s.alphas_cumprod.pow_(1.1)

    def moved(s):
        s.timesteps[4] += 7

    def numbered(s):
        s.num_inference_steps = 20

    def ended(s):
        s.final_alpha_cumprod = torch.tensor(0.99)

    changes = [replaced, in_place] + ([moved] if kind == "ddpm" else [numbered, ended])
    for change in changes:
        pair = [scheduled(kind), THEIRS[kind]()]
        pair[1].set_timesteps(10)
        for scheduler in pair:
            scheduler.step(OUT, 0, X)
            change(scheduler)
        t = pair[1].timesteps[-1 if change is ended else 3]
        assert_near(*[s.step(OUT, t, X, generator=generator(1)).prev_sample for s in pair])


def test_threads_may_share_a_scheduler():
    """Each has its own eta; there are more tables than the cache holds."""
    ours, errors = scheduled("ddim"), []
    want = {eta: ours.step(OUT, 500, X, eta / 20, variance_noise=OUT) for eta in range(12)}

    def work():
        try:
            for _ in range(8):
                for eta, expected in want.items():
                    got = ours.step(OUT, 500, X, eta / 20, variance_noise=OUT)
                    assert torch.equal(got.prev_sample, expected.prev_sample)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@EACH
def test_a_default_device_that_is_not_the_cpu(kind):
    ours = FAST[kind]()
    with torch.device("meta"):
        ours.set_timesteps(10)
        ours.step(OUT, 500, X, variance_noise=OUT) if kind == "ddim" else ours._table("rows")
    assert ours.timesteps.tolist() == scheduled(kind).timesteps.tolist()
    assert ours.step(OUT, 500, X).prev_sample.device == X.device


@EACH
def test_the_scheduler_is_unchanged_after_an_error(kind):
    ours = scheduled(kind, 10, timestep_spacing="trailing")
    before, want = ours.timesteps, ours.step(OUT, 499, X, generator=generator(1)).prev_sample
    for bad in (61, 2000):  # 61 trailing timesteps end at -1
        with pytest.raises(ValueError, match=r"timesteps must be|steps must be at most"):
            ours.set_timesteps(bad)
    with pytest.raises(ValueError, match=r"device must be a device.*nonsense"):
        ours.set_timesteps(20, "nonsense")
    assert ours.timesteps is before
    assert ours.num_inference_steps == 10
    assert torch.equal(ours.step(OUT, 499, X, generator=generator(1)).prev_sample, want)
    with pytest.raises(ValueError, match=r"steps_offset=1\)"):
        FAST[kind](steps_offset=1).set_timesteps(1000)


# step


@EACH
def test_every_form_of_a_timestep(kind):
    ours = scheduled(kind)
    t = ours.timesteps[4]
    want = ours.step(OUT, t, X, generator=generator(1)).prev_sample
    forms = [int(t), t.clone(), t.clone()[None], t.expand(2), t.to(torch.int32), t.numpy()[()]]
    for form in forms:
        got = ours.step(OUT, form, X, generator=generator(1)).prev_sample
        assert torch.equal(got, want)


@EACH
def test_each_sample_may_have_its_own_timestep(kind):
    ours = scheduled(kind)
    at = ours.timesteps[[2, 7]]
    got = ours.step(OUT, at, X, generator=generator(1)).prev_sample
    noise = torch.randn(X.shape, generator=generator(1))
    for n, t in enumerate(at):
        alone = ours.step(OUT[n : n + 1], t, X[n : n + 1], generator=generator(9)).prev_sample
        if kind == "ddim":
            assert torch.equal(got[n : n + 1], alone)
        else:
            std = float(ours._get_variance(int(t)) ** 0.5)
            drawn = torch.randn(alone.shape, generator=generator(9))
            torch.testing.assert_close(got[n] - std * noise[n], (alone - std * drawn)[0])


@EACH
def test_return_value(kind):
    ours, theirs = scheduled(kind), THEIRS[kind]()
    theirs.set_timesteps(10)
    got = ours.step(OUT, 500, X, generator=generator(1))
    want = theirs.step(OUT, 500, X, generator=generator(1))
    assert type(got) is type(want)
    assert list(got.keys()) == list(want.keys())
    pair = ours.step(OUT, 500, X, generator=generator(1), return_dict=False)
    assert isinstance(pair, tuple)
    assert all(map(torch.equal, pair, got.values()))


def test_generators_are_used_as_by_diffusers():
    """There is one, or one for each sample; noise is drawn for t > 0 only."""
    ours, theirs = scheduled(), diffusers.DDPMScheduler()
    theirs.set_timesteps(10)
    for several in (False, True):
        drawn = []
        for scheduler in (ours, theirs):
            source = [generator(1), generator(2)] if several else generator(1)
            x = X
            for t in scheduler.timesteps:
                x = scheduler.step(OUT, t, x, generator=source).prev_sample
            last = source if several else [source]
            drawn.append((x, [torch.randn(2, generator=g) for g in last]))
        assert_near(drawn[0][0], drawn[1][0], 1e-4)
        assert all(map(torch.equal, drawn[0][1], drawn[1][1]))


def test_the_default_generator_is_that_of_torch():
    ours = scheduled()
    torch.manual_seed(3)
    want = ours.step(OUT, 500, X).prev_sample
    assert torch.equal(ours.step(OUT, 500, X, generator=generator(3)).prev_sample, want)


# add_noise, get_velocity


@EACH
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_add_noise_and_get_velocity_equal_diffusers(kind, dtype):
    """In half precision too, where diffusers casts alphas_cumprod before the square root."""
    ours, theirs = FAST[kind](), THEIRS[kind]()
    x, noise = X.to(dtype), OUT.to(dtype)
    for t in ([0, 999], [3, 500]):
        t = torch.tensor(t)
        for name, args in (("add_noise", (x, noise, t)), ("get_velocity", (x, noise, t))):
            got, want = getattr(ours, name)(*args), getattr(theirs, name)(*args)
            assert_near(got, want, 3 * torch.finfo(dtype).eps)


def test_add_noise_broadcasts_as_diffusers():
    ours, theirs = FastDDPMScheduler(), diffusers.DDPMScheduler()
    t = torch.tensor([5, 900])
    cases = [
        (X, OUT, t[:1]),
        (X, OUT, t[0]),
        (X[:1], OUT, t),
        (X, OUT[:1], t),
        (X[:1], OUT[:1], t),
        (X, OUT[:, :1], t),
        (X.half(), OUT, t),
        (X, OUT, t.int()),
    ]
    for x, noise, at in cases:
        want = theirs.add_noise(x, noise, at)
        assert_near(ours.add_noise(x, noise, at), want, 3e-3 if x.dtype == torch.float16 else 1e-6)


def test_add_noise_has_the_gradient_of_diffusers():
    grads = []
    for scheduler in (FastDDPMScheduler(), diffusers.DDPMScheduler()):
        x, noise = X.clone().requires_grad_(), OUT.clone().requires_grad_()
        (scheduler.add_noise(x, noise, torch.tensor([5, 900])) ** 2).sum().backward()
        grads.append((x.grad, noise.grad))
    torch.testing.assert_close(*grads)


# Copies


@EACH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_independent(kind, copied):
    ours = scheduled(kind)
    want = ours.step(OUT, 500, X, generator=generator(1)).prev_sample
    other = copied(ours)
    assert other.config == ours.config
    assert len(pickle.dumps(ours)) < 100_000  # without the rows
    assert torch.equal(other.step(OUT, 500, X, generator=generator(1)).prev_sample, want)
    other.set_timesteps(3)
    assert torch.equal(ours.step(OUT, 500, X, generator=generator(1)).prev_sample, want)
