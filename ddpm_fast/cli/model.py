"""A checkpoint as the commands use it: its options, checked, and the network that runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ddpm_fast.cli.devices import device_of
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, DynamicThreshold
from ddpm_fast.engine import AcceleratedUNet
from ddpm_fast.models import UNet
from ddpm_fast.models.checkpoint.checkpoint import load

SHIPPED = str(Path(__file__).resolve().parent.parent / "assets" / "triangles")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

ModelOption = Annotated[
    str,
    typer.Option(
        help="Folder of a diffusers pipeline, or its repository on the Hub (owner/name).",
        show_default="triangles",
    ),
]
VariantOption = Annotated[
    str | None, typer.Option(help="Of the model's weights, such as fp16.", show_default=False)
]
DataOption = Annotated[
    Path,
    typer.Option(
        help="A .npy (uint8, or floats in [-1, 1]; [N, C, H, W] or [N, H, W]), or a folder of PNG"
        " and JPEG pictures.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="the GPU, if any")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help=f"Of the network: {', '.join(DTYPES)}. The chain itself is float32.",
        show_default="float16 on a GPU, float32 on a CPU",
    ),
]
BackendOption = Annotated[
    str, typer.Option(help="Of the updates: auto, reference, cpu, triton or cuda.")
]
EngineOption = Annotated[
    bool,
    typer.Option(
        help="Run the network as a fused plan where that is faster (a CPU times it) and there is"
        " one: not of a ThesisUNet."
    ),
]
ClipOption = Annotated[
    str | None,
    typer.Option(
        help="Of x0: none, a bound, or dynamic[:QUANTILE[:CAP]] (by the image).",
        show_default="the model's",
    ),
]
LabelOption = Annotated[
    str | None,
    typer.Option(help="Class of the images; several, after commas, take turns by the index."),
]
ProgressOption = Annotated[bool, typer.Option(help="Show a progress bar.")]


@dataclass(frozen=True)
class OpenModel:
    """What a command samples with. in_words: the model's name and the shape of its images."""

    network: Any
    schedule: NoiseSchedule
    prediction: Any
    variance: Any
    clip: Clip
    sample_shape: tuple[int, int, int]
    device: torch.device
    dtype: str
    classes: int | None
    learns_variance: bool
    in_words: str

    @classmethod
    def open(
        cls, model: str, variant: str | None, device: str | None, dtype: str | None, engine: bool
    ) -> OpenModel:
        """Load a checkpoint. Raises ValueError where it lacks what a chain needs.

        engine: run the network as a plan, if it is one of which plans are made.
        """
        place = device_of(device)
        chosen = dtype or ("float16" if place.type == "cuda" else "float32")
        if chosen not in DTYPES:
            raise ValueError(f"--dtype must be {', '.join(DTYPES)}; got {dtype!r}")
        # The engine rounds the weights itself, once; sums of them before.
        checkpoint = load(
            model, torch.float32 if engine else DTYPES[chosen], place, variant=variant
        )
        if engine and not isinstance(checkpoint.unet, UNet):
            # The network itself, read in the dtype that it runs in, which must hold its weights.
            return cls.open(model, variant, device, dtype, engine=False)
        schedule, shape = checkpoint.schedule, checkpoint.sample_shape
        if schedule is None:
            reason = "it holds a network alone; scheduler/scheduler_config.json is needed"
            raise ValueError(f"{model}: cannot be used here: {reason}")
        if shape is None:
            reason = "its unet/config.json has no sample_size"
            raise ValueError(f"{model}: cannot be used here: {reason}")
        unet, config = checkpoint.unet, checkpoint.unet.config
        if isinstance(unet, UNet) and unet.config.class_embed_type is not None:
            reason = "its network embeds its labels itself (class_embed_type)"
            raise ValueError(f"{model}: cannot be used here: {reason}")
        network: Any = unet
        if engine:
            network = AcceleratedUNet(unet, dtype=DTYPES[chosen], num_timesteps=schedule.T)
        name = "triangles (shipped)" if model == SHIPPED else model
        if variant is not None:
            name += f" ({variant})"
        return cls(
            network=network,
            schedule=schedule,
            prediction=checkpoint.prediction,
            variance=checkpoint.variance,
            clip=checkpoint.clip,
            sample_shape=shape,
            device=place,
            dtype=chosen,
            classes=config.num_classes,
            learns_variance=config.out_channels == 2 * shape[0],
            in_words=f"{name}, {' x '.join(map(str, shape))}",
        )

    def on(self, where: str) -> str:
        """Where a command runs, and the network's dtype if no engine chooses it."""
        planned = isinstance(self.network, AcceleratedUNet)
        return where if planned else f"{where}, network in {self.dtype}"

    def engine_report(self) -> str:
        """What ran the network in the end, for a command that asked for the engine."""
        if isinstance(self.network, AcceleratedUNet):
            return self.network.report().splitlines()[-1]
        return f"none for a {type(self.network).__name__}, which runs as it is"

    def labels(self, text: str | None, num: int, first: int = 0) -> Tensor | None:
        """The label of each of num images, of which the first has that index."""
        if (text is None) != (self.classes is None):
            needed = f"0 to {(self.classes or 0) - 1}" if text is None else "none"
            got = "none" if text is None else repr(text)
            raise ValueError(f"--label must be {needed} for this model; got {got}")
        if text is None or self.classes is None:
            return None
        parts = [part.strip() for part in text.split(",")]
        given = [int(part) if part.isascii() and part.isdigit() else self.classes for part in parts]
        if max(given) >= self.classes:
            raise ValueError(f"--label must be 0 to {self.classes - 1}; got {text!r}")
        return torch.tensor([given[(first + i) % len(given)] for i in range(num)])


def clip_of(text: str | None, of_model: Clip) -> Clip:
    """The option --clip."""
    if text is None:
        return of_model
    if text == "none":
        return None
    name, *numbers = text.split(":") if text.startswith("dynamic") else ("", text)
    try:
        values = [float(number) for number in numbers]
        if name == "dynamic" and len(values) <= 2:
            return DynamicThreshold(*values)
        if name == "" and len(values) == 1 and values[0] > 0:
            return values[0]
    except ValueError as error:
        raise ValueError(f"--clip: {text}: {error}") from error
    accepted = "none, a number above 0 or dynamic[:QUANTILE[:CAP]]"
    raise ValueError(f"--clip must be {accepted}; got {text!r}")
