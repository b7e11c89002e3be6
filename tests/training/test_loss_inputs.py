"""Arguments of `training_losses`: noise, models, compilation, and errors."""

from __future__ import annotations

import math

import pytest
import torch

from cases import BF16, F32, F64, SCHEDULE, assert_named, same_bits
from ddpm_fast import TrainingLosses, philox_normal, q_sample_philox, training_losses
from ddpm_fast.ops.philox import STREAM_OFFSET, STREAM_TRAINING
from loss_cases import SHORT, T4, Network, batch

SEED, FIRST = 7, 100
COMPILED = {
    "simple": {},
    "score": {"prediction": "score", "objective": "score"},
    "full": {"objective": "full", "variance": "learned_range"},
    "hybrid": {"objective": "hybrid", "variance": "learned_range", "weighting": "min_snr"},
    "offset": {"offset_noise": 0.1, "prediction": "v"},
}


def generated(x0, t, schedule=SHORT, **options):
    model = options.pop("model", lambda x, t: torch.zeros_like(x))
    return training_losses(model, x0, t, schedule, seed=SEED, **options)


def test_noise_and_x_t_are_those_of_q_sample_philox() -> None:
    x0, _ = batch(dtype=F32, layout="channels-last")
    stream = STREAM_TRAINING + 3
    found = generated(x0, T4, stream=stream, first_sample=FIRST)
    x_t, noise = q_sample_philox(x0, T4, SHORT, SEED, stream, FIRST)
    assert same_bits(found.x_t, x_t)
    assert same_bits(found.noise, noise)
    assert same_bits(generated(x0, T4).noise, philox_normal(4, x0.shape[1:], SEED, STREAM_TRAINING))


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_the_noise_of_a_sample_does_not_depend_on_the_batch(strength: float, dtype) -> None:
    x0, _ = batch((7, 2, 3, 5), dtype=dtype)
    t = torch.arange(7)
    whole = generated(x0, t, offset_noise=strength, first_sample=FIRST)
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        part = generated(
            x0[begin:end], t[begin:end], offset_noise=strength, first_sample=FIRST + begin
        )
        for name in ("noise", "x_t", "loss"):
            assert same_bits(getattr(part, name), getattr(whole, name)[begin:end]), name
    other = generated(x0, t, offset_noise=strength, stream=STREAM_TRAINING + 1, first_sample=FIRST)
    assert not torch.isclose(other.noise, whole.noise).any()


def test_the_offset_is_one_normal_for_each_sample_and_channel_of_another_stream() -> None:
    x0, _ = batch((6, 3, 4, 4), dtype=F32)
    t, stream = torch.full((6,), 5), STREAM_TRAINING + 9
    plain = generated(x0, t, stream=stream, first_sample=FIRST)
    found = generated(x0, t, stream=stream, first_sample=FIRST, offset_noise=0.25)
    offset = philox_normal(6, (3,), SEED, STREAM_OFFSET + 9, FIRST)[..., None, None]
    torch.testing.assert_close(found.noise, plain.noise + 0.25 * offset)
    # The target is the noise with its offset, and x_t contains it.
    torch.testing.assert_close(found.mse, found.noise.square().flatten(1).mean(1))
    abar = SHORT.alphas_cumprod[5].float()
    torch.testing.assert_close(found.x_t, abar.sqrt() * x0 + (1 - abar).sqrt() * found.noise)


def test_the_statistics_of_the_offset() -> None:
    """A mean over a channel of variance 1/d + strength^2 (Guttenberg 2023), and no correlation."""
    x0, strength = torch.zeros(4000, 3, 8, 8), 0.5
    for options in ({"seed": SEED}, {"noise": torch.randn(x0.shape), "seed": None}):
        torch.manual_seed(1)
        found = training_losses(
            lambda x, t: x, x0, 3, SHORT, offset_noise=strength, **options
        ).noise
        means = found.mean((2, 3))
        assert means.var(0).mean().item() == pytest.approx(1 / 64 + strength**2, rel=0.05)
        assert torch.corrcoef(means.T).fill_diagonal_(0).abs().max() < 0.06
        assert found.var().item() == pytest.approx(1 + strength**2, rel=0.05)


