"""Recording of the uses of modules' outputs in one forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ddpm_fast.engine.fuse_modules.modules import METADATA_FUNCTIONS


class OutputUse:
    """Uses of the tensor that one call of a module returned."""

    def __init__(self, output: Tensor) -> None:
        self.output: Callable[[], Tensor | None] = weakref.ref(output)
        self.users: list[str] = []
        self.returned = False

    def reason_not_silu(self) -> str:
        """Return why SiLU is not the only use of the output; empty if it is."""
        if self.returned:
            return "the model returns its output"
        if self.users != ["silu"]:
            users = ", ".join(dict.fromkeys(self.users))
            if self.users == ["silu"] * len(self.users) != []:
                users = "silu more than once"
            return f"its output goes to {users}" if users else "nothing is seen to use its output"
        return "its output is kept" if self.output() is not None else ""


class _UseRecorder(TorchFunctionMode):
    """Record every function of torch that takes an output."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.calls: dict[nn.Module, list[OutputUse]] = {module: [] for module in modules}
        self.alive: dict[int, OutputUse] = {}  # by the identity of the output

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record an output; a forward hook."""
        call = OutputUse(output)
        self.calls[module].append(call)
        self.alive[id(output)] = call

    def find(self, value: Any) -> OutputUse | None:
        """Return the call that returned this object."""
        call = self.alive.get(id(value))
        return call if call is not None and call.output() is value else None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in METADATA_FUNCTIONS:
            return result
        for value in tree_leaves((args, kwargs)):
            if (call := self.find(value)) is not None:
                call.users.append(_name_of(func))
                if func is F.silu and result is value:  # in place: the output no longer exists
                    call.output = lambda: None
        return result


def _name_of(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", name) if name == "__get__" else name


def observe(
    model: nn.Module, modules: Iterable[nn.Module], example_inputs: Any
) -> dict[nn.Module, list[OutputUse]]:
    """Run one forward pass and record the uses of the outputs of `modules`.

    Args:
        model: the model, whose modes, buffers and random state are restored.
        modules: the modules to observe.
        example_inputs: inputs of the model: a tensor, a tuple or list, or a dict of keyword
            arguments.

    Returns:
        The calls of each module.

    Raises:
        TypeError: `example_inputs` has another type.
        ValueError: the model raised an error.
    """
    args, kwargs = _arguments(example_inputs)
    watch = _UseRecorder(modules)
    with ExitStack() as stack:
        stack.enter_context(_preserving_state(model))
        for module in watch.calls:
            stack.callback(module.register_forward_hook(watch.note).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(watch)
        try:
            output = model(*args, **kwargs)
        except Exception as error:
            raise ValueError(
                "example_inputs must be inputs that the model takes; it raised"
                f" {type(error).__name__}: {error}"
            ) from error
    for value in _values(output):
        if (call := watch.find(value)) is not None:
            call.returned = True
    return watch.calls


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(k, str) for k in example_inputs):
        return (), dict(example_inputs)
    raise TypeError(
        "example_inputs must be a tensor, a tuple or list of positional arguments, or a dict of"
        f" keyword arguments; got {type(example_inputs).__name__}"
    )


def _values(output: Any) -> Iterator[Any]:
    """Yield the leaves of a model's output, and the attributes of objects among them."""
    for value in tree_leaves(output):
        yield value
        if not isinstance(value, Tensor):
            yield from tree_leaves(getattr(value, "__dict__", None))


@contextmanager
def _preserving_state(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode; afterwards restore modes, buffers and the random state."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module._buffers, name, buffer, buffer.clone(), _version(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    with torch.random.fork_rng([device.index for device in devices]), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for owner, name, buffer, copy, version in buffers:
                owner[name] = buffer
                if version is None or buffer._version != version:
                    with torch.inference_mode(buffer.is_inference()):
                        buffer.copy_(copy)


def _version(tensor: Tensor) -> int | None:
    """Return the version counter; None for an inference tensor."""
    return None if tensor.is_inference() else tensor._version
