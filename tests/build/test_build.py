"""The decisions of setup.py, its checks, and an installation by pip."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
REPORT_INSTALLATION = """
import ddpm_fast, json, pathlib
from ddpm_fast import _C
from ddpm_fast.ops.registry import NOT_LOADED
ddpm_fast.load(pathlib.Path(ddpm_fast.__file__).parent / "assets/triangles")
print(json.dumps([ddpm_fast.__file__, NOT_LOADED, _C.build_info()["cuda_architectures"]]))
"""


@pytest.fixture
def build(monkeypatch):
    """Return setup.py as a module, without building anything."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("DDPM_FAST_CUDA", "0")
    monkeypatch.delenv("DDPM_FAST_CUDA_ARCHS", raising=False)
    spec = importlib.util.spec_from_file_location("ddpm_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        pytest.param(["90a"], ["-gencode=arch=compute_90a,code=sm_90a"], id="specific"),
        pytest.param(
            ["80", "90a+PTX"],
            [
                "-gencode=arch=compute_80,code=sm_80",
                "-gencode=arch=compute_90a,code=sm_90a",
                "-gencode=arch=compute_90,code=compute_90",
            ],
            id="ptx-without-the-a",
        ),
    ],
)
def test_architectures_become_flags(build, names, flags):
    assert build.gencode(names) == flags


def test_architectures_come_from_the_environment(build, monkeypatch):
    assert build.architectures() == ["80", "86", "89", "90a+PTX"]
    monkeypatch.setenv("DDPM_FAST_CUDA_ARCHS", "80, 89+PTX")
    assert build.architectures() == ["80", "89+PTX"]
    monkeypatch.setenv("DDPM_FAST_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match=r"must be names such as 80, 90a or 89\+PTX; got 'hopper'"):
        build.architectures()


def toolkit(folder, release):
    """Return a folder that looks like a CUDA toolkit of a release."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("torch_cuda", "release", "reason"),
    [
        pytest.param("13.0", "13.1", "", id="same-major"),
        pytest.param("12.8", "13.0", "needs CUDA 12", id="other-major"),
        pytest.param(None, "13.0", "build without CUDA", id="torch-without-cuda"),
    ],
)
def test_toolkit_decides_about_cuda(build, monkeypatch, tmp_path, torch_cuda, release, reason):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, release)))
    home, why = build.cuda_or_reason()
    assert home == (None if reason else tmp_path)
    assert reason in why
    monkeypatch.setenv("DDPM_FAST_CUDA", "1")
    if reason:
        with pytest.raises(SystemExit, match="DDPM_FAST_CUDA=1, but"):
            build.decide_cuda()
    else:
        assert build.decide_cuda() == tmp_path
    monkeypatch.setenv("DDPM_FAST_CUDA", "auto")
    assert build.decide_cuda() == home


def test_unknown_ddpm_fast_cuda_is_rejected(build, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1; got 'yes'"):
        build.decide_cuda()


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "setup.py"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["--check", "build_ext"])
def test_missing_compiler_is_reported_in_one_line(command):
    done = run_setup(command, CXX="/no/such/compiler -O1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "without a C++ compiler (/no/such/compiler is not on the PATH" in done.stderr


def test_check_passes_here():
    done = run_setup("--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_headers_and_packages_are_named(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    found = {"setuptools": "76.1.0", "torch": "2.9.1+cu128"}
    monkeypatch.setattr(build, "version", found.__getitem__)
    missing = build.missing_tools() + build.missing_packages()
    assert [item.split(" (")[0] for item in missing] == [
        "the Python headers",
        "setuptools 77",
        "torch 2.10",
    ]

    def nothing(name):
        raise build.PackageNotFoundError(name)

    monkeypatch.setattr(build, "version", nothing)
    assert "torch 2.10 (found none; pip install --upgrade torch)" in build.missing_packages()
    monkeypatch.setattr(build, "version", lambda name: "100.0")
    assert build.missing_packages() == []
    with pytest.raises(
        SystemExit, match=r"without the Python headers .* and without setuptools 77"
    ):
        build.require(missing)


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["install", "editable"])
def test_pip_install_without_cuda(tmp_path, editable):
    source, target = tmp_path / "source", tmp_path / "env"
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    venv = [sys.executable, "-m", "venv", "--without-pip", str(target)]
    subprocess.run(venv, check=True, capture_output=True)
    # Makes the packages of the current environment available, pip and torch among them.
    site = next(target.glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    python = str(target / "bin" / "python")
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"DDPM_FAST_CUDA": "0"}
    command = [*install, *(["-e"] if editable else []), str(source)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = subprocess.run(
        [python, "-c", REPORT_INSTALLATION], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert report.returncode == 0, report.stderr
    where = source if editable else site
    assert f'"{where}/ddpm_fast/__init__.py"' in report.stdout
    assert '"cpu": ""' in report.stdout
    assert "_ops_cuda is not built" in report.stdout
    assert report.stdout.rstrip().endswith('""]')
