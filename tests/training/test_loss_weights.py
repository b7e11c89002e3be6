"""Weights of the squared error: min-SNR against its formulas, diffusers' scripts, one's own."""

from __future__ import annotations

import pytest
import torch

from cases import F32, F64, SCHEDULE
from ddpm_fast import objective_weights, training_losses
from loss_cases import PREDICTIONS, SHORT, T4, Network, batch

T = torch.tensor([0, 150, 500, 999])  # of SNR above and below gamma


@pytest.mark.parametrize("gamma", [5.0, 1.0])
@pytest.mark.parametrize("objective", ["simple", "score"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_that_of_the_paper(prediction: str, objective: str, gamma: float) -> None:
    """min(SNR, gamma) of x_0, divided by SNR for epsilon and by SNR + 1 for v (Section 3.4, Hang
    et al. 2023); of a score the error is that of epsilon over 1 - abar."""
    x0, noise = batch()
    found = training_losses(
        Network(), x0, T, SCHEDULE, prediction=prediction, objective=objective,
        weighting="min_snr", gamma=gamma, noise=noise,
    )  # fmt: skip
    abar = (1 - SCHEDULE.betas).cumprod(0)[T]
    snr = abar / (1 - abar)
    cut = snr.clamp(max=gamma)
    assert (cut < snr).any()
    assert (cut == snr).any()
    weight = {
        "x0": cut,
        "epsilon": cut / snr,
        "v": cut / (snr + 1),
        "score": cut / snr * (1 - abar),
    }[prediction]
    torch.testing.assert_close(found.loss, weight * found.mse, rtol=1e-9, atol=0)
    assert not torch.equal(found.loss, found.mse)


@pytest.mark.parametrize("weighting", [None, "min_snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_losses_are_those_of_diffusers_scripts(prediction, weighting) -> None:
    """As train_text_to_image.py of diffusers has it, by its scheduler and its compute_snr."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr

    scheduler = diffusers.DDPMScheduler()
    network, (x0, noise) = Network(dtype=F32), batch(dtype=F32)
    found = training_losses(
        network, x0, T, SCHEDULE, prediction=prediction, weighting=weighting, noise=noise
    )
    x_t = scheduler.add_noise(x0, noise, T)
    target = {
        "epsilon": lambda: noise,
        "x0": lambda: x0,
        "v": lambda: scheduler.get_velocity(x0, noise, T),
    }[prediction]()
    theirs = torch.nn.functional.mse_loss(network(x_t, T), target, reduction="none")
    theirs = theirs.mean(dim=[1, 2, 3])
    if weighting is not None:
        snr = compute_snr(scheduler, T)
        cut = torch.stack([snr, 5.0 * torch.ones_like(T)], dim=1).min(dim=1)[0]
        theirs = theirs * cut / {"epsilon": snr, "v": snr + 1, "x0": 1}[prediction]
    torch.testing.assert_close(found.x_t, x_t, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, theirs, rtol=2e-4, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_table_of_ones_own_multiplies_what_the_objective_has(prediction: str) -> None:
    network, (x0, noise) = Network(learned=True), batch()
    table = torch.linspace(0.5, 2, 8, dtype=F64)
    options = {"prediction": prediction, "noise": noise, "variance": "learned_range"}

    def loss(**given):
        return training_losses(network, x0, T4, SHORT, **options, **given).loss

    own = table[T4]
    torch.testing.assert_close(loss(weighting=table), own * loss())
    score = loss(objective="score")
    torch.testing.assert_close(loss(objective="score", weighting=table), own * score)
    # The learned variance's term is left alone.
    bound = loss(objective="hybrid") - loss()
    torch.testing.assert_close(loss(objective="hybrid", weighting=table), own * loss() + bound)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_weights_of_the_bound_give_its_gradient(prediction: str) -> None:
    """objective_weights in nats of the whole: the Gaussian L_0 and the divergences."""
    network, (x0, noise) = Network(), batch()
    options = {"prediction": prediction, "noise": noise}
    table = objective_weights(SHORT, "beta", prediction)
    weighted = training_losses(network, x0, T4, SHORT, weighting=table, **options)
    full = training_losses(
        network, x0, T4, SHORT, objective="full", variance="beta", decoder="gaussian", **options
    )
    nats = full.loss * torch.tensor(2.0).log()
    for n in range(4):
        ours, theirs = (
            torch.autograd.grad(loss[n], list(network.parameters()), retain_graph=True)
            for loss in (weighted.loss, nats)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
