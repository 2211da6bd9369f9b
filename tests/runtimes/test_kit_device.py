"""What a device is and whether that will do: recorded devices, fact by fact."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgediffusion import targets
from edgediffusion.bundle import Bundle
from edgediffusion.errors import BundleError, MissingExtra
from edgediffusion.registry import find
from edgediffusion.runtimes.kit import BUNDLE, Golden, Kit, door, steps, write_manifest
from edgediffusion.runtimes.kit.checks import JETPACKS, OK, REFUSED, WARNING, check
from edgediffusion.runtimes.kit.machine import Facts, Swap, available_bytes, look
from edgediffusion.runtimes.sizes import usual_sizes
from edgediffusion.targets import Device, Machine

from .tiny import write_bundle

GB = 10**9
ORIN = Facts(
    machine=Machine("arm64", "linux", (Device("NVIDIA Jetson Orin Nano Developer Kit", 7.4),), "R36.4.3"),
    compute_capability="8.7",
    memory_bytes=8 * GB,
    available_bytes=6 * GB,
    swaps=(Swap("/dev/zram0", GB),),
    power_mode="15W",
    free_bytes=100 * GB,
    library="10.3.0",
    library_problem="",
    runner=True,
)
MEMINFO = "MemTotal:        7802000 kB\nMemFree:          123000 kB\nMemAvailable:    5400000 kB\n"
SWAPS = "Filename\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/zram0   partition\t650000\t\t0\t\t5\n/swapfile   file\t8388604\t\t0\t\t-2\n"
NVPMODEL = "# comment\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=7W >\n< PM_CONFIG DEFAULT=0 >\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of a tiny bundle, but for its golden outputs, for an Orin Nano."""
    folder = tmp_path_factory.mktemp("kit")
    bundle = write_bundle(folder / BUNDLE)
    (folder / "x.whl").write_bytes(b"wheel")
    write_manifest(kit_of(folder, bundle))
    return folder


def kit_of(folder: Path, bundle: Bundle, target: str = "jetson-orin-nano") -> Kit:
    golden = {c.name: Golden("x.whl", "float32", 0.01) for c in bundle.components}
    return Kit(folder, "0.1.0", targets.load(target), bundle.digest, "x.whl", usual_sizes(bundle), golden, {})


def test_the_manifest_comes_back_as_it_was(folder: Path) -> None:
    kit = Kit.open(folder)
    assert kit.target == targets.load("jetson-orin-nano")
    assert (kit.shapes, kit.engine) == (usual_sizes(kit.bundle()), "tensorrt")
    assert kit.damaged() == ()


