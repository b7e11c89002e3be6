"""The fast schedulers as objects: configuration, timesteps, arguments, what they wait for."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers

import ddpm_fast
import ddpm_fast.diffusers.schedulers as module
from cases import assert_named
from ddpm_fast import checks
from ddpm_fast.diffusers import FastDDIMScheduler, FastDDPMScheduler
from fast_cases import FAST, OPTIONS, THEIRS, assert_near, generator, normals

EACH = pytest.mark.parametrize("kind", FAST)
X, OUT = normals(0), normals(1)


def made(kind="ddpm", steps=10, device=None, **options):
    scheduler = FAST[kind](**options)
    scheduler.set_timesteps(steps, device)
    return scheduler


# Configuration


def test_the_module_is_imported_where_it_is_asked_for():
    """Without it `import ddpm_fast` needs no diffusers, and takes none of its time."""
    code = (
        "import sys, ddpm_fast; assert 'diffusers' not in sys.modules;"
        " ddpm_fast.diffusers.FastDDPMScheduler; assert 'diffusers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'diffuser'"):
        getattr(ddpm_fast, "diffuser")  # noqa: B009


@EACH
def test_they_are_the_librarys_schedulers(kind):
    ours = FAST[kind]()
    assert isinstance(ours, (THEIRS[kind], diffusers.SchedulerMixin, diffusers.ConfigMixin))
    assert len(ours) == 1000
    assert ours.order == 1
    assert ours.init_noise_sigma == 1.0
    assert ours.scale_model_input(X, 3) is X


@EACH
@pytest.mark.parametrize("compat", ["diffusers", "corrected"])
def test_a_configuration_goes_round(kind, compat, tmp_path):
    """Through a dictionary, a folder, and the library's own class."""
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


def test_options_of_other_schedulers_in_a_configuration_are_not_read():
    """diffusers keeps them when one scheduler is made of another's configuration."""
    ddpm = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    ours = FastDDIMScheduler.from_config(ddpm.config)
    ours.set_timesteps(10)
    assert ours.step(OUT, 500, X).prev_sample.shape == X.shape


@EACH
def test_the_timesteps_are_the_librarys(kind):
    for name in ("epsilon", "linspace", "trailing", "offset", "betas-given"):
        for steps in (1, 3, 10, 50, 399):
            pair = [cls(**OPTIONS[kind][name]) for cls in (FAST[kind], THEIRS[kind])]
            for scheduler in pair:
                scheduler.set_timesteps(steps)
            assert pair[0].timesteps.dtype == pair[1].timesteps.dtype == torch.int64
            assert pair[0].timesteps.tolist() == pair[1].timesteps.tolist()
            assert pair[0].num_inference_steps == steps


def test_custom_timesteps_and_the_timestep_before():
    ours = FastDDPMScheduler()
    assert ours.previous_timestep(5) == 4
    ours.set_timesteps(timesteps=[900, 333, 12])
    theirs = diffusers.DDPMScheduler()
    theirs.set_timesteps(timesteps=[900, 333, 12])
    for t in ours.timesteps:
        want = theirs.previous_timestep(t)
        for given in (t, int(t), t.clone()):
            assert int(ours.previous_timestep(given)) == int(want)
        step = [s.step(OUT, t, X, generator=generator(1)).prev_sample for s in (ours, theirs)]
        assert_near(*step)
    with pytest.raises(ValueError, match=r"timestep must be one of scheduler.timesteps; got 5"):
        ours.previous_timestep(5)


def test_timesteps_that_are_replaced_by_hand():
    """As image-to-image pipelines cut them."""
    ours = made(steps=10)
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
def test_a_chain_that_cannot_be_set_leaves_the_scheduler_as_it_was(kind):
    ours = made(kind, 10, timestep_spacing="trailing")
    before, want = ours.timesteps, ours.step(OUT, 499, X, generator=generator(1)).prev_sample
    for bad in (61, 2000):  # 61 trailing timesteps end at -1
        with pytest.raises(ValueError, match=r"timesteps must lie|cannot be larger"):
            ours.set_timesteps(bad)
    assert ours.timesteps is before
    assert ours.num_inference_steps == 10
    assert torch.equal(ours.step(OUT, 499, X, generator=generator(1)).prev_sample, want)
    with pytest.raises(ValueError, match=r"steps_offset=1\)"):
        FAST[kind](steps_offset=1).set_timesteps(1000)


# step


@EACH
def test_every_form_of_a_timestep(kind):
    ours = made(kind)
    t = ours.timesteps[4]
    want = ours.step(OUT, t, X, generator=generator(1)).prev_sample
    forms = [int(t), t.clone(), t.clone()[None], t.expand(2), t.to(torch.int32), t.numpy()[()]]
    for form in forms:
        got = ours.step(OUT, form, X, generator=generator(1)).prev_sample
        assert torch.equal(got, want)


