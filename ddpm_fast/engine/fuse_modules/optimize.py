"""`optimize_module`: replace GroupNorm and SiLU in a model by the fused operator, and restore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ddpm_fast.engine.fuse_modules.modules import (
    FUSED_NORMS,
    FusedGroupNorm,
    FusedGroupNormSiLU,
    FusedSequential,
    has_hooks,
    is_pair,
)
from ddpm_fast.engine.fuse_modules.trace import OutputUse, observe
from ddpm_fast.ops import BACKENDS, get_backend
from ddpm_fast.utils import checks

FUSED, NORM_ONLY, LEFT_ALONE = "fused with SiLU", "norm only", "left alone"
_ABSENT: Any = object()


@dataclass(frozen=True)
class OptimizedNorm:
    """One GroupNorm of the model.

    Attributes:
        paths: paths of the module in the model.
        done: "fused with SiLU", "norm only" or "left alone".
        reason: why it was not fused; empty if it was.
    """

    paths: tuple[str, ...]
    done: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.done}: {self.reason}" if self.reason else self.done


@dataclass
class OptimizeReport:
    """Result of `optimize_module`. `print` shows a table.

    Attributes:
        norms: every GroupNorm of the model.
    """

    norms: tuple[OptimizedNorm, ...]
    _changes: list[_Change] = field(default_factory=list, repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """Number of norms fused with SiLU, of norms only and of norms left alone."""
        return {
            done: sum(n.done == done for n in self.norms) for done in (FUSED, NORM_ONLY, LEFT_ALONE)
        }

    def __str__(self) -> str:
        names = [" = ".join(path or "(the model)" for path in norm.paths) for norm in self.norms]
        width = max(map(len, names), default=0)
        lines = [f"{name:<{width}}  {norm}" for name, norm in zip(names, self.norms, strict=True)]
        counts = ", ".join(f"{count} {done}" for done, count in self.counts.items())
        return "\n".join([*lines, f"{len(self.norms)} GroupNorms: {counts}"])

    def restore(self) -> None:
        """Restore the class and attributes of every module; a second call has no effect.

        Raises:
            RuntimeError: the class of a module has changed since; nothing is restored.
        """
        for change in self._changes:
            if type(change.module) is not change.new:
                raise RuntimeError(
                    f"cannot restore a {change.old.__name__} that has become a"
                    f" {type(change.module).__name__} since; undo that first"
                )
        while self._changes:
            self._changes.pop().undo()


@dataclass
class _Change:
    """New class and attributes of a module, and the old ones."""

    module: nn.Module
    new: type[nn.Module]
    attributes: dict[str, Any]

    def __post_init__(self) -> None:
        self.old = type(self.module)
        self.before = {k: self.module.__dict__.get(k, _ABSENT) for k in self.attributes}

    @property
    def changes_something(self) -> bool:
        now = ((getattr(self.module, k, _ABSENT), v) for k, v in self.attributes.items())
        return self.old is not self.new or any(a != b for a, b in now)

    def do(self) -> None:
        self.module.__class__ = self.new
        self.module.__dict__.update(self.attributes)

    def undo(self) -> None:
        self.module.__class__ = self.old
        for name, value in self.before.items():
            self.module.__dict__.pop(name, None)
            if value is not _ABSENT:
                self.module.__dict__[name] = value


def optimize_module(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | None = None,
    backend: str = "auto",
) -> OptimizeReport:
    """Run every nn.GroupNorm of a model by the fused operator, together with a following SiLU.

    The model is changed in place: the modules stay the same objects, with their parameters, hooks
    and state-dict keys; only their class changes (`FusedGroupNorm`, `FusedGroupNormSiLU`,
    `FusedSequential`). The fused operator runs without gradients only; training, autocast,
    torch.compile and unsupported inputs run torch's operator, so that gradients keep their bits.
    Run inference under torch.no_grad() or torch.inference_mode(). Call `report.restore()` before
    torch.jit.script.

    SiLU is fused if it follows in an nn.Sequential and, with `example_inputs`, if one forward pass
    shows that SiLU (nn.SiLU or F.silu) is the only use of a norm's output. If another input takes
    another path through the model, the norm's output is computed when it is used; it is a
    RuntimeError if the norm's input has been overwritten, or may have been (inference tensors do
    not record it). Reads of a tensor's memory outside of torch, such as by a C extension, are not
    detected.

    Norms with a subclass or a replaced forward are left alone. A second call with the same
    arguments has no effect. After an error the model is unchanged.

    Args:
        model: the model.
        example_inputs: a tensor, a tuple or list of positional or a dict of keyword arguments of
            the model. The pass runs without gradients in evaluation mode; modes, buffers and the
            random state are restored.
        backend: "auto", "reference", "cpu", "triton" or "cuda". On a CPU "auto" runs torch's
            operator where the fused one was not measured to be faster: in contiguous memory (use
            torch.channels_last), for maps of 1024 pixels and more, groups of 16 channels and more,
            float64 and small tensors. Another backend runs wherever it can.

    Returns:
        A report, which can restore the model.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `backend` is unknown, or the model raises an error on `example_inputs`.
        RuntimeError: the backend cannot run on the model's device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    _check_backend(backend, model)
    norms = _norms(model)
    unfit: dict[nn.Module, str] = {norm: _reason_left_alone(norm) for norm in norms}
    observed = [norm for norm in norms if not unfit[norm] and not has_hooks(norm)]
    sequentials = [
        s
        for s in model.modules()
        if type(s) in (nn.Sequential, FusedSequential) and "forward" not in s.__dict__
    ]
    paired = {a for s in sequentials for a, b in _neighbours(s) if is_pair(a, b)}
    seen = None if example_inputs is None else observe(model, observed, example_inputs)
    rows, changes = [], []
    for norm, paths in norms.items():
        if unfit[norm]:
            rows.append(OptimizedNorm(paths, LEFT_ALONE, unfit[norm]))
            continue
        reason = _reason_not_fused(norm, norm in paired, seen)
        activates = type(norm) is FusedGroupNormSiLU
        if seen is not None:
            activates = not reason and bool(seen[norm])
        new = FusedGroupNormSiLU if activates else FusedGroupNorm
        changes.append(_Change(norm, new, {"_backend": backend}))
        rows.append(OptimizedNorm(paths, NORM_ONLY if reason else FUSED, reason))
    changes += [
        _Change(s, FusedSequential, {})
        for s in sequentials
        if any(a in paired and not unfit[a] for a, _ in _neighbours(s))
    ]
    changes = [change for change in changes if change.changes_something]
    _apply(changes)
    return OptimizeReport(tuple(rows), changes)


