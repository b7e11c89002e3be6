"""Cache of kernel choices, kept on disk between runs.

There is one JSON file for each environment (device, versions, threads), in $DDPM_FAST_CACHE,
otherwise in $XDG_CACHE_HOME/ddpm_fast or ~/.cache/ddpm_fast. DDPM_FAST_CACHE=off keeps nothing.
Errors of the folder or a file are logged once (logger `ddpm_fast`, WARNING) and then ignored:
choices are made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.utils.files import atomic_write, cache_dir

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock, the last writer wins
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("ddpm_fast")

_PACKAGES = ("ddpm_fast", "triton", "nvidia-cudnn-frontend")


@dataclass(frozen=True)
class TunerChoice:
    """Choice for one operation.

    Attributes:
        name: the chosen candidate.
        seconds: seconds of one call, for each candidate that was timed.
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)


def environment(device: torch.device) -> dict[str, str]:
    """Return what a choice depends on besides the operation: the device and the versions."""
    found = {
        "torch": torch.__version__,
        **{package: package_version(package) or "none" for package in _PACKAGES},
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {
            "device": torch.cuda.get_device_name(device),
            "capability": f"{major}.{minor}",
            "cudnn": str(torch.backends.cudnn.version()),
        }
    else:
        found |= {
            "device": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
        }
    return found


def package_version(package: str) -> str:
    """Return the version of an installed package; empty without one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


class PlanCache:
    """Choices of one environment.

    The file is read at the first use.

    Args:
        environment: what the choices are valid for, from `environment`.
        folder: folder of the file; None keeps choices in memory alone.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path | None) -> None:
        self.environment = dict(environment)
        self.folder = folder
        text = json.dumps(self.environment, sort_keys=True)
        self._file_name = f"plans-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
        self._choices: dict[str, TunerChoice] | None = None
        self._warned = False

    @classmethod
    def of_device(cls, device: torch.device) -> PlanCache:
        """Return the cache of a device in the default folder."""
        return cls(environment(device), cache_dir())

    @property
    def path(self) -> Path | None:
        """File of this environment; None without a folder."""
        return None if self.folder is None else self.folder / self._file_name

    def get(self, key: str) -> TunerChoice | None:
        """Return the recorded choice of a key."""
        if self._choices is None:
            self._choices = self._read()
        return self._choices.get(key)

    def record(self, key: str, choice: TunerChoice, accepted: Collection[str]) -> TunerChoice:
        """Record a choice and return the valid one.

        If another process has recorded a choice for the key in the meantime, and its name is in
        `accepted`, that one is returned: concurrent processes agree on a plan.

        Args:
            key: the operation.
            choice: the new choice.
            accepted: names of the candidates.
        """
        if self._choices is None:
            self._choices = self._read()
        standing = choice
        if self.path is not None:
            try:
                with self._locked():
                    others = self._read()
                    recorded = others.get(key)
                    if recorded is not None and recorded.name in accepted:
                        standing = recorded
                    self._choices = {**self._choices, **others, key: standing}
                    self._write(self._choices)
            except OSError as error:
                self._warn_once(f"cannot write {self.path}: {error}; choices are not kept")
        self._choices[key] = standing
        return standing

    def _read(self) -> dict[str, TunerChoice]:
        if self.path is None:
            return {}
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            self._warn_once(f"cannot read {self.path}: {error}; choices are made again")
            return {}
        try:
            return self._parse(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._warn_once(f"{self.path} is damaged: {error!r}; choices are made again")
            return {}

    def _parse(self, content: Any) -> dict[str, TunerChoice]:
        if content["environment"] != self.environment:
            raise ValueError("it belongs to another environment")
        found = {}
        for key, entry in content["choices"].items():
            if not isinstance(entry["name"], str):
                raise TypeError(f"name of {key!r} must be a string; got {entry['name']!r}")
            seconds = {str(name): float(value) for name, value in entry["seconds"].items()}
            found[key] = TunerChoice(entry["name"], seconds)
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude other writers of the file."""
        path = self.path
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield  # closing the file releases the lock

    def _write(self, choices: Mapping[str, TunerChoice]) -> None:
        """Replace the file atomically."""
        path = self.path
        assert path is not None
        content = {
            "environment": self.environment,
            "choices": {key: asdict(choice) for key, choice in sorted(choices.items())},
        }
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=1).encode())

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("plan cache: %s", message)