def test_the_offset_of_a_noise_argument_is_drawn_with_the_seed_or_torchs_generator() -> None:
    x0, noise = batch(dtype=F32)
    zeros = torch.zeros_like(noise)

    def offset(noise, **options):
        return training_losses(
            lambda x, t: x, x0, T4, SHORT, noise=noise, offset_noise=0.1, **options
        ).noise

    by_seed = philox_normal(4, (2,), SEED, STREAM_OFFSET)[..., None, None]
    torch.testing.assert_close(offset(zeros, seed=SEED), 0.1 * by_seed.expand_as(noise))
    torch.manual_seed(5)
    first = offset(noise)
    torch.manual_seed(5)
    torch.testing.assert_close(first - noise, 0.1 * torch.randn(4, 2, 1, 1).expand_as(noise))


class Output:
    def __init__(self, sample) -> None:
        self.sample = sample


def test_models_may_return_objects_and_take_labels() -> None:
    network, (x0, noise) = Network(), batch()
    expected = training_losses(network, x0, T4, SHORT, noise=noise)
    wrapped = training_losses(lambda x, t: Output(network(x, t)), x0, T4, SHORT, noise=noise)
    assert same_bits(wrapped.loss, expected.loss)
    labels = torch.tensor([3, 0, 2, 1])
    labelled = training_losses(network, x0, T4, SHORT, noise=noise, labels=labels)
    later = training_losses(lambda x, t: network(x, t + labels), x0, T4, SHORT, noise=noise)
    assert same_bits(labelled.loss, later.loss)
    same = training_losses(network, x0, T4, SHORT, noise=noise, labels=2)
    each = training_losses(network, x0, T4, SHORT, noise=noise, labels=torch.full((4,), 2))
    assert same_bits(same.loss, each.loss)
    assert not same_bits(same.loss, expected.loss)


def test_an_int_timestep_is_passed_to_the_model_for_each_sample() -> None:
    seen = []

    def model(x, t):
        seen.append((t.dtype, t.tolist()))
        return torch.zeros_like(x)

    x0, noise = batch()
    found = training_losses(model, x0, 5, SHORT, noise=noise)
    assert seen == [(torch.int64, [5] * 4)]
    each = training_losses(model, x0, torch.full((4,), 5), SHORT, noise=noise)
    assert same_bits(found.x_t, each.x_t)


def test_vectors_and_an_empty_batch() -> None:
    x0 = torch.zeros(3, 6)
    found = training_losses(lambda x, t: x, x0, 4, SHORT, seed=1, offset_noise=0.1)
    assert found.loss.shape == (3,)
    empty = training_losses(lambda x, t: x, x0[:0], 4, SHORT, objective="full", seed=1)
    assert empty.loss.shape == (0,)


@pytest.mark.parametrize("objective", ["simple", "hybrid", "full"])
def test_the_loss_is_float32_under_autocast(objective: str) -> None:
    network, (x0, noise) = Network(learned=True, dtype=F32), batch(dtype=F32)
    options = {"objective": objective, "variance": "learned_range", "noise": noise}
    seen = []

    def model(x, t):
        seen.append(network(x, t))
        return seen[-1]

    exact = training_losses(network, x0, T4, SHORT, **options)
    with torch.autocast("cpu", BF16):
        found = training_losses(model, x0, T4, SHORT, **options)
    assert seen[0].dtype == BF16
    assert {part.dtype for part in found if part is not None} == {F32}
    # The arithmetic after the network is float32, on its output.
    again = training_losses(lambda x, t: seen[0].float(), x0, T4, SHORT, **options)
    assert same_bits(found.loss, again.loss)
    torch.testing.assert_close(found.loss, exact.loss, rtol=0.1, atol=0.1)
    found.loss.mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == F32 for p in network.parameters()
               if objective != "simple" or p.shape[-1] == 3)  # fmt: skip