def _check_backend(backend: str, model: nn.Module) -> None:
    """Check that the backend exists and can run on the model's device and dtype."""
    checks.choice("backend", backend, ("auto", *BACKENDS))
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if backend != "auto" and parameter is not None:
        get_backend(backend, parameter.device, parameter.dtype)


def _norms(model: nn.Module) -> dict[nn.GroupNorm, tuple[str, ...]]:
    """Return every GroupNorm with its paths."""
    found: dict[nn.GroupNorm, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.GroupNorm):
            found[module] = (*found.get(module, ()), path)
    return found


def _reason_left_alone(norm: nn.GroupNorm) -> str:
    if type(norm) not in (nn.GroupNorm, *FUSED_NORMS):
        return f"its class is {type(norm).__name__}"
    return "its forward has been replaced" if "forward" in norm.__dict__ else ""


def _neighbours(sequential: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    modules = list(sequential._modules.values())  # children() leaves out repetitions
    return [(a, b) for a, b in pairwise(modules) if a is not None and b is not None]


def _reason_not_fused(
    norm: nn.GroupNorm,
    paired: bool,
    seen: Mapping[nn.Module, list[OutputUse]] | None,
) -> str:
    """Return why SiLU is not fused into the norm; empty if it is."""
    if has_hooks(norm):
        return "it has hooks"
    if seen is None:
        if paired or type(norm) is FusedGroupNormSiLU:
            return ""
        return "no SiLU behind it in an nn.Sequential, and no example_inputs to see what follows"
    if not seen[norm]:
        return "" if paired else "the example does not call it"
    return next((reason for call in seen[norm] if (reason := call.reason_not_silu())), "")


def _apply(changes: list[_Change]) -> None:
    done: list[_Change] = []
    try:
        for change in changes:
            done.append(change)
            change.do()
    except BaseException:
        for change in reversed(done):
            change.undo()
        raise
