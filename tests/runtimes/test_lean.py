"""What a device must have: a fresh interpreter shows what the runtime really loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgediffusion.runtimes
from edgediffusion.bundle import Bundle

from .tiny import write_bundle


def loaded_by(script: str) -> set[str]:
    """Top-level third-party modules in a fresh interpreter after ``script``."""
    tail = "\nimport sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    output = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", script + tail], capture_output=True, text=True, check=True)
    bare = subprocess.run([sys.executable, "-c", tail], capture_output=True, text=True, check=True)
    modules = set(json.loads(output.stdout.splitlines()[-1])) - set(json.loads(bare.stdout))
    return {m for m in modules if m not in sys.stdlib_module_names and not m.startswith("_")}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("lean") / "bundle")


def test_importing_loads_numpy_and_no_library() -> None:
    assert loaded_by("from edgediffusion.runtimes import Pipeline") <= {"numpy", "edgediffusion"}


def test_naming_the_package_loads_nothing() -> None:
    assert loaded_by("import edgediffusion.runtimes") <= {"edgediffusion"}


def test_a_whole_generation_loads_no_torch(bundle: Bundle) -> None:
    pytest.importorskip("onnxruntime")
    script = (
        "from edgediffusion.runtimes import Pipeline\n"
        f"result = Pipeline.from_bundle({str(bundle.path)!r}, threads=1)('a cat', num_inference_steps=2)\n"
        "result.images"
    )
    found = loaded_by(script)
    assert "torch" not in found
    # What the engine's library brings along is its affair, as long as it is none of the heavy ones.
    heavy = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "modelopt", "scipy", "click"}
    assert not found & heavy
    assert found >= {"numpy", "onnxruntime", "tokenizers", "PIL"}


def test_all_is_what_is_exported() -> None:
    for name in edgediffusion.runtimes.__all__:
        assert getattr(edgediffusion.runtimes, name).__name__ == name
    with pytest.raises(AttributeError, match="Pipelin"):
        edgediffusion.runtimes.Pipelin  # noqa: B018


def test_no_source_file_imports_what_a_device_lacks() -> None:
    folder = Path(edgediffusion.runtimes.__file__).parent
    for file in folder.rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in {"torch", "diffusers", "transformers", "onnx", "onnx_ir"}, f"{file}: {line}"
