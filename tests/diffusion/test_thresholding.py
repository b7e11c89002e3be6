"""Dynamic thresholding: quantile, cap and step, compared with torch and diffusers."""

from __future__ import annotations

import pytest
import torch

from cases import F32, F64, backends
from ddpm_fast import DynamicThreshold, Sampler, StepTable, reverse_step_
from ddpm_fast.ops.row import column
from ddpm_fast.sampling.reverse_step import thresholds
from diffusers_pairs import SCHEDULES, closed_form, config

LINEAR = SCHEDULES["linear"]
# Every solver on one backend, and one solver on every backend; the rest of the product is slow.
EACH_STEP = [
    pytest.param(
        on,
        kind,
        id=f"{kind}-{on}",
        marks=() if on.name == "cpu" or kind == "ddim" else pytest.mark.slow,
    )
    for kind in ("ddpm", "ddim", "dpm", "unipc")
    for on in backends()
]


def wide(num: int = 4, shape=(3, 7, 5), seed: int = 0) -> torch.Tensor:
    """Return samples of very different variance."""
    x = torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.2, 6, num).view(-1, 1, 1, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("quantile", [0.3, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 1), (2, 1, 1), (1, 50, 41)], ids=str)
def test_the_threshold_is_the_quantile_of_torch(quantile, shape, schedule):
    table = StepTable.ddpm(SCHEDULES[schedule], 5, clip=DynamicThreshold(quantile))
    x, out = wide(shape=shape), wide(shape=shape, seed=1)
    rows, step = table.to("cpu")[0], torch.tensor([0, 4, 2, 1])
    # At the noisy end of the cosine schedule the two cancel to one part in 20,000.
    out[0] = x[0] * (1 + 1e-4 * out[0])
    P, Q = (table.rows[:, column(name)] for name in "PQ")
    x0 = [P[i] * x[n].double() + Q[i] * out[n].double() for n, i in enumerate(step)]
    expected = torch.stack([v.abs().flatten().quantile(quantile) for v in x0]).clamp(min=1)
    got = thresholds(table.threshold, x, out, None, rows, step)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    capped = thresholds(DynamicThreshold(quantile, 1.5), x, out, None, rows, step)
    torch.testing.assert_close(capped.double(), expected.clamp(max=1.5), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_sample_may_have_more_than_2_24_elements():
    table = StepTable.ddpm(LINEAR, 5, prediction="x0", clip=DynamicThreshold(0.5))
    size = (1 << 24) + 3
    out = torch.linspace(0, 4, size).view(1, size)
    got = thresholds(table.threshold, out, out, None, table.to("cpu")[0], torch.zeros(1).long())
    torch.testing.assert_close(got, torch.tensor([2.0]))


@pytest.mark.parametrize(("on", "kind"), EACH_STEP)
def test_each_step_equals_diffusers(on, kind):
    """thresholding=True, with a cap above 1 that some samples reach and some do not."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    option = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.6}
    how = DynamicThreshold(0.8, 1.6)
    scheduler, table = {
        "ddpm": lambda: (
            diffusers.DDPMScheduler,
            StepTable.ddpm(LINEAR, 10, spacing="leading", clip=how),
        ),
        "ddim": lambda: (
            diffusers.DDIMScheduler,
            StepTable.ddim(LINEAR, 10, clip=how, rederive_epsilon=False),
        ),
        "dpm": lambda: (
            diffusers.DPMSolverMultistepScheduler,
            StepTable.dpmpp_2m(LINEAR, 10, clip=how),
        ),
        "unipc": lambda: (diffusers.UniPCMultistepScheduler, StepTable.unipc(LINEAR, 10, clip=how)),
    }[kind]()
    scheduler = scheduler(**config("linear", "epsilon", **option))
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    model, x = closed_form(LINEAR, "epsilon"), wide()
    memory, exactly = table.memory(x.to(on.device)), table.memory(x.double())
    for row, t in enumerate(scheduler.timesteps):
        out = 1.2 * model(x, t.expand(len(x)))
        extra, noise = {}, None
        if kind == "ddpm":
            extra = {"generator": torch.Generator().manual_seed(row)}
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(row))
        theirs = scheduler.step(out, t, x, **extra).prev_sample
        ours, exact = x.clone().to(on.device), x.double()
        of_ours = {"memory": memory, "backend": on.name}
        of_exact = {"memory": exactly, "backend": "reference"}
        if noise is not None:
            of_ours["noise"], of_exact["noise"] = noise.to(on.device), noise.double()
        reverse_step_(ours, out.to(on.device), table, row, **of_ours)
        reverse_step_(exact, out.double(), table, row, **of_exact)
        scale = float(exact.abs().max())
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=0, atol=1e-5 * scale)
        # Their alphas_cumprod is a product of a thousand float32 numbers.
        torch.testing.assert_close(theirs.double(), exact, rtol=0, atol=3e-5 * scale)
        x = theirs


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_chain_stays_within_one(dtype):
    """For any s, x0 / s is in [-1, 1]; a cap of 1 is plain clipping, bit for bit."""
    model = closed_form(LINEAR, "epsilon")

    def draw(clip):
        table = StepTable.dpmpp_2m(LINEAR, 12, clip=clip)
        sampler = Sampler(lambda x, t: 3 * model(x, t), table, (3, 4, 4), 4, "cpu", dtype)
        return sampler.sample(4, seed=1, progress=False)

    assert float(draw(DynamicThreshold(0.9)).abs().max()) <= 1
    assert torch.equal(draw(DynamicThreshold(0.9, 1.0)), draw(1.0))
    assert not torch.equal(draw(DynamicThreshold(0.5)), draw(1.0))


def test_guidance_comes_before_the_threshold():
    table = StepTable.ddim(LINEAR, 5, clip=DynamicThreshold(0.7)).with_guidance(3.0)
    plain = StepTable.ddim(LINEAR, 5, clip=DynamicThreshold(0.7))
    x, out, out2 = wide(), wide(seed=1), wide(seed=2)
    ours = reverse_step_(x.clone(), out, table, 2, model_output2=out2)
    mixed = reverse_step_(x.clone(), 3 * out - 2 * out2, plain, 2)
    torch.testing.assert_close(ours, mixed, rtol=1e-5, atol=1e-5)


def test_a_nan_stays_in_its_sample():
    table = StepTable.ddim(LINEAR, 5, clip=DynamicThreshold(0.7))
    x, out = wide(), wide(seed=1)
    out[2, 1, 3, 3] = torch.nan
    ours = reverse_step_(x, out, table, 2)
    assert int(ours.isnan().sum()) == 1
    assert ours[2, 1, 3, 3].isnan()


@pytest.mark.parametrize("quantile", [0.5, 1.0])
def test_samples_of_one_number_are_as_those_of_one_element(quantile):
    table = StepTable.ddim(LINEAR, 5, clip=DynamicThreshold(quantile))
    x, out = wide(shape=(1, 1, 1)).flatten(), wide(shape=(1, 1, 1), seed=1).flatten()
    expected = reverse_step_(x[:, None].clone(), out[:, None], table, 2).flatten()
    assert torch.equal(reverse_step_(x.clone(), out, table, 2), expected)