@EACH
def test_each_sample_may_be_at_a_timestep_of_its_own(kind):
    ours = made(kind)
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
def test_what_comes_back(kind):
    ours, theirs = made(kind), THEIRS[kind]()
    theirs.set_timesteps(10)
    got = ours.step(OUT, 500, X, generator=generator(1))
    want = theirs.step(OUT, 500, X, generator=generator(1))
    assert type(got) is type(want)
    assert list(got.keys()) == list(want.keys())
    pair = ours.step(OUT, 500, X, generator=generator(1), return_dict=False)
    assert isinstance(pair, tuple)
    assert all(map(torch.equal, pair, got.values()))


def test_generators_are_drawn_from_as_the_library_draws():
    """One or a list of one for each sample; wherever t > 0, and not at 0."""
    ours, theirs = made(), diffusers.DDPMScheduler()
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


def test_no_generator_is_torchs_own():
    ours = made()
    torch.manual_seed(3)
    want = ours.step(OUT, 500, X).prev_sample
    assert torch.equal(ours.step(OUT, 500, X, generator=generator(3)).prev_sample, want)


# What a step runs, and what it waits for

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item"}
VIEWS = {"aten::expand", "aten::slice", "aten::select", "aten::alias", "aten::detach"}
VIEWS |= {"aten::view", "aten::split", "aten::promote_types"}