def test_the_right_device_is_told_all_that_was_looked_at(folder: Path) -> None:
    findings = check(Kit.open(folder), ORIN)
    assert {f.about: f.state for f in findings} == dict.fromkeys(
        ("kit", "processor", "device", "JetPack", "tensorrt", "GPU", "cuda-python", "memory", "swap", "power mode", "disk"), OK
    )


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "an x86 machine": (
        {"machine": replace(ORIN.machine, architecture="x86-64")},
        "processor",
        r"'jetson-orin-nano', which has another processor or system. Got: linux on x86-64. Allowed: linux on arm64. Unpack and run it on",
    ),
    "another Jetson": (
        {"machine": replace(ORIN.machine, devices=(Device("NVIDIA Jetson AGX Orin Developer Kit", 61.0),))},
        "device",
        r"The kit is for 'jetson-orin-nano' .*Got: NVIDIA Jetson AGX Orin .*Allowed: NVIDIA Jetson Orin Nano.*edgediffusion kit",
    ),
    "no accelerator": ({"machine": replace(ORIN.machine, devices=())}, "device", r"Got: no accelerator that this system tells of"),
    "JetPack 5": (
        {"machine": replace(ORIN.machine, release="R35.4.1")},
        "JetPack",
        r"This JetPack is too old.*Got: Jetson Linux R35.4.1, JetPack 5. Allowed: JetPack 6.1 or newer, .*R36.4 or newer. Update",
    ),
    "JetPack 6.0": ({"machine": replace(ORIN.machine, release="R36.3.0")}, "JetPack", r"Got: Jetson Linux R36.3.0, JetPack 6.0"),
    "no TensorRT": (
        {"library": "", "library_problem": "no Python module 'tensorrt'"},
        "tensorrt",
        r"cannot be used by this Python. Got: no Python module 'tensorrt'. Allowed: >=10.3,<10.4. JetPack brings it: .*site-packages",
    ),
    "an older TensorRT": ({"library": "8.6.2"}, "tensorrt", r"tensorrt is too old for this kit. Got: 8.6.2. Allowed: >=10.3,<10.4"),
    "a newer TensorRT": ({"library": "10.13.3"}, "tensorrt", r"tensorrt is too new for this kit. Got: 10.13.3. Allowed: >=10.3,<10.4"),
    "another GPU": (
        {"compute_capability": "7.2"},
        "GPU",
        r"another compute capability. Got: 7.2. Allowed: 8.7. Make a kit for this device",
    ),
    "no driver": ({"compute_capability": ""}, "GPU", r"Got: no NVIDIA driver that answers. Allowed: 8.7. Install .*sudo dmesg"),
    "no cuda-python": ({"runner": False}, "cuda-python", r"Got: no Python module 'cuda.bindings'.*pip install 'cuda-python"),
    "no memory": (
        {"available_bytes": 1000, "swaps": ()},
        "memory",
        r"too little memory to build 'text_encoder|unet|vae_decoder'. Got: 1 kB available, 0 B of swap. Allowed: .* or more. Close",
    ),
    "a full disk": ({"free_bytes": 10**6}, "disk", r"too little room for the engines. Got: 1 MB. Allowed: 200 MB or more. Free some space"),
}
DOUBTFUL: dict[str, tuple[dict[str, Any], str, str]] = {
    "little memory": ({"available_bytes": 10**8}, "memory", r"may take more memory than is available. Got: 100 MB of 250 MB. Close"),
    "zram alone": ({"available_bytes": 10**8}, "swap", r"compressed memory \(zram\) only.*Got: /dev/zram0 1 GB. Add some: sudo fallocate"),
    "no swap": (
        {"available_bytes": 10**8, "swaps": ()},
        "swap",
        r"There is no swap: if memory runs out the system ends the build. Add some",
    ),
    "memory untold": ({"available_bytes": 0}, "memory", r"does not tell how much memory is available. Got: no /proc/meminfo"),
    "an unknown release": ({"machine": replace(ORIN.machine, release="")}, "JetPack", r"is not known. Got: no /etc/nv_tegra_release"),
}


@pytest.mark.parametrize("name", [*WRONG, *DOUBTFUL])
def test_every_other_fact_is_told_with_what_to_do(folder: Path, name: str) -> None:

    facts, about, message = {**WRONG, **DOUBTFUL}[name]
    others = [f for f in check(Kit.open(folder), replace(ORIN, **facts)) if f.state != OK]
    (finding,) = [f for f in others if f.about == about]
    assert finding.state == (REFUSED if name in WRONG else WARNING)
    assert re.search(message, finding.text), finding.text
    assert not [f for f in others if f.state == REFUSED and f.about != about]


def test_the_door_knows_the_steps() -> None:
    assert door.STEPS == steps.STEPS


def test_several_wrong_facts_are_told_at_once(folder: Path) -> None:
    facts = replace(ORIN, compute_capability="7.2", library="8.5", free_bytes=0)
    assert {f.about for f in check(Kit.open(folder), facts) if f.state == REFUSED} == {"tensorrt", "GPU", "disk"}


def test_swap_on_a_disk_counts_as_memory_for_what_must_fit(folder: Path) -> None:
    facts = replace(ORIN, available_bytes=1000, swaps=(Swap("/swapfile", 8 * GB),))
    assert [f.about for f in check(Kit.open(folder), facts) if f.state == REFUSED] == []


def test_releases_and_what_they_brought_rise_together() -> None:
    assert [tuple(map(int, version.split("."))) for *_, version in JETPACKS] == sorted(
        tuple(map(int, version.split("."))) for *_, version in JETPACKS
    )


