"""Modules that take the place of a network in loops of others."""

from __future__ import annotations

import numbers
import threading
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ddpm_fast.utils import checks


class ModelOutput(NamedTuple):
    """Output of a call with `return_dict`, as of a model of diffusers.

    Attributes:
        sample: The output.
    """

    sample: Tensor


class StandIn(nn.Module):
    """Module that has the parameters, buffers, submodules and state dict of another one.

    They are shared: a change by one of the two, such as `to` or `load_state_dict`, is a change of
    both. Public attributes and methods that it does not have are those of the network.

    Args:
        network: The network.

    Attributes:
        network: The network.
        training: False, whatever the mode of the network.
    """

    network: nn.Module
    training = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        del self.__dict__["training"]
        # The dictionaries themselves, as copy.copy shares them.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = getattr(network, name)
        self.network = network

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (self._parameters | self._buffers | self._modules):
            setattr(self.network, name, value)
        else:
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "network" not in self.__dict__:
                raise
        return getattr(self.network, name)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the network.

        Args:
            mode: Training mode; False for evaluation mode.
        """
        self.network.train(mode)
        return self


class EvalMode:
    """Network without dropout in any mode, for images and outputs of any dtype.

    Args:
        module: The network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._lock = threading.Lock()  # modes are restored before another call runs

    def __call__(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """Run the network in evaluation mode and return its output tensor, in the dtype of x."""
        images = x.to(next(self._module.parameters()).dtype)
        args = (images, t) if class_labels is None else (images, t, class_labels)
        with self._lock:
            training = [module for module in self._module.modules() if module.training]
            for module in training:
                module.training = False
            try:
                out = self._module(*args)
            finally:
                for module in training:
                    module.training = True
        return (out if isinstance(out, Tensor) else out.sample).to(x.dtype)


def needs_gradient(*values: Any) -> bool:
    """Return True if autograd, torch.func or forward-mode differentiation follows these values."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in values
    )


def one_of(name: str, value: Any, other: str, alias: Any) -> Any:
    """Return the argument that was given under one of two names; None if it was not given.

    Raises:
        TypeError: It was given under both.
    """
    if value is not None and alias is not None:
        raise TypeError(f"{name} must be given once, as {name} or {other}; got both")
    return alias if value is None else value


def as_timesteps(t: Any, x: Tensor, end: int) -> Tensor:
    """Return timesteps as int64 [N] on the device of `x`.

    Args:
        t: An integer, or a floating-point number without a fraction; or a tensor of such values,
            0-d, [1] or [N]. A single value may be in CPU memory for images elsewhere.
        x: Images [N, ...].
        end: One more than the largest timestep. On a GPU, where a check would synchronise, values
            with a fraction become -1.

    Raises:
        TypeError: A value is no whole number.
        ValueError: A value is out of range, or the tensor has another shape or device.
    """
    accepted = "t must be an integer, or a whole number in floating point"
    if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"{accepted}, without a gradient; got a tensor that requires one")
    if isinstance(t, Tensor) and t.device.type == "cpu" and t.numel() == 1 and t.dim() <= 1:
        t = t.item()
    if isinstance(t, numbers.Real) and not isinstance(t, numbers.Integral):
        if not float(t).is_integer():
            raise TypeError(f"{accepted}; got {t}")
        t = int(float(t))
    elif isinstance(t, Tensor) and t.is_floating_point():
        whole = t == t.floor()
        if t.device.type == "cpu" and not whole.all():
            raise TypeError(f"{accepted}; got {float(t[~whole][0])}")
        t = torch.where(whole, t, -1).long()
    return checks.index("t", t, x, end)
