"""Making a kit: its bytes, its graphs, its golden outputs, its wheel, and what is refused. ``test_kit_on_device.py`` runs one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import edgediffusion
from edgediffusion import bundle as bundles
from edgediffusion.bundle import Bundle
from edgediffusion.cli import main
from edgediffusion.errors import ArgumentError, Cancelled, OutputError
from edgediffusion.export.kit import kit
from edgediffusion.export.kit_wheel import write_wheel
from edgediffusion.runtimes.kit import Kit
from edgediffusion.runtimes.kit.results import RESULTS
from edgediffusion.runtimes.onnx_header import read_header
from tests.runtimes.tiny import DENOISE, write_bundle
from tests.test_runtime_alone import oldest_python, pip

COMPONENTS = ("text_encoder", "unet", "vae_decoder")


def newer_bundle(folder: Path) -> Bundle:
    """The tiny bundle, its denoiser in opset 23 with an operator of that."""
    made = write_bundle(folder)
    file = made.path / DENOISE.model
    model = onnx.load(file, load_external_data=False)
    node = onnx.helper.make_node("RMSNormalization", ["encoder_hidden_states", "ones"], ["normal"])
    next(n for n in model.graph.node if n.op_type == "ReduceMean").input[0] = "normal"
    model.graph.node.insert(0, node)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(6, np.float32), "ones"))
    model.opset_import[0].version = 23
    onnx.save(onnx.shape_inference.infer_shapes(model), file)
    bundles.write(made.path, family="tiny", components=made.components, sampling=made.sampling, history=())
    return Bundle.open(made.path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return newer_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def tar(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kits") / "orin.tar"
    kit(bundle, output, target="jetson-orin-nano")
    return output


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python 3.10, where there is one, with NumPy and nothing else."""
    folder = tmp_path_factory.mktemp("device") / "venv"
    subprocess.run([oldest_python(), "-m", "venv", "--without-pip", folder], check=True)
    subprocess.run([*pip(folder / "bin"), "install", "--quiet", "--no-compile", "numpy"], check=True)
    return folder / "bin" / "python"


