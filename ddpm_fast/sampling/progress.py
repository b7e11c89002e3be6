"""Progress of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from tqdm.auto import tqdm


class Progress(Protocol):
    """Progress bar, such as that of tqdm."""

    def update(self, n: int) -> object:
        """Advance by `n` steps."""


def step_bar(progress: bool | Progress, steps: int) -> AbstractContextManager[Progress]:
    """Return the progress bar of a run.

    Args:
        progress: Show a bar; or a bar, which is returned.
        steps: Steps of the run.
    """
    if not isinstance(progress, bool):
        return nullcontext(progress)
    return tqdm(total=steps, desc="sampling", unit="step", disable=not progress)
