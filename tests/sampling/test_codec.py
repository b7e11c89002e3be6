"""Codec: encode, decode, interpolate, and image_to_image, on models in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cases import F32, F64, same_bits
from ddpm_fast import Codec, Sampler, StepTable, image_to_image, philox_normal, slerp
from diffusers_pairs import MEAN, SCHEDULES, VARIANCE, closed_form

LINEAR = SCHEDULES["linear"]
SHAPE = (2, 4, 3)


def codec(steps=50, prediction="epsilon", dtype=F64, **options) -> Codec:
    model = closed_form(LINEAR, prediction)
    placement = {"device": "cpu", "dtype": dtype, "micro_batch": 8}
    return Codec(model, LINEAR, SHAPE, steps, prediction, **placement, **options)


def data(num=6, seed=0, dtype=F64):
    """Return samples of the data of the closed-form model."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num, *SHAPE, generator=generator, dtype=F64)
    return (MEAN + math.sqrt(VARIANCE) * values).to(dtype)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_codes_of_data_are_noise_and_decode_to_the_data(prediction):
    """The ODE maps N(m, s^2) to N(0, 1) by a line: the code of x is (x - m) / s."""
    images = data(50)
    codes = codec(200, prediction).encode(images, progress=False)
    expected = (images - MEAN) / math.sqrt(VARIANCE)
    torch.testing.assert_close(codes, expected, rtol=0, atol=0.06)
    back = codec(200, prediction).decode(codes, progress=False)
    torch.testing.assert_close(back, images, rtol=0, atol=0.04)


def test_codes_of_any_timestep():
    images = data(50)
    codes = codec(200).encode(images, t=399, progress=False)
    abar = float(LINEAR.alphas_cumprod[399])
    scale = math.sqrt(abar * VARIANCE + 1 - abar) / math.sqrt(VARIANCE)
    expected = MEAN * math.sqrt(abar) + (images - MEAN) * scale
    torch.testing.assert_close(codes, expected, rtol=0, atol=0.06)
    back = codec(200).decode(codes, t=399, progress=False)
    torch.testing.assert_close(back, images, rtol=0, atol=0.04)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", [999, 500, 99, 98, 0]])
@pytest.mark.parametrize("t", [0, 98, 99, 500, 999])
def test_a_chain_reaches_the_requested_timestep(t, spacing):
    model_timesteps = []

    def model(x, at):
        model_timesteps.append(int(at[0]))
        return 0.1 * x

    ours = Codec(model, LINEAR, SHAPE, 50, spacing=spacing, device="cpu", dtype=F64)
    codes = ours.encode(data(1), t, progress=False)
    assert model_timesteps[-1] == max(model_timesteps) == t
    model_timesteps.clear()
    ours.decode(codes, t, progress=False)
    assert model_timesteps[0] == max(model_timesteps) == t


def test_no_images():
    none = data(0)
    assert codec(5).encode(none, progress=False).shape == (0, *SHAPE)
    for mode in ("latent-slerp", "latent-lerp", "stochastic"):
        got = codec(5).interpolate(none, none, torch.tensor([0.0, 1.0]), mode, progress=False)
        assert got.shape == (2, 0, *SHAPE)


def test_guidance_equals_that_of_the_tables():
    def model(x, t, labels):
        return 0.1 * x * (1 + labels.view(-1, 1, 1, 1))

    placement = {"device": "cpu", "dtype": F64, "null_label": 3}
    ours = Codec(model, LINEAR, SHAPE, 5, guidance=2.0, **placement)
    images, labels = data(2), torch.tensor([0, 1])
    table = StepTable.ddim_inverse(LINEAR, 5, spacing="linspace").with_guidance(2.0)
    sampler = Sampler(model, table, SHAPE, pad=False, **placement)
    expected = sampler.sample(2, x_T=images, labels=labels, progress=False)
    assert same_bits(ours.encode(images, labels=labels, progress=False), expected)


