"""`ddpm-fast train`: train a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpm_fast.cli.devices import device_text
from ddpm_fast.cli.model import DeviceOption
from ddpm_fast.cli.output import say
from ddpm_fast.cli.schedules import SCHEDULES, schedule_of
from ddpm_fast.models.architectures import ARCHITECTURES
from ddpm_fast.training.config import TrainOptions
from ddpm_fast.utils.figures import require_matplotlib

DATA = ("triangles", "triangles-lowres", "triangles-array", "digits")


def train(
    data: Annotated[str, typer.Option(help=f"{', '.join(DATA)}, or a folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    options: TrainOptions,
    network: Annotated[
        str,
        typer.Option(
            help=f"Architecture ({', '.join(ARCHITECTURES)}, thesis), config.json or checkpoint."
        ),
    ] = "small",
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")] = False,
    schedule: Annotated[
        str,
        typer.Option(
            help=f"Noise schedule: {', '.join(SCHEDULES)}; arguments after colons, as power:2."
        ),
    ] = "linear",
    timesteps: Annotated[int, typer.Option(min=1, help="Timesteps T of the schedule.")] = 1000,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels", help="Train a conditional network, on classes: sub-folders or digits."
        ),
    ] = False,
    dropout: Annotated[float, typer.Option(help="Dropout of the network.")] = 0.0,
    num: Annotated[int, typer.Option(min=1, help="Number of triangles to generate.")] = 10_000,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Size in pixels that images are resized to.")
    ] = None,
    crop: Annotated[
        bool,
        typer.Option("--crop", help="Resize the shorter side, and crop the centre to a square."),
    ] = False,
    flip: Annotated[
        bool, typer.Option("--flip", help="Mirror images left to right with probability 1/2.")
    ] = False,
    channels: Annotated[
        int | None,
        typer.Option(help="Channels of the images: 1 or 3.", show_default="as in the files"),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Skip files that cannot be read.")
    ] = False,
    device: DeviceOption = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that load images; 0: load them in this one.")
    ] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Epochs between checkpoints.")] = 1,
    save_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between checkpoints within an epoch.", show_default="none"),
    ] = None,
    sample_every: Annotated[
        int, typer.Option(min=0, help="Epochs between sheets of samples; 0: none.")
    ] = 10,
    sample_steps: Annotated[int, typer.Option(min=1, help="Sampling steps of a sheet.")] = 50,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write the metrics to TensorBoard files.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train a network (Algorithm 1, Ho et al. 2020), and save it in the layout of diffusers.

    --out gets checkpoint/ (the averaged weights), state.pt, history.csv, loss.png and samples/.
    --resume continues an interrupted run, with the same losses. To train on several GPUs:
    accelerate launch -m ddpm_fast train ...
    """
    from ddpm_fast.training.build_network import build_network
    from ddpm_fast.training.data import load_data
    from ddpm_fast.training.metrics import TensorBoardWriter, require_tensorboard
    from ddpm_fast.training.samples import save_samples
    from ddpm_fast.training.trainer import Trainer

    if tensorboard:
        require_tensorboard()
    images = load_data(
        data,
        num=num,
        seed=options.seed,
        resize=resize,
        crop=crop,
        flip=flip,
        channels=channels,
        labels=labels,
        skip_broken=skip_broken,
    )
    classes = images.num_classes
    if classes is not None and options.label_dropout:
        classes += 1
    trainer = Trainer(
        build_network(
            network, images.sample_shape, classes, options.learned, dropout, options.seed
        ),
        images,
        schedule_of("--schedule", schedule, timesteps),
        options,
        out,
        device=device,
        resume=resume,
        save_every=save_every,
        save_steps=save_steps,
        workers=workers,
    )
    if trainer.is_main:
        parameters = sum(p.numel() for p in trainer.network.parameters())
        say("data", f"{images.name}, {len(images)} images of {list(images.sample_shape)}")
        say("network", f"{network}, {parameters / 1e6:.2f} M parameters")
        say("device", device_text(trainer.device))
        say("steps", f"{trainer.step} .. {trainer.steps}")
    writer = None
    if tensorboard and trainer.is_main:
        writer = TensorBoardWriter(out / "tensorboard", trainer.history)

    def sheet_path() -> Path | None:
        """Return the file of the sheet that is due after this epoch, or None."""
        due = sample_every and trainer.epoch and trainer.epoch % sample_every == 0
        return out / "samples" / f"{trainer.epoch:05d}.png" if due else None

    title = f"{network} on {images.name}, {schedule}"
    draws = trainer.is_main and _can_draw()
    path = sheet_path()
    if (
        path and trainer.between_epochs and not path.exists()
    ):  # the run was killed before it was written
        save_samples(trainer, path, steps=sample_steps)
    for row in trainer.run(progress):
        if writer is not None:
            writer.add(row)
        if path := sheet_path():
            save_samples(trainer, path, steps=sample_steps)
            if draws:
                trainer.draw(title)
    if draws:
        trainer.draw(title)
    if trainer.is_main:
        last = trainer.history[-1]
        held_out = "" if last["test_loss"] is None else f", held out {last['test_loss']:.5g}"
        say("loss", f"{last['loss']:.5g}{held_out}")
        say("wrote", str(out / "checkpoint"))


def _can_draw() -> bool:
    """Return True if matplotlib is installed; otherwise print a note."""
    try:
        require_matplotlib()
    except ImportError as error:
        typer.echo(f"note: no loss.png, {error}", err=True)
        return False
    return True
