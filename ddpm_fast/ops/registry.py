"""Registration of the operators `torch.ops.ddpm_fast.*`: schemas, fakes, gradients, libraries.

Each operator is defined under two names: the compiled libraries, or ATen, implement `name` on the
keys CPU and CUDA, Triton implements `triton_name`. The names differ because a second registration
on an occupied key replaces the first with only a warning. `ddpm_fast.ops.reference` defines what
the operators compute.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "ddpm_fast"
_DIFFUSION_SCHEMAS = {
    "q_sample": "(Tensor x0, Tensor t, Tensor noise, Tensor coefs) -> Tensor",
    "q_sample_philox": "(Tensor x0, Tensor t, Tensor coefs, Tensor rng) -> (Tensor, Tensor)",
    "q_posterior": "(Tensor x0, Tensor x_t, Tensor t, Tensor coefs) -> (Tensor, Tensor, Tensor)",
    "reverse_step_": (
        "(Tensor(a!) x, Tensor model_output, Tensor rows, Tensor step, Tensor? noise, Tensor? rng,"
        " Tensor(b!)? model_input, Tensor(c!)? pred_x0, int flags, Tensor? model_output2=None,"
        " Tensor? log_variance=None, Tensor? threshold=None, Tensor(d!)? second=None,"
        " Tensor(e!)? history=None) -> ()"
    ),
    "reverse_step": (
        "(Tensor x, Tensor model_output, Tensor rows, Tensor step, Tensor? noise, int flags,"
        " Tensor? log_variance=None, Tensor? threshold=None) -> (Tensor, Tensor)"
    ),
    "philox_normal_": "(Tensor(a!) out, Tensor rng) -> ()",
}
# These write to preallocated tensors, because the engine plans its memory once.
_NETWORK_SCHEMAS = {
    "group_norm_": (
        "(Tensor(a!) out, Tensor x, Tensor? x2, Tensor? vector, Tensor? row, Tensor? residual,"
        " Tensor(b!)? total, Tensor weight, Tensor bias, Tensor? modulation, int groups, float eps,"
        " bool silu) -> ()"
    ),
    "attention_": "(Tensor(a!) out, Tensor qkv, int heads, float scale) -> ()",
    "conv_": (
        "(Tensor(a!) out, Tensor x, Tensor? x2, Tensor weight, Tensor? bias, Tensor? residual,"
        " int stride, int[4] padding) -> ()"
    ),
}
SCHEMAS = {
    **_DIFFUSION_SCHEMAS,
    **_NETWORK_SCHEMAS,
    "checksum": "(Tensor[] tensors) -> Tensor",
}
DIFFUSION_OPS, NETWORK_OPS = tuple(_DIFFUSION_SCHEMAS), tuple(_NETWORK_SCHEMAS)
OPS = tuple(SCHEMAS)

# The module of each operator's Triton kernel, and of those that ATen runs on the keys CPU and CUDA.
_TRITON_MODULES = {
    **dict.fromkeys(DIFFUSION_OPS, "ddpm_fast.ops.triton.diffusion"),
    "group_norm_": "ddpm_fast.ops.triton.group_norm",
    "attention_": "ddpm_fast.ops.triton.attention",
    "conv_": "ddpm_fast.ops.triton.conv",
    "checksum": "ddpm_fast.ops.triton.checksum",
}
_ATEN_MODULES = {"attention_": "ddpm_fast.ops.aten", "conv_": "ddpm_fast.ops.aten"}


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [N] to broadcast over samples.

    Args:
        values: One value for each sample, [N].
        like: Samples [N, ...].

    Returns:
        View [N, 1, ...] with the number of dimensions of `like`.
    """
    return values.view(-1, *[1] * (like.ndim - 1))


def _fake_q_sample(x0: Tensor, t: Tensor, noise: Tensor, coefs: Tensor) -> Tensor:
    return torch.empty_like(x0)


def _fake_q_sample_philox(
    x0: Tensor, t: Tensor, coefs: Tensor, rng: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x0), torch.empty_like(x0)