def test_encode_and_decode_run_ddim_inverse_and_ddim():
    images = data(8, dtype=F32)
    ours = codec(20, dtype=F32, clip=0.8, spacing="trailing")
    options = {"steps": 20, "clip": 0.8, "spacing": "trailing"}
    model = closed_form(LINEAR, "epsilon")
    inverse = Sampler(model, StepTable.ddim_inverse(LINEAR, **options), SHAPE, 8, "cpu")
    codes = ours.encode(images, progress=False)
    assert same_bits(codes, inverse.sample(8, x_T=images, progress=False))
    forward = inverse.with_table(StepTable.ddim(LINEAR, **options))
    assert same_bits(
        ours.decode(codes, progress=False), forward.sample(8, x_T=codes, progress=False)
    )


def test_slerp_stays_on_the_sphere():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 500, generator=generator, dtype=F64).unbind()
    b = b * a.norm(dim=1, keepdim=True) / b.norm(dim=1, keepdim=True)
    half = slerp(a, b, 0.5)
    torch.testing.assert_close(half.norm(dim=1), a.norm(dim=1))
    torch.testing.assert_close((half * a).sum(1), (half * b).sum(1))
    for weight, end in ((0, a), (1, b)):
        torch.testing.assert_close(slerp(a, b, weight), end)
    angle = torch.acos((a * b).sum(1) / a.norm(dim=1) ** 2)
    quarter = torch.acos((a * slerp(a, b, 0.25)).sum(1) / a.norm(dim=1) ** 2)
    torch.testing.assert_close(quarter, angle / 4)


def test_slerp_of_single_numbers_is_that_of_vectors_of_one():
    a, b = torch.randn(2, 5, dtype=F64)
    torch.testing.assert_close(slerp(a, b, 0.3), slerp(a[:, None], b[:, None], 0.3)[:, 0])


def test_slerp_of_parallel_vectors_is_a_line():
    a = torch.ones(3, 4, dtype=F64)
    b = torch.stack([2 * a[0], -a[0], 0 * a[0]])
    expected = torch.stack([1.25 * a[0], 0.5 * a[0], 0.75 * a[0]])
    torch.testing.assert_close(slerp(a, b, 0.25), expected)


@pytest.mark.parametrize("mode", ["latent-slerp", "latent-lerp"])
def test_interpolation_is_between_codes(mode):
    """Decoding is linear for this model, and so is interpolation of images."""
    x_a, x_b = data(3, 1), data(3, 2)
    ours = codec(100)
    weights = [0, 0.3, 1]
    got = ours.interpolate(x_a, x_b, weights, mode, progress=False)
    assert got.shape == (3, 3, *SHAPE)
    for w, images in zip(weights, got, strict=True):
        codes = ours.encode(torch.cat([x_a, x_b]), progress=False).split(3)
        mixed = slerp(*codes, w) if mode == "latent-slerp" else torch.lerp(*codes, w)
        torch.testing.assert_close(images, ours.decode(mixed, progress=False))
    if mode == "latent-lerp":
        torch.testing.assert_close(got[1], torch.lerp(got[0], got[2], 0.3), rtol=0, atol=1e-9)
    torch.testing.assert_close(got[0], x_a, rtol=0, atol=0.1)


def test_stochastic_interpolation_is_noised_mixed_and_sampled():
    x_a, x_b = data(3, 1), data(3, 2)
    t, seed = 300, 5
    ours = codec(50)
    got = ours.interpolate(x_a, x_b, [0.0, 0.4], "stochastic", t=t, seed=seed, progress=False)
    abar = float(LINEAR.alphas_cumprod[t])
    ends = [
        math.sqrt(abar) * x + math.sqrt(1 - abar) * philox_normal(3, SHAPE, seed, stream).double()
        for x, stream in ((x_a, 0), (x_b, 0x7FFF_FFFE))
    ]
    table = StepTable.ddpm(LINEAR, 50, clip=None, spacing="trailing", start=t + 1)
    sampler = Sampler(closed_form(LINEAR, "epsilon"), table, SHAPE, 8, "cpu", F64, pad=False)
    for w, images in zip((0.0, 0.4), got, strict=True):
        expected = sampler.sample(3, seed, x_T=torch.lerp(*ends, w), progress=False)
        torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
    other = ours.interpolate(x_a, x_b, 0.4, "stochastic", t=t, seed=6, progress=False)
    assert not torch.equal(other[0], got[1])


