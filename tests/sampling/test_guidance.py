"""Labels and classifier-free guidance: one batched call, whatever the batch."""

from __future__ import annotations

import pytest
import torch

from cases import F16, F32, F64, same_bits
from ddpm_fast import Sampler, StepTable, UNet, reverse_step_
from diffusers_pairs import SCHEDULES

LINEAR = SCHEDULES["linear"]
SHAPE = (3, 4, 4)
TABLES = {
    "ddpm": StepTable.ddpm(LINEAR, 6),
    "ddim-raw": StepTable.ddim(LINEAR, 6, rederive_epsilon=False),
    "unipc": StepTable.unipc(LINEAR, 6),
    "plms": StepTable.plms(LINEAR, 6),
}
NULL = 9


class Classes:
    """Model in closed form whose x0 is its label; records its arguments."""

    device, dtype = torch.device("cpu"), F64

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, x, t, labels):
        self.calls.append((x.clone(), t.clone(), labels.clone()))
        abar = LINEAR.alphas_cumprod[t].view(-1, 1, 1, 1).to(x)
        x0 = (labels.to(x) / 10).view(-1, 1, 1, 1)
        return (x - abar.sqrt() * x0) / (1 - abar).sqrt()


def guided(table, model, scale, labels, batch=5, num=5, **options):
    sampler = Sampler(model, table.with_guidance(scale), SHAPE, batch, null_label=NULL, **options)
    return sampler.sample(num, seed=3, labels=labels, progress=False)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guidance_equals_the_combined_model(table, scale):
    """The same chain as a model that returns the combined output."""
    labels = torch.tensor([0, 3, 1, 2, 2])
    model = Classes()

    def combined(x, t):
        null = torch.full_like(labels, NULL)
        return scale * model(x, t, labels) + (1 - scale) * model(x, t, null)

    expected = Sampler(combined, table, SHAPE, 5, "cpu", F64).sample(5, seed=3, progress=False)
    got = guided(table, Classes(), scale, labels)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_model_is_called_once_a_step_under_guidance():
    model, labels = Classes(), torch.tensor([4, 0, 1, 7, 2])
    guided(TABLES["ddpm"], model, 2.0, labels)
    assert len(model.calls) == 6
    for x, t, of in model.calls:
        assert x.shape == (10, *SHAPE)
        assert torch.equal(x[:5], x[5:])
        assert torch.equal(t[:5], t[5:])
        assert of.tolist() == [*labels.tolist(), *[NULL] * 5]
    plain = Classes()
    guided(TABLES["ddpm"], plain, 1.0, labels)
    assert [len(x) for x, _, _ in plain.calls] == [5] * 6


def test_a_scale_for_each_row():
    table = TABLES["ddpm"]
    scales = [1.0, 1.0, 4.0, 4.0, 1.0, 1.0]
    model, labels = Classes(), torch.tensor([0, 3, 1, 2, 2])

    def combined(x, t):
        w = scales[table.timesteps.tolist().index(int(t[0]))]
        null = torch.full_like(labels, NULL)
        return w * model(x, t, labels) + (1 - w) * model(x, t, null)

    expected = Sampler(combined, table, SHAPE, 5, "cpu", F64).sample(5, seed=3, progress=False)
    for supplied in (scales, torch.tensor(scales)):
        got = guided(table, Classes(), supplied, labels)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_sample_k_has_its_label_and_bits_in_any_division(dtype):
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=NULL + 1,
    ).eval()
    network = unet if dtype == F32 else lambda x, t, labels: unet(x.float(), t, labels).to(dtype)
    table = StepTable.dpmpp_2m(LINEAR, 4).with_guidance(2.0)
    sampler = Sampler(network, table, (3, 8, 8), 4, "cpu", dtype, null_label=NULL)
    labels = torch.arange(10) % NULL
    whole = sampler.sample(10, seed=5, labels=labels, progress=False)
    for first, num in ((0, 3), (3, 5), (7, 1)):
        section = labels[first : first + num]
        part = sampler.sample(num, 5, first, labels=section, progress=False)
        assert same_bits(part, whole[first : first + num])
    other = sampler.sample(1, 5, 7, labels=3, progress=False)
    assert not torch.equal(other, whole[7:8])