def _fake_q_posterior(
    x0: Tensor, x_t: Tensor, t: Tensor, coefs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shape = [x_t.shape[0], *[1] * (x_t.ndim - 1)]
    return torch.empty_like(x_t), coefs.new_empty(shape), coefs.new_empty(shape)


def _fake_reverse_step(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _fake_checksum(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), 2, dtype=torch.int64)


def _fake_in_place(*args: Any) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = {
    "q_sample": _fake_q_sample,
    "q_sample_philox": _fake_q_sample_philox,
    "q_posterior": _fake_q_posterior,
    "reverse_step_": _fake_in_place,
    "reverse_step": _fake_reverse_step,
    "philox_normal_": _fake_in_place,
    **dict.fromkeys(NETWORK_OPS, _fake_in_place),
    "checksum": _fake_checksum,
}


def _save_for_q_sample(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, t, _, coefs = inputs
    ctx.save_for_backward(t, coefs)


def _save_for_q_sample_philox(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, t, coefs, _ = inputs
    ctx.save_for_backward(t, coefs)
    ctx.mark_non_differentiable(output[1])


def _gathered(ctx: Any, column: int, grad: Tensor) -> Tensor:
    t, coefs = ctx.saved_tensors
    scale = coefs[:, column].index_select(0, t.clamp(0, coefs.shape[0] - 1))
    return (per_sample(scale, grad) * grad).to(grad.dtype)


def _q_sample_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x0 = _gathered(ctx, 0, grad) if ctx.needs_input_grad[0] else None
    grad_noise = _gathered(ctx, 1, grad) if ctx.needs_input_grad[2] else None
    return grad_x0, None, grad_noise, None


def _q_sample_philox_backward(
    ctx: Any, grad: Tensor, grad_noise: Tensor
) -> tuple[Tensor | None, ...]:
    # The noise does not depend on x0.
    return _gathered(ctx, 0, grad), None, None, None


def _save_for_q_posterior(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, t, coefs = inputs
    ctx.save_for_backward(t, coefs)
    ctx.mark_non_differentiable(output[1], output[2])


def _q_posterior_backward(
    ctx: Any, grad: Tensor, grad_variance: Tensor, grad_log_variance: Tensor
) -> tuple[Tensor | None, ...]:
    grad_x0 = _gathered(ctx, 0, grad) if ctx.needs_input_grad[0] else None
    grad_x_t = _gathered(ctx, 1, grad) if ctx.needs_input_grad[1] else None
    return grad_x0, grad_x_t, None, None


GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "q_sample": (_q_sample_backward, _save_for_q_sample),
    "q_sample_philox": (_q_sample_philox_backward, _save_for_q_sample_philox),
    "q_posterior": (_q_posterior_backward, _save_for_q_posterior),
}


def _launcher(module: str, name: str) -> Callable[..., Any]:
    """Return an operator of a module that is imported by the first call."""

    def launch(*args: Any) -> Any:
        return getattr(import_module(module), name)(*args)

    return launch


def _load(stem: str) -> str:
    """Load a compiled library; return the reason if it cannot be loaded, else an empty string."""
    folder = Path(__file__).resolve().parent.parent
    found = sorted(p for p in folder.glob(f"{stem}.*") if p.suffix in {".so", ".pyd"})
    if not found:
        return f"ddpm_fast/{stem} is not built"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"ddpm_fast/{found[0].name} does not load: {error}"
    return ""


def _register() -> tuple[torch.library.Library, dict[str, str]]:
    library = torch.library.Library(NAMESPACE, "DEF")
    library.define("use_cpu_kernels(str name) -> str")
    for name, schema in SCHEMAS.items():
        for full in (name, f"triton_{name}"):
            library.define(full + schema, tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"{NAMESPACE}::{full}", FAKES[name], lib=library)
            if name in GRADIENTS:
                backward, save = GRADIENTS[name]
                torch.library.register_autograd(
                    f"{NAMESPACE}::{full}", backward, setup_context=save, lib=library
                )
        for key in ("CPU", "CUDA"):
            library.impl(f"triton_{name}", _launcher(_TRITON_MODULES[name], name), key)
            if name in _ATEN_MODULES:
                library.impl(name, _launcher(_ATEN_MODULES[name], name), key)
    reasons = {"cpu": _load("_ops_cpu")}
    # The CUDA library links libraries that a torch without CUDA does not have.
    reasons["cuda"] = (
        _load("_ops_cuda") if torch.version.cuda else "this torch is a build without CUDA"
    )
    return library, reasons


# NOT_LOADED: why a library is not loaded, empty if it is. LIBRARY keeps the operators registered.
LIBRARY, NOT_LOADED = _register()
