"""Optional dependencies: packages that only some features need."""

from __future__ import annotations

import importlib
from types import ModuleType

# Module: what pip installs, and the extra of this package that contains it.
_PACKAGES = {
    "accelerate": ("accelerate", "train"),
    "diffusers": ("diffusers>=0.30", "diffusers"),
    "huggingface_hub": ("huggingface_hub", "hub"),
    "matplotlib": ("matplotlib", "train"),
    "sklearn": ("scikit-learn", "train"),
    "tensorboard": ("tensorboard", "train"),
    "torchvision": ("torchvision", "train"),
}


def missing(package: str, feature: str) -> str:
    """Return the message that a feature needs a package, with the commands that install it."""
    requirement, extra = _PACKAGES[package]
    name = requirement.partition(">=")[0]
    return (
        f"{feature} needs the package {name}: `pip install '{requirement}'`, or"
        f" `pip install '.[{extra}]'` in a checkout of ddpm_fast"
    )


def require(package: str, feature: str, module: str | None = None) -> ModuleType:
    """Import an optional dependency.

    Args:
        package: Name by which the package is imported, such as "sklearn".
        feature: Subject of the message, such as "training".
        module: Module to import and return. None: the package itself.

    Raises:
        ImportError: The package is not installed; the message has the commands that install it.
            Or it is installed and cannot be imported.
    """
    try:
        return importlib.import_module(module or package)
    except ModuleNotFoundError as error:
        raise ImportError(missing(package, feature)) from error
