from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, Any]: ...
def row_fields() -> list[str]: ...
def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def philox_words(
    num: int,
    words: int,
    seed: int,
    stream: int,
    first_sample: int = 0,
) -> NDArray[np.uint32]: ...
def philox_normal(
    num: int,
    elements: int,
    seed: int,
    stream: int,
    first_sample: int = 0,
) -> NDArray[np.float32]: ...