@pytest.mark.parametrize(
    "case", [c if c == "hybrid" else pytest.param(c, marks=pytest.mark.slow) for c in COMPILED]
)
def test_compiles_as_one_graph_before_the_first_call(case: str) -> None:
    options, x0 = COMPILED[case], batch(dtype=F32)[0]
    network = Network("variance" in options, dtype=F32)
    schedule = type(SHORT).linear(8, 1e-2, 0.85)  # without tables on any device

    def step(x0, t, stream, first_sample):
        losses = training_losses(
            network, x0, t, schedule, seed=SEED, stream=STREAM_TRAINING + stream,
            first_sample=first_sample, **options,
        )  # fmt: skip
        return losses.loss.mean(), losses

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(3):
        t = (T4 + i).clamp(max=7)
        values = []
        for run in (compiled, step):
            loss, losses = run(x0, t, i, 4 * i)
            network.zero_grad()
            loss.backward()
            grads = [p.grad for p in network.parameters() if p.grad is not None]
            values.append([*[part for part in losses if part is not None], *grads])
        torch.testing.assert_close(*values)
        assert isinstance(losses, TrainingLosses)


def test_a_timestep_outside_is_clamped_in_compiled_code() -> None:
    x0, noise = batch(dtype=F32)

    def step(t):
        return training_losses(
            lambda x, t: x, x0, t, SHORT, prediction="v", objective="full", noise=noise,
            backend="reference",  # which clamps, as those of a GPU do
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outside, inside = torch.tensor([-3, 0, 7, 8]), torch.tensor([0, 0, 7, 7])
    torch.testing.assert_close(compiled(outside), step(inside))


@pytest.mark.slow
def test_a_compiled_step_follows_the_schedule() -> None:
    x0, noise = batch(dtype=F32)
    network = Network(dtype=F32)

    def step(schedule):
        return training_losses(network, x0, T4, schedule, objective="full", noise=noise).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for schedule in (SHORT, type(SHORT).cosine(8), type(SHORT).cosine(9)):
        torch.testing.assert_close(compiled(schedule), step(schedule))


def test_a_model_in_ddp_learns_the_same(tmp_path) -> None:
    x0, noise = batch(dtype=F32)
    plain, inner = Network(dtype=F32), Network(dtype=F32)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1
    )
    try:
        model = torch.nn.parallel.DistributedDataParallel(inner)
        for network in (plain, model):
            training_losses(network, x0, T4, SHORT, noise=noise).loss.mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    for ours, exact in zip(inner.parameters(), plain.parameters(), strict=True):
        assert same_bits(ours.grad, exact.grad)


@pytest.mark.cuda
@pytest.mark.parametrize("case", COMPILED)
def test_nothing_synchronises_with_the_gpu(case: str) -> None:
    options = COMPILED[case]
    network = Network("variance" in options, dtype=F32).cuda()
    x0, t = batch(dtype=F32)[0].cuda(), T4.cuda()
    training_losses(network, x0, t, SHORT, seed=SEED, **options)  # moves the tables to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_losses(network, x0, t, SHORT, seed=SEED, **options).loss.mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


GOOD = {
    "model": lambda x, t, *labels: torch.cat([x, x], 1),
    "x0": torch.zeros(4, 2, 3, 5),
    "t": T4,
    "schedule": SHORT,
    "noise": torch.ones(4, 2, 3, 5),
    "variance": "learned_range",
}