def test_labels_stay_with_their_images():
    seen = []

    def model(x, t, labels):
        seen.append(labels.clone())
        return 0.1 * x

    ours = Codec(model, LINEAR, SHAPE, 3, device="cpu", dtype=F64)
    labels = torch.tensor([4, 5])
    ours.interpolate(data(2, 1), data(2, 2), [0.0, 0.5, 1.0], labels=labels, progress=False)
    assert [of.tolist() for of in seen[:3]] == [[4, 5] * 2] * 3
    assert [of.tolist() for of in seen[3:]] == [[4, 5] * 3] * 3


@pytest.mark.parametrize("make", [StepTable.ddpm, StepTable.dpmpp_2m, StepTable.ve_ode])
def test_image_to_image_begins_at_the_noised_image(make):
    table = make(LINEAR, 20, start=500, clip=None)
    t = int(table.timesteps[0])
    images = data(4)
    states = []

    def model(x, model_timesteps):
        states.append((x.clone(), model_timesteps.clone()))
        return closed_form(LINEAR, "epsilon")(x, model_timesteps)

    sampler = Sampler(model, table, SHAPE, 4, "cpu", F64)
    got = image_to_image(sampler, images, LINEAR, seed=7, progress=False)
    abar = float(LINEAR.alphas_cumprod[t])
    noise = philox_normal(4, SHAPE, 7).double()
    x_t = math.sqrt(abar) * images + math.sqrt(1 - abar) * noise
    torch.testing.assert_close(states[0][0], x_t, rtol=1e-9, atol=1e-9)
    assert states[0][1].tolist() == [t] * 4
    again = sampler.sample(4, 7, x_T=x_t * table.init_scale, progress=False)
    torch.testing.assert_close(got, again, rtol=1e-9, atol=1e-9)


def test_image_to_image_keeps_less_of_an_image_the_higher_it_starts():
    images, distances = data(64), []
    for start in (50, 300, 900):
        table = StepTable.ddpm(LINEAR, 50, start=start, clip=None)
        sampler = Sampler(closed_form(LINEAR, "epsilon"), table, SHAPE, 64, "cpu", F64)
        got = image_to_image(sampler, images, LINEAR, progress=False)
        distances.append(float((got - images).square().mean()))
    assert distances == sorted(distances)
    assert distances[0] < 0.2 * distances[-1]
    assert distances[-1] == pytest.approx(2 * VARIANCE, rel=0.3)


X = data(2)
BAD = {
    "mode": (lambda: codec().interpolate(X, X, 0.5, "slerp"), "mode must be one of latent-slerp"),
    "weights": (lambda: codec().interpolate(X, X, []), "weights must be a number or a sequence"),
    "weight-nan": (lambda: codec().interpolate(X, X, [0.1, np.nan]), r"weights\[1\] must"),
    "x_b": (lambda: codec().interpolate(X, X[:1], 0.5), r"x_b must have the shape of x_a"),
    "t": (lambda: codec().encode(X, t=1000), r"t must be an integer in \[0, 999\]"),
    "images": (lambda: codec().encode(X[:, :1]), r"images must be \[N, 2, 4, 3\]"),
    "latents": (lambda: codec().decode(X[:, :1]), r"latents must be \[N, 2, 4, 3\]"),
    "steps": (lambda: codec(0), "steps must"),
    "t-of-a-list": (lambda: codec(spacing=[9, 99]).encode(X, t=50), "t must be one of the listed"),
    "data-table": (
        lambda: image_to_image(
            Sampler(closed_form(LINEAR, "v"), StepTable.ddim_inverse(LINEAR, 5), SHAPE, 2, "cpu"),
            X,
            LINEAR,
        ),
        "must begin at a noise level; got one that begins at data",
    ),
    "no-x_T": (
        lambda: Sampler(
            closed_form(LINEAR, "v"), StepTable.ddim_inverse(LINEAR, 5), SHAPE, 2, "cpu"
        ).sample(2),
        "x_T must be given for a table that begins at data",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
