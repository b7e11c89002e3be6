"""Share of samples of the shipped model that are triangles, beside its training images.

    python benchmarks/sample_quality.py --num 512 --steps 250 --seed 0 [--peer] [--out FILE]
    python benchmarks/sample_quality.py --num 1024 --solver ddim:50 --solver dpmpp_2m:20 ...

An image counts as a triangle if its foreground (below 0, at least 8 pixels) has an IoU of at least
0.85 with the smallest triangle that encloses the pixel centres of its largest component, the best
of that triangle grown by 0 to 0.75 pixels. Training images fail if the triangle is blank or a
sliver after the reduction. Pixel-aligned rectangles never pass, nor do discs with a radius of 3
pixels or more, or rectangles with a shorter side of 5 pixels or more; smaller shapes have too few
pixels to tell. The KS distance compares foreground areas.

Memorisation: the median L2 distance of the samples to the nearest training image (`nearest`), that
of as many fresh images of the recipe (`nearest_fresh`), and their ratio (`nearest_of_fresh`).
Samples are `novel` if they are not nearer by more than 10%. The measure applies to a model trained
on `make_triangles` of --training and --training-seed. For two sets of fresh images the ratio is 1
with a standard deviation of 0.035 for 512 images and 0.1 for 64.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, stats

from ddpm_fast.bench.results import RESULTS, ROOT, metadata, write_csv
from ddpm_fast.training.data import make_triangles
from quality.enclosing import convex_hull, smallest_triangle
from quality.nearest import NEAREST_COLUMNS, Memorisation

CHECKPOINT = ROOT / "ddpm_fast" / "assets" / "triangles"
BATCH = 64
SOLVERS = ("ddpm", "ddim", "ve_ode", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "plms")
MIN_PIXELS = 8
MIN_IOU = 0.85
MAX_GROWTH = 0.75
SUBSAMPLES = 8

Images = NDArray[np.float32]
Growth = NDArray[np.float64]


def _plane(image: ArrayLike) -> NDArray[np.floating]:
    plane = np.asarray(image)
    if plane.ndim == 3 and plane.shape[0] == 1:
        plane = plane[0]
    if plane.ndim != 2:
        raise ValueError(f"image must have the shape [H, W] or [1, H, W]; got {plane.shape}")
    return plane


def _stack(images: ArrayLike) -> NDArray[np.floating]:
    stack = np.asarray(images)
    if stack.ndim != 4 or stack.shape[1] != 1 or not len(stack):
        raise ValueError(f"images must have the shape [n, 1, H, W] with n >= 1; got {stack.shape}")
    return stack


def foreground_areas(images: ArrayLike) -> NDArray[np.int64]:
    """Count the pixels below 0 in each image: [n, 1, H, W] to int64 [n]."""
    return (_stack(images) < 0).sum((1, 2, 3))


def _half_covered_at(triangle: NDArray[np.float64], height: int, width: int) -> Growth:
    """Return the growth at which each pixel is half inside the triangle.

    The result [3 H, 3 W] has the image [H, W] in its middle, because the triangle may extend beyond
    the
    image: the midpoints of a smallest triangle's sides lie in the image, so it extends by at most
        one
    image. Growing by d moves every side outward by d, so a point is inside once d reaches its
    largest signed distance to the sides, and a pixel once d reaches the median of its 8 x 8 points.
    Pixels that no d in [0, 0.75] decides are -inf or inf.
    """
    edges = np.roll(triangle, -1, 0) - triangle
    outward = np.stack([edges[:, 1], -edges[:, 0]], 1) / np.hypot(*edges.T)[:, None]
    offsets = (outward * triangle).sum(1)
    x, y = np.meshgrid(np.arange(-width, 2 * width), np.arange(-height, 2 * height))
    centres = np.stack([x, y], -1).astype(float)
    growth = (centres @ outward.T - offsets).max(-1)
    reach = np.sqrt(0.5)
    inside, outside = growth < -reach, growth > MAX_GROWTH + reach
    growth[inside], growth[outside] = -np.inf, np.inf
    near = ~(inside | outside)
    steps = (np.arange(SUBSAMPLES) + 0.5) / SUBSAMPLES - 0.5
    within = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    distances = (centres[near][:, None] + within) @ outward.T - offsets
    half = (len(within) - 1) // 2
    growth[near] = np.partition(distances.max(-1), half, axis=1)[:, half]
    return growth


def triangle_iou(image: ArrayLike) -> float:
    """Return the best IoU of an image's foreground with its grown enclosing triangle.

    The triangle is the smallest one that encloses the pixel centres of the largest 8-connected
    component. It is grown by every d from 0 to 0.75 pixels (all sides move outward by d),
    rasterised by half coverage and compared with the whole foreground.

    Args:
        image: [H, W] or [1, H, W], foreground below 0.

    Returns:
        The IoU in [0, 1]; 0 if the foreground has fewer than 8 pixels or its largest component lies
        on a line.

    Raises:
        ValueError: the image has another shape.
    """
    foreground = _plane(image) < 0
    if foreground.sum() < MIN_PIXELS:
        return 0.0
    labels, _ = ndimage.label(foreground, np.ones((3, 3)))
    largest = 1 + np.bincount(labels.ravel())[1:].argmax()
    hull = convex_hull(np.argwhere(labels == largest)[:, ::-1])
    if len(hull) < 3:
        return 0.0
    height, width = foreground.shape
    growth = np.maximum(_half_covered_at(smallest_triangle(hull), height, width), 0)
    wanted = np.pad(foreground, ((height, height), (width, width)))[growth <= MAX_GROWTH]
    # IoU after each pixel as the triangle grows; pixels that enter together count as one.
    entered = growth[growth <= MAX_GROWTH]
    order = entered.argsort()
    entered, shared = entered[order], wanted[order].cumsum()
    inside = np.arange(1, entered.size + 1)
    iou = shared / (inside + foreground.sum() - shared)
    complete = np.append(entered[1:] > entered[:-1], True)
    return float(iou[complete].max(initial=0.0))


def is_triangle(image: ArrayLike) -> bool:
    """Return True if `triangle_iou` of an image is at least 0.85."""
    return triangle_iou(image) >= MIN_IOU


def triangle_share(images: ArrayLike) -> float:
    """Return the share of images [n, 1, H, W] that are triangles; n is at least 1."""
    return float(np.mean([is_triangle(image) for image in _stack(images)]))


def sample_ours(
    folder: Path, num: int, steps: int, seed: int, device: str, solver: str = "ddpm"
) -> Images:
    """Sample by a solver of `StepTable`, with its own spacing of the timesteps."""
    from ddpm_fast import Sampler, StepTable, load

    checkpoint = load(folder)
    options = {"variance": checkpoint.variance} if solver == "ddpm" else {}
    table = getattr(StepTable, solver)(
        checkpoint.schedule,
        steps,
        prediction=checkpoint.prediction,
        clip=checkpoint.clip,
        **options,
    )
    unet = checkpoint.unet.to(device)
    sampler = Sampler(unet, table, checkpoint.sample_shape, micro_batch=BATCH, device=device)
    return sampler.sample(num, seed=seed).cpu().numpy()


def sample_diffusers(folder: Path, num: int, steps: int, seed: int, device: str) -> Images:
    """Sample by diffusers' DDPMPipeline of the folder, in channels_last."""
    import torch
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(folder).to(device)
    pipeline.unet.to(memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(seed)
    batches = []
    for first in range(0, num, BATCH):
        images = pipeline(
            batch_size=min(BATCH, num - first),
            generator=generator,
            num_inference_steps=steps,
            output_type="np",
        ).images
        batches.append(images.transpose(0, 3, 1, 2).astype(np.float32) * 2 - 1)
    return np.concatenate(batches)


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """Sample and measure; return one row for each source, the training images first."""
    from ddpm_fast.utils.files import prepare_folder
    from ddpm_fast.utils.images import save_npy

    about = metadata()
    if options.samples:
        prepare_folder(options.samples)
    model, num, seed, device = options.model, options.num, options.seed, options.device
    training_seed = options.training_seed
    sources = {("training", "", ""): lambda: make_triangles(options.training, training_seed)}
    for solver, steps in [("ddpm", options.steps), *options.solver]:
        sources["ddpm_fast", solver, steps] = partial(
            sample_ours, model, num, steps, seed, device, solver
        )
    if options.peer:
        sources["diffusers", "ddpm", options.steps] = partial(
            sample_diffusers, model, num, options.steps, seed, device
        )
    rows: list[dict[str, object]] = []
    for (source, solver, steps), produce in sources.items():
        start = time.perf_counter()
        name = "-".join(str(part) for part in (source, solver, steps) if part != "")
        stored = options.samples / f"{name}.npy" if options.samples else None
        if stored is not None and stored.is_file():
            images, seconds = np.load(stored), None
        else:
            images = produce()
            seconds = time.perf_counter() - start
            if stored is not None:
                save_npy(images, stored)
        share, areas = triangle_share(images), foreground_areas(images)
        nearness = dict.fromkeys(NEAREST_COLUMNS, "")
        if source == "training":
            training_share, training_areas = share, areas
            memorisation = Memorisation(images, lambda n: make_triangles(n, training_seed + 1))
        else:
            nearness = memorisation.columns(images)
        if (source, solver) == ("ddpm_fast", "ddpm"):
            ancestral_share = share
        rows.append(
            about
            | {
                "device": "cpu" if source == "training" else device,
                "source": source,
                "solver": solver,
                "num": len(images),
                "steps": steps,
                "seed": seed,
                "share": round(share, 4),
                "share_of_training": round(share / training_share, 4),
                "share_of_ancestral": "" if not solver else round(share / ancestral_share, 4),
                "ks_area": round(float(stats.ks_2samp(areas, training_areas).statistic), 4),
                **nearness,
                "seconds": "" if seconds is None else round(seconds, 2),
            }
        )
    return rows


def _solver(text: str) -> tuple[str, int]:
    """Parse `ddim:50`: a solver of `StepTable` and its steps."""
    name, _, steps = text.partition(":")
    if name not in SOLVERS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(SOLVERS)}; got {name!r}")
    return name, _positive(steps or "0")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="a diffusers folder")
    parser.add_argument("--num", type=_positive, default=512, help="samples per sampler")
    parser.add_argument("--steps", type=_positive, default=250)
    parser.add_argument(
        "--solver",
        type=_solver,
        action="append",
        default=[],
        metavar="NAME:STEPS",
        help="another solver beside ancestral sampling; may be given several times",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", type=_positive, default=10_000, help="training images")
    parser.add_argument(
        "--training-seed", type=int, default=0, help="seed of the model's training images"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer", action="store_true", help="also sample with diffusers")
    parser.add_argument(
        "--samples", type=Path, help="folder that stores each source's samples between runs"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "triangle_quality.csv")
    options = parser.parse_args()

    rows = measure(options)
    columns = (
        *("source", "solver", "num", "steps", "share"),
        *("share_of_training", "share_of_ancestral", "ks_area", *NEAREST_COLUMNS, "seconds"),
    )
    print(" ".join(f"{column:>17}" for column in columns))
    for row in rows:
        print(" ".join(f"{row[column]!s:>17}" for column in columns))
    write_csv(options.out, rows)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
