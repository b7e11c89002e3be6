"""Images to train on: the thesis' triangles, scikit-learn's digits, folders of pictures.

`load_data` finds them by name; `ImageData` is what it returns; `make_triangles` draws.
"""

from ddpm_fast.training.data.dataset import ImageData, ImageSource
from ddpm_fast.training.data.load import load_data
from ddpm_fast.training.data.triangles import make_triangles

__all__ = ["ImageData", "ImageSource", "load_data", "make_triangles"]
