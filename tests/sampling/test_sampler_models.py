"""Models of a sampler: accepted outputs, errors of bad models and bad arguments."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cases import BF16, F16, F32, F64, SCHEDULE, assert_named, backends, same_bits
from ddpm_fast import Sampler
from sampler_cases import DDPM, SHAPE, Net, draw, sampler, smooth


@pytest.mark.parametrize("on", backends(), ids=str)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x, t: x, id="itself"),
        pytest.param(lambda x, t: x[:1].expand_as(x), id="first-sample"),
        pytest.param(lambda x, t: x[:, :, :1].expand_as(x), id="first-line"),
    ],
)
def test_a_model_may_return_its_input_or_a_view_of_it(on, dtype, view):
    apart = draw(sampler(lambda x, t: view(x, t).clone(), dtype=dtype, on=on), 4)
    assert same_bits(draw(sampler(view, dtype=dtype, on=on), 4), apart)


def test_a_model_may_return_an_object_with_a_sample():
    got = draw(sampler(lambda x, t: SimpleNamespace(sample=smooth(x, t))))
    assert same_bits(got, draw(sampler()))


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "sliced"])
def test_a_model_may_return_any_layout(layout):
    def model(x, t):
        out = smooth(x, t)[..., :1].expand_as(x)
        if layout == "sliced":
            return out.repeat(1, 1, 1, 2)[..., ::2]
        return out if layout == "expanded" else out.contiguous()

    got = draw(sampler(model))
    assert same_bits(got, draw(sampler(lambda x, t: smooth(x, t)[..., :1].repeat(1, 1, 1, 5))))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_float32_state_takes_half_outputs(dtype):
    got = draw(sampler(lambda x, t: smooth(x, t).to(dtype)))
    assert got.dtype == F32
    torch.testing.assert_close(got, draw(sampler()), rtol=0, atol=0.05)


def test_a_nan_of_the_model_stays_in_its_element():
    def model(x, t):
        out = smooth(x, t)
        out[1, 0, 0, 0] = torch.nan
        return out

    got = draw(sampler(model), 4)
    assert got.isnan().sum() == 1
    assert got[1, 0, 0, 0].isnan()


def test_device_and_dtype_are_those_of_the_models_parameters():
    half = Sampler(Net().to(BF16), DDPM, SHAPE)
    assert (half.device, half.dtype, half.state_dtype) == (torch.device("cpu"), BF16, F32)
    assert Sampler(Net().double(), DDPM, SHAPE).state_dtype == F64
    assert Sampler(Net().to(BF16), DDPM, SHAPE, dtype=F32).dtype == F32
    assert Sampler(smooth, DDPM, SHAPE, device="cpu").dtype == F32


def test_an_error_of_the_model_leaves_the_sampler_usable():
    broken = True

    def model(x, t):
        if broken and t[0] < 500:
            raise KeyError("of the model")
        return smooth(x, t)

    sample = sampler(model)
    with pytest.raises(KeyError, match="of the model"):
        draw(sample)
    broken = False
    assert same_bits(draw(sample), draw(sampler()))


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        pytest.param(lambda x, t: None, TypeError, ("tensor", "NoneType"), id="nothing"),
        pytest.param(lambda x, t: (x, x), TypeError, ("tensor", "tuple"), id="tuple"),
        pytest.param(
            lambda x, t: x[:, :1], ValueError, ("[4, 3, 6, 5]", "[4, 1, 6, 5]"), id="channels"
        ),
        pytest.param(lambda x, t: x[:1], ValueError, ("[4, 3, 6, 5]", "[1, 3, 6, 5]"), id="batch"),
        pytest.param(lambda x, t: x.to("meta"), ValueError, ("cpu", "meta"), id="device"),
        pytest.param(lambda x, t: x.long(), TypeError, ("floating-point", "int64"), id="integers"),
        pytest.param(lambda x, t: x.double(), TypeError, ("float32", "float64"), id="float64"),
        pytest.param(
            lambda x, t: torch.cat([x, x, x], dim=1),
            ValueError,
            ("[4, 3, 6, 5]", "[4, 9, 6, 5]"),
            id="more-channels",
        ),
    ],
)
def test_invalid_model_outputs_are_named(model, error, words):
    with pytest.raises(error) as raised:
        draw(sampler(model))
    assert all(word in str(raised.value) for word in ("model", *words)), str(raised.value)


def built(
    model=smooth,
    table=DDPM,
    sample_shape=SHAPE,
    micro_batch=4,
    device="cpu",
    dtype=None,
    backend="auto",
    noise="philox",
    graph="auto",
):
    return Sampler(model, table, sample_shape, micro_batch, device, dtype, backend, noise, graph)


def sampled(num=2, seed=0, first_sample=0, x_T=None, return_steps=None):
    sample = built().sample
    return sample(num, seed, first_sample, x_T, progress=False, return_steps=return_steps)


MADE = [
    ("model", 3, TypeError, "callable", "int"),
    ("table", SCHEDULE, TypeError, "StepTable", "NoiseSchedule"),
    ("sample_shape", 3, TypeError, "sequence of ints", "3"),
    ("sample_shape", (3, -1, 4), ValueError, "negative", "-1"),
    ("micro_batch", 0, ValueError, "[1, ", "0"),
    ("micro_batch", 2.0, TypeError, "int", "float"),
    ("device", "nowhere", ValueError, "nowhere"),
    ("dtype", torch.int8, TypeError, "float32, float16, bfloat16, float64", "int8"),
    ("dtype", "half", TypeError, "float32, float16, bfloat16, float64", "half"),
    ("backend", "jax", ValueError, "auto, reference, cpu, triton, cuda", "'jax'"),
    ("backend", "cuda", RuntimeError, "cannot run", "CUDA tensors"),
    ("noise", "gaussian", TypeError, "'philox', a torch.Generator or a list", "gaussian"),
    ("noise", 3, TypeError, "'philox', a torch.Generator or a list", "3"),
    ("noise", [], ValueError, "one generator or more", "empty"),
    ("noise", [torch.Generator(), 3], TypeError, "noise[1] must be a Generator", "int"),
    ("graph", "always", ValueError, "'auto', True or False", "always"),
    ("graph", True, ValueError, "CUDA", "cpu"),
]
SAMPLED = [
    ("num", -1, ValueError, "[0, ", "-1"),
    ("num", 1.0, TypeError, "int", "float"),
    ("seed", -1, ValueError, "[0, 18446744073709551615]", "-1"),
    ("seed", None, TypeError, "int", "NoneType"),
    ("first_sample", -1, ValueError, "[0, ", "-1"),
    ("first_sample", (1 << 63) - 1, ValueError, "[0, ", "9223372036854775807"),
    ("x_T", [0.0], TypeError, "tensor", "list"),
    ("x_T", torch.zeros(2, *SHAPE, dtype=torch.int64), TypeError, "floating-point", "int64"),
    ("x_T", torch.zeros(1, *SHAPE), ValueError, "[2, 3, 6, 5]", "[1, 3, 6, 5]"),
    ("return_steps", [6], ValueError, "[0, 5]", "6"),
    ("return_steps", [-1], ValueError, "[0, 5]", "-1"),
    ("return_steps", [0.5], TypeError, "int", "float"),
    ("return_steps", 3, TypeError, "sequence", "int"),
]


@pytest.mark.parametrize("bad", MADE, ids=lambda c: f"{c[0]}-{c[-1]}")
def test_bad_arguments_of_a_sampler(bad):
    assert_named(built, bad)


@pytest.mark.parametrize("bad", SAMPLED, ids=lambda c: f"{c[0]}-{c[-1]}")
def test_bad_arguments_of_sample(bad):
    assert_named(sampled, bad)


def test_noise_input_has_the_shape_of_steps_and_samples():
    sample = built(noise=torch.zeros(5, 2, *SHAPE)).sample
    assert sample(2, progress=False).shape == (2, *SHAPE)
    with pytest.raises(ValueError, match=r"noise must be \[5, 3, 3, 6, 5\]; got \[5, 2, 3, 6, 5\]"):
        sample(3, progress=False)
    with pytest.raises(TypeError, match=r"noise .*int64"):
        built(noise=torch.zeros(5, 2, *SHAPE).long()).sample(2, progress=False)
