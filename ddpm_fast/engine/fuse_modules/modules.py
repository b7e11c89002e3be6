"""nn.GroupNorm and nn.Sequential with the fused GroupNorm, where it has torch's result.

`optimize_module` changes the class of modules to these, so that objects, parameters, hooks and
state dicts stay the same.

A norm that is followed by SiLU alone (`FusedGroupNormSiLU`) computes both at once and returns
`Activated`: a tensor that stores silu(norm(x)) and represents norm(x). F.silu returns the stored
value; any other operation computes norm(x) first. An unforeseen path through the model is therefore
slow, or an error if the input no longer exists, but never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_map_only

from ddpm_fast.ops import get_backend

Kernel = Callable[..., None]
_MIN_ELEMENTS = 1 << 15
_MAX_PIXELS = 1024
_MAX_WIDTH = 16  # channels a group


@cache
def _kernel(backend: str, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Return the fused operator; None to use torch's."""
    if device.type not in ("cpu", "cuda"):
        return None
    try:
        chosen = get_backend(backend, device, dtype)
    except (TypeError, RuntimeError):  # the model was moved to another device or dtype
        return None
    if backend == "auto" and chosen.name == "reference":
        return None
    return chosen.group_norm_


def has_hooks(module: nn.Module) -> bool:
    """Return True if the module has hooks, or if global hooks are registered."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def _is_traced() -> bool:
    """Return True while the operations are compiled, traced or transformed."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _as_image(x: Tensor) -> Tensor:
    """View a dense tensor [N, C, L] or [N, C, D, H, W] as [N, C, H, W]."""
    return x.unsqueeze(3) if x.dim() == 3 else x.flatten(2, 3)


def _keeps_layout(x: Tensor) -> bool:
    """Return True if torch's group_norm also returns the strides of `x`."""
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def _faster_on_cpu(x: Tensor, groups: int) -> bool:
    """Return True if the CPU operator was measured to be faster than torch's.

    That is the case on one core in channels_last memory, in float32, float16 and bfloat16, for
    small maps (torch has a faster kernel from 1024 pixels on) of narrow groups, with enough work to
    hide the overhead of the call. Otherwise it was slower, or faster only with SiLU in some dtypes.
    """
    pixels = x.numel() // (x.shape[0] * x.shape[1])
    return (
        x.numel() >= _MIN_ELEMENTS
        and pixels < _MAX_PIXELS
        and x.shape[1] < _MAX_WIDTH * groups
        and x.dtype != torch.float64
        and not x.is_contiguous()
    )


class FusedGroupNorm(nn.GroupNorm):
    """nn.GroupNorm that runs `ddpm_fast.group_norm` unless torch's kernel has an advantage.

    The fused operator runs on dense tensors [N, C, L], [N, C, H, W] or [N, C, D, H, W] of the dtype
    and device of the parameters that the backend supports, without gradients and autocast; with the
    backend "auto" on a CPU, only where it was measured to be faster. Everything else, such as
    training, torch.compile, tracing and torch.func, runs nn.GroupNorm's forward.
    """

    _backend = "auto"

    def forward(self, input: Tensor) -> Tensor:
        """Return norm(input)."""
        out = self._fused(input, silu=False)
        return super().forward(input) if out is None else out

    def activated(self, input: Tensor) -> Tensor:
        """Return silu(norm(input))."""
        out = self._fused(input, silu=True)
        return F.silu(super().forward(input)) if out is None else out

    def _fused(self, x: Any, silu: bool) -> Tensor | None:
        """Return the output of the fused operator; None to use torch's."""
        if type(x) is not Tensor or _is_traced():
            return None
        if x.layout is not torch.strided or x.is_nested or not 3 <= x.dim() <= 5:
            return None
        # torch raises an error for one value in a group.
        if x.shape[1] != self.num_channels or x.numel() <= self.num_groups:
            return None
        dtype, device = x.dtype, x.device
        if (
            self._backend == "auto"
            and device.type == "cpu"
            and not _faster_on_cpu(x, self.num_groups)
        ):
            return None
        weight, bias = self.weight, self.bias
        recording = torch.is_grad_enabled()
        for parameter in (weight, bias):
            if parameter is not None and (
                parameter.dtype != dtype
                or parameter.device != device
                or (recording and parameter.requires_grad)
                or not parameter.is_contiguous()
            ):
                return None
        if (recording and x.requires_grad) or torch.is_autocast_enabled(device.type):
            return None
        kernel = _kernel(self._backend, device, dtype) if _keeps_layout(x) else None
        if kernel is None:
            return None
        out = torch.empty_like(x)
        if weight is None:
            weight = x.new_ones(self.num_channels)
        if bias is None:
            bias = x.new_zeros(self.num_channels)
        images = (out, x) if x.dim() == 4 else (_as_image(out), _as_image(x))
        absent = (None,) * 5  # x2, vector, row, residual, total
        kernel(*images, *absent, weight, bias, None, self.num_groups, self.eps, silu)
        return out


