"""Small networks and data sets for the tests of training."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cases import same_bits
from ddpm_fast import NoiseSchedule, UNet
from ddpm_fast.training.config import TrainOptions
from ddpm_fast.training.trainer import Trainer

LINEAR = NoiseSchedule.linear()
SHAPE = (1, 8, 8)
TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}


class Squares(Dataset):
    """Images of a black square at a random position on white."""

    num_classes = None
    sample_shape = SHAPE

    def __init__(self, num: int = 96, seed: int = 0, images: Tensor | None = None) -> None:
        if images is None:
            generator = torch.Generator().manual_seed(seed)
            images = torch.ones(num, *SHAPE)
            for image, (y, x) in zip(
                images, torch.randint(0, 5, (num, 2), generator=generator).tolist(), strict=True
            ):
                image[:, y : y + 3, x : x + 3] = -1
        self.images, self.name = images, "squares"
        self.fingerprint = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        return self.images[i]

    def set_epoch(self, epoch: int) -> None:
        pass

    def split(self, test: float, seed: int):
        num = round(len(self) * (1 - test))
        return Squares(images=self.images[:num]), Squares(images=self.images[num:])


class Labelled(Squares):
    """Squares whose label is the first row of the square."""

    num_classes = 5

    def __getitem__(self, i: int):
        image = self.images[i]
        return image, int((image[0] < 0).any(1).nonzero()[0])

    def split(self, test: float, seed: int):
        num = round(len(self) * (1 - test))
        return Labelled(images=self.images[:num]), Labelled(images=self.images[num:])


def network(seed: int = 0, **options) -> UNet:
    torch.manual_seed(seed)
    return UNet(**TINY | options)


def options(**changed) -> TrainOptions:
    """Options of two epochs of three steps, with a constant learning rate."""
    defaults = {"epochs": 2, "batch": 28, "lr": 1e-3, "warmup": 2, "decay": "none", "ema": 0.9}
    return TrainOptions(**defaults | changed)


def losses(trainer) -> list[tuple[float, float, float, float | None]]:
    """Losses of each epoch, with all digits."""
    names = ("loss", "loss_min", "loss_max", "test_loss")
    return [tuple(row[name] for name in names) for row in trainer.history]


def trainer(out, model=None, data=None, schedule=LINEAR, chosen=None, **others) -> Trainer:
    model = model if model is not None else network()
    data = data if data is not None else Squares()
    return Trainer(model, data, schedule, chosen or options(), out, device="cpu", **others)


def run(trainer_: Trainer) -> Trainer:
    for _ in trainer_.run(progress=False):
        pass
    return trainer_


def weights(module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def same_weights(a, b) -> bool:
    return all(map(same_bits, weights(a), weights(b)))