@pytest.mark.parametrize(
    "bad",
    [
        ("model", None, TypeError, "callable", "NoneType"),
        ("x0", torch.zeros(4, 2, dtype=torch.uint8), TypeError, "float32, float64", "uint8"),
        ("x0", torch.zeros(4, dtype=F32), ValueError, "[N, C, ...]", "[4]"),
        ("t", torch.zeros(3, dtype=torch.int64), ValueError, "4 samples", "[3]"),
        ("t", 8, ValueError, "[0, 7]", "8"),
        ("t", torch.tensor([0.0] * 4), TypeError, "int64", "float32"),
        ("schedule", [0.1], TypeError, "NoiseSchedule", "list"),
        ("prediction", "noise", ValueError, "epsilon, x0", "noise"),
        ("objective", "elbo", ValueError, "simple, full, hybrid, score", "elbo"),
        ("variance", "large", ValueError, "learned_range", "large"),
        ("decoder", "exact", ValueError, "discretised, gaussian", "exact"),
        ("weighting", "max_snr", ValueError, "min_snr", "[T]", "max_snr"),
        ("weighting", torch.ones(9), ValueError, "[8]", "[9]"),
        ("weighting", torch.ones(8, dtype=torch.int64), TypeError, "floating", "int64"),
        ("weighting", torch.ones(8, device="meta"), ValueError, "cpu", "meta"),
        ("gamma", 0.0, ValueError, "(0, inf)", "0"),
        ("vb_weight", -1.0, ValueError, "[0, inf)", "-1"),
        ("offset_noise", -0.1, ValueError, "[0, inf)", "-0.1"),
        ("offset_noise", True, TypeError, "number", "bool"),
        ("noise", torch.ones(4, 2, 3, 4), ValueError, "[4, 2, 3, 5]", "[4, 2, 3, 4]"),
        ("noise", torch.ones(4, 2, 3, 5, dtype=F64), TypeError, "float32", "float64"),
        ("seed", 3, ValueError, "seed must be None", "3"),
        ("labels", torch.zeros(3), ValueError, "[4, ...]", "[3]"),
        ("backend", "fastest", ValueError, "reference", "fastest"),
    ],
    ids=lambda bad: f"{bad[0]}-{bad[-1]}",
)
def test_an_invalid_argument_is_named(bad) -> None:
    assert_named(lambda **wrong: training_losses(**(GOOD | wrong)), bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": None}, ["seed must be an integer", "None"]),
        ({"objective": "hybrid", "variance": "beta"}, ["variance", "learned_range", "'beta'"]),
        ({"objective": "full", "weighting": "min_snr"}, ["weighting must be None", "'full'"]),
        ({"noise": None, "seed": -1}, ["seed", "-1"]),
        ({"noise": None, "seed": 1, "stream": -1}, ["stream", "-1"]),
        ({"noise": None, "seed": 1, "first_sample": -1}, ["first_sample", "-1"]),
        ({"noise": None, "seed": 1, "offset_noise": 0.1, "stream": STREAM_OFFSET},
         ["stream", str(STREAM_TRAINING), str(STREAM_OFFSET)]),
        ({"noise": None, "seed": 1, "offset_noise": 0.1, "stream": 5}, ["stream", "5"]),
        ({"objective": "full", "schedule": type(SHORT).from_betas([0.999]), "t": 0,
          "variance": "posterior"}, ["'clamp' for T = 1; got 'repeat'"]),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_contradict_each_other_are_rejected(options, message) -> None:
    with pytest.raises(ValueError, match=message[0]) as raised:
        training_losses(**(GOOD | options))
    assert [word for word in message if word not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("output", "variance", "error", "message"),
    [
        (torch.zeros(4, 2, 3, 5), "learned_range", ValueError,
         ["the model's output", "2C channels", "[4, 4, 3, 5]", "[4, 2, 3, 5]"]),
        (torch.zeros(4, 3, 3, 5), "beta", ValueError, ["[4, 2, 3, 5]", "[4, 3, 3, 5]"]),
        ((torch.zeros(4, 2, 3, 5),), "beta", TypeError, ["model", "tuple"]),
        (torch.zeros(4, 2, 3, 5, dtype=torch.int64), "beta", TypeError, ["model", "int64"]),
        (torch.zeros(4, 2, 3, 5, device="meta"), "beta", ValueError, ["model", "cpu", "meta"]),
    ],
    ids=["too-few-channels", "too-many-channels", "tuple", "integers", "device"],
)  # fmt: skip
def test_an_invalid_output_of_the_model_is_described(output, variance, error, message) -> None:
    arguments = GOOD | {"model": lambda x, t: output, "variance": variance}
    with pytest.raises(error) as raised:
        training_losses(**arguments)
    assert [word for word in message if word not in str(raised.value)] == []


def test_the_outer_bins_are_decoded() -> None:
    """The outer bins extend to infinity, so that a perfect model has a small loss."""
    x0 = torch.tensor([[-1.0, 1.0]])
    found = training_losses(
        lambda x, t: x0, x0, 0, SCHEDULE, prediction="x0", objective="full", seed=1
    )
    assert 0 <= found.loss.item() < 1
    assert math.isfinite(found.loss.item())
