"""Detection of changed network weights."""

from __future__ import annotations

from operator import is_

from torch import Tensor, nn


class WeightWatcher:
    """Snapshot of a module's parameters, buffers and submodules, to detect changes.

    It runs in every call, so it walks over the modules' dictionaries instead of the module tree.
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
        """Return True if anything was replaced, added, removed or written to, except by `.data`."""
        return self.state() != self._first

    def state(self) -> object:
        """Return a value that stays equal while nothing changes."""
        for entries, things in self._held:
            now = entries.values()
            if len(now) != len(things) or not all(map(is_, now, things)):
                return None
        return self._written()

    def _written(self) -> tuple[tuple[int, int], ...]:
        """Return the address and autograd's version counter of each tensor."""
        return tuple(
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for tensor in self._tensors
        )
