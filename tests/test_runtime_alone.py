"""A device has Python 3.10, NumPy and one engine library: a whole generation where nothing else is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgediffusion

ROOT = Path(__file__).parent.parent
SOURCE = Path(edgediffusion.__file__).parent / "reference" / "fashion"
ABSENT = ("torch", "diffusers", "transformers", "safetensors", "onnx", "onnx-ir", "onnxscript", "nvidia-modelopt")
DRAW = ("--prompt", "a photo of a sneaker", "--steps", "4", "--seed", "7", "--json", "-o")


def oldest_python() -> str:
    """Python 3.10, the oldest that we promise, where this machine has one; else the Python of these tests."""
    found = sorted(Path.home().glob(".pyenv/versions/3.10*/bin/python3.10"))
    for candidate in [*map(str, found), "python3.10"]:
        try:
            subprocess.run([candidate, "-c", "import venv"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    return sys.executable


def pip(device: Path) -> list[str]:
    """This environment's pip, told to work on the other one: that is seconds faster than giving it a pip of its own."""
    return [sys.executable, "-m", "pip", "--python", str(device / "python")]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the extra ``cpu`` and nothing else."""
    folder = tmp_path_factory.mktemp("device")
    source = folder / "source"
    shutil.copytree(ROOT / "edgediffusion", source / "edgediffusion", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([oldest_python(), "-m", "venv", "--without-pip", folder / "venv"], check=True)
    subprocess.run([*pip(folder / "venv" / "bin"), "install", "--quiet", "--no-compile", f"{source}[cpu]"], check=True)
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgediffusion.export import export

    return export(SOURCE, tmp_path_factory.mktemp("bundles") / "fashion", weights="copy").path


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [folder / "edgediffusion", *arguments]
    return subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_whole_generation_without_torch(device: Path, bundle: Path, tmp_path: Path) -> None:
    installed = json.loads(subprocess.run([*pip(device), "list", "--format=json"], check=True, capture_output=True).stdout)
    assert not set(ABSENT) & {package["name"].lower() for package in installed}
    there = run(device, "run", bundle, *DRAW, tmp_path / "there.png")
    assert there.returncode == 0, there.stderr
    assert len(json.loads(there.stdout)["step_ms"]) == 4
    here = run(Path(sys.executable).parent, "run", bundle, *DRAW, tmp_path / "here.png")
    assert here.returncode == 0, here.stderr
    pictures = [np.asarray(Image.open(tmp_path / name), dtype=int) for name in ("there.png", "here.png")]
    # another version of the engine adds in another order: float32 errors of a few steps stay under two of 255 levels
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_the_other_commands_of_a_device(device: Path, bundle: Path, tmp_path: Path) -> None:
    assert json.loads(run(device, "inspect", bundle, "--json").stdout)["family"]
    assert "pip install 'edgediffusion[export]'" in run(device, "doctor").stdout
    built = run(device, "build", bundle, "--target", "cpu-x86-64", "-o", tmp_path / "built")
    assert built.returncode == 0, built.stderr
    assert run(device, "run", tmp_path / "built", *DRAW, tmp_path / "built.png").returncode == 0


@pytest.mark.parametrize("arguments", [("export", SOURCE), ("calibrate", "BUNDLE", "--source", SOURCE)], ids=lambda a: a[0])
def test_what_needs_torch_says_so(device: Path, bundle: Path, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    result = run(device, *(bundle if a == "BUNDLE" else a for a in arguments), "-o", tmp_path / "out")
    assert result.returncode == 1
    assert "which is not installed. Install it with: pip install 'edgediffusion[" in result.stderr
    assert list(tmp_path.iterdir()) == []