class TestMaking:
    def test_the_same_bundle_gives_the_same_bytes(self, bundle: Bundle, tar: Path, tmp_path: Path) -> None:
        again = kit(bundle, tmp_path / "orin.tar", target="jetson-orin-nano")
        assert again.path.read_bytes() == tar.read_bytes()
        assert again.bytes == tar.stat().st_size
        assert [p.name for p in tmp_path.iterdir()] == ["orin.tar"]

    def test_graphs_are_what_the_target_reads_and_the_files_are_nobodys(self, tar: Path, tmp_path: Path) -> None:
        with tarfile.open(tar) as archive:
            members = archive.getmembers()
            archive.extractall(tmp_path, filter="data")
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        assert members[0].name == "orin/build_here.py"
        opened = Kit.open(tmp_path / "orin")
        assert opened.damaged() == ()
        assert {read_header(opened.bundle().path / c.model).opset for c in opened.bundle().components} == {18, 20}
        assert os.access(tmp_path / "orin" / "build_here.py", os.X_OK)
        assert not [n for n in opened.files if b"/tmp" in (tmp_path / "orin" / n).read_bytes() and not n.endswith(".whl")]

    def test_golden_inputs_follow_each_other(self, bundle: Bundle, tar: Path, tmp_path: Path) -> None:
        with tarfile.open(tar) as archive:
            archive.extractall(tmp_path, filter="data")
        golden = {c: np.load(tmp_path / "orin" / "golden" / f"{c}.npz") for c in COMPONENTS}
        np.testing.assert_array_equal(golden["text_encoder"]["out.last_hidden_state"], golden["unet"]["in.encoder_hidden_states"])
        assert golden["unet"]["in.sample"].shape == (2, 4, 8, 8)
        assert float(golden["unet"]["in.timestep"]) == 500
        assert (golden["text_encoder"]["in.input_ids"][0] != golden["text_encoder"]["in.input_ids"][1]).any()

    def test_shapes_of_ones_own(self, bundle: Bundle, tmp_path: Path) -> None:
        kit(bundle, tmp_path / "x.tar", target="jetson-orin-nano", shapes="batch=1,height=4:8:16")
        with tarfile.open(tmp_path / "x.tar") as archive:
            archive.extractall(tmp_path, filter="data")
        assert {axis: str(size) for axis, size in Kit.open(tmp_path / "x").shapes.items()} == {
            "batch": "1",
            "height": "4:8:16",
            "width": "8",
            "image_height": "16",
            "image_width": "16",
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target": "rtx-4090"}, r"Engines for 'rtx-4090' are built where the bundle is.*edgediffusion build .* --target rtx-4090"),
            ({"target": "toaster"}, r"No target is called 'toaster'"),
            ({"target": "jetson-orin-nano", "shapes": "depth=3"}, r"No graph of the bundle has such an axis. Got: depth. Allowed: batch"),
        ],
    )
    def test_what_cannot_be_a_kit_is_refused(self, bundle: Bundle, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            kit(bundle, tmp_path / "x.tar", **options)
        assert list(tmp_path.iterdir()) == []

    def test_a_bundle_that_was_quantized_for_another_engine(self, bundle: Bundle, tmp_path: Path) -> None:
        made = with_history(bundle, tmp_path / "int8", {"target": "cpu-x86-64", "placement": "onnxruntime-cpu"})
        with pytest.raises(ArgumentError, match=r"Got: placement 'onnxruntime-cpu'. Allowed: placement 'tensorrt'. Quantize the float"):
            kit(made, tmp_path / "x.tar", target="jetson-orin-nano")

    def test_fp8_for_a_device_without_it(self, bundle: Bundle, tmp_path: Path) -> None:
        def add(model: onnx.ModelProto) -> None:
            tensor = onnx.TensorProto(name="fp8", data_type=onnx.TensorProto.FLOAT8E4M3FN, dims=[4], raw_data=b"\0" * 4)
            model.graph.initializer.append(tensor)

        made = changed(bundle, tmp_path / "fp8", add)
        with pytest.raises(
            ArgumentError, match=r"'jetson-orin-nano' has no kernels for what 'unet' is computed in. Got: fp8. Allowed: float32"
        ):
            kit(made, tmp_path / "x.tar", target="jetson-orin-nano")

    def test_a_file_that_is_there_stays_and_what_is_stopped_leaves_nothing(self, bundle: Bundle, tmp_path: Path) -> None:
        (tmp_path / "there.tar").write_text("mine")
        with pytest.raises(OutputError, match="exists already"):
            kit(bundle, tmp_path / "there.tar", target="jetson-orin-nano")

        def stop(label: str, part: float) -> None:
            if label == "golden outputs of unet":
                raise Cancelled("Enough")

        with pytest.raises(Cancelled):
            kit(bundle, tmp_path / "new.tar", target="jetson-orin-nano", progress=stop)
        assert [p.name for p in tmp_path.iterdir()] == ["there.tar"]
        assert (tmp_path / "there.tar").read_text() == "mine"

    def test_progress_never_goes_back(self, bundle: Bundle, tmp_path: Path) -> None:
        parts: list[float] = []
        kit(bundle, tmp_path / "x.tar", target="jetson-orin-nano", progress=lambda label, part: parts.append(part))
        assert parts == sorted(parts)
        assert parts[-1] == 1.0

    def test_the_command(self, bundle: Bundle, tmp_path: Path) -> None:
        arguments = ["kit", str(bundle.path), "--target", "jetson-orin-nano", "-o", str(tmp_path / "k.tar")]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert "tar xf k.tar && cd k && python3 build_here.py" in result.output
        result = CliRunner().invoke(main, [*arguments[:-1], str(tmp_path / "l.tar"), "--json"])
        assert json.loads(result.stdout)["golden"]["unet"]["tolerance"] == 0.01


def changed(bundle: Bundle, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Bundle:
    shutil.copytree(bundle.path, folder)
    model = onnx.load(folder / DENOISE.model, load_external_data=False)
    change(model)
    onnx.save(model, folder / DENOISE.model)
    return with_history(bundle, folder, None)


def with_history(bundle: Bundle, folder: Path, quantized: dict[str, Any] | None) -> Bundle:
    if not folder.exists():
        shutil.copytree(bundle.path, folder)
    (folder / "bundle.json").unlink()
    history = () if quantized is None else (bundles.Verb("quantize", quantized),)
    bundles.write(folder, family="tiny", components=bundle.components, sampling=bundle.sampling, history=history)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return folder / write_wheel(folder)


class TestTheWheel:
    def test_pip_installs_it_and_finds_it_whole(self, wheel: Path, python: Path, tmp_path: Path) -> None:
        target = tmp_path / "venv"
        subprocess.run([python, "-m", "venv", "--without-pip", target], check=True)
        subprocess.run([*pip(target / "bin"), "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
        shown = subprocess.run([*pip(target / "bin"), "show", "-f", "edgediffusion"], check=True, capture_output=True, text=True).stdout
        assert f"Version: {edgediffusion.__version__}" in shown
        assert "edgediffusion/runtimes/kit/steps.py" in shown
        assert (target / "bin" / "edgediffusion").is_file()

    def test_it_has_the_package_without_the_shipped_pipelines(self, wheel: Path) -> None:
        names = set(zipfile.ZipFile(wheel).namelist())
        root = Path(edgediffusion.__file__).parent
        package = {p.relative_to(root.parent).as_posix() for p in root.rglob("*") if p.suffix in (".py", ".toml")}
        assert {n for n in names if n.startswith("edgediffusion/") and n.endswith((".py", ".toml"))} == {
            n for n in package if not n.startswith("edgediffusion/reference/")
        }
        assert wheel.stat().st_size < 3_000_000


def test_a_kit_for_a_processor_builds_runs_and_verifies_for_real(tmp_path: Path, bundle: Bundle) -> None:
    """By ONNX Runtime: nothing is simulated but that this machine is another one."""
    kit(bundle, tmp_path / "cpu.tar", target="cpu-x86-64" if os.uname().machine == "x86_64" else "cpu-arm64")
    with tarfile.open(tmp_path / "cpu.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    done = subprocess.run([sys.executable, "build_here.py", "--runs", "3"], cwd=tmp_path / "cpu", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = Bundle.open(tmp_path / "cpu" / "built")
    told = json.loads((made.path / "engines" / made.targets[0] / RESULTS).read_text())
    assert max(one["run"]["error"] for one in told["components"].values()) < 1e-5
    result = CliRunner().invoke(main, ["run", str(made.path), "--prompt", "a red shirt", "--steps", "2", "-o", str(tmp_path / "x.png")])
    assert result.exit_code == 0, result.output
