"""Noise schedules on the command line: a name, and arguments after colons."""

from __future__ import annotations

from collections.abc import Callable

from ddpm_fast.diffusion.schedule import NoiseSchedule

# Function, names of its arguments in order, and how many of them are required.
_ENDS = ("beta_start", "beta_end")
SCHEDULES: dict[str, tuple[Callable[..., NoiseSchedule], tuple[str, ...], int]] = {
    "linear": (NoiseSchedule.linear, _ENDS, 0),
    "scaled_linear": (NoiseSchedule.scaled_linear, _ENDS, 0),
    "cosine": (NoiseSchedule.cosine, ("s", "max_beta"), 0),
    "sigmoid": (NoiseSchedule.sigmoid, _ENDS, 0),
    "sigmoid_cumprod": (NoiseSchedule.sigmoid_cumprod, ("start", "end", "tau"), 0),
    "power": (NoiseSchedule.power, ("exponent", *_ENDS), 1),
    "sine_wave": (NoiseSchedule.sine_wave, ("cycles", *_ENDS), 0),
}


def schedule_of(option: str, text: str, T: int) -> NoiseSchedule:
    """Parse `name` or `name:argument:...`, the value of an option.

    Raises:
        ValueError: naming the option, for an unknown name or invalid arguments.
    """
    name, *values = text.split(":")
    if name not in SCHEDULES:
        accepted = ", ".join(
            ":".join([known, *(arguments if needed else ())[:needed]])
            for known, (_, arguments, needed) in SCHEDULES.items()
        )
        raise ValueError(f"{option}: no schedule {name!r}; accepted: {accepted}")
    make, arguments, needed = SCHEDULES[name]
    if not needed <= len(values) <= len(arguments):
        raise ValueError(
            f"{option}: {name} takes {needed} to {len(arguments)} arguments"
            f" ({', '.join(arguments)}); got {text!r}"
        )
    options = {}
    for argument, value in zip(arguments, values, strict=False):
        try:
            options[argument] = float(value)
        except ValueError:
            message = f"{option}: {argument} must be a number; got {value!r} in {text!r}"
            raise ValueError(message) from None
    try:
        return make(T=T, **options)
    except ValueError as error:
        raise ValueError(f"{option}: {text}: {error}") from error
