"""Detection of changed network weights."""

from __future__ import annotations

from operator import is_

import torch
from torch import Tensor, nn

from ddpm_fast.ops.checksum import checksum


class WeightWatcher:
    """Detect that a module's parameters, buffers or submodules were replaced or written.

    It compares contents, by `checksum`: many writes leave no other trace, such as those of fused
    optimizers, through `.data` and through NumPy views. A comparison reads all weights once, and
    walks over the modules' dictionaries instead of the module tree.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        held = [
            entries
            for part in module.modules()
            for entries in (part._parameters, part._buffers, part._modules)
            if entries
        ]
        self._held = [(entries, tuple(entries.values())) for entries in held]
        tensors = [
            thing for _, things in self._held for thing in things if isinstance(thing, Tensor)
        ]
        self._groups = [
            [tensor for tensor in tensors if tensor.device == device]
            for device in dict.fromkeys(tensor.device for tensor in tensors)
        ]
        self._first = self._checksums()
        self._answer: tuple[Tensor, torch.cuda.Event] | None = None

    def changed(self) -> bool:
        """Compare the weights with those at the start, and wait for the result."""
        if self._replaced():
            return True
        now = self._checksums()
        return not all(torch.equal(a, b) for a, b in zip(now, self._first, strict=True))

    def changed_before(self) -> bool:
        """Start a comparison on the GPU; return the result of the previous one.

        The first call returns False.
        """
        if self._replaced():
            return True
        answer = self._answer
        differs = [(a != b).any() for a, b in zip(self._checksums(), self._first, strict=True)]
        with torch.cuda.device(self._groups[0][0].device):
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            host.copy_(torch.stack(differs).any(), non_blocking=True)
            self._answer = host, torch.cuda.current_stream().record_event()
        if answer is None:
            return False
        answer[1].synchronize()
        return bool(answer[0])

    def _replaced(self) -> bool:
        """Return True if a parameter, buffer or submodule was replaced, added or removed."""
        for entries, things in self._held:
            now = entries.values()
            if len(now) != len(things) or not all(map(is_, now, things)):
                return True
        return False

    def _checksums(self) -> list[Tensor]:
        """Return the checksums of the tensors on each device."""
        return [checksum(group) for group in self._groups]
