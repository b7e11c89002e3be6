"""Accelerated pipelines: calls, images and noise as those of diffusers."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers

import ddpm_fast
from ddpm_fast import accelerate
from ddpm_fast.diffusers import FastDDPMScheduler, step_table
from ddpm_fast.diffusers.pipelines import FastDDIMPipeline, FastDDPMPipeline
from pipeline_cases import OFF, SCHEDULERS, SHIPPED, ddim, ddpm, fast, quiet, unet
from scheduler_cases import generator


@pytest.fixture(scope="module")
def network():
    return diffusers.UNet2DModel.from_pretrained(SHIPPED, subfolder="unet")


@pytest.fixture(scope="module")
def network64(network):
    return copy.deepcopy(network).double()


def shipped(network, kind="ddpm", **options):
    scheduler = SCHEDULERS[kind].from_pretrained(SHIPPED, subfolder="scheduler", **options)
    return quiet(diffusers.DDPMPipeline(network, scheduler))


def in_float64(scheduler):
    """Return a scheduler of diffusers with tables and therefore coefficients in float64."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def sample_by_steps(network, scheduler, steps, num, **step_options):
    """Sample by the steps of a scheduler of diffusers, in the dtype of the network.

    The step of DPM-Solver computes in float32. For a float64 network, our step table replaces it;
    test_steps.py compares the two step by step.
    """
    scheduler, source = copy.deepcopy(scheduler), generator(5)
    scheduler.set_timesteps(steps)
    x = torch.randn((num, 1, 32, 32), generator=source).to(network.dtype)
    if network.dtype == torch.float64:
        if isinstance(scheduler, SCHEDULERS["dpm"]):
            return _by_table(network, scheduler, x, source)
        scheduler = in_float64(scheduler)
    if not isinstance(scheduler, SCHEDULERS["unipc"]):
        step_options["generator"] = source
    with drawing_float32():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x, **step_options).prev_sample
    return x


@contextmanager
def drawing_float32():
    """Make schedulers draw the float32 numbers for float64 samples too."""
    import diffusers.schedulers.scheduling_ddim as of_ddim
    import diffusers.schedulers.scheduling_ddpm as of_ddpm

    draw = of_ddpm.randn_tensor

    def in_float32(shape, generator=None, device=None, dtype=None):
        return draw(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        for module in (of_ddim, of_ddpm):
            patch.setattr(module, "randn_tensor", in_float32)
        yield


def _by_table(network, scheduler, x, source):
    table = step_table(scheduler)
    memory = table.memory(x)
    for row, t in enumerate(table.timesteps):
        noise = torch.zeros_like(x)
        if table.draws(row):
            noise = torch.randn(x.shape, generator=source).double()
        out = network(x, t).sample
        ddpm_fast.reverse_step_(x, out, table, row, noise=noise, memory=memory)
    return x


def images(x):
    return (x / 2 + 0.5).clamp(0, 1)


# The images


CHAINS = {
    "ddpm": ("ddpm", {}, {}),
    "ddpm-trailing": (
        "ddpm",
        {"variance_type": "fixed_large", "timestep_spacing": "trailing"},
        {},
    ),
    "ddpm-thresholded": ("ddpm", {"thresholding": True, "sample_max_value": 1.2}, {}),
    "ddim": ("ddim", {}, {}),
    "ddim-eta": ("ddim", {}, {"eta": 0.6, "use_clipped_model_output": True}),
    "dpm": ("dpm", {}, {}),
    "dpm-heun": ("dpm", {"solver_type": "heun", "final_sigmas_type": "sigma_min"}, {}),
    "dpm-sde-karras": (
        "dpm",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        {},
    ),
    "unipc": ("unipc", {}, {}),
}


@pytest.mark.parametrize(("kind", "options", "step_options"), CHAINS.values(), ids=CHAINS)
@torch.no_grad()
def test_chains_of_the_shipped_model(network, network64, kind, options, step_options):
    """Compare with float64: within 1e-4, or twice the error of diffusers."""
    pipe, steps = shipped(network, kind, **options), 10
    if step_options:
        pipe = quiet(diffusers.DDIMPipeline(pipe.unet, pipe.scheduler))
    exact = images(sample_by_steps(network64, pipe.scheduler, steps, 1, **step_options))
    call = {"num_inference_steps": steps, "output_type": "pt", **step_options}
    if kind == "unipc":  # DDPMPipeline passes a generator, which UniPC does not accept
        theirs = images(sample_by_steps(network, pipe.scheduler, steps, 1)).double()
    else:
        theirs = pipe(1, generator(5), **call).images.double()
    ours = fast(pipe)(1, generator(5), **call).images.double()
    bound = max(1e-4 * float(exact.abs().max()), 2 * float((theirs - exact).abs().max()))
    assert float((ours - exact).abs().max()) <= bound
    assert float((theirs - exact).abs().max()) < 2e-3, "the reference is wrong"


@torch.no_grad()
def test_half_precision_error_within_that_of_diffusers(network):
    pipe = shipped(network)
    half = quiet(diffusers.DDPMPipeline(copy.deepcopy(pipe.unet).half(), pipe.scheduler))
    steps, num = 4, 1
    theirs, ours = (
        p(num, generator(5), steps, output_type="pt").images for p in (half, fast(half))
    )
    assert ours.dtype == theirs.dtype == torch.float16
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    table = step_table(scheduler)
    source, wide = generator(5), copy.deepcopy(half.unet).double()
    draw = lambda: torch.randn(num, 1, 32, 32, generator=source, dtype=torch.float16).double()  # noqa: E731
    x = draw()
    for row, t in enumerate(table.timesteps):
        noise = draw() if table.draws(row) else torch.zeros_like(x)
        ddpm_fast.reverse_step_(x, wide(x, t).sample, table, row, noise=noise)
    errors = [float((result.double() - images(x)).abs().max()) for result in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1] + 1e-3  # half a unit in the last place of the image


@pytest.mark.parametrize("sde", [False, True])
def test_noise_is_drawn_in_the_dtype_of_diffusers(sde, monkeypatch):
    """Noise has the dtype of the network, except that of DPM-Solver's SDE."""
    scheduler = diffusers.DDPMScheduler()
    if sde:
        scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    pipe = ddpm(scheduler)
    pipe.unet.half()
    quick, drawn, draw = fast(pipe), [], torch.randn
    quick(1, generator(1), 3, output_type="pt")
    monkeypatch.setattr(
        torch, "randn", lambda *a, **o: (drawn.append(o["dtype"]), draw(*a, **o))[1]
    )
    quick(1, generator(1), 3, output_type="pt")
    assert drawn == [torch.float16, *[torch.float32 if sde else torch.float16] * (3 if sde else 2)]


@pytest.mark.parametrize(
    ("make", "source"),
    [(ddpm, "one"), (ddpm, "list"), (ddim, "one"), (ddim, "list-of-one"), (ddim, "none")],
)
def test_generators_of_every_form(make, source):
    pipe, num = make(), 1 if source == "list-of-one" else 3
    quick = fast(pipe)
    results = []
    for called in (pipe, quick):
        torch.manual_seed(7)
        sources = {
            "one": generator(1),
            "list": [generator(1), generator(2), generator(3)],
            "list-of-one": [generator(1)],
            "none": None,
        }
        used = sources[source]
        extra = {"eta": 0.7} if make is ddim else {}
        result = called(num, used, num_inference_steps=6, output_type="np", **extra).images
        after = [torch.randn(1, generator=g) for g in np.atleast_1d(np.array(used, dtype=object))]
        results.append((result, after))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-4)
    assert results[0][1] == results[1][1]  # drawn from as often


