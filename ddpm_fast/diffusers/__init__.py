"""Drop-in replacements for schedulers and pipelines of diffusers, which must be installed."""

from ddpm_fast.utils.optional import require

require("diffusers", "ddpm_fast.diffusers")

from ddpm_fast.diffusers.schedulers import FastDDIMScheduler, FastDDPMScheduler  # noqa: E402
from ddpm_fast.diffusers.step_tables import step_table  # noqa: E402

__all__ = ["FastDDIMScheduler", "FastDDPMScheduler", "step_table"]
