from __future__ import annotations

import platform
from pathlib import Path

import pytest

from edgediffusion import targets
from edgediffusion.errors import ArgumentError, UnknownName
from edgediffusion.registry import names
from edgediffusion.targets import Machine

ROOT = Path(targets.__file__).parent.parent
GOOD = (ROOT / "targets" / "cpu-x86-64.toml").read_text(encoding="utf-8")


def write(folder: Path, text: str) -> Path:
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    return folder / "mine.toml"


@pytest.mark.parametrize("name", targets.names())
def test_every_target_is_complete_and_names_what_exists(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    assert target.facts, "facts without a source are rumours"
    assert all(fact.source.startswith("https://") for fact in target.facts)
    assert set(target.engines) <= set(names("runtimes.engines"))
    assert set(target.libraries) <= set(target.engines)
    assert target.placement in names("optimize.placements", ".toml")
    assert target.formats
    assert target.opset >= 18


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"No target is called 'toaster'. Allowed: .*cpu-x86-64.* Or give a path ending in .toml."):
        targets.load("toaster")


@pytest.mark.parametrize("name", ["../targets/cpu-x86-64", "", "cpu_x86_64"])
def test_only_listed_names_are_read(name: str) -> None:
    with pytest.raises(UnknownName):
        targets.load(name)


def test_a_path_that_does_not_exist_is_an_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(UnknownName):
        targets.load(tmp_path / "none.toml")


def test_a_file_of_ones_own_is_a_target(tmp_path: Path) -> None:
    assert targets.load(write(tmp_path, GOOD)).name == "mine"
    assert targets.load(str(write(tmp_path, GOOD))).engines == ("onnxruntime", "openvino")