@pytest.mark.parametrize(
    "make",
    [
        lambda: (ddim(), {"eta": 1.0}),
        lambda: (
            ddpm(diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")),
            {},
        ),
        lambda: (ddpm(diffusers.DDPMScheduler(timestep_spacing="trailing")), {}),
    ],
    ids=["ddim", "sde", "ddpm"],
)
@pytest.mark.parametrize("compat", ["diffusers", "corrected"])
def test_noise_that_is_multiplied_by_0_is_drawn(make, compat):
    pipe, call = make()
    after = []
    for called in (pipe, fast(pipe, compat=compat)):
        source = generator(1)
        called(1, source, num_inference_steps=1, output_type="np", **call)
        after.append(torch.randn(1, generator=source))
    assert torch.equal(*after)


@pytest.mark.parametrize(("eta", "clipped"), [(0.0, None), (0.0, True), (1.0, False), (1.0, True)])
def test_the_arguments_of_ddim(eta, clipped):
    pipe = ddim(diffusers.DDIMScheduler(timestep_spacing="trailing"))
    call = {"eta": eta, "use_clipped_model_output": clipped, "num_inference_steps": 7}
    want, got = (p(2, generator(1), output_type="np", **call).images for p in (pipe, fast(pipe)))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_learned_variance():
    pipe = ddpm(diffusers.DDPMScheduler(variance_type="learned_range"), out_channels=6)
    want, got = (p(2, generator(1), 6, output_type="np").images for p in (pipe, fast(pipe)))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_images_that_are_not_square():
    pipe = ddpm(sample_size=(8, 16))
    want, got = (p(2, generator(1), 4, output_type="np").images for p in (pipe, fast(pipe)))
    assert got.shape == (2, 8, 16, 3)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_any_network_and_scheduler_without_a_pipeline():
    network = unet()
    for kind, cls in SCHEDULERS.items():
        pipe = quiet(accelerate(network, cls(), tuner=OFF))
        assert type(pipe) is (FastDDIMPipeline if kind == "ddim" else FastDDPMPipeline)
        assert np.isfinite(
            pipe(2, generator(1), num_inference_steps=5, output_type="np").images
        ).all()


# The call


@pytest.mark.parametrize("make", [ddpm, ddim], ids=["ddpm", "ddim"])
def test_output_types(make):
    pipe = make()
    quick = fast(pipe)
    call = {"num_inference_steps": 3}
    for output in ("pil", "np", "pt"):
        want, got = (p(2, generator(1), output_type=output, **call).images for p in (pipe, quick))
        assert type(got) is type(want)
        if output == "pil":
            assert [i.size for i in got] == [i.size for i in want]
            assert [i.mode for i in got] == [i.mode for i in want]
            continue
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        if output == "pt":
            assert got.stride() == want.stride()
    assert isinstance(quick(2, return_dict=False, **call), tuple)
    assert type(quick(1, **call)) is type(pipe(1, **call))


def test_the_progress_bar_is_that_of_the_pipeline(capsys):
    pipe = ddpm()
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    quick = fast(pipe)
    quick(1, num_inference_steps=5)
    shown = capsys.readouterr().err
    assert "drawing" in shown
    assert "5/5" in shown
    quick.set_progress_bar_config(disable=True)
    quick(1, num_inference_steps=5)
    assert capsys.readouterr().err == ""


def test_it_shares_parts_and_saves_as_a_pipeline_of_diffusers(tmp_path):
    pipe = ddpm(FastDDPMScheduler(compat="corrected"))
    before = dict(pipe.__dict__)
    quick = fast(pipe)
    assert isinstance(quick, diffusers.DDPMPipeline)
    assert quick.unet is pipe.unet
    assert quick.scheduler is pipe.scheduler
    assert pipe.__dict__ == before
    assert type(pipe) is diffusers.DDPMPipeline
    quick.save_pretrained(tmp_path)
    again = quiet(diffusers.DDPMPipeline.from_pretrained(tmp_path))
    assert type(again.scheduler) is diffusers.DDPMScheduler
    want = again(2, generator(1), 4, output_type="np").images
    np.testing.assert_allclose(
        fast(again)(2, generator(1), 4, output_type="np").images, want, atol=1e-4
    )


def test_parts_may_be_replaced_or_changed_later():
    quick = fast(ddpm())
    quick(1, generator(1), 3, output_type="np")
    with torch.no_grad():
        quick.unet.conv_out.bias.add_(0.3)
    quick.scheduler = diffusers.DDIMScheduler()
    pipe = quiet(diffusers.DDPMPipeline(quick.unet, quick.scheduler))
    want, got = (p(1, generator(1), 3, output_type="np").images for p in (pipe, quick))
    np.testing.assert_allclose(got, want, atol=1e-4)
    pipe.to(torch.bfloat16)
    assert quick(1, generator(1), 3, output_type="pt").images.dtype == torch.bfloat16
    quick.unet = unet(sample_size=16).float()
    assert quick(1, num_inference_steps=3, output_type="np").images.shape == (1, 16, 16, 3)


def test_report_and_copies_of_a_tuned_pipeline():
    quick = accelerate(ddpm())
    want = quick(2, generator(1), 4, output_type="np").images
    assert "UNet2DModel on cpu" in quick.report()
    assert "2x3x8x8: " in quick.report()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(quick)))
    got = copied(2, generator(1), 4, output_type="np").images
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_compiled_network_is_unwrapped():
    pipe = ddpm()
    want = pipe(1, generator(1), 3, output_type="np").images
    pipe.unet = torch.compile(pipe.unet)
    got = fast(pipe)(1, generator(1), 3, output_type="np").images
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_inference_mode_and_autocast():
    quick = fast(ddpm())
    want = quick(1, generator(1), 3, output_type="np").images
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = quick(1, generator(1), 3, output_type="np").images
    np.testing.assert_allclose(inside, want, atol=1e-5)