def test_float_labels_and_labels_without_guidance():
    seen = []

    def model(x, t, labels):
        seen.append(labels.clone())
        return 0 * x + labels.mean(1).view(-1, 1, 1, 1)

    table = StepTable.ddpm(LINEAR, 2, prediction="x0")
    labels = torch.linspace(-1, 1, 12).view(3, 4)
    got = Sampler(model, table, SHAPE, 3, "cpu").sample(3, labels=labels, progress=False)
    torch.testing.assert_close(got[:, 0, 0, 0], labels.mean(1))
    assert all(torch.equal(of, labels) for of in seen)
    null = torch.full((4,), 0.25)
    sampler = Sampler(model, table.with_guidance(0.0), SHAPE, 3, "cpu", null_label=null)
    torch.testing.assert_close(
        sampler.sample(3, labels=labels, progress=False), torch.full((3, *SHAPE), 0.25)
    )


def test_a_call_with_labels_after_one_without():
    def model(x, t, labels=None):
        return 0 * x if labels is None else 0 * x + labels.double().view(-1, 1, 1, 1)

    table = StepTable.ddpm(LINEAR, 2, prediction="x0")
    sampler = Sampler(model, table, SHAPE, 2, "cpu", F64)
    for labels in (None, torch.tensor([0.5, -0.25]), torch.tensor([1, 0]), None):
        got = sampler.sample(2, labels=labels, progress=False)[:, 0, 0, 0]
        assert got.tolist() == ([0, 0] if labels is None else labels.tolist())


def test_the_learned_variance_is_the_conditional_one():
    def model(x, t, labels):
        v = torch.where(labels == NULL, 5.0, -0.5).to(x).view(-1, 1, 1, 1).expand_as(x)
        return torch.cat([0.1 * x, v], dim=1)

    table = StepTable.ddpm(LINEAR, 6, variance="learned_range")
    labels = torch.zeros(5, dtype=torch.int64)
    got = guided(table, model, 2.0, labels, device="cpu", dtype=F64)
    fixed = Sampler(
        lambda x, t: torch.cat([0.1 * x, torch.full_like(x, -0.5)], 1), table, SHAPE, 5, "cpu", F64
    )
    torch.testing.assert_close(got, fixed.sample(5, seed=3, progress=False), rtol=1e-9, atol=1e-9)


X = torch.zeros(2, *SHAPE)
DDPM, UNIPC = TABLES["ddpm"], TABLES["unipc"]


def step(table, **options):
    return lambda: reverse_step_(X.clone(), X, table, 5, **options)


BAD = {
    "no-labels": (lambda: guided(DDPM, Classes(), 2.0, None), "labels must be given"),
    "no-null": (
        lambda: Sampler(Classes(), DDPM.with_guidance(2.0), SHAPE).sample(1, labels=1),
        "null_label must be given",
    ),
    "count": (
        lambda: guided(DDPM, Classes(), 2.0, torch.arange(4)),
        r"labels must.*\[5, ...\]; got \[4\]",
    ),
    "null-float": (
        lambda: Sampler(Classes(), DDPM.with_guidance(2.0), SHAPE, null_label=1.7).sample(
            1, labels=1, progress=False
        ),
        r"null_label must be a label, int64 \[\], or an int >= 0.*got 1.7",
    ),
    "null-negative": (
        lambda: Sampler(Classes(), DDPM.with_guidance(2.0), SHAPE, null_label=-1).sample(
            1, labels=1, progress=False
        ),
        "null_label must be a label.*got -1",
    ),
    "null-shape": (
        lambda: Sampler(
            Classes(), DDPM.with_guidance(2.0), SHAPE, null_label=torch.tensor([1, 2])
        ).sample(1, labels=1, progress=False),
        r"null_label must be a label.*got int64 \[2\]",
    ),
    "nan": (lambda: DDPM.with_guidance(float("nan")), "scale must be a number in"),
    "scales": (lambda: DDPM.with_guidance([1.0, 2.0]), "one for each of 6 rows; got 2"),
    "one-output": (
        step(DDPM.with_guidance(2.0), noise=X),
        "model_output2 must be a tensor for a table with guidance; got None",
    ),
    "two-outputs": (
        step(DDPM, noise=X, model_output2=X),
        "model_output2 must be None for a table without guidance; got a tensor",
    ),
    "no-memory": (step(UNIPC), r"memory.second must be \[2, 3, 4, 4\].*got None"),
    "memory-of-another": (
        step(StepTable.dpmpp_2m(LINEAR, 6), memory=UNIPC.memory(X)),
        r"memory.second must be None.*got \[2, 3, 4, 4\]",
    ),
    "memory-dtype": (
        step(UNIPC, memory=UNIPC.memory(X.double())),
        "memory.second must have the dtype and device of x, float32 on cpu; got float64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
