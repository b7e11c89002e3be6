"""Checkpoints on the command line: shared options, and the network that runs."""

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

DataOption = Annotated[
    Path,
    typer.Option(
        help="Images: a .npy (uint8, or floats in [-1, 1]; [N, C, H, W] or [N, H, W]), or a folder"
        " of image files.",
        show_default=False,
    ),
]
NumOption = Annotated[
    int | None, typer.Option(min=1, help="Use the first images only.", show_default="all")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the noise, 64 bits.")]
BatchOption = Annotated[
    int, typer.Option(min=1, help="Images in a batch. It affects the last bits of each image.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Device: cpu, cuda or cuda:N.", show_default="a GPU if there is one"),
]
BackendOption = Annotated[
    str, typer.Option(help="Backend of the sampling steps: auto, reference, cpu, triton or cuda.")
]


@dataclass(frozen=True)
class ModelOptions:
    """Options of the commands that run a checkpoint's network."""

    model: Annotated[
        str,
        typer.Option(
            help="Folder of a diffusers pipeline, or its repository on the Hub (owner/name).",
            show_default="triangles",
        ),
    ] = SHIPPED
    variant: Annotated[
        str | None, typer.Option(help="Variant of the weights, such as fp16.", show_default=False)
    ] = None
    label: Annotated[
        str | None,
        typer.Option(
            help="Class of the images. With several, separated by commas, image k gets the class"
            " at k modulo their number."
        ),
    ] = None
    device: DeviceOption = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Dtype of the network: {', '.join(DTYPES)}. Samples are float32.",
            show_default="float16 on a GPU, float32 on a CPU",
        ),
    ] = None
    engine: Annotated[
        bool,
        typer.Option(
            help="Run the network by the fused engine where this is faster (measured on CPUs) and"
            " possible (not for a ThesisUNet)."
        ),
    ] = True
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True

    def open(self) -> OpenModel:
        """Load the checkpoint (`OpenModel.open`)."""
        return OpenModel.open(self.model, self.variant, self.device, self.dtype, self.engine)


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint with all that a command needs.

    Attributes:
        network: The network, or an `AcceleratedUNet` of it.
        schedule: Noise schedule.
        prediction: Prediction type of the network.
        variance: Variance of the checkpoint's scheduler.
        clip: Clipping of x0 of the checkpoint's scheduler.
        sample_shape: (C, H, W).
        device: Device of the network.
        dtype: Name of the network's dtype.
        classes: Number of labels; None for an unconditional network.
        learns_variance: True if the network also predicts the variance.
        description: Name of the model and shape of its images.
    """

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
    description: str

    @classmethod
    def open(
        cls, model: str, variant: str | None, device: str | None, dtype: str | None, engine: bool
    ) -> OpenModel:
        """Load a checkpoint.

        Args:
            model: Folder or repository.
            variant: Variant of the weights.
            device: "cpu", "cuda" or "cuda:N". None: a GPU if there is one.
            dtype: A key of `DTYPES`. None: "float16" on a GPU, "float32" on a CPU.
            engine: Run a `UNet` by the engine.

        Raises:
            ValueError: an option is invalid, or the checkpoint lacks a scheduler or a sample size.
        """
        target = device_of(device)
        chosen = dtype or ("float16" if target.type == "cuda" else "float32")
        if chosen not in DTYPES:
            raise ValueError(f"--dtype must be {', '.join(DTYPES)}; got {dtype!r}")
        # The engine rounds the weights once, after it has added some of them.
        checkpoint = load(
            model, torch.float32 if engine else DTYPES[chosen], target, variant=variant
        )
        if engine and not isinstance(checkpoint.unet, UNet):
            # Load it again in the dtype that it runs in, which must be able to hold the weights.
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
            device=target,
            dtype=chosen,
            classes=config.num_classes,
            learns_variance=config.out_channels == 2 * shape[0],
            description=f"{name}, {' x '.join(map(str, shape))}",
        )

    def with_dtype(self, device: str) -> str:
        """Append the network's dtype to the name of a device, unless the engine chooses it."""
        accelerated = isinstance(self.network, AcceleratedUNet)
        return device if accelerated else f"{device}, network in {self.dtype}"

    def engine_report(self) -> str:
        """Describe what ran the network."""
        if isinstance(self.network, AcceleratedUNet):
            return self.network.report().splitlines()[-1]
        return f"none for a {type(self.network).__name__}, which runs as it is"

    def labels(self, text: str | None, num: int, first: int = 0) -> Tensor | None:
        """Return the labels of `num` images from index `first`, int64 [num], by `--label`.

        Raises:
            ValueError: the model needs labels or has none, or a label is out of range.
        """
        if (text is None) != (self.classes is None):
            needed = f"0 to {(self.classes or 0) - 1}" if text is None else "none"
            got = "none" if text is None else repr(text)
            raise ValueError(f"--label must be {needed} for this model; got {got}")
        if text is None or self.classes is None:
            return None
        parts = [part.strip() for part in text.split(",")]
        classes = [
            int(part) if part.isascii() and part.isdigit() else self.classes for part in parts
        ]
        if max(classes) >= self.classes:
            raise ValueError(f"--label must be 0 to {self.classes - 1}; got {text!r}")
        return torch.tensor([classes[(first + i) % len(classes)] for i in range(num)])


def clip_of(text: str | None, of_model: Clip) -> Clip:
    """Parse `--clip`; None stands for the clipping of the model.

    Raises:
        ValueError: the text is no clipping.
    """
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
