"""Training (Algorithm 1, Ho et al. 2020) in one process or several, resumable at any point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddpm_fast.diffusion.parameterization import check_prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.models.checkpoint.checkpoint import save
from ddpm_fast.ops.philox import STREAM_TRAINING
from ddpm_fast.training import data_order
from ddpm_fast.training.accelerator import make_accelerator
from ddpm_fast.training.config import TrainOptions
from ddpm_fast.training.ema import EMA
from ddpm_fast.training.loader import BatchLoader
from ddpm_fast.training.losses import training_losses
from ddpm_fast.training.lr_schedule import learning_rate
from ddpm_fast.training.metrics import EpochMetrics, draw_history, write_history
from ddpm_fast.training.optimizer import make_optimizer
from ddpm_fast.training.run_state import (
    CHECKPOINT,
    HISTORY,
    LOSS_CURVE,
    STATE,
    check_compatible,
    check_resumable,
    identity,
    read_state,
    remove_unfinished,
    split_data,
    write_state,
)
from ddpm_fast.utils import checks
from ddpm_fast.utils.files import prepare_folder

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """Trains a network on images, and saves everything in a folder.

    The order of images, timesteps, noise and dropped labels are functions of the seed and of an
    image's position in the training (`data_order`). So a training that was killed and resumed has
    the same losses as one that was not, and several processes, started by `accelerate launch` or
    `torchrun`, the same as one. Dropout in the network depends on step and process.

    Args:
        network: A `UNet` or `ThesisUNet`, trained in place, moved to the device and to
            channels_last.
        data: A map-style data set of images, float32 [C, H, W] in [-1, 1], or (image, label)
            pairs, with a `fingerprint` (`ddpm_fast.training.data.ImageData`).
        schedule: The noise schedule.
        options: Options of the training.
        out: Folder for `state.pt`, `history.csv`, its plot `loss.png`, and `checkpoint` (the
            averaged weights, as `ddpm_fast.save` writes them).
        device: Device of this process. None: a GPU if there is one.
        resume: Continue from `state.pt` in `out`.
        save_every: Epochs between two savings; the last epoch is always saved.
        save_steps: Also save after this number of steps, for long epochs. None: never.
        workers: Processes that load images; 0 loads in this process.

    Attributes:
        epoch: Epochs that are complete.
        step: Steps that are complete.
        history: Rows of `history.csv`, a list of dicts.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is not accepted, or a resumed training had another network,
            schedule, data set or option; the message names the difference.
        FileExistsError: `out` holds a training and `resume` is False.
        OSError: A file cannot be read or written.
    """

    def __init__(
        self,
        network: Any,
        data: Any,
        schedule: NoiseSchedule,
        options: TrainOptions,
        out: str | Path,
        *,
        device: torch.device | str | None = None,
        resume: bool = False,
        save_every: int = 1,
        save_steps: int | None = None,
        workers: int = 0,
    ) -> None:
        checks.instance("network", network, nn.Module)
        checks.instance("schedule", schedule, NoiseSchedule)
        self.options = checks.instance("options", options, TrainOptions)
        self.schedule, self.out = schedule, Path(out)
        self.save_every = checks.integer("save_every", save_every, 1, 1 << 31)
        self.save_steps = save_steps
        if save_steps is not None:
            self.save_steps = checks.integer("save_steps", save_steps, 1, 1 << 31)
        self._accelerator = make_accelerator(device)
        self.device = self._accelerator.device
        if options.batch % self._accelerator.num_processes:
            raise ValueError(
                f"batch must be a multiple of the {self._accelerator.num_processes} processes; got"
                f" {options.batch}"
            )
        check_prediction(options.prediction, schedule)
        check_compatible(network, data, options)
        self.train_data, self.test_data = split_data(data, options)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self._parameters = list(network.parameters())
        self._ema = EMA(network, options.ema) if options.ema else None
        self._model = self._accelerator.prepare_model(self.network)
        if options.compile:
            self._model = torch.compile(self._model)
        self._optimizer = make_optimizer(self._parameters, options)
        self._scaler = torch.amp.GradScaler(
            self.device.type, enabled=options.precision == "float16"
        )
        self.batch, self._epoch_steps = data_order.epoch_size(
            len(self.train_data), options.batch, self._accelerator.num_processes
        )
        self._load = BatchLoader(self.device, workers)
        self.epoch, self.step = 0, 0
        self.history: list[dict[str, Any]] = []
        self._metrics = EpochMetrics(self._accelerator, 0, 0)
        self._in_step = False
        self._null_label = (network.config.num_classes or 0) - 1
        self._identity = identity(network, data, schedule)
        if resume:
            self._resume(read_state(self.out / STATE))
        elif found := [n for n in (STATE, HISTORY, CHECKPOINT) if (self.out / n).exists()]:
            raise FileExistsError(
                f"{self.out}: holds a training ({found[0]}); resume it, or use another folder"
            )
        self._accelerator.wait_for_everyone()  # before one process writes what another looks for
        if self.is_main:
            prepare_folder(self.out)
            remove_unfinished(self.out)

    @property
    def is_main(self) -> bool:
        """True in the process that writes files."""
        return bool(self._accelerator.is_main_process)

    @property
    def averaged(self) -> Any:
        """The network that is saved and sampled: the EMA, or the network itself without one."""
        return self._ema.module if self._ema else self.network

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.options.epochs * self._epoch_steps

    @property
    def between_epochs(self) -> bool:
        """True before the first step and after the last step of an epoch."""
        return self.step == self.epoch * self._epoch_steps

    def run(self, progress: bool = True) -> Iterator[dict[str, Any]]:
        """Train to the last epoch, and yield the row of the history after each epoch.

        After an interrupt it may be called again, unless a step was interrupted: then a new
        `Trainer` with resume=True continues.

        Args:
            progress: Show a progress bar.

        Raises:
            RuntimeError: A loss is not finite, or a step was interrupted. Saved files are intact.
        """
        progress_bar = tqdm(
            total=self.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not (progress and self.is_main),
        )
        # Now the training can be resumed; and one that was killed between writing its state and
        # its checkpoint gets the checkpoint.
        self.save()
        with progress_bar as bar:
            while self.epoch < self.options.epochs:
                row = self._epoch(bar)
                bar.set_postfix(loss=f"{row['loss']:.4g}")
                # One assignment, so that an interrupt finds all of it changed or nothing.
                self.history, self._metrics, self.epoch = (
                    [*self.history, row],
                    EpochMetrics(self._accelerator, self.epoch + 1, self.step),
                    self.epoch + 1,
                )
                at_epoch = self.epoch % self.save_every == 0 or self.epoch == self.options.epochs
                if at_epoch or self._saves_at_step():
                    self.save()
                yield row

    def save(self) -> None:
        """Write state, history and checkpoint in the main process; every process must call it.

        Raises:
            OSError: A file cannot be written.
            RuntimeError: A loss or a weight is not finite, or a step was interrupted. Files that
                were saved before are intact.
        """
        if self._in_step:
            raise RuntimeError(
                f"step {self.step} was interrupted: resume from {self.out / STATE} with resume=True"
            )
        self._metrics.read()
        norms = torch._foreach_norm([*self._parameters, *self.averaged.parameters()])
        if not torch.stack(norms).isfinite().all():
            raise RuntimeError(f"the weights are not finite after step {self.step - 1}")
        if self.is_main:
            write_state(self._state(), self.out / STATE)
            write_history(self.history, self.out / HISTORY)
            save(
                self.out / CHECKPOINT,
                self.averaged,
                self.schedule,
                prediction=self.options.prediction,
                variance=self.options.variance,
                overwrite=True,
            )
        self._accelerator.wait_for_everyone()

    def draw(self, title: str) -> None:
        """Draw the losses of the history to `loss.png`."""
        if self.is_main and self.history:
            draw_history(self.history, self.out / LOSS_CURVE, title)

    def _epoch(self, bar: Any) -> dict[str, Any]:
        """Train the remaining steps of an epoch, then compute the held-out loss."""
        options, ranks = self.options, self._accelerator.num_processes
        rank, first_step = self._accelerator.process_index, self.epoch * self._epoch_steps
        order = data_order.EpochOrder(len(self.train_data), self.batch, options.seed, self.epoch)
        positions = list(order.batches(rank, ranks))[self.step - first_step :]
        t, dropped = self._timesteps_and_drops(order.first, self._epoch_steps * self.batch)
        with self._preserved_generators():
            self._model.train()
            self._metrics.start()
            batches = self._load(self.train_data, positions, self.epoch)
            for _ in positions:
                # Before the images are loaded, which may use the generator too.
                torch.manual_seed(data_order.step_seed(options.seed, self.step, rank))
                images, labels, first = next(batches)
                begin = first - order.first
                own = slice(begin, begin + len(images))
                if labels is not None and dropped is not None:
                    labels = torch.where(dropped[own], self._null_label, labels)
                self._in_step = True
                self._metrics.add(self._train_step(images, labels, t[own], first))
                self.step += 1
                self._in_step = False
                bar.update(1)
                if self._saves_at_step() and self.step % self._epoch_steps:
                    self.save()
                    self._metrics.start()
        self._metrics.read()
        summary = self._metrics.summary(len(self._metrics.losses) * self.batch)
        return {
            "epoch": self.epoch,
            "steps": self.step,
            "lr": learning_rate(options, self.step - 1, self.steps),
            **summary,
            "test_loss": self._held_out(),
        }

    def _preserved_generators(self) -> AbstractContextManager[None]:
        """Restore the state of torch's generators afterwards."""
        devices = range(torch.cuda.device_count()) if self.device.type == "cuda" else ()
        return torch.random.fork_rng(devices)

    def _timesteps_and_drops(self, first: int, num: int) -> tuple[Tensor, Tensor | None]:
        """Return timesteps and the mask of dropped labels, on the device."""
        options = self.options
        t = data_order.random_timesteps(options.seed, first, num, self.schedule.T).to(self.device)
        if not options.label_dropout:
            return t, None
        dropped = data_order.dropped_labels(options.seed, first, num, options.label_dropout)
        return t, dropped.to(self.device)

    def _saves_at_step(self) -> bool:
        return self.save_steps is not None and self.step % self.save_steps == 0

    def _train_step(self, images: Tensor, labels: Tensor | None, t: Tensor, first: int) -> Tensor:
        """Make one step of the optimizer; return the mean loss of this process's images."""
        rate = learning_rate(self.options, self.step, self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._model, images, labels, t, first)
        self._scaler.scale(loss).backward()
        if self.options.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self.options.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._ema:
            self._ema.update(self.step)
        return loss.detach()

    def _loss(
        self,
        model: Any,
        images: Tensor,
        labels: Tensor | None,
        t: Tensor,
        first: int,
        stream: int = STREAM_TRAINING,
    ) -> Tensor:
        """Return the mean loss of images from position `first` on."""
        options, precision = self.options, _DTYPES.get(self.options.precision)
        autocast = torch.autocast(self.device.type, precision) if precision else nullcontext()
        with autocast:
            return training_losses(
                model,
                images,
                t,
                self.schedule,
                prediction=options.prediction,
                objective=options.objective,
                variance=options.variance,
                weighting=options.weighting,
                gamma=options.gamma,
                offset_noise=options.offset_noise,
                seed=options.seed,
                first_sample=first,
                stream=stream,
                labels=labels,
            ).loss.mean()

    @torch.no_grad()
    def _held_out(self) -> float | None:
        """Return the loss of the averaged network on the held-out images, or None.

        Timesteps and noise are the same in every epoch.
        """
        if self.test_data is None:
            return None
        options, num = self.options, len(self.test_data)
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        share = -(-num // ranks)
        indices = torch.arange(min(rank * share, num), min((rank + 1) * share, num))
        batches = [(part, int(part[0])) for part in indices.split(options.batch) if len(part)]
        network = self.averaged.eval()
        t = data_order.random_timesteps(
            options.seed, 0, num, self.schedule.T, data_order.STREAM_HELD_OUT_TIMESTEPS
        ).to(self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._preserved_generators():
            torch.manual_seed(data_order.step_seed(options.seed, 0, rank))
            for images, labels, first in self._load(self.test_data, batches, 0):
                own = t[first : first + len(images)]
                loss = self._loss(network, images, labels, own, first, data_order.STREAM_HELD_OUT)
                total += loss.double() * len(images)
        return float(self._accelerator.reduce(total, "sum")) / num

    def _state(self) -> dict[str, Any]:
        return {
            "options": self.options.to_dict(),
            "identity": self._identity,
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "losses": self._metrics.losses,
            "seconds": self._metrics.seconds,
            "network": self.network.state_dict(),
            "average": self._ema.module.state_dict() if self._ema else None,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def _resume(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        check_resumable(self.out, state, self._identity, self.options)
        self.network.load_state_dict(state["network"])
        if self._ema:
            self._ema.module.load_state_dict(state["average"])
        for group, fresh in zip(
            state["optimizer"]["param_groups"], self._optimizer.param_groups, strict=True
        ):
            group["fused"] = fresh["fused"]  # depends on the device
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history = list(state["history"])
        self._metrics = EpochMetrics(
            self._accelerator,
            self.epoch,
            self.epoch * self._epoch_steps,
            state["losses"],
            state["seconds"],
        )
