"""Training (Algorithm 1, Ho et al. 2020): one process or several, to be stopped at any point."""

from __future__ import annotations

import shutil
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
from ddpm_fast.training import data_order as order
from ddpm_fast.training.config import TrainOptions
from ddpm_fast.training.ema import Average
from ddpm_fast.training.fit import check_fit, identity, parts
from ddpm_fast.training.history import draw_history, write_history
from ddpm_fast.training.loader import Feed
from ddpm_fast.training.losses import training_losses
from ddpm_fast.training.metrics import Tally
from ddpm_fast.training.processes import processes
from ddpm_fast.training.run_state import differences, read_state, write_state
from ddpm_fast.utils import checks
from ddpm_fast.utils.files import prepare_folder

STATE, HISTORY, CHECKPOINT, CURVE = "state.pt", "history.csv", "checkpoint", "loss.png"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# What may change between a run and the one that goes on with it.
_FREE = ("epochs", "compile")


class Trainer:
    """Trains a network on images, into a folder.

    network: a `UNet` or `ThesisUNet`; trained in place, moved to the device, channels-last. data: a
    map-style data set of images, float32 [C, H, W] in [-1, 1], or (image, label), with a
    ``fingerprint`` (`ddpm_fast.training.data.ImageData`). out: gets ``state.pt``, ``history.csv``
    and its picture ``loss.png``, ``checkpoint`` (the averaged weights, in the layout of
    `ddpm_fast.save`).

    Order, timesteps, noise and dropped labels are functions of the seed and of an image's place in
    the run (`order`), so that a run that was killed and goes on has the losses of one that was not,
    and several processes, started by ``accelerate launch`` or ``torchrun``, those of one. A dropout
    in the network is drawn by step and process.

    resume: go on from ``state.pt``. save_every: epochs between savings; the last one saves.
    save_steps: also save after every so many steps, for epochs of hours; None for never.

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
        self._processes = processes(device)
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
        self._parameters = list(network.parameters())
        self._average = Average(network, options.ema) if options.ema else None
        self._model = self._processes.prepare_model(self.network)
        if options.compile:
            self._model = torch.compile(self._model)
        self._optimizer = _optimizer(self._parameters, options)
        self._scaler = torch.amp.GradScaler(
            self.device.type, enabled=options.precision == "float16"
        )
        self.batch, self._epoch_steps = order.cut(
            len(self.train_data), options.batch, self._processes.num_processes
        )
        self._feed = Feed(self.device, workers)
        self.epoch, self.step = 0, 0
        self.history: list[dict[str, Any]] = []
        self._tally = Tally(self._processes, 0, 0)
        self._in_step = False
        self._null_label = (network.config.num_classes or 0) - 1
        self._identity = identity(network, data, schedule)
        if resume:
            self._go_on(read_state(self.out / STATE))
        elif found := [n for n in (STATE, HISTORY, CHECKPOINT) if (self.out / n).exists()]:
            raise FileExistsError(
                f"{self.out}: holds a run ({found[0]}); resume it, or take another folder"
            )
        self._processes.wait_for_everyone()  # all have looked before one writes
        if self.is_main:
            prepare_folder(self.out)
            _clear_up(self.out)

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

    @property
    def between_epochs(self) -> bool:
        """Whether the last step was the last of epoch ``epoch - 1``, or none was made yet."""
        return self.step == self.epoch * self._epoch_steps

    def run(self, progress: bool = True) -> Iterator[dict[str, Any]]:
        """Train to the last epoch; yields the row of the history after each.

        Raises RuntimeError where a loss is not finite; what was saved before stays. After an
        interrupt it may be called again, unless that came within a step: then it raises, and
        another `Trainer` goes on with ``resume=True``.
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
                # At once, so that an interrupt finds all of it or nothing.
                self.history, self._tally, self.epoch = (
                    [*self.history, row],
                    Tally(self._processes, self.epoch + 1, self.step),
                    self.epoch + 1,
                )
                at_epoch = self.epoch % self.save_every == 0 or self.epoch == self.options.epochs
                if at_epoch or self._saves_at_step():
                    self.save()
                yield row

    def save(self) -> None:
        """Write the state, the history and the checkpoint; by the main process, for all.

        Raises OSError with the path and the reason, and RuntimeError where a loss or a weight is
        not finite, or a step was interrupted; what was saved before is then intact.
        """
        if self._in_step:
            raise RuntimeError(
                f"step {self.step} was interrupted: go on from {self.out / STATE} with resume=True"
            )
        self._tally.read()
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
        self._processes.wait_for_everyone()

    def draw(self, title: str) -> None:
        """Draw the losses of the history into ``loss.png``."""
        if self.is_main and self.history:
            draw_history(self.history, self.out / CURVE, title)

    def _epoch(self, bar: Any) -> dict[str, Any]:
        """The rest of a pass over the training images, and the held-out loss after it."""
        options, ranks = self.options, self._processes.num_processes
        rank, first_step = self._processes.process_index, self.epoch * self._epoch_steps
        images_of = order.Epoch(len(self.train_data), self.batch, options.seed, self.epoch)
        places = list(images_of.batches(rank, ranks))[self.step - first_step :]
        t, lost = self._draws(images_of.first, self._epoch_steps * self.batch)
        with self._own_generator():
            self._model.train()
            self._tally.start()
            fed = self._feed(self.train_data, places, self.epoch)
            for _ in places:
                # Before the images are fetched, which may draw from it too.
                torch.manual_seed(order.torch_seed(options.seed, self.step, rank))
                images, labels, first = next(fed)
                begin = first - images_of.first
                own = slice(begin, begin + len(images))
                if labels is not None and lost is not None:
                    labels = torch.where(lost[own], self._null_label, labels)
                self._in_step = True
                self._tally.add(self._train_step(images, labels, t[own], first))
                self.step += 1
                self._in_step = False
                bar.update(1)
                if self._saves_at_step() and self.step % self._epoch_steps:
                    self.save()
                    self._tally.start()
        self._tally.read()
        found = self._tally.row(len(self._tally.losses) * self.batch)
        return {
            "epoch": self.epoch,
            "steps": self.step,
            "lr": options.rate(self.step - 1, self.steps),
            **found,
            "test_loss": self._held_out(),
        }

    def _own_generator(self) -> AbstractContextManager[None]:
        """Torch's generators for the trainer; the caller's are as they were after it."""
        devices = range(torch.cuda.device_count()) if self.device.type == "cuda" else ()
        return torch.random.fork_rng(devices)

    def _draws(self, first: int, num: int) -> tuple[Tensor, Tensor | None]:
        """Timesteps, and which labels are lost, of the places from ``first`` on, on the device."""
        options = self.options
        t = order.timesteps(options.seed, first, num, self.schedule.T).to(self.device)
        if not options.label_dropout:
            return t, None
        return t, order.dropped(options.seed, first, num, options.label_dropout).to(self.device)

    def _saves_at_step(self) -> bool:
        return self.save_steps is not None and self.step % self.save_steps == 0

    def _train_step(self, images: Tensor, labels: Tensor | None, t: Tensor, first: int) -> Tensor:
        """One step of the optimizer; the mean loss of this process's images, on the device."""
        rate = self.options.rate(self.step, self.steps)
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
        stream = order.STREAM_HELD_OUT_TIMESTEPS
        t = order.timesteps(options.seed, 0, num, self.schedule.T, stream).to(self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._own_generator():
            torch.manual_seed(order.torch_seed(options.seed, 0, rank))
            for images, labels, first in self._feed(self.test_data, cuts, 0):
                own = t[first : first + len(images)]
                loss = self._loss(network, images, labels, own, first, order.STREAM_HELD_OUT)
                total += loss.double() * len(images)
        return float(self._processes.reduce(total, "sum")) / num

    def _state(self) -> dict[str, Any]:
        return {
            "options": self.options.to_dict(),
            "identity": self._identity,
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "losses": self._tally.losses,
            "seconds": self._tally.seconds,
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
        self._tally = Tally(
            self._processes,
            self.epoch,
            self.epoch * self._epoch_steps,
            state["losses"],
            state["seconds"],
        )


def _clear_up(out: Path) -> None:
    """Remove what a process that was killed while it wrote has left."""
    if not (out / CHECKPOINT).exists():
        # Killed between two renames, where the file system has no exchange of names.
        for path in sorted(out.glob(f".{CHECKPOINT}.*.old"))[:1]:
            path.rename(out / CHECKPOINT)
    unfinished = (".ddpm_fast.*.tmp", "samples/.ddpm_fast.*.tmp", f".{CHECKPOINT}.*")
    for path in (path for names in unfinished for path in out.glob(names)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _optimizer(parameters: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    return kind(
        parameters,
        options.lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        fused=parameters[0].is_cuda,  # also so that a GradScaler waits for nothing
    )
