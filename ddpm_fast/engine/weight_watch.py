"""Noticing that the weights of a network are no longer what they were."""

from __future__ import annotations

from operator import is_

from torch import Tensor, nn


class WeightWatcher:
    """A module's parameters, buffers and submodules as they are now, to be compared with later.

    Looked at in every call, so it walks over the dictionaries of the modules and not over the tree.
    """

    def __init__(self, module: nn.Module) -> None:
        held = [
            entries
            for part in module.modules()
            for entries in (part._parameters, part._buffers, part._modules)
            if entries
        ]
        self._held = [(entries, tuple(entries.values())) for entries in held]
        self._tensors = [
            thing for _, things in self._held for thing in things if isinstance(thing, Tensor)
        ]
        self._first = self._written()

    def changed(self) -> bool:
        """Whether anything was replaced, added, removed or written to; not through ``.data``."""
        return self.state() != self._first

    def state(self) -> object:
        """Equal as long as nothing has changed."""
        for entries, things in self._held:
            now = entries.values()
            if len(now) != len(things) or not all(map(is_, now, things)):
                return None
        return self._written()

    def _written(self) -> tuple[tuple[int, int], ...]:
        """Addresses, and how often autograd saw a write."""
        return tuple(
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for tensor in self._tensors
        )
