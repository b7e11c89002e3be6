"""Checkpoints: pipeline folders of diffusers, read and written.

    model_index.json
    unet/config.json, unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json

Files of `unet` and `scheduler` may also be in the folder itself, as in google/ddpm-cifar10-32. The
names of files of weights are in `weights`.
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
    """Contents of a checkpoint.

    Attributes:
        unet: A `UNet` or `ThesisUNet` in eval mode, channels_last.
        schedule: The noise schedule. This and the next five are None, and `steps_offset` 0, for a
            folder with a U-Net only.
        prediction: Output of the network: "epsilon", "x0", "v" or "score".
        variance: "posterior", "beta", "learned" or "learned_range".
        clip: x0 is clipped to [-clip, clip], or thresholded by a `DynamicThreshold`. None: neither.
        spacing: "linspace", "leading" or "trailing".
        steps_offset: Is added to leading timesteps.
        scheduler_config: Contents of scheduler_config.json, with the class in model_index.json.
        sample_shape: Shape (C, H, W) of an image; None if the configuration of the U-Net has no
            sample_size.
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
    """Read a checkpoint from a pipeline folder of diffusers, or from a folder with a U-Net only.

    The configuration names the class of the network: UNet2DModel, read as `UNet`, or `ThesisUNet`.
    A U-Net only (config.json and weights, no model_index.json) has no schedule, unless there is a
    scheduler_config.json in the same folder. safetensors files precede .bin files, of which only
    tensors are unpickled; both may be split into shards.

    Args:
        folder: The folder. A string that is no existing path but can be the name of a repository
            on the Hugging Face Hub, such as "google/ddpm-cifar10-32", is downloaded by
            huggingface_hub, or read from its cache without a connection.
        dtype: float32, float16, bfloat16 or float64, to which weights are cast. None: float32.
        device: Device of the network. None: the CPU.
        variant: Suffix in the names of the files of weights, such as "fp16". None: no suffix.
        revision: Branch, tag or commit of the repository. None: the main branch.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: The folder, repository or variant, one of its files, or huggingface_hub,
            which a repository needs, is missing.
        ValueError: A file is damaged, truncated, of another format, or does not fit the others; or
            an argument is not accepted. The message names the file or the argument.
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
        raise ValueError(f"{folder}: is a file; must be a folder with {INDEX} or {CONFIG}")
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint folder", str(folder))

    index = folder / INDEX
    of_unet, of_scheduler = _read_index(index) if index.exists() else (None, None)
    config_path = _locate(folder, "unet", CONFIG)
    contents = read_json(config_path)
    kind = _kind(contents, config_path, of_unet)
    try:
        config = kind.config.from_dict(contents)
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
    """Return `folder` if it is the name of a repository and no existing path, else None."""
    if isinstance(folder, str) and is_repository_id(folder) and not os.path.lexists(folder):
        if revision is None or (isinstance(revision, str) and revision):
            return folder
        raise ValueError(f"revision must be a branch, tag or commit; got {revision!r}")
    if revision is not None:
        raise ValueError(
            f"revision must be None for a folder, {os.fspath(folder)}; got {revision!r}"
        )
    return None


def _locate(folder: Path, part: str, name: str) -> Path:
    """Return `folder/part/name`, or `folder/name` if there is no folder `part`."""
    path = (folder / part if (folder / part).is_dir() else folder) / name
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "checkpoint file is missing", str(path))
    return path


def _read_index(path: Path) -> tuple[str, str]:
    """Return the classes of the U-Net and the scheduler in model_index.json."""
    index = read_json(path)
    if index.get("_class_name") not in _PIPELINES:
        accepted = " or ".join(_PIPELINES)
        got = repr(index.get("_class_name"))
        raise ValueError(f"{path}: _class_name must be {accepted}; got {got}")
    for part, kinds in (
        ("unet", tuple(kind.name for kind in NETWORK_KINDS)),
        ("scheduler", SCHEDULERS),
    ):
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in kinds:
            raise ValueError(f"{path}: {part} must be a {' or '.join(kinds)}; got {entry!r}")
    return index["unet"][1], index["scheduler"][1]


def _kind(config: Mapping[str, Any], path: Path, named: str | None) -> NetworkKind:
    """Return the class of a network.

    Args:
        config: Its configuration.
        path: File of the configuration.
        named: Class in model_index.json, the default of a configuration without a class name. None
            if there is no such file; the default is then UNet2DModel.
    """
    name = config.get("_class_name", named or UNET.name)
    kind = find_kind(name)
    if kind is None:
        accepted = " or ".join(kind.name for kind in NETWORK_KINDS)
        raise ValueError(f"{path}: _class_name must be {accepted}; got {name!r}")
    if named not in (None, name):
        raise ValueError(f"{path}: _class_name must be {named}, as in {INDEX}; got {name!r}")
    return kind


def _read_scheduler(
    folder: Path, named: str | None
) -> tuple[SchedulerOptions | None, dict[str, Any] | None]:
    """Return options and configuration of the scheduler; `named` is its class in the index."""
    try:
        path = _locate(folder, "scheduler", SCHEDULER)
    except FileNotFoundError:
        if named:
            raise
        return None, None
    config = read_json(path)
    # diffusers uses the class in model_index.json, also if the file has another one.
    held = config.get("_class_name") or named
    if named and held in SCHEDULERS and diffusers_scheduler(held) != diffusers_scheduler(named):
        held = named
    if held is not None:
        config["_class_name"] = held
    try:
        return parse_scheduler(config), config
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
    """Write a checkpoint, which `load` reads.

    from_pretrained of diffusers reads the checkpoint of a `UNet`. That of a `ThesisUNet` has the
    same files, but diffusers has no such network: its pipelines reject the folder, and its
    UNet2DModel ignores the weights with a warning and initialises its own.

    The scheduler is described either by `schedule` and the next four arguments, or by
    `scheduler_config`. With neither, the folder holds the U-Net only.

    All files are written and synced to disk in a folder next to the target, which is then renamed.
    After an error the target is unchanged and nothing else is left. With `overwrite`, an existing
    checkpoint is replaced as a whole: atomically on file systems that can exchange two names
    (several of Linux), and otherwise by two renames, between which the old checkpoint is
    `.<name>.<token>.old`.

    Args:
        folder: The folder.
        unet: A `UNet` or `ThesisUNet`. Weights keep their dtype.
        schedule: The noise schedule.
        prediction: Output of the network: "epsilon", "x0", "v" or "score".
        variance: "posterior", "posterior_log", "beta", "beta_log", "learned" or "learned_range".
        clip: Bound of x0, a `DynamicThreshold` or None.
        spacing: "linspace", "leading" or "trailing".
        scheduler_config: Contents of scheduler_config.json, as in `Checkpoint.scheduler_config`.
        overwrite: Replace an existing checkpoint.
        variant: Suffix in the name of the file of weights, such as "fp16".

    Returns:
        The folder.

    Raises:
        TypeError: `unet` or `schedule` is of another type.
        ValueError: There are both a schedule and a scheduler_config, an option is not accepted, or
            weights are not finite.
        FileExistsError: The folder exists and `overwrite` is False; or it holds files that are not
            part of a checkpoint, or weights of another variant.
        OSError: The folder cannot be written.
    """
    network = network_kind(unet)
    check_variant(variant)
    if schedule is not None:
        if scheduler_config is not None:
            raise ValueError("scheduler_config must be None with a schedule; got both")
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
            # safetensors makes its file readable by the owner only.
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
    """Return True for a file of a checkpoint, except weights of other variants."""
    home = path.parent.as_posix()
    return path.as_posix() in _DOCUMENTS or (
        home in (".", "unet") and is_weights(path.name, variant)
    )


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] + [root]
