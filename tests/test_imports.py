"""What is really loaded, seen in a fresh interpreter: a rule for imports that static tools cannot see past ``find()``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgediffusion
from edgediffusion.registry import names

ROOT = Path(edgediffusion.__file__).parent
NEVER = {"torch", "diffusers", "transformers", "safetensors", "modelopt", "onnx", "onnx_ir", "onnxscript", "accelerate"}
ENGINES = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"}

# What importing may load besides the standard library. tomli is its tomllib on Python 3.10.
NOTHING = {"edgediffusion"}
TARGETS = NOTHING | {"tomli"}
RUNTIME = TARGETS | {"numpy"}
COMMAND_LINE = TARGETS | {"click"}

REPORT = """
import json, sys
before = set(sys.modules)
{code}
loaded = {{name.partition('.')[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(loaded - set(sys.stdlib_module_names))))
"""


def loaded_by(code: str) -> set[str]:
    result = subprocess.run([sys.executable, "-c", REPORT.format(code=code)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return {name for name in json.loads(result.stdout.splitlines()[-1]) if not name.startswith("__editable__")}


def modules_of(*folders: str) -> list[str]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return ["edgediffusion." + ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]


def test_the_package_alone_loads_nothing() -> None:
    assert loaded_by("import edgediffusion") <= NOTHING


@pytest.mark.parametrize("module", ["errors", "registry", "files", "bundle", "text"])
def test_the_ground_needs_the_standard_library_only(module: str) -> None:
    assert loaded_by(f"import edgediffusion.{module}") <= NOTHING


def test_targets_need_the_standard_library_only() -> None:
    assert loaded_by("from edgediffusion import targets; targets.load(targets.names()[0])") <= TARGETS


@pytest.mark.parametrize("module", modules_of("runtimes", "profiles"))
def test_what_runs_on_a_device_loads_numpy_and_no_engine_until_it_is_used(module: str) -> None:
    assert loaded_by(f"import {module}") <= RUNTIME


def test_all_of_it_together_loads_no_torch_and_no_graph_editor() -> None:
    imports = "\n".join(f"import {module}" for module in modules_of("runtimes", "profiles", "targets"))
    assert not loaded_by(imports) & (NEVER | ENGINES)


@pytest.mark.parametrize("command", ["", *names("cli")])
def test_help_loads_click_and_nothing_else(command: str) -> None:
    code = f"""
import contextlib, io
from edgediffusion.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main([{command!r}, "--help"] if {command!r} else ["--help"])
assert out.getvalue().startswith("Usage:"), out.getvalue()
"""
    assert loaded_by(code) <= COMMAND_LINE


def test_help_of_one_command_does_not_load_the_others() -> None:
    code = """
import contextlib, io, sys
from edgediffusion.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["run", "--help"])
print([m for m in sys.modules if m.startswith("edgediffusion.cli.") and "_" not in m.rpartition(".")[2]])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['edgediffusion.cli.run']"


@pytest.mark.parametrize("command", ["inspect", "doctor", "targets"])
def test_a_command_that_only_tells_loads_no_engine(command: str) -> None:
    code = f"""
import contextlib, io
from edgediffusion.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
    main([{command!r}, "--json"])
"""
    assert loaded_by(code) <= COMMAND_LINE


def test_the_list_of_what_is_never_loaded_is_that_of_the_import_contracts() -> None:
    text = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    contracts = text[text.index("[tool.importlinter]") :]
    assert all(f'"{name}"' in contracts for name in NEVER | ENGINES)
