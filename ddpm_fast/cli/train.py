"""``ddpm-fast train``: a network of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpm_fast.cli.devices import device_text
from ddpm_fast.cli.output import say
from ddpm_fast.cli.schedules import SCHEDULES, schedule_of
from ddpm_fast.models.architectures import ARCHITECTURES
from ddpm_fast.utils.figures import require_matplotlib

DATA = ("triangles", "triangles-lowres", "triangles-array", "digits")


def train(
    data: Annotated[str, typer.Option(help=f"{', '.join(DATA)}, or a folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    network: Annotated[
        str,
        typer.Option(help=f"{', '.join(ARCHITECTURES)}, thesis, a config.json or a checkpoint."),
    ] = "small",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Images a step, of all processes.")] = 128,
    schedule: Annotated[
        str, typer.Option(help=f"{', '.join(SCHEDULES)}; arguments after colons, as power:2.")
    ] = "linear",
    timesteps: Annotated[int, typer.Option(min=1, help="T, steps of the schedule.")] = 1000,
    optimizer: Annotated[str, typer.Option(help="adam or adamw.")] = "adam",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 4e-4,
    betas: Annotated[tuple[float, float], typer.Option(help="Of the optimizer's averages.")] = (
        0.9,
        0.999,
    ),
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    warmup: Annotated[int, typer.Option(min=0, help="Steps in which the rate rises.")] = 1000,
    decay: Annotated[str, typer.Option(help="none, linear or cosine.")] = "linear",
    decay_share: Annotated[float, typer.Option(help="Last share of the steps that decays.")] = 0.4,
    clip_norm: Annotated[float, typer.Option(help="Of the gradient; 0: not clipped.")] = 1.0,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights; 0: none.")] = 0.9995,
    objective: Annotated[str, typer.Option(help="simple, full, hybrid or score.")] = "simple",
    prediction: Annotated[str, typer.Option(help="epsilon, x0, v or score.")] = "epsilon",
    variance: Annotated[
        str, typer.Option(help="posterior, beta, learned or learned_range.")
    ] = "posterior",
    weighting: Annotated[str | None, typer.Option(help="min_snr.", show_default="none")] = None,
    gamma: Annotated[float, typer.Option(help="Of min_snr.")] = 5.0,
    offset_noise: Annotated[float, typer.Option(help="Strength of the offset.")] = 0.0,
    labels: Annotated[
        bool, typer.Option("--labels", help="A conditional network: sub-folders or digits.")
    ] = False,
    label_dropout: Annotated[float, typer.Option(help="Share without label, for guidance.")] = 0.0,
    dropout: Annotated[float, typer.Option(help="Of the network.")] = 0.0,
    num: Annotated[int, typer.Option(min=1, help="Images that are generated.")] = 10_000,
    test_share: Annotated[float, typer.Option(help="Share of the images held out.")] = 0.1,
    resize: Annotated[int | None, typer.Option(min=1, help="Shorter side, in pixels.")] = None,
    crop: Annotated[bool, typer.Option("--crop", help="To a square, after --resize.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Half of the images, sideways.")] = False,
    channels: Annotated[
        int | None, typer.Option(help="1 or 3.", show_default="as the images")
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Go on without files that cannot be read.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    device: Annotated[str | None, typer.Option(show_default="cuda if there is one")] = None,
    precision: Annotated[
        str, typer.Option(help="float32, or autocast to bfloat16 or float16.")
    ] = "float32",
    compile_: Annotated[bool, typer.Option("--compile", help="By torch.compile.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="That load images.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Epochs between savings.")] = 1,
    save_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between savings within an epoch.")
    ] = None,
    sample_every: Annotated[int, typer.Option(min=0, help="Epochs between sheets; 0: none.")] = 10,
    sample_steps: Annotated[int, typer.Option(min=1, help="Of a sheet's chains.")] = 50,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write its files.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train a network (Algorithm 1, Ho et al. 2020), and keep it in diffusers' layout.

    --out gets checkpoint/ (the averaged weights), state.pt, history.csv, loss.png and samples/.
    A run that was killed goes on with --resume, with the losses that it would have had. On several
    GPUs: ``accelerate launch -m ddpm_fast train ...``.
    """
    from ddpm_fast.training.build_network import build_network
    from ddpm_fast.training.config import TrainOptions
    from ddpm_fast.training.data import load_data
    from ddpm_fast.training.metrics import TensorBoardWriter, require_tensorboard
    from ddpm_fast.training.samples import save_samples
    from ddpm_fast.training.trainer import Trainer

    options = TrainOptions(
        epochs=epochs,
        batch=batch,
        optimizer=optimizer,  # type: ignore[arg-type]
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        warmup=warmup,
        decay=decay,  # type: ignore[arg-type]
        decay_share=decay_share,
        clip_norm=clip_norm or None,
        ema=ema,
        objective=objective,  # type: ignore[arg-type]
        prediction=prediction,  # type: ignore[arg-type]
        variance=variance,  # type: ignore[arg-type]
        weighting=weighting,  # type: ignore[arg-type]
        gamma=gamma,
        offset_noise=offset_noise,
        label_dropout=label_dropout,
        test_share=test_share,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]
        compile=compile_,
    )
    if tensorboard:
        require_tensorboard()
    images = load_data(
        data,
        num=num,
        seed=seed,
        resize=resize,
        crop=crop,
        flip=flip,
        channels=channels,
        labels=labels,
        skip_broken=skip_broken,
    )
    classes = images.num_classes
    if classes is not None and label_dropout:
        classes += 1
    trainer = Trainer(
        build_network(network, images.sample_shape, classes, options.learned, dropout, seed),
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
    writer = (
        TensorBoardWriter(out / "tensorboard", trainer.history)
        if tensorboard and trainer.is_main
        else None
    )

    def sheet_path() -> Path | None:
        """Of the sheet that is due after the epochs so far."""
        due = sample_every and trainer.epoch and trainer.epoch % sample_every == 0
        return out / "samples" / f"{trainer.epoch:05d}.png" if due else None

    title = f"{network} on {images.name}, {schedule}"
    draws = trainer.is_main and _can_draw()
    path = sheet_path()
    if path and trainer.between_epochs and not path.exists():  # a run was killed before it
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
    """Whether there is matplotlib; where not, a note says what will be missing."""
    try:
        require_matplotlib()
    except ImportError as error:
        typer.echo(f"note: no loss.png, {error}", err=True)
        return False
    return True
