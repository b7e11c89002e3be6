"""Options of a training, checked before it begins."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ddpm_fast.diffusion.parameterization import PREDICTIONS
from ddpm_fast.diffusion.variance import LEARNED, VARIANCES
from ddpm_fast.training.losses import OBJECTIVES
from ddpm_fast.utils import checks

DECAYS = ("none", "linear", "cosine")
PRECISIONS = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("adam", "adamw")


def _option(default: Any, text: str, **limits: int) -> Any:
    """Describe a field; the command line takes its help and limits from here."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training. The metadata of each field has its description under "help".

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range, or two do not go together.
    """

    epochs: int = _option(100, "Passes over the training images.", min=1)
    batch: int = _option(128, "Images of a step, over all processes.", min=1)
    optimizer: Literal["adam", "adamw"] = _option(
        "adam", "adam (Kingma & Ba 2014) or adamw (Loshchilov & Hutter 2019)."
    )
    lr: float = _option(4e-4, "Learning rate after the warmup.")
    betas: tuple[float, float] = _option((0.9, 0.999), "Decay of the optimizer's moments.")
    weight_decay: float = _option(0.0, "Weight decay of the optimizer.")
    warmup: int = _option(1000, "Steps in which the learning rate rises to lr.", min=0)
    decay: Literal["none", "linear", "cosine"] = _option(
        "linear", "Decay of the learning rate to 0: none, linear or cosine."
    )
    decay_share: float = _option(0.4, "Share of the steps, at the end, in which it decays.")
    clip_norm: float | None = _option(
        1.0, "Largest norm of the gradient; None, or 0 on the command line: not clipped.", none=0
    )
    ema: float = _option(
        0.9995, "Decay of the averaged weights, which are saved and sampled; 0: none."
    )
    objective: Literal["simple", "full", "hybrid", "score"] = _option(
        "simple", "Loss: simple, full, hybrid or score."
    )
    prediction: Literal["epsilon", "x0", "v", "score"] = _option(
        "epsilon", "Output of the network: epsilon, x0, v or score."
    )
    variance: Literal["posterior", "beta", "learned", "learned_range"] = _option(
        "posterior", "Variance: posterior, beta, learned or learned_range."
    )
    weighting: Literal["min_snr"] | None = _option(None, "Weighting of the loss: min_snr.")
    gamma: float = _option(5.0, "gamma of min_snr.")
    offset_noise: float = _option(0.0, "Strength of the offset noise; 0: none.")
    label_dropout: float = _option(0.0, "Share of labels that are dropped, for guidance.")
    test_share: float = _option(0.1, "Share of the images that is held out.")
    seed: int = _option(0, "Seed of everything that is random.", min=0)
    precision: Literal["float32", "bfloat16", "float16"] = _option(
        "float32", "float32, or autocast to bfloat16 or float16."
    )
    compile: bool = _option(False, "Compile the network by torch.compile.", flag=True)

    def __post_init__(self) -> None:
        for name, accepted in (
            ("optimizer", OPTIMIZERS),
            ("decay", DECAYS),
            ("objective", OBJECTIVES),
            ("prediction", PREDICTIONS),
            ("variance", VARIANCES),
            ("precision", PRECISIONS),
        ):
            checks.choice(name, getattr(self, name), accepted)
        ends = {"epochs": (1, 1 << 31), "batch": (1, 1 << 31), "warmup": (0, 1 << 31)}
        for name, (least, most) in (ends | {"seed": (0, (1 << 64) - 1)}).items():
            self._set(name, checks.integer(name, getattr(self, name), least, most + 1))
        for name, low, high, closed in (
            ("lr", 0, math.inf, "()"),
            ("weight_decay", 0, math.inf, "[)"),
            ("decay_share", 0, 1, "[]"),
            ("ema", 0, 1, "[)"),
            ("gamma", 0, math.inf, "()"),
            ("offset_noise", 0, math.inf, "[)"),
            ("label_dropout", 0, 1, "[)"),
            ("test_share", 0, 1, "[)"),
        ):
            self._set(name, checks.real(name, getattr(self, name), low, high, closed))
        if self.clip_norm is not None:
            self._set("clip_norm", checks.real("clip_norm", self.clip_norm, 0, math.inf, "()"))
        if self.weighting is not None:
            checks.choice("weighting", self.weighting, ("min_snr",))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1); got {self.betas}")
        names = [f"betas[{i}]" for i in range(2)]
        betas = [checks.real(n, b, 0, 1, "[)") for n, b in zip(names, self.betas, strict=True)]
        self._set("betas", tuple(betas))
        checks.instance("compile", self.compile, bool)
        if self.objective == "full" and self.weighting is not None:
            raise ValueError("weighting must be None for the objective 'full', which has its own")
        if self.objective == "hybrid" and not self.learned:
            raise ValueError(
                "objective 'hybrid' needs variance 'learned' or 'learned_range'; got"
                f" {self.variance!r}"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def learned(self) -> bool:
        """True if the network also returns the variance."""
        return self.variance in LEARNED

    def to_dict(self) -> dict[str, Any]:
        """Return the options as values that JSON can hold."""
        return asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainOptions:
        """Return the options of `to_dict`.

        Raises:
            ValueError: There is no such option.
        """
        known = {option.name for option in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"options: there is no {', '.join(unknown)}")
        return cls(**values | {"betas": tuple(values.get("betas", cls.betas))})
