"""What a training run is told, checked before it begins."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ddpm_fast.diffusion.parameterization import PREDICTIONS
from ddpm_fast.diffusion.variance import LEARNED, VARIANCES
from ddpm_fast.training.losses import OBJECTIVES
from ddpm_fast.utils import checks

DECAYS = ("none", "linear", "cosine")
PRECISIONS = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("adam", "adamw")


@dataclass(frozen=True)
class TrainOptions:
    """How a network is trained.

    epochs, batch: passes over the training images, and images of a step, over all processes.
    optimizer, lr, betas, weight_decay: Adam (Kingma & Ba 2014) or AdamW. warmup: steps over which
    the rate rises to lr. decay, decay_share: how it falls to 0 over the last share of the steps.
    clip_norm: of the gradient, None for none. ema: decay of the average of the weights that is
    saved and sampled, at most (1 + n) / (10 + n) after n steps; 0 for none.
    objective, prediction, variance, weighting, gamma, offset_noise: of `training_losses`.
    label_dropout: share of labels that become the null label, the last, for guidance.
    test_share: share of the images that are held out. seed: of the order, the timesteps, the noise
    and the network's dropout. precision: of autocast. compile: the network by torch.compile.

    Raises TypeError, ValueError naming the option.
    """

    epochs: int = 100
    batch: int = 128
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 1000
    decay: Literal["none", "linear", "cosine"] = "linear"
    decay_share: float = 0.4
    clip_norm: float | None = 1.0
    ema: float = 0.9995
    objective: Literal["simple", "full", "hybrid", "score"] = "simple"
    prediction: Literal["epsilon", "x0", "v", "score"] = "epsilon"
    variance: Literal["posterior", "beta", "learned", "learned_range"] = "posterior"
    weighting: Literal["min_snr"] | None = None
    gamma: float = 5.0
    offset_noise: float = 0.0
    label_dropout: float = 0.0
    test_share: float = 0.1
    seed: int = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False

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
        """Whether the network returns a variance beside its prediction."""
        return self.variance in LEARNED

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, 0 .. steps - 1."""
        rate = self.lr * min(1.0, (step + 1) / max(self.warmup, 1))
        begin = steps - math.ceil(self.decay_share * steps)
        if self.decay == "none" or step < begin:
            return rate
        done = (step - begin) / max(steps - begin, 1)
        if self.decay == "linear":
            return rate * (1 - done)
        return rate * (1 + math.cos(math.pi * done)) / 2

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, and for `TrainOptions(**values)` again."""
        return asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainOptions:
        """The inverse of to_dict. Raises ValueError for an option that there is not."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"options: there is no {', '.join(unknown)}")
        return cls(**values | {"betas": tuple(values.get("betas", cls.betas))})