class TestADamagedKit:
    @pytest.fixture
    def copy(self, folder: Path, tmp_path: Path) -> Path:

        return Path(shutil.copytree(folder, tmp_path / "kit"))

    @pytest.mark.parametrize(
        ("break_it", "message"),
        [
            (lambda f: f.unlink(), r"'bundle/unet/model.onnx' is missing"),
            (lambda f: f.write_bytes(f.read_bytes()[:-1]), r"'bundle/unet/model.onnx' has \d+ bytes, not \d+"),
            (lambda f: f.write_bytes(f.read_bytes()[:-1] + b"?"), r"'bundle/unet/model.onnx' has other bytes than it had"),
        ],
        ids=["missing", "cut off", "changed"],
    )
    def test_is_refused_before_anything_else(self, copy: Path, break_it: Callable[[Path], object], message: str) -> None:

        break_it(copy / BUNDLE / "unet" / "model.onnx")
        (finding,) = check(Kit.open(copy), ORIN)
        assert (finding.about, finding.state) == ("kit", REFUSED)
        assert re.search(message, finding.text)

    @pytest.mark.parametrize(
        ("break_it", "message"),
        [
            (lambda text: "{", r"is damaged"),
            (lambda text: text.replace('"version": "0.1.0"', '"version": "0.2.0"'), r"was changed after it was written"),
            (lambda text: text.replace('"format": 1', '"format": 2'), r"newer than the package in it. Got: format 2. Allowed: 1"),
        ],
        ids=["no JSON", "another version", "newer"],
    )
    def test_a_damaged_manifest(self, copy: Path, break_it: Callable[[str], str], message: str) -> None:
        (copy / "kit.json").write_text(break_it((copy / "kit.json").read_text()))
        with pytest.raises(BundleError, match=message):
            Kit.open(copy)

    def test_no_kit_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"is no kit: it has no kit.json. Run build_here.py in the folder"):
            Kit.open(tmp_path)

    def test_a_path_that_leaves_the_kit(self, copy: Path) -> None:
        kit = Kit.open(copy)
        write_manifest(replace(kit, wheel="../x.whl"))
        with pytest.raises(BundleError, match=r"names a file that is not in it. Got: '../x.whl'. Do not use it"):
            Kit.open(copy)

    def test_another_bundle(self, copy: Path) -> None:
        with pytest.raises(BundleError, match="not the one that it was made of"):
            replace(Kit.open(copy), digest="0").bundle()


class TestLooking:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for name, text in {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "proc/meminfo": MEMINFO,
            "proc/swaps": SWAPS,
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8\n",
            "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet\n",
            "etc/nvpmodel.conf": NVPMODEL,
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    def test_a_recorded_jetson(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        monkeypatch.setattr(targets, "cuda_devices", lambda: (Device("Orin", 7.4, "8.7"),))
        facts = look("null", tmp_path / "not yet there", root)
        assert facts.machine.devices[0].name == "NVIDIA Jetson Orin Nano Developer Kit"
        assert (facts.machine.architecture, facts.machine.release, facts.compute_capability) == ("arm64", "R36.4.3", "8.7")
        assert (facts.memory_bytes, facts.available_bytes) == (7802000 * 1024, 5400000 * 1024)
        assert facts.swaps == (Swap("/dev/zram0", 650000 * 1024), Swap("/swapfile", 8388604 * 1024))
        assert [swap.compressed for swap in facts.swaps] == [True, False]
        assert (facts.power_mode, facts.library, facts.library_problem) == ("7W", "1", "")
        assert facts.free_bytes > 0

    def test_a_mode_that_no_configuration_names(self, root: Path, tmp_path: Path) -> None:
        (root / "etc/nvpmodel.conf").unlink()
        assert look("null", tmp_path, root).power_mode == "mode 1"

    def test_a_system_that_tells_nothing(self, tmp_path: Path) -> None:
        facts = look("null", tmp_path, tmp_path / "empty")
        assert (facts.memory_bytes, facts.swaps, facts.power_mode, facts.machine.release) == (0, (), "", "")
        assert available_bytes(tmp_path / "empty") == 0

    @pytest.mark.parametrize(
        ("raised", "problem"),
        [
            (MissingExtra("tensorrt", "tensorrt", "Building"), "no Python module 'tensorrt'"),
            (ImportError("libnvinfer.so.10: cannot open shared object file"), "ImportError: libnvinfer.so.10: cannot open"),
        ],
        ids=["absent", "broken"],
    )
    def test_a_library_that_cannot_be_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, problem: str) -> None:
        def fail() -> str:
            raise raised

        monkeypatch.setattr(find("runtimes.engines", "null"), "version", fail)
        facts = look("null", tmp_path)
        assert facts.library == ""
        assert facts.library_problem.startswith(problem)
