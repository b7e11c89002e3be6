"""Argument checks, files, images, figures and CUDA graphs: nothing here knows diffusion."""