class FusedGroupNormSiLU(FusedGroupNorm):
    """`FusedGroupNorm` that is followed by SiLU alone and computes it too; see `Activated`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return norm(input): an `Activated` if the fused operator runs without hooks."""
        if self._forward_hooks:
            return super().forward(input)
        out = self._fused(input, silu=True)
        return nn.GroupNorm.forward(self, input) if out is None else Activated.of(self, input, out)


FUSED_NORMS = (FusedGroupNorm, FusedGroupNormSiLU)


class FusedSequential(nn.Sequential):
    """nn.Sequential that runs a GroupNorm and the following SiLU at once.

    Modules that are called on their own are not affected.
    """

    def forward(self, input: Any) -> Any:
        """Run the modules in order."""
        if torch.compiler.is_compiling():
            return super().forward(input)
        modules = list(self)
        done = False
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            if done:
                done = False
            elif isinstance(module, FusedGroupNorm) and is_pair(module, following):
                input, done = module.activated(input), True
            else:
                input = module(input)
        return input


def is_pair(module: nn.Module, following: nn.Module | None) -> bool:
    """Return True for a GroupNorm and a SiLU without hooks and replaced forwards."""
    return (
        type(module) in (nn.GroupNorm, *FUSED_NORMS)
        and type(following) is nn.SiLU
        and not any(has_hooks(m) or "forward" in m.__dict__ for m in (module, following))
    )


_METADATA = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad", "is_leaf")
# Functions that depend on a tensor's metadata alone.
METADATA_FUNCTIONS = {getattr(Tensor, name).__get__ for name in _METADATA} | {
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.element_size,
    Tensor.get_device,
    Tensor.__len__,
    torch.is_floating_point,
    torch.numel,
}


class Activated(Tensor):
    """Tensor that stores silu(norm(x)) and represents norm(x) for everything except F.silu.

    Attributes:
        _source: the norm, its input and the input's version, until the value has been determined.
    """

    _activated: Tensor
    _source: tuple[FusedGroupNorm, Tensor, int | None] | None
    _consumed: bool

    @staticmethod
    def of(norm: FusedGroupNorm, x: Tensor, activated: Tensor) -> Activated:
        """Create a tensor that represents norm(x) and stores `activated`, its SiLU."""
        tensor = activated.as_subclass(Activated)
        version = None if x.is_inference() else x._version
        tensor._activated, tensor._source, tensor._consumed = activated, (norm, x, version), False
        return tensor

    def _restore_norm(self) -> None:
        """Replace the stored value by norm(x)."""
        assert self._source is not None
        norm, x, version = self._source
        if version is None or x._version != version:
            what = "may have been changed" if version is None else "has been changed"
            raise RuntimeError(
                f"the output of {norm} is used other than by SiLU, unlike in the example_inputs of"
                f" ddpm_fast.optimize_module, and its input {what} since; call report.restore(), or"
                " pass example_inputs that take this path"
            )
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            plain: Any = FusedGroupNorm.forward(norm, x)
            self.set_(plain)
        self._source = None

    def _apply_silu(self, inplace: bool) -> Tensor:
        """Return SiLU of the represented value."""
        if self._consumed:
            self._restore_norm()
            with torch._C.DisableTorchFunctionSubclass():
                return F.silu(self, inplace)
        self._consumed = True
        if inplace:
            self._source = None  # the tensor now represents the stored value
        return self._activated

    def _as_plain(self) -> Tensor:
        if self._source is not None:
            self._restore_norm()
        return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return deepcopy(self._as_plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._as_plain().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.silu:
            x, inplace = _silu_arguments(*args, **kwargs)
            if x._source is not None:
                return x._apply_silu(inplace)
        if func not in METADATA_FUNCTIONS:
            plain = tree_map_only(cls, cls._as_plain, (args, kwargs))
            if not all(kind in (cls, Tensor, nn.Parameter) for kind in types):
                return func(*plain[0], **plain[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _silu_arguments(input: Any, inplace: bool = False) -> tuple[Any, bool]:
    return input, inplace
