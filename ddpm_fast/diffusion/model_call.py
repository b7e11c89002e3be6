"""Calls of a user's model: its inputs must stay as they are, and it must be in evaluation mode."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Attributes in which modules without an nn.Dropout hold their probability.
_PROBABILITIES = ("p", "dropout", "dropout_p", "dropout_prob", "attn_dropout", "drop_prob")


def call_model(model: Any, x: Tensor, t: Tensor, *arguments: Any, **keywords: Any) -> Any:
    """Call a model, and check by autograd's version counters that it wrote to no input.

    Args:
        model: The model.
        x: Noisy images.
        t: Timesteps.
        *arguments: Further arguments.
        **keywords: Further arguments.

    Returns:
        The output of the model.

    Raises:
        RuntimeError: The model wrote to one of its inputs.
    """
    if torch.compiler.is_compiling():
        return model(x, t, *arguments, **keywords)
    inputs = {"x": x, "t": t}
    inputs |= {f"argument {i}": value for i, value in enumerate(arguments, 2)}
    inputs |= keywords
    before = {
        name: value._version
        for name, value in inputs.items()
        if isinstance(value, Tensor) and not value.is_inference()
    }
    out = model(x, t, *arguments, **keywords)
    for name, version in before.items():
        if inputs[name]._version != version:
            raise RuntimeError(
                f"model must not write to its inputs; {_name(model)} wrote to {name} in place:"
                f" replace the operation, or pass lambda x, t: model(x.clone(), t)"
            )
    return out


def check_eval_mode(model: Any) -> None:
    """Raise if dropout or batch normalisation is active in a model.

    Finds modules in the model itself, in attributes, arguments of functools.partial, and in the
    variables that a function refers to. An object whose attribute `training` is False is not
    searched.

    Args:
        model: The model.

    Raises:
        ValueError: A dropout with p > 0, or a batch normalisation, is in training mode.
    """
    for module in _modules(model):
        if not module.training:
            continue
        what = _random_part(module)
        if what is not None:
            raise ValueError(
                f"model must be in evaluation mode, call model.eval() first; got {_name(model)}"
                f" with an active {what}"
            )


def _random_part(module: nn.Module) -> str | None:
    """Describe what differs in training mode in this module, without its children."""
    kind = type(module).__name__
    if isinstance(module, _BatchNorm):
        return kind
    for name in _PROBABILITIES if "Drop" in kind else _PROBABILITIES[1:]:
        value = module.__dict__.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return f"{kind}({name}={value:g})"
    return None


def _modules(model: Any) -> Iterator[nn.Module]:
    """Yield all modules that a callable reaches."""
    waiting, seen = [(model, 0)], set()
    while waiting:
        value, depth = waiting.pop()
        if id(value) in seen or getattr(value, "training", None) is False:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield from value.modules()
        elif depth < 4:
            waiting += [(part, depth + 1) for part in _parts(value)]


def _parts(value: Any) -> list[Any]:
    """Return what a callable refers to, if it can be called itself."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if inspect.isfunction(value):
        names = inspect.getclosurevars(value)
        referred = [*names.nonlocals.values(), *names.globals.values()]
    else:
        referred = list(getattr(value, "__dict__", {}).values())
    return [part for part in referred if callable(part) and not inspect.isclass(part)]


def _name(model: Any) -> str:
    return str(getattr(model, "__name__", type(model).__name__))
