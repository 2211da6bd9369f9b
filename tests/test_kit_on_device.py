"""A kit where it is for: unpacked where there is Python 3.10 with NumPy and a simulated TensorRT, and run there.

``tests/runtimes/simulated_jetson`` stands for the device's libraries; its files are those of a recorded Jetson Orin Nano, under a root
of their own.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from edgediffusion.bundle import Bundle
from edgediffusion.export.kit import kit
from edgediffusion.runtimes import engine_manifest
from edgediffusion.runtimes.kit import door
from edgediffusion.runtimes.kit.results import RESULTS
from tests.runtimes.test_kit_device import NVPMODEL, SWAPS
from tests.test_kit import newer_bundle
from tests.test_runtime_alone import oldest_python, pip

SIMULATED = Path(__file__).parent / "runtimes" / "simulated_jetson"
ORIN = {"machine": "aarch64", "compute_capability": "8.7", "tensorrt": "10.3.0", "free_bytes": 10**11}
AVAILABLE_KB = 5_400_000
FILES = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/meminfo": f"MemTotal:        7802000 kB\nMemFree:          123000 kB\nMemAvailable:    {AVAILABLE_KB} kB\n",
    "proc/swaps": SWAPS,
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8\n",
    "var/lib/nvpmodel/status": "pmode:0000\n",
    "etc/nvpmodel.conf": NVPMODEL,
}
COMPONENTS = ("text_encoder", "unet", "vae_decoder")


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


class Jetson:
    """A simulated device with the kit unpacked on it."""

    def __init__(self, python: Path, tar: Path, folder: Path):
        self.python, self.folder, self.root = python, folder, folder / "root"
        with tarfile.open(tar) as archive:
            archive.extractall(folder, filter="data")
        self.kit = folder / tar.stem
        self.facts: dict[str, Any] = {**ORIN, "golden": str(self.kit / "golden"), "log": str(folder / "log")}
        for name, text in FILES.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def start(self, *arguments: str, python: Path | None = None) -> subprocess.Popen[str]:
        (self.folder / "device.json").write_text(json.dumps(self.facts))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {"PYTHONPATH": str(SIMULATED), "SIMULATED_DEVICE": str(self.folder / "device.json"), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [python or self.python, self.kit / "build_here.py", *arguments, "--root", self.root, "--runs", "2"]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        # a shell's background jobs, such as a test run of that kind, pass on that SIGINT is ignored
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(list(map(str, command)), env=environment, cwd=self.folder, **options)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    @property
    def built(self) -> list[dict[str, Any]]:
        """What the builder was told, an entry for each engine that was begun."""
        log = Path(self.facts["log"])
        return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


@pytest.fixture
def jetson(python: Path, tar: Path, tmp_path: Path) -> Iterator[Jetson]:
    device = Jetson(python, tar, tmp_path)
    yield device
    left = [p.name for p in device.kit.rglob("*") if ".partial-" in p.name]
    assert left == []


class TestOnTheDevice:
    def test_checks_builds_verifies_measures_and_writes_the_bundle(self, jetson: Jetson, bundle: Bundle) -> None:
        code, out, err = jetson.run()
        assert (code, err.startswith("Error")) == (0, False), err
        assert "JetPack: Jetson Linux R36.4.3" in out
        assert "power mode: 15W" in out
        assert [told["component"] for told in jetson.built] == list(COMPONENTS)
        assert {told["workspace"] for told in jetson.built} == {AVAILABLE_KB * 1024 // 4}
        assert jetson.built[1]["shapes"]["sample"] == [[1, 4, 8, 8], [2, 4, 8, 8], [4, 4, 8, 8]]
        made = Bundle.open(jetson.kit / "built")
        assert made.targets == ("jetson-orin-nano",)
        assert [verb.name for verb in made.history] == ["lower", "build"]
        manifest = engine_manifest.read(made, "jetson-orin-nano")
        assert (manifest.engine, manifest.version, manifest.compute_capability, manifest.arch) == ("tensorrt", "10.3.0", "8.7", "aarch64")
        assert manifest.components["unet"].shapes == {"batch": (1, 2, 4), "height": (8, 8, 8), "width": (8, 8, 8)}
        told = json.loads((made.path / "engines" / "jetson-orin-nano" / RESULTS).read_text())
        assert told["device"]["names"] == ["NVIDIA Jetson Orin Nano Developer Kit"]
        for name in COMPONENTS:
            one = told["components"][name]
            assert (one["run"]["error"], one["run"]["good"], one["run"]["runs"]) == (0, True, 2)
            assert one["build"]["least_available_bytes"] == AVAILABLE_KB * 1024
        assert told["components"]["unet"]["run"]["median_ms"] > 0

    def test_a_second_run_goes_on_where_the_first_ended(self, jetson: Jetson) -> None:
        assert jetson.run("build")[0] == 0
        code, out, _ = jetson.run("verify")
        assert (code, len(jetson.built)) == (0, 3)
        assert out.count("kept") == 3
        engine = jetson.kit / "work" / "engines" / "unet" / "unet.plan"
        engine.write_bytes(engine.read_bytes() + b"!")  # a disk that lost a bit
        assert jetson.run()[0] == 0
        assert [told["component"] for told in jetson.built][3:] == ["unet"]
        code, _, err = jetson.run()
        assert (code, "exists already" in err, len(jetson.built)) == (1, True, 4)

    def test_another_tensorrt_builds_all_of_it_again(self, jetson: Jetson) -> None:
        assert jetson.run("build")[0] == 0
        jetson.facts["tensorrt"] = "10.3.1"
        assert jetson.run("build")[0] == 0
        assert len(jetson.built) == 6
        assert {p.name: p.read_bytes().count(b"kernel") for p in (jetson.kit / "work").glob("*.cache")} == {
            "timing-10.3.0.cache": 3,
            "timing-10.3.1.cache": 3,
        }

    def test_engines_that_compute_something_else_are_not_kept_as_a_bundle(self, jetson: Jetson) -> None:
        jetson.facts["off_by"] = {"unet": 0.5, "vae_decoder": float("nan")}
        code, out, err = jetson.run()
        assert code == 1
        assert "compute something else than the graphs do. Got: unet is off by 0.5 of its outputs' norm; vae_decoder is off by" in err
        assert "Allowed: 0.01 in float32" in err
        assert out.count("WRONG") == 2
        assert not (jetson.kit / "built").exists()
        assert json.loads((jetson.kit / "work" / RESULTS).read_text())["components"]["unet"]["run"]["good"] is False

    def test_a_build_that_the_system_ends_is_told_and_what_was_built_is_kept(self, jetson: Jetson) -> None:
        jetson.facts["killed"] = "unet"
        code, _, err = jetson.run()
        assert code == 1
        assert "The component 'unet' could not be built: The system ended the work on 'unet': it ran out of memory." in err
        del jetson.facts["killed"]
        assert jetson.run("build", "--workspace-mb", "100")[0] == 0
        assert [told["component"] for told in jetson.built] == ["text_encoder", "unet", "unet", "vae_decoder"]
        assert [told["workspace"] for told in jetson.built][2:] == [10**8] * 2

    def test_what_the_builder_refuses_is_told_in_its_words(self, jetson: Jetson) -> None:
        jetson.facts["refused"] = "vae_decoder"
        code, _, err = jetson.run()
        assert (
            code,
            "TensorRT could not build 'vae_decoder/model.onnx'. Got: Could not find any implementation for node Conv_7" in err,
        ) == (
            1,
            True,
        )

    def test_ctrl_c_keeps_what_is_built_and_leaves_no_process(self, jetson: Jetson) -> None:
        jetson.facts["seconds"] = 60.0
        process = jetson.start()
        deadline = time.monotonic() + 60
        while not jetson.built and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, "Cancelled; what was built is kept" in err) == (130, True)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        jetson.facts["seconds"] = 0.0
        assert jetson.run()[0] == 0

    WRONG: ClassVar[dict[str, tuple[dict[str, Any], dict[str, str], str]]] = {
        "processor": ({"machine": "x86_64"}, {}, "another processor or system. Got: linux on x86-64. Allowed: linux on arm64"),
        "device": (
            {},
            {"proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0"},
            "Got: NVIDIA Jetson Orin NX",
        ),
        "JetPack": ({}, {"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 1\n"}, "JetPack 5. Allowed: JetPack 6.1 or newer"),
        "no TensorRT": ({"tensorrt": ""}, {}, "Got: no Python module 'tensorrt'. Allowed: >=10.3,<10.4. JetPack brings it"),
        "old TensorRT": ({"tensorrt": "8.6.2"}, {}, "tensorrt is too old for this kit. Got: 8.6.2"),
        "new TensorRT": ({"tensorrt": "10.7.0"}, {}, "tensorrt is too new for this kit. Got: 10.7.0"),
        "GPU": ({"compute_capability": "7.2"}, {}, "another compute capability. Got: 7.2. Allowed: 8.7"),
        "driver": ({"compute_capability": ""}, {}, "Got: no NVIDIA driver that answers"),
        "memory": (
            {},
            {"proc/meminfo": "MemTotal: 7802000 kB\nMemAvailable: 1 kB\n", "proc/swaps": "Filename\n"},
            "too little memory to build",
        ),
        "disk": ({"free_bytes": 1000}, {}, "too little room for the engines. Got: 1 kB"),
    }

    @pytest.mark.parametrize("name", WRONG)
    def test_each_wrong_fact_is_refused_with_its_message(self, jetson: Jetson, name: str) -> None:
        facts, files, message = self.WRONG[name]
        jetson.facts |= facts
        for file, text in files.items():
            jetson.write(file, text)
        code, out, err = jetson.run()
        assert code == 1
        assert message in out
        assert err.rstrip().endswith("Put right what is refused above, and start again; nothing was built.")
        assert jetson.built == []

    def test_a_damaged_kit_is_refused(self, jetson: Jetson) -> None:
        golden = jetson.kit / "golden" / "unet.npz"
        golden.write_bytes(golden.read_bytes()[:-5])
        code, out, _ = jetson.run("check")
        assert (code, "The kit is damaged. Got: 'golden/unet.npz' has" in out) == (1, True)
        next(jetson.kit.glob("*.whl")).write_bytes(b"PK")
        code, _, err = jetson.run("check")
        assert (code, "has other bytes than it had. Copy it here again" in err) == (1, True)

    def test_an_older_python_says_so(self, jetson: Jetson) -> None:
        old = next(iter(sorted(Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python3"))), None)
        if old is None:
            pytest.skip("no Python older than 3.10 is here")
        process = jetson.start(python=old)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "Error: This Python is too old. Got: 3." in err


def test_the_door_is_python_that_an_old_python_can_read() -> None:
    ast.parse(Path(str(door.__file__)).read_text(), feature_version=(3, 6))
