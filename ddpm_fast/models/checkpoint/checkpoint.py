"""Checkpoints on disk: a diffusers pipeline folder, read and written.

    model_index.json
    unet/config.json, unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json

Files of `unet` and `scheduler` may also lie in the folder itself, as in google/ddpm-cifar10-32.
Weights go by the names in `weight_files`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip
from ddpm_fast.models.checkpoint.hub import fetch, fetch_weights, is_repository_id
from ddpm_fast.models.checkpoint.scheduler_config import (
    SCHEDULERS,
    SchedulerOptions,
    diffusers_scheduler,
    make_scheduler_config,
    parse_scheduler,
)
from ddpm_fast.models.checkpoint.weights import (
    check_variant,
    find_weights,
    is_weights,
    read_weights,
    single_name,
    write_weights,
)
from ddpm_fast.models.registry import (
    NETWORK_KINDS,
    UNET,
    AnyUNet,
    NetworkKind,
    find_kind,
    network_kind,
)
from ddpm_fast.utils.files import fsync_path, read_json, replace_directory, write_json

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"

_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DOCUMENTS = {INDEX, CONFIG, SCHEDULER, f"unet/{CONFIG}", f"scheduler/{SCHEDULER}"}


@dataclass(frozen=True)
class Checkpoint:
    """A model as `load` finds it on disk.

    unet: a `UNet`, or a `ThesisUNet`, in eval mode, channels_last.
    schedule, prediction, variance, clip, spacing, steps_offset: see
        `SchedulerOptions`; None (0) for a folder that holds a U-Net alone.
    scheduler_config: scheduler_config.json as read, with the class that model_index.json names;
        None for a U-Net alone.
    sample_shape: (C, H, W) of an image; None where the U-Net's config has no sample_size.
    """

    unet: AnyUNet
    schedule: NoiseSchedule | None
    prediction: str | None
    variance: str | None
    clip: Clip
    spacing: str | None
    steps_offset: int
    scheduler_config: dict[str, Any] | None
    sample_shape: tuple[int, int, int] | None


def load(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    variant: str | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """Read a checkpoint from a diffusers pipeline folder, or from a folder with a U-Net alone.

    Its config says which U-Net it is: a UNet2DModel, read as `UNet`, or a `ThesisUNet`.

    A string that is no path here but could be a repository of the Hugging Face Hub, such as
    "google/ddpm-cifar10-32", is read from there by huggingface_hub: the configs, then the weights
    that are asked for, and from its cache where the Hub is out of reach. `revision` is a branch,
    tag or commit of it.

    A U-Net alone (config.json and weights, no model_index.json) comes without a schedule, unless
    scheduler_config.json lies beside it. `dtype` is float32 (the default), float16, bfloat16 or
    float64, and `device` the CPU by default. `variant` picks weights by the name they were saved
    under, such as "fp16"; they are cast to `dtype` as all are. safetensors come before .bin
    files, of which nothing but tensors is unpickled; either may be split into shards.

    Raises:
        FileNotFoundError: the folder or repository or one of its files is missing, or the variant
            is not there, or huggingface_hub, which a repository needs.
        ValueError: a file is corrupt, truncated, of another kind, or does not fit the others, or
            an argument is none that is accepted; the message names the file or the argument, and
            what is wrong.
    """
    check_variant(variant)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}; got {dtype}")
    try:
        device = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device; got {device!r}") from error
    repository = _repository(folder, revision)
    folder = fetch(repository, revision, _DOCUMENTS) if repository else Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; expected a folder with {INDEX} or {CONFIG}")
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint folder", str(folder))

    index = folder / INDEX
    of_unet, of_scheduler = _read_index(index) if index.exists() else (None, None)
    config_path = _locate(folder, "unet", CONFIG)
    raw = read_json(config_path)
    kind = _kind(raw, config_path, of_unet)
    try:
        config = kind.config.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from error

    options, scheduler = _read_scheduler(folder, of_scheduler)
    home = config_path.parent
    if repository:
        fetch_weights(repository, folder, home.relative_to(folder).as_posix(), variant)
    weights = find_weights(home, variant)
    with torch.device("meta"):
        unet = kind.build(config).to(dtype or torch.float32).eval()
    read_weights(unet, weights, device)
    return Checkpoint(
        unet=unet,
        schedule=options.schedule if options else None,
        prediction=options.prediction if options else None,
        variance=options.variance if options else None,
        clip=options.clip if options else None,
        spacing=options.spacing if options else None,
        steps_offset=options.steps_offset if options else 0,
        scheduler_config=scheduler,
        sample_shape=config.sample_shape,
    )


def _repository(folder: str | os.PathLike[str], revision: str | None) -> str | None:
    """`folder` where it is the name of a repository rather than a path."""
    if isinstance(folder, str) and is_repository_id(folder) and not os.path.lexists(folder):
        if revision is None or (isinstance(revision, str) and revision):
            return folder
        raise ValueError(f"revision must be a branch, tag or commit; got {revision!r}")
    if revision is not None:
        reason = f"{os.fspath(folder)} is a folder, which has none"
        raise ValueError(
            f"revision must be None but for a repository of the Hub; got {revision!r}; {reason}"
        )
    return None


def _locate(folder: Path, part: str, name: str) -> Path:
    """`folder/part/name`, or `folder/name` where there is no folder `part`."""
    path = (folder / part if (folder / part).is_dir() else folder) / name
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "checkpoint file is missing", str(path))
    return path


def _read_index(path: Path) -> tuple[str, str]:
    """The U-Net and the scheduler that model_index.json names, after a check of all it names."""
    index = read_json(path)
    if index.get("_class_name") not in _PIPELINES:
        accepted = " or ".join(_PIPELINES)
        raise ValueError(f"{path}: expected a {accepted}, found {index.get('_class_name')!r}")
    for part, kinds in (
        ("unet", tuple(kind.name for kind in NETWORK_KINDS)),
        ("scheduler", SCHEDULERS),
    ):
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in kinds:
            raise ValueError(f"{path}: {part} is {entry!r}, expected {' or '.join(kinds)}")
    return index["unet"][1], index["scheduler"][1]


def _kind(config: Mapping[str, Any], path: Path, named: str | None) -> NetworkKind:
    """The class of a U-Net's config; `named` is what model_index.json calls it, where there is one.

    A config that does not say is what the index names, or a UNet2DModel.
    """
    name = config.get("_class_name", named or UNET.name)
    kind = find_kind(name)
    if kind is None:
        accepted = " or ".join(kind.name for kind in NETWORK_KINDS)
        raise ValueError(f"{path}: expected a {accepted}, found {name!r}")
    if named not in (None, name):
        raise ValueError(f"{path}: is the config of a {name}; {INDEX} names a {named}")
    return kind


def _read_scheduler(
    folder: Path, named: str | None
) -> tuple[SchedulerOptions | None, dict[str, Any] | None]:
    """The scheduler's config; `named` is its class where there is a model_index.json."""
    try:
        path = _locate(folder, "scheduler", SCHEDULER)
    except FileNotFoundError:
        if named:
            raise
        return None, None
    raw = read_json(path)
    # diffusers reads the file with the class that the index names, whichever the file names.
    held = raw.get("_class_name", named)
    if named and held in SCHEDULERS and diffusers_scheduler(held) != diffusers_scheduler(named):
        held = named
    if held is not None:
        raw["_class_name"] = held
    try:
        return parse_scheduler(raw), raw
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save(
    folder: str | os.PathLike[str],
    unet: AnyUNet,
    schedule: NoiseSchedule | None = None,
    *,
    prediction: str = "epsilon",
    variance: str = "posterior",
    clip: Clip = 1.0,
    spacing: str = "leading",
    scheduler_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    variant: str | None = None,
) -> Path:
    """Write a checkpoint that `load` reads; returns the folder.

    With a `UNet` it is one for diffusers' from_pretrained as well. A `ThesisUNet`'s has the same
    files, but diffusers has no such network: its pipelines refuse the folder, and its UNet2DModel
    would leave these weights aside, with a warning, for random ones.

    The scheduler is described either by `schedule` and the four options after it, or by
    `scheduler_config` verbatim (what `Checkpoint.scheduler_config` holds). With neither, the
    folder holds the U-Net alone, a `UNet` for diffusers' UNet2DModel.from_pretrained.
    Weights keep their dtype. With `variant`, such as "fp16", they are found under that name alone.

    All is written and flushed to a folder beside the target, which then takes its name; after an
    error the target is as it was and nothing else is left. With `overwrite` an existing
    checkpoint is replaced as a whole; where the file system can exchange two names (Linux has
    several) it is there at every moment, the old or the new, and elsewhere is
    ``.<name>.<token>.old`` between two renames.

    Raises:
        TypeError: `unet` or `schedule` is something else.
        ValueError: both ways of describing the scheduler at once, an option that is not accepted,
            or weights that are not finite.
        FileExistsError: the folder exists and `overwrite` is False, or it holds files that are
            not part of a checkpoint, or weights of another variant, which would be lost.
        OSError: the folder cannot be written; the message has the path and the reason.
    """
    network = network_kind(unet)
    check_variant(variant)
    if schedule is not None:
        if scheduler_config is not None:
            raise ValueError("scheduler_config: give either it or schedule, not both")
        scheduler_config = make_scheduler_config(
            schedule, prediction=prediction, variance=variance, clip=clip, spacing=spacing
        )
    documents: dict[str, Mapping[str, Any]] = {
        CONFIG: {"_class_name": network.name, **unet.config.to_dict()}
    }
    weights = single_name(variant)
    if scheduler_config is not None:
        scheduler = {"_class_name": "DDPMScheduler", **scheduler_config}
        parse_scheduler(scheduler)
        kind = diffusers_scheduler(scheduler["_class_name"])
        pipeline = kind.replace("Scheduler", "Pipeline")
        weights = f"unet/{weights}"
        documents = {
            f"unet/{CONFIG}": documents[CONFIG],
            f"scheduler/{SCHEDULER}": scheduler,
            INDEX: {
                "_class_name": pipeline if pipeline in _PIPELINES else "DDPMPipeline",
                "scheduler": ["diffusers", kind],
                "unet": [network.library, network.name],
            },
        }

    target = Path(folder).resolve()
    _check_target(target, variant, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(4)
        temporary = target.with_name(f".{target.name}.{token}.tmp")
        temporary.mkdir()
        try:
            for name, document in documents.items():
                write_json(temporary / name, document)
            write_weights(unet, temporary / weights)
            # The safetensors library makes its file readable by the owner alone.
            mode = (temporary / weights).with_name(CONFIG).stat().st_mode
            (temporary / weights).chmod(mode & 0o777)
            for path in (temporary / weights, *_folders(temporary)):
                fsync_path(path)
            replace_directory(temporary, target, target.with_name(f".{target.name}.{token}.old"))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        reason = f"checkpoint cannot be saved: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, reason, str(target)) from error
    return Path(folder)


def _check_target(target: Path, variant: str | None, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        reason = "checkpoint folder exists; pass overwrite=True to replace it"
        raise FileExistsError(errno.EEXIST, reason, str(target))
    if not target.is_dir():
        raise FileExistsError(errno.EEXIST, "a file has the checkpoint's name", str(target))
    held = (path.relative_to(target) for path in target.rglob("*") if not path.is_dir())
    if others := sorted(str(path) for path in held if not _is_own(path, variant)):
        reason = f"folder holds files that are not part of a checkpoint ({', '.join(others[:3])})"
        raise FileExistsError(errno.EEXIST, reason, str(target))


def _is_own(path: Path, variant: str | None) -> bool:
    """Whether a file in a checkpoint's folder is part of it, weights of other variants not."""
    home = path.parent.as_posix()
    return path.as_posix() in _DOCUMENTS or (
        home in (".", "unet") and is_weights(path.name, variant)
    )


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] + [root]
