"""ImageData: items, flips, workers, splits and fingerprints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ddpm_fast.training.data import ImageData

COUNT = 24


def ramps(count: int = COUNT) -> Tensor:
    """Images that rise from left to right, with the index in the second channel."""
    images = torch.linspace(-1, 1, 4).expand(count, 2, 3, 4).clone()
    images[:, 1, 0, :] = torch.arange(count)[:, None] / 100
    return images


def data(**options: object) -> ImageData:
    return ImageData(ramps(), **{"name": "ramps"} | options)


def flipped(images: ImageData) -> list[bool]:
    return [bool(images[i][0, 0, 0] > 0) for i in range(len(images))]


def test_items_are_the_images() -> None:
    images = data()
    assert len(images) == COUNT
    assert images.sample_shape == (2, 3, 4)
    assert images.num_classes is None
    assert images.class_names is None
    for i, image in enumerate(images):
        assert torch.equal(image, ramps()[i])
    assert torch.equal(images[-1], ramps()[-1])
    with pytest.raises(IndexError):
        images[COUNT]


def test_items_have_labels_where_there_are_classes() -> None:
    labels = np.arange(COUNT) % 3
    images = data(labels=labels, class_names=["a", "b", "c"])
    assert images.num_classes == 3
    image, label = images[5]
    assert torch.equal(image, ramps()[5])
    assert label == 2
    assert type(label) is int
    batch, numbers = next(iter(DataLoader(images, batch_size=4)))
    assert batch.shape == (4, 2, 3, 4)
    assert numbers.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_equals_its_items(flip: bool) -> None:
    """From memory and from a source, of all and of a part, in any order, with repetition."""

    class Source:
        sample_shape = (2, 3, 4)

        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, index: int) -> Tensor:
            return ramps()[index]

        def digest(self) -> str:
            return "0"

    labels, names = np.arange(COUNT) % 3, ["a", "b", "c"]
    for source in (ramps(), Source()):
        whole = ImageData(source, name="ramps", labels=labels, class_names=names, flip=flip, seed=2)
        whole.set_epoch(3)
        for images in (whole, whole.split(0.25, 1)[0]):
            indices = [5, 0, len(images) - 1, 5, 7, 3]
            batch, numbers = images.batch(indices)
            assert torch.equal(batch, torch.stack([images[i][0] for i in indices]))
            assert numbers.tolist() == [images[i][1] for i in indices]
            assert numbers.dtype == torch.int64
            before = images[5][0].clone()
            batch.fill_(0)
            assert torch.equal(images[5][0], before)
        plain = ImageData(source, name="ramps", flip=flip)
        assert torch.equal(plain.batch([1, 2]), torch.stack([plain[1], plain[2]]))
        with pytest.raises(IndexError):
            plain.batch([COUNT])


def test_flips_depend_only_on_seed_epoch_and_image() -> None:
    images = data(flip=True, seed=3)
    first = flipped(images)
    assert 4 < sum(first) < COUNT - 4
    for i, mirrored in enumerate(first):
        expected = ramps()[i].flip(-1) if mirrored else ramps()[i]
        assert torch.equal(images[i], expected)
    images.set_epoch(1)
    second = flipped(images)
    assert second != first
    images.set_epoch(0)
    assert flipped(images) == first
    assert flipped(data(flip=True, seed=4)) != first
    resumed = data(flip=True, seed=3)
    resumed.set_epoch(1)
    assert [resumed[i][0, 0, 0] > 0 for i in reversed(range(COUNT))] == second[::-1]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_give_the_same_images_and_follow_the_epoch(context: str) -> None:
    images = data(flip=True)
    loader = DataLoader(
        images,
        batch_size=5,
        num_workers=2,
        multiprocessing_context=context,
        persistent_workers=True,
    )
    seen = []
    for epoch in (0, 1):
        images.set_epoch(epoch)
        seen.append(torch.cat(list(loader)))
        assert torch.equal(seen[-1], torch.stack([images[i] for i in range(COUNT)]))
    assert not torch.equal(*seen)


def test_parts_are_disjoint_and_test_images_are_not_flipped() -> None:
    whole = data(flip=True, seed=3)
    train, test = whole.split(0.25, seed=1)
    assert (len(train), len(test)) == (18, 6)
    numbers = [
        round(100 * part[i][1, 0, 0].item()) for part in (train, test) for i in range(len(part))
    ]
    assert sorted(numbers) == list(range(COUNT))
    assert numbers[:18] == sorted(numbers[:18])
    flips = flipped(whole)
    assert flipped(train) == [flips[number] for number in numbers[:18]]
    assert not any(flipped(test))
    other = whole.split(0.25, seed=2)[1]
    assert other.fingerprint != test.fingerprint
    train.set_epoch(7)
    assert (whole.epoch, test.epoch, train.epoch) == (0, 0, 7)


def test_split_keeps_labels_with_their_images() -> None:
    whole = data(labels=range(COUNT), class_names=[str(i) for i in range(COUNT)])
    for part in whole.split(0.5)[0].split(0.5):
        assert all(round(100 * image[1, 0, 0].item()) == label for image, label in part)
        assert part.num_classes == COUNT


def test_fingerprints_of_different_data_differ() -> None:
    changed = ramps()
    changed[3, 0, 0, 0] = -0.5
    names, labels = ["a", "b"], [0, 1] * (COUNT // 2)
    variants = [
        data(),
        data(name="other"),
        data(parameters={"size": 4}),
        data(flip=True),
        data(flip=True, seed=1),
        data(labels=labels, class_names=names),
        data(labels=labels[::-1], class_names=names),
        data(labels=labels, class_names=["a", "c"]),
        ImageData(changed, name="ramps"),
        ImageData(ramps().flip(0), name="ramps"),
        ImageData(ramps().reshape(COUNT, 2, 4, 3), name="ramps"),
        *data().split(0.5),
        data().split(0.5, seed=1)[0],
    ]
    fingerprints = [images.fingerprint for images in variants]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(digest) == 64 for digest in fingerprints)


def test_fingerprint_is_stable() -> None:
    images = data(flip=True)
    digest = images.fingerprint
    images.set_epoch(5)
    assert images.fingerprint == digest
    # Without flips the seed has no effect.
    assert data(seed=1).fingerprint == data().fingerprint
    assert digest == "edb988f859d7a7642af9b8e14e95e50bae7ddec89b6524f938ec64a32aee21ab"


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        pytest.param(ramps() * 1.5, {}, ValueError, r"\[-1, 1\]; got -1.5 to 1.5", id="range"),
        pytest.param(ramps() * torch.nan, {}, ValueError, r"\[-1, 1\]", id="nan"),
        pytest.param(ramps().double(), {}, TypeError, "images must be float32", id="dtype"),
        pytest.param(ramps()[0], {}, ValueError, r"\[N, C, H, W\]", id="dimensions"),
        pytest.param(ramps(0), {}, ValueError, "not empty", id="empty"),
        pytest.param(ramps(), {"labels": [0]}, ValueError, "both be None", id="no-class-names"),
        pytest.param(ramps(), {"labels": [0], "class_names": ["a"]}, ValueError,
                     r"each of 24 images; got shape \[1\]", id="few-labels"),
        pytest.param(ramps(2), {"labels": [0, 1], "class_names": ["a"]}, ValueError,
                     r"labels must be an integer in \[0, 0\]; got 1", id="label-beyond"),
        pytest.param(ramps(), {"flip": 1}, TypeError, "flip must be a bool", id="flip"),
        pytest.param(ramps(), {"seed": -1}, ValueError, "seed must", id="seed"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_named(
    images: Tensor, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ImageData(images, **{"name": "ramps"} | options)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        pytest.param(0.0, r"in \(0, 1\)", id="zero"),
        pytest.param(1.0, r"in \(0, 1\)", id="one"),
        pytest.param(0.01, "got 0.01, which is 0 of 24", id="empty-test"),
        pytest.param(0.99, "got 0.99, which is 24 of 24", id="empty-train"),
    ],
)
def test_an_empty_part_is_rejected(test: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data().split(test)


def test_a_negative_epoch_is_rejected() -> None:
    with pytest.raises(ValueError, match="epoch must be an integer in"):
        data().set_epoch(-1)
