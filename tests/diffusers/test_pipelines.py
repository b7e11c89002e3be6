"""`accelerate(pipe)`: the same call and images as diffusers' pipelines, and what is refused."""

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


def shipped(kind="ddpm", **options):
    scheduler = SCHEDULERS[kind].from_pretrained(SHIPPED, subfolder="scheduler", **options)
    network = diffusers.UNet2DModel.from_pretrained(SHIPPED, subfolder="unet")
    return quiet(diffusers.DDPMPipeline(network, scheduler))


def in_float64(scheduler):
    """A scheduler of diffusers with its tables in float64, and coefficients that follow them."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def own_loop(pipe, steps, num, wide=False, **of_step):
    """A pipeline's chain written out, by diffusers' scheduler; in float64 throughout where wide.

    DPM-Solver's step goes through float32 by itself; in float64 its table stands in, which
    test_fast_steps holds to it step by step.
    """
    network = copy.deepcopy(pipe.unet).double() if wide else pipe.unet
    scheduler, source = copy.deepcopy(pipe.scheduler), generator(5)
    scheduler.set_timesteps(steps)
    x = torch.randn((num, 1, 32, 32), generator=source)
    if wide and isinstance(scheduler, SCHEDULERS["dpm"]):
        return _by_table(network, scheduler, x.double(), source)
    x, scheduler = (x.double(), in_float64(scheduler)) if wide else (x, scheduler)
    if not isinstance(scheduler, SCHEDULERS["unipc"]):
        of_step["generator"] = source
    with drawing_float32():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x, **of_step).prev_sample
    return x


@contextmanager
def drawing_float32():
    """What a scheduler draws for float64 samples are the float32 numbers."""
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


@pytest.mark.parametrize(("kind", "options", "of_step"), CHAINS.values(), ids=CHAINS)
@torch.no_grad()
def test_chains_of_the_shipped_model(kind, options, of_step):
    """Within 1e-4, or twice the library's own distance from float64, of the chain in float64."""
    pipe = shipped(kind, **options)
    if of_step:
        pipe = quiet(diffusers.DDIMPipeline(pipe.unet, pipe.scheduler))
    exact = images(own_loop(pipe, 20, 2, wide=True, **of_step))
    theirs = images(own_loop(pipe, 20, 2, **of_step)).double()
    call = {"num_inference_steps": 20, "output_type": "pt", **of_step}
    ours = accelerate(pipe)(2, generator(5), **call).images.double()
    bound = max(1e-4 * float(exact.abs().max()), 2 * float((theirs - exact).abs().max()))
    assert float((ours - exact).abs().max()) <= bound
    assert float((theirs - exact).abs().max()) < 2e-3  # the bound is one
    if kind != "unipc":  # DDPMPipeline hands UniPC a generator, which it does not take
        again = pipe(2, generator(5), **call).images.double()
        torch.testing.assert_close(again, theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_half_precision_is_no_further_from_float64_than_the_library():
    pipe = shipped()
    half = quiet(diffusers.DDPMPipeline(copy.deepcopy(pipe.unet).half(), pipe.scheduler))
    steps, num = 8, 2
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
    errors = [float((made.double() - images(x)).abs().max()) for made in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1] + 1e-3  # half a unit in the last place of the image


@pytest.mark.parametrize("sde", [False, True])
def test_what_is_drawn_has_the_dtype_that_the_library_draws(sde, monkeypatch):
    """That of the network, but for the noise of DPM-Solver's SDE."""
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


@pytest.mark.parametrize("source", ["one", "list", "list-of-one", "none"])
@pytest.mark.parametrize("make", [ddpm, ddim], ids=["ddpm", "ddim"])
def test_generators_of_every_form(make, source):
    pipe, num = make(), 1 if source == "list-of-one" else 3
    quick = fast(pipe)
    results = []
    for called in (pipe, quick):
        torch.manual_seed(7)
        given = {
            "one": generator(1),
            "list": [generator(1), generator(2), generator(3)],
            "list-of-one": [generator(1)],
            "none": None,
        }[source]
        extra = {"eta": 0.7} if make is ddim else {}
        made = called(num, given, num_inference_steps=6, output_type="np", **extra).images
        after = [torch.randn(1, generator=g) for g in np.atleast_1d(np.array(given, dtype=object))]
        results.append((made, after))
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
def test_what_a_factor_of_0_meets_is_drawn_too(make, compat):
    """A chain of one step, whose noise is left out but drawn."""
    pipe, call = make()
    after = []
    for called in (pipe, fast(pipe, compat=compat)):
        source = generator(1)
        called(1, source, num_inference_steps=1, output_type="np", **call)
        after.append(torch.randn(1, generator=source))
    assert torch.equal(*after)


@pytest.mark.parametrize("clipped", [None, True, False])
def test_the_arguments_of_ddim(clipped):
    pipe = ddim(diffusers.DDIMScheduler(timestep_spacing="trailing"))
    for eta in (0.0, 1.0):
        call = {"eta": eta, "use_clipped_model_output": clipped, "num_inference_steps": 7}
        want, got = (
            p(2, generator(1), output_type="np", **call).images for p in (pipe, fast(pipe))
        )
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


def test_the_progress_bar_is_the_pipelines_own(capsys):
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


def test_it_is_a_pipeline_of_diffusers(tmp_path):
    """Its parts are those of the pipe, which is left as it was; it saves what anybody loads."""
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


def test_parts_that_are_replaced_or_changed_later():
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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies(copied):
    quick = accelerate(ddpm())
    want = quick(2, generator(1), 4, output_type="np").images
    np.testing.assert_allclose(
        copied(quick)(2, generator(1), 4, output_type="np").images, want, atol=1e-5
    )


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


def test_the_report_says_what_runs():
    quick = accelerate(ddpm())
    quick(2, num_inference_steps=2)
    assert "UNet2DModel on cpu" in quick.report()
    assert "2x3x8x8: " in quick.report()


# compat, noise


def test_compat():
    """The last trailing step of fixed_large noises the image, unless it is corrected."""
    options = {"variance_type": "fixed_large", "timestep_spacing": "trailing"}
    pipe = ddpm(diffusers.DDPMScheduler(**options))
    want = pipe(2, generator(1), 10, output_type="np").images
    follows = fast(pipe)(2, generator(1), 10, output_type="np").images
    right = fast(pipe, compat="corrected")(2, generator(1), 10, output_type="np").images
    np.testing.assert_allclose(follows, want, atol=1e-4)
    assert np.abs(right - want).max() > 0.05
    own = ddpm(FastDDPMScheduler(**options, compat="corrected"))
    np.testing.assert_array_equal(fast(own)(2, generator(1), 10, output_type="np").images, right)


def test_philox_noise_is_each_images_own():
    """Image k is the same bits in any batch; the generator gives the seed."""
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
