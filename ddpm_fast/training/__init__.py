"""Training: the objectives, on top of the fused updates. Nothing in the core imports it."""

from ddpm_fast.training.losses import TrainingLosses, training_losses

__all__ = ["TrainingLosses", "training_losses"]
