"""Training (Algorithm 1, Ho et al. 2020): one process or several, to be stopped at any point."""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddpm_fast import checks
from ddpm_fast.chain import check_prediction
from ddpm_fast.checkpoint import save
from ddpm_fast.images import prepare_folder
from ddpm_fast.noise import STREAM_TRAINING
from ddpm_fast.schedules import NoiseSchedule
from ddpm_fast.training import order
from ddpm_fast.training.average import Average
from ddpm_fast.training.feed import Feed
from ddpm_fast.training.fit import check_fit, identity, parts
from ddpm_fast.training.history import draw_history, write_history
from ddpm_fast.training.losses import training_losses
from ddpm_fast.training.options import TrainOptions
from ddpm_fast.training.state import differences, read_state, write_state

STATE, HISTORY, CHECKPOINT, CURVE = "state.pt", "history.csv", "checkpoint", "loss.png"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# What may change between a run and the one that goes on with it.
_FREE = ("epochs", "compile")


class Trainer:
    """Trains a network on images, into a folder.

    network: a `UNet` or `ThesisUNet`; trained in place, moved to the device, channels-last. data: a
    map-style data set of images, float32 [C, H, W] in [-1, 1], or (image, label), with a
    ``fingerprint`` (`ddpm_fast.data.ImageData`). out: gets ``state.pt``, ``history.csv`` and its
    picture ``loss.png``, ``checkpoint`` (the averaged weights, in the layout of `ddpm_fast.save`).

    Order, timesteps, noise and dropped labels are functions of the seed and of an image's place in
    the run (`order`), so that a run that was killed and goes on has the losses of one that was not,
    and several processes, started by ``accelerate launch`` or ``torchrun``, those of one. A dropout
    in the network is drawn by epoch and process.

    resume: go on from ``state.pt``. save_every: epochs between savings; the last one saves.

    Raises TypeError, ValueError naming the argument: also for a run that goes on with another
    network, schedule, data set or option than it began with, the difference named; OSError from the
    disk; FileExistsError where out holds a run and resume is False.
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
        workers: int = 0,
    ) -> None:
        checks.instance("network", network, nn.Module)
        checks.instance("schedule", schedule, NoiseSchedule)
        self.options = checks.instance("options", options, TrainOptions)
        self.schedule, self.out = schedule, Path(out)
        self.save_every = checks.integer("save_every", save_every, 1, 1 << 31)
        self._processes = _processes(device)
        self.device = self._processes.device
        if options.batch % self._processes.num_processes:
            raise ValueError(
                f"batch must be a multiple of the {self._processes.num_processes} processes; got"
                f" {options.batch}"
            )
        check_prediction(options.prediction, schedule)
        check_fit(network, data, options)
        self.train_data, self.test_data = parts(data, options)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self._average = Average(network, options.ema) if options.ema else None
        self._model = self._processes.prepare_model(self.network)
        if options.compile:
            self._model = torch.compile(self._model)
        self._optimizer = _optimizer(network, options)
        self._scaler = torch.amp.GradScaler(
            self.device.type, enabled=options.precision == "float16"
        )
        self.batch, self._epoch_steps = order.cut(
            len(self.train_data), options.batch, self._processes.num_processes
        )
        self._feed = Feed(self.device, workers)
        self.epoch, self.step = 0, 0
        self.history: list[dict[str, Any]] = []
        self._null_label = (network.config.num_classes or 0) - 1
        self._identity = identity(network, data, schedule)
        if resume:
            self._go_on(read_state(self.out / STATE))
        elif found := [n for n in (STATE, HISTORY, CHECKPOINT) if (self.out / n).exists()]:
            raise FileExistsError(
                f"{self.out}: holds a run ({found[0]}); resume it, or take another folder"
            )
        if self.is_main:
            prepare_folder(self.out)
            _remove_leftovers(self.out)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self._processes.is_main_process)

    @property
    def averaged(self) -> Any:
        """The network that is saved and sampled: of averaged weights, or itself without any."""
        return self._average.module if self._average else self.network

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.options.epochs * self._epoch_steps

    def run(self, progress: bool = True) -> Iterator[dict[str, Any]]:
        """Train to the last epoch; yields the row of the history after each.

        Raises RuntimeError where a loss is not finite; what was saved before stays.
        """
        shown = tqdm(
            total=self.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not (progress and self.is_main),
        )
        # From here on there is something to go on from; and a run that was killed between its
        # state and its checkpoint gets the checkpoint.
        self.save()
        with shown as bar:
            while self.epoch < self.options.epochs:
                row = self._epoch(bar)
                bar.set_postfix(loss=f"{row['loss']:.4g}")
                self.history.append(row)
                self.epoch += 1
                if self.epoch % self.save_every == 0 or self.epoch == self.options.epochs:
                    self.save()
                yield row

    def save(self) -> None:
        """Write the state, the history and the checkpoint; by the main process, for all.

        Raises OSError with the path and the reason, and RuntimeError where a weight is not finite;
        what was saved before is then intact.
        """
        norms = torch._foreach_norm([*self.network.parameters(), *self.averaged.parameters()])
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
        self._processes.wait_for_everyone()

    def draw(self, title: str) -> None:
        """Draw the losses of the history into ``loss.png``."""
        if self.is_main and self.history:
            draw_history(self.history, self.out / CURVE, title)

    def _epoch(self, bar: Any) -> dict[str, Any]:
        """One pass over the training images, and the held-out loss after it."""
        options, ranks = self.options, self._processes.num_processes
        rank, begun = self._processes.process_index, time.perf_counter()
        images_of = order.Epoch(len(self.train_data), self.batch, options.seed, self.epoch)
        places = list(images_of.batches(rank, ranks))
        losses, rate = [], options.lr
        devices = range(torch.cuda.device_count()) if self.device.type == "cuda" else ()
        with torch.random.fork_rng(devices):
            torch.manual_seed(((options.seed * 1_000_003 + self.epoch) * 1009 + rank) % (1 << 63))
            self._model.train()
            for images, labels, first in self._feed(self.train_data, places, self.epoch):
                rate = options.rate(self.step, self.steps)
                losses.append(self._train_step(images, labels, first, rate))
                self.step += 1
                bar.update(1)
        # Of all processes, in the order of the places; nothing waits for a GPU before.
        mean = self._processes.reduce(torch.stack(losses), "mean").double().cpu()
        if not mean.isfinite().all():
            step = self.step - len(losses) + int((~mean.isfinite()).nonzero()[0])
            raise RuntimeError(f"the loss is not finite at step {step}, epoch {self.epoch}")
        seconds = time.perf_counter() - begun
        return {
            "epoch": self.epoch,
            "steps": self.step,
            "lr": rate,
            "loss": float(mean.mean()),
            "loss_min": float(mean.min()),
            "loss_max": float(mean.max()),
            "test_loss": self._held_out(),
            "images_per_s": round(self._epoch_steps * self.batch / seconds, 2),
        }

    def _train_step(self, images: Tensor, labels: Tensor | None, first: int, rate: float) -> Tensor:
        """One step of the optimizer; the mean loss of this process's images, on the device."""
        options = self.options
        t = order.timesteps(options.seed, first, len(images), self.schedule.T)
        if labels is not None and options.label_dropout:
            lost = order.dropped(options.seed, first, len(images), options.label_dropout)
            labels = torch.where(lost.to(self.device, non_blocking=True), self._null_label, labels)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._model, images, labels, t, first)
        self._scaler.scale(loss).backward()
        if options.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), options.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._average:
            self._average.update(self.step)
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
        """The mean loss of some images, of the noise of their places."""
        options, precision = self.options, _DTYPES.get(self.options.precision)
        autocast = torch.autocast(self.device.type, precision) if precision else nullcontext()
        with autocast:
            return training_losses(
                model,
                images,
                t.to(self.device, non_blocking=True),
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
        """The loss of the averaged network on the held-out images; None without any.

        Timesteps and noise are the same in every epoch.
        """
        if self.test_data is None:
            return None
        options, num = self.options, len(self.test_data)
        ranks, rank = self._processes.num_processes, self._processes.process_index
        share = -(-num // ranks)
        mine = torch.arange(min(rank * share, num), min((rank + 1) * share, num))
        cuts = [(part, int(part[0])) for part in mine.split(options.batch) if len(part)]
        network = self.averaged.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for images, labels, first in self._feed(self.test_data, cuts, 0):
            stream = order.STREAM_HELD_OUT_TIMESTEPS
            t = order.timesteps(options.seed, first, len(images), self.schedule.T, stream)
            loss = self._loss(network, images, labels, t, first, order.STREAM_HELD_OUT)
            total += loss.double() * len(images)
        return float(self._processes.reduce(total, "sum")) / num

    def _state(self) -> dict[str, Any]:
        return {
            "options": self.options.to_dict(),
            "identity": self._identity,
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "network": self.network.state_dict(),
            "average": self._average.module.state_dict() if self._average else None,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def _go_on(self, state: dict[str, Any]) -> None:
        """Take up a run where its state was written."""
        before = {k: v for k, v in state["options"].items() if k not in _FREE}
        now = {k: v for k, v in self.options.to_dict().items() if k not in _FREE}
        changed = differences(state["identity"] | before, self._identity | now)
        if changed:
            raise ValueError(
                f"resume: {self.out} was begun with something else: {'; '.join(changed[:4])}"
                + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
            )
        self.network.load_state_dict(state["network"])
        if self._average:
            self._average.module.load_state_dict(state["average"])
        for group, fresh in zip(
            state["optimizer"]["param_groups"], self._optimizer.param_groups, strict=True
        ):
            group["fused"] = fresh["fused"]  # of this device, not of the one it was saved on
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history = list(state["history"])


def _processes(device: torch.device | str | None) -> Any:
    """The processes of the run, by accelerate. Raises ImportError saying what to install."""
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError as error:
        raise ImportError(
            "training needs the package accelerate: pip install ddpm_fast[train]"
        ) from error
    place = None if device is None else torch.device(device)
    on_cpu = place.type == "cpu" if place is not None else not torch.cuda.is_available()
    # Autocast and compilation are the options', not those of `accelerate config`.
    processes = accelerate.Accelerator(cpu=on_cpu, mixed_precision="no", dynamo_backend="no")
    kind = str(getattr(processes.distributed_type, "value", processes.distributed_type))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ValueError(f"training is for one process, or several on CPUs or GPUs; got {kind}")
    found = processes.device
    if place is not None and (place.type != found.type or place.index not in (None, found.index)):
        raise ValueError(
            f"device must be cpu, or the one that accelerate gives this process, {found}; got"
            f" {place}. Set CUDA_VISIBLE_DEVICES to choose a GPU"
        )
    return processes


def _remove_leftovers(out: Path) -> None:
    """What a process that was killed while it wrote has left."""
    for path in (*out.glob(".ddpm_fast.*.tmp"), *out.glob(f".{CHECKPOINT}.*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _optimizer(network: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    parameters = list(network.parameters())
    return kind(
        parameters,
        options.lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        fused=parameters[0].is_cuda,  # also so that a GradScaler waits for nothing
    )
