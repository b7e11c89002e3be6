"""In place of diffusers: its schedulers with a fused step, its pipelines on the engine.

Needs the package diffusers (``pip install ddpm_fast[diffusers]``).
"""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "ddpm_fast.diffusers needs the package diffusers: pip install 'ddpm_fast[diffusers]'"
    ) from error

from ddpm_fast.diffusers.schedulers import FastDDIMScheduler, FastDDPMScheduler
from ddpm_fast.diffusers.step_tables import step_table

__all__ = ["FastDDIMScheduler", "FastDDPMScheduler", "step_table"]