class Operators(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def operators(step):
    step()  # tables are made by the first
    with Operators() as found:
        step()
    return [name for name in found.seen if name not in VIEWS]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Timesteps are taken for ones whose values the host cannot see."""
    index = checks.index
    monkeypatch.setattr(module, "_on_host", lambda timestep: False)
    monkeypatch.setattr(
        checks, "index", lambda name, value, like, end: index(name, value, like, None)
    )


def test_a_step_is_one_operator_and_one_draw(as_on_a_gpu):
    ours, learned = made(), made(variance_type="learned_range")
    t, foreign = ours.timesteps[3], ours.timesteps[3].clone()
    both = normals(4, (2, 6, 6, 5))
    for step in (
        lambda: ours.step(OUT, t, X),
        lambda: ours.step(OUT, foreign, X),
        lambda: ours.step(OUT, 500, X),
        lambda: learned.step(both, t, X),
    ):
        assert operators(step) == ["aten::randn", "ddpm_fast::reverse_step"]
    ddim = made("ddim")
    assert operators(lambda: ddim.step(OUT, t, X)) == ["ddpm_fast::reverse_step"]
    assert operators(lambda: ddim.step(OUT, foreign, X)) == ["ddpm_fast::reverse_step"]
    assert operators(lambda: ours.add_noise(X, OUT, t.expand(2))) == ["ddpm_fast::q_sample"]


def test_the_librarys_step_waits_and_ours_does_not(as_on_a_gpu):
    """Nothing asks for a value on the device: no item(), no nonzero()."""
    ours, theirs = made(), diffusers.DDPMScheduler()
    theirs.set_timesteps(10)
    threshold = made(thresholding=True)
    t = ours.timesteps[3].clone()

    def waits(step):
        return sum(name in WAITS for name in operators(step))

    assert waits(lambda: theirs.step(OUT, theirs.timesteps[3], X)) >= 3
    assert waits(lambda: ours.step(OUT, t, X)) == 0
    assert waits(lambda: threshold.step(OUT, t, X)) == 0
    assert waits(lambda: ours.previous_timestep(t)) == 0


def test_a_timestep_of_the_chain_is_known_by_its_place(as_on_a_gpu):
    """So that nothing is drawn at t = 0, and what is not of the chain is NaN."""
    ours = made()
    for t, draws in (
        (ours.timesteps[-1], False),
        (torch.tensor(0), True),
        (ours.timesteps[2], True),
    ):
        source = generator(1)
        ours.step(OUT, t, X, generator=source)
        assert (torch.randn(1, generator=source) == torch.randn(1, generator=generator(1))) != draws
    large = made(variance_type="fixed_large")
    last = large.step(OUT, large.timesteps[-1], X).prev_sample
    assert torch.equal(large.step(OUT, torch.tensor(0), X).prev_sample, last)
    got = ours.step(OUT, torch.tensor(901), X)
    assert got.prev_sample.isnan().all()
    assert got.pred_original_sample.isnan().all()
    cut = made()
    cut.timesteps = cut.timesteps[4:]
    assert int(cut.previous_timestep(cut.timesteps[1])) == int(cut.timesteps[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@EACH
def test_nothing_waits_on_a_gpu(kind):
    ours = made(kind, device="cuda")
    x, out = X.cuda(), OUT.cuda()
    ours.step(out, ours.timesteps[0], x)
    ours.add_noise(x, out, ours.timesteps[:2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in ours.timesteps:
            x = ours.step(out, t, x).prev_sample
            ours.step(out, t.clone(), x)
            ours.add_noise(x, out, t.expand(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


# add_noise, get_velocity


@EACH
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_add_noise_and_get_velocity_are_the_librarys(kind, dtype):
    """In half precision too, where it casts alphas_cumprod before it takes the roots."""
    ours, theirs = FAST[kind](), THEIRS[kind]()
    x, noise = X.to(dtype), OUT.to(dtype)
    for t in ([0, 999], [3, 500]):
        t = torch.tensor(t)
        for name, args in (("add_noise", (x, noise, t)), ("get_velocity", (x, noise, t))):
            got, want = getattr(ours, name)(*args), getattr(theirs, name)(*args)
            assert_near(got, want, 3 * torch.finfo(dtype).eps)


def test_add_noise_broadcasts_as_the_library_does():
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


def test_add_noise_has_the_gradient_of_the_library():
    grads = []
    for scheduler in (FastDDPMScheduler(), diffusers.DDPMScheduler()):
        x, noise = X.clone().requires_grad_(), OUT.clone().requires_grad_()
        (scheduler.add_noise(x, noise, torch.tensor([5, 900])) ** 2).sum().backward()
        grads.append((x.grad, noise.grad))
    torch.testing.assert_close(*grads)


# Copies


@EACH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_by_themselves(kind, copied):
    ours = made(kind)
    want = ours.step(OUT, 500, X, generator=generator(1)).prev_sample
    other = copied(ours)
    assert other.config == ours.config
    assert len(pickle.dumps(ours)) < 100_000  # without the rows
    assert torch.equal(other.step(OUT, 500, X, generator=generator(1)).prev_sample, want)
    other.set_timesteps(3)
    assert torch.equal(ours.step(OUT, 500, X, generator=generator(1)).prev_sample, want)


# Bad arguments


def step(kind="ddpm", **given):
    arguments = {"model_output": OUT, "timestep": 500, "sample": X} | given
    return made(kind).step(**arguments)


BAD = [
    ("sample", None, TypeError, "torch.Tensor", "NoneType"),
    ("sample", X.long(), TypeError, "float32", "int64"),
    ("model_output", OUT[:, :1], ValueError, "[2, 3, 6, 5]", "[2, 1, 6, 5]"),
    ("model_output", OUT.repeat(1, 2, 1, 1), ValueError, "no variance is learned", "[2, 6, 6, 5]"),
    ("model_output", OUT.to("meta"), ValueError, "cpu", "meta"),
    ("timestep", 500.0, TypeError, "int", "float"),
    ("timestep", torch.tensor(500.0), TypeError, "integer tensor", "float32"),
    ("timestep", 1000, ValueError, "[0, 1000)", "1000"),
    ("timestep", -1, ValueError, "[0, 1000)", "-1"),
    ("timestep", torch.tensor([500, 1000]), ValueError, "[0, 1000)", "1000"),
    ("timestep", torch.tensor([1, 2, 3]), ValueError, "2 samples", "[3]"),
    ("timestep", 501, ValueError, "scheduler.timesteps", "501"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: f"{b[0]}-{b[-1]}")
def test_bad_arguments_of_step_are_named(bad):
    assert_named(step, bad)


def test_a_learned_variance_must_be_there():
    with pytest.raises(
        ValueError, match=r"model_output must have 2C channels .* got \[2, 3, 6, 5\]"
    ):
        made(variance_type="learned_range").step(OUT, 500, X)


def test_ddim_before_its_timesteps_are_set_and_with_noise_twice():
    with pytest.raises(ValueError, match="num_inference_steps is None: call set_timesteps"):
        FastDDIMScheduler().step(OUT, 500, X)
    with pytest.raises(ValueError, match="generator and variance_noise"):
        made("ddim").step(OUT, 500, X, eta=0.5, generator=generator(1), variance_noise=OUT)
    with pytest.raises(ValueError, match=r"variance_noise must have the shape of sample"):
        made("ddim").step(OUT, 500, X, eta=0.5, variance_noise=OUT[:1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction' .* 'epsilon'"),
        ({"compat": "right"}, "compat must be 'diffusers' or 'corrected'; got 'right'"),
    ],
)
@EACH
def test_options_that_are_not_supported_are_refused_by_name(kind, options, words):
    with pytest.raises(ValueError, match=words):
        FAST[kind](**options)


def test_bad_images_and_timesteps_of_add_noise():
    ours = FastDDPMScheduler()
    for arguments, error, words in (
        ((X, OUT, 5), TypeError, "timesteps must be an integer tensor"),
        ((X, OUT, torch.tensor([0.5])), TypeError, "timesteps must be .* float32"),
        ((X, OUT, torch.tensor([5, 1000])), ValueError, r"timesteps must lie in \[0, 1000\)"),
        ((X, OUT, torch.tensor([-1])), ValueError, r"timesteps must lie in \[0, 1000\); got -1"),
        ((X, OUT, torch.tensor([1, 2, 3])), ValueError, "must broadcast"),
        ((X, OUT[:, :2], torch.tensor([1])), ValueError, "must broadcast"),
        ((None, OUT, torch.tensor([1])), TypeError, "original_samples must be"),
        ((X, OUT.to("meta"), torch.tensor([1])), ValueError, "noise must be on the device"),
    ):
        with pytest.raises(error, match=words):
            ours.add_noise(*arguments)
