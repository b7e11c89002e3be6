"""Exponential moving average (EMA) of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of the weights of a network.

    After step n, counted from 0: ema = d ema + (1 - d) weights, with d = min(decay,
    (1 + n) / (10 + n)), so that early weights are soon forgotten. Floating-point buffers are
    averaged too, others are copied. An update does not synchronise with a GPU, as the counter of
    torch's AveragedModel does.

    Args:
        network: The network to follow; its weights are updated in place by the optimizer.
        decay: Largest decay d, in [0, 1).

    Attributes:
        module: A copy of the network with the averaged weights, without gradients.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(network).requires_grad_(False)
        pairs: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
        for average, current in zip(_tensors(self.module), _tensors(network), strict=True):
            pairs[current.is_floating_point()].append((average, current))
        self._averages, self._currents = [list(side) for side in zip(*pairs[True], strict=True)]
        self._copied = pairs[False]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages with the weights after step number `step`."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._currents, share)
        for average, current in self._copied:
            average.copy_(current)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
