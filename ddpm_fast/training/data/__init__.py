"""Data sets of images: generated triangles, scikit-learn's digits, folders of images."""

from ddpm_fast.training.data.dataset import ImageData, ImageSource
from ddpm_fast.training.data.load import load_data
from ddpm_fast.training.data.triangles import make_triangles

__all__ = ["ImageData", "ImageSource", "load_data", "make_triangles"]