WRONG = {
    "unknown key": (GOOD.replace("opset = 23", "opset = 23\ncolour = 'red'"), "has unknown keys. Got: colour. Allowed: summary, device"),
    "missing key": (GOOD.replace("opset = 23\n", ""), "lacks keys. Got: opset"),
    "wrong kind": (
        GOOD.replace("opset = 23", "opset = 'new'"),
        "'opset' of the target .* is of the wrong kind. Got: 'new'. Allowed: a whole number",
    ),
    "a word for a list": (GOOD.replace('engines = ["onnxruntime", "openvino"]', 'engines = "onnxruntime"'), "'engines' of the target"),
    "a truth for a number": (GOOD.replace("opset = 23", "opset = true"), "'opset' of the target"),
    "note without source": (GOOD + '[[facts]]\nabout = "x"\ntext = "y"\n', "Fact 6 of .* lacks keys. Got: source"),
    "figure without source": (
        GOOD.replace("opset = 23", "opset = 23\nmemory_gb = 8"),
        "facts without a source. Got: memory_gb. Give the page",
    ),
    "source that is no page": (
        GOOD.replace("opset = 23", 'opset = 23\nmemory_gb = 8\nsources = { memory_gb = "a friend" }'),
        "what is no web page. Got: a friend. Allowed: https://",
    ),
    "source of nothing": (
        GOOD.replace("opset = 23", 'opset = 23\nsources = { memory_gb = "https://example.org" }'),
        "facts that it does not state. Got: memory_gb",
    ),
    "unknown format": (GOOD.replace('"int8"]', '"int9"]'), "'formats' of the target .* has what is not known. Got: int9. Allowed: float32"),
    "unknown device": (GOOD.replace('device = "cpu"', 'device = "abacus"'), "'device' of .* Got: abacus. Allowed: cpu, gpu, npu"),
    "version of another engine": (GOOD.replace("opset = 23", 'opset = 23\nlibraries = { steam = ">=1" }'), "'libraries' of .* Got: steam"),
    "no engine": (GOOD.replace('engines = ["onnxruntime", "openvino"]', "engines = []"), "'engines' of the target .* is empty"),
    "a negative figure": (
        GOOD.replace("opset = 23", "opset = 23\nmemory_gb = -1"),
        "'memory_gb' of .* Got: -1. Allowed: a number that is not neg",
    ),
    "facts that are no tables": ('facts = ["x"]\n' + GOOD[: GOOD.index("[[facts]]")], "must be tables"),
    "no TOML": ("engines = [", "is not valid TOML"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_with_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        targets.load(write(tmp_path, text))


def recorded(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def machine(folder: Path, files: dict[str, str], smi: str = "", *, cpu: str = "x86_64") -> Machine:
    """A machine as its files and nvidia-smi told of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "machine", lambda: cpu)
        patch.setattr(platform, "system", lambda: "Linux")
        return targets.this_machine(recorded(folder, files), lambda command: smi)


def jetson(model: str, kb: int) -> dict[str, str]:
    return {
        "proc/device-tree/model": model + "\0",
        "proc/meminfo": f"MemTotal:       {kb} kB\nMemFree:          123 kB\n",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8\n",
    }


@pytest.mark.parametrize(
    ("model", "kb", "name"),
    [
        ("NVIDIA Jetson Orin Nano Developer Kit", 7_802_000, "jetson-orin-nano"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7_802_000, "jetson-orin-nano-super"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 16_006_000, "jetson-orin-nx-16"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 31_268_000, "jetson-agx-orin-32"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 64_350_000, "jetson-agx-orin-64"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 128_788_000, "jetson-agx-thor"),
        ("NVIDIA Jetson Xavier NX Developer Kit", 7_756_000, "jetson-xavier-nx"),
    ],
)
def test_a_jetson_is_recognised_by_its_device_tree(tmp_path: Path, model: str, kb: int, name: str) -> None:
    found = machine(tmp_path, jetson(model, kb), cpu="aarch64")
    assert found.release == "R36.4.3"
    assert targets.detect(found) == name


@pytest.mark.parametrize(
    ("smi", "cpu", "name"),
    [
        ("NVIDIA GeForce RTX 4090, 24564, 8.9, 570.86.10\n", "x86_64", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB, 81920, 8.0, 535.129.03\nNVIDIA A100-SXM4-80GB, 81920, 8.0, 535.129.03\n", "x86_64", "a100"),
        ("NVIDIA H100 80GB HBM3, 81559, 9.0, 550.54.15\n", "x86_64", "h100"),
        ("NVIDIA L40S, 46068, 8.9, 550.54.15\n", "x86_64", "l40s"),
        ("Tesla T4, 15360, 7.5, 535.104.05\n", "x86_64", "t4"),
        ("NVIDIA GB10, [N/A], 12.1, 580.95.05\n", "aarch64", "dgx-spark"),
    ],
)
def test_a_gpu_is_recognised_by_what_nvidia_smi_says(tmp_path: Path, smi: str, cpu: str, name: str) -> None:
    found = machine(tmp_path, {"proc/meminfo": "MemTotal:  125513000 kB\n"}, smi, cpu=cpu)
    assert targets.detect(found) == name
    assert found.devices[0].driver
    assert found.devices[0].memory_gb > 14
    assert found.devices[0].compute_capability == targets.load(name).compute_capability


def test_intels_devices_are_recognised_by_the_kernels_list(tmp_path: Path) -> None:
    gpu, npu = "sys/class/drm/renderD128/device/vendor", "sys/class/accel/accel0/device/vendor"
    assert targets.detect(machine(tmp_path / "gpu", {gpu: "0x8086\n", npu: "0x8086\n"})) == "intel-gpu"
    assert targets.detect(machine(tmp_path / "npu", {npu: "0x8086\n"})) == "intel-npu"
    assert targets.detect(machine(tmp_path / "amd", {gpu: "0x1002\n"})) == "cpu-x86-64"


def test_a_gpu_that_no_target_describes_is_not_passed_over_for_the_processor(tmp_path: Path) -> None:
    found = machine(tmp_path, {}, "NVIDIA GeForce RTX 3080, 10240, 8.6, 570.86.10\n")
    with pytest.raises(ArgumentError, match=r"No known target describes this machine. Got: x86-64 linux NVIDIA GeForce RTX 3080"):
        targets.detect(found)


@pytest.mark.parametrize(
    "smi", ["", "No devices were found\n", "NVIDIA-SMI has failed because it could not communicate, with the driver\n"]
)
def test_answers_of_nvidia_smi_without_a_gpu(tmp_path: Path, smi: str) -> None:
    assert targets.detect(machine(tmp_path, {}, smi)) == "cpu-x86-64"


def test_auto_is_the_target_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = machine(tmp_path, jetson("NVIDIA Jetson Orin Nano Developer Kit", 7_802_000), cpu="aarch64")
    monkeypatch.setattr(targets, "this_machine", lambda: here)
    assert targets.load("auto").name == "jetson-orin-nano"


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("10.3.0", ">=10.3,<10.4", True),
        ("10.3.0.26", ">=10.3,<10.4", True),
        ("10.4", ">=10.3,<10.4", False),
        ("1.7.1.116", ">=1.7,<2", True),
        ("9.9", "", True),
        ("1.0", "about 1", False),
    ],
)
def test_versions_of_libraries_are_compared_by_their_numbers(version: str, wanted: str, fits: bool) -> None:
    assert targets.in_range(version, wanted) is fits


@pytest.mark.parametrize(("machine", "system"), [("x86_64", "Linux"), ("AMD64", "Windows")])
def test_an_x86_machine_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, system: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "system", lambda: system)
    assert targets.detect(targets.this_machine(tmp_path, lambda command: "")) == "cpu-x86-64"


def test_a_machine_that_no_target_describes_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "z80")
    with pytest.raises(ArgumentError, match="No known target describes this machine. Got: z80"):
        targets.detect(targets.this_machine(Path("nowhere"), lambda command: ""))


def test_the_file_that_the_documentation_shows_is_a_target(tmp_path: Path) -> None:
    page = (ROOT.parent / "docs" / "targets.md").read_text(encoding="utf-8")
    target = targets.load(write(tmp_path, page.split("```toml\n")[1].split("```")[0]))
    assert target.compute_capability == "8.6"
    assert target.unverified == ("power_modes_w",)
