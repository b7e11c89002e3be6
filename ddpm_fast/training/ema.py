"""The exponential average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Average:
    """A second network, of the weights that the first has had of late.

    After step n, from 0 on, with d = min(decay, (1 + n) / (10 + n)): average = d average + (1 - d)
    weights, so that the beginning is soon forgotten. Buffers likewise where they are floating, and
    copied where not. Nothing waits for a GPU, as torch's AveragedModel does for its counter.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(network).requires_grad_(False)
        kinds: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
        for ours, theirs in zip(_tensors(self.module), _tensors(network), strict=True):
            kinds[theirs.is_floating_point()].append((ours, theirs))
        self._averaged, self._current = [list(side) for side in zip(*kinds[True], strict=True)]
        self._copied = kinds[False]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights that step has led to."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._current, share)
        for ours, theirs in self._copied:
            ours.copy_(theirs)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