# compat, noise


def test_compat():
    """With "diffusers" the last trailing step of fixed_large adds noise; with "corrected" not."""
    options = {"variance_type": "fixed_large", "timestep_spacing": "trailing"}
    pipe = ddpm(diffusers.DDPMScheduler(**options))
    want = pipe(2, generator(1), 10, output_type="np").images
    follows = fast(pipe)(2, generator(1), 10, output_type="np").images
    right = fast(pipe, compat="corrected")(2, generator(1), 10, output_type="np").images
    np.testing.assert_allclose(follows, want, atol=1e-4)
    assert np.abs(right - want).max() > 0.05
    own = ddpm(FastDDPMScheduler(**options, compat="corrected"))
    np.testing.assert_array_equal(fast(own)(2, generator(1), 10, output_type="np").images, right)


def test_philox_noise_depends_on_seed_and_index_only():
    pipe = ddpm()
    quick = fast(pipe, noise="philox", micro_batch=4)
    ten = quick(10, generator(3), 5, output_type="np").images
    np.testing.assert_array_equal(quick(3, generator(3), 5, output_type="np").images, ten[:3])
    source = generator(3)
    first, second = (quick(2, source, 5, output_type="np").images for _ in range(2))
    np.testing.assert_array_equal(first, ten[:2])
    assert np.abs(second - first).max() > 0.1
    torch.manual_seed(4)
    a, b = (quick(1, num_inference_steps=5, output_type="np").images for _ in range(2))
    torch.manual_seed(4)
    np.testing.assert_array_equal(quick(1, num_inference_steps=5, output_type="np").images, a)
    assert np.abs(a - b).max() > 0.1
    whole = fast(pipe, noise="philox")(10, generator(3), 5, output_type="np").images
    np.testing.assert_allclose(whole, ten, atol=1e-4)
