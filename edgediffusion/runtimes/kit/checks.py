"""Whether a device is the one that a kit is for, and has what building takes: every finding at once.

A finding is fine, or it is told as a warning and the build goes on, or it refuses the device: then nothing is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from edgediffusion import targets
from edgediffusion.bundle import Bundle
from edgediffusion.errors import EdgeDiffusionError
from edgediffusion.registry import find
from edgediffusion.runtimes.kit import Kit, Progress
from edgediffusion.runtimes.kit.machine import Facts
from edgediffusion.text import size

OK, WARNING, REFUSED = "ok", "warning", "refused"

# What TensorRT for RTX took to build, at most, beside its libraries, in bytes of weights (benchmarks/tensorrt_build.py: 3.2 for a float16
# and 3.5 for an int8 UNet of Stable Diffusion 1.5's size; 0.25 GB for the smallest graph). TensorRT on a device was not measured.
_PER_WEIGHT, _LEAST_BYTES = 3.5, 250_000_000
_DISK = 1.2  # engines and what lies beside them, in bytes of weights
_DISK_BYTES = 200_000_000

# Releases of Jetson Linux that brought another TensorRT: JetPack's name, TensorRT's version (developer.nvidia.com/embedded/jetpack-archive)
JETPACKS = (
    ((32,), "4", "8.0"),
    ((35,), "5", "8.5"),
    ((36, 2), "6.0", "8.6"),
    ((36, 4), "6.1", "10.3"),
    ((38,), "7.0", "10.13"),
)


@dataclass(frozen=True)
class Finding:
    """``text`` of one that is not fine says what is wrong, what was found, what is allowed and what to do."""

    about: str
    state: str
    text: str


def check(kit: Kit, facts: Facts, progress: Progress = lambda label, part: None) -> tuple[Finding, ...]:
    """All findings, in the order in which they should be put right."""
    broken = kit.damaged(progress)
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        return (
            _refused("kit", "The kit is damaged", got="; ".join(broken[:3]) + more, do="Copy it to this machine again, and unpack it."),
        )
    return (Finding("kit", OK, f"{len(kit.files)} files, whole"), *_device(kit, facts), *_library(kit, facts), *_room(kit, facts))


def refused(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings if finding.state == REFUSED)


def _finding(about: str, state: str, wrong: str, *, got: object = None, allowed: str = "", do: str = "") -> Finding:
    return Finding(about, state, str(EdgeDiffusionError(wrong, got=got, allowed=allowed, do=do)))


def _refused(about: str, wrong: str, *, got: object = None, allowed: str = "", do: str = "") -> Finding:
    return _finding(about, REFUSED, wrong, got=got, allowed=allowed, do=do)


def _warning(about: str, wrong: str, *, got: object = None, do: str = "") -> Finding:
    return _finding(about, WARNING, wrong, got=got, do=do)


def _device(kit: Kit, facts: Facts) -> Iterator[Finding]:
    target, machine = kit.target, facts.machine
    if machine.architecture != target.architecture or machine.system not in target.systems:
        yield _refused(
            "processor",
            f"The kit is for '{target.name}', which has another processor or system",
            got=f"{machine.system} on {machine.architecture}",
            allowed=f"{', '.join(target.systems)} on {target.architecture}",
            do="Unpack and run it on that device.",
        )
    else:
        yield Finding("processor", OK, f"{machine.system} on {machine.architecture}")
    if target.known_as:
        yield _called(kit, facts)
    if _is_jetson(kit) and kit.engine == "tensorrt":
        yield _jetpack(kit, facts)


def _is_jetson(kit: Kit) -> bool:
    return any("Jetson" in name for name in kit.target.known_as)


def _called(kit: Kit, facts: Facts) -> Finding:
    target, names = kit.target, [device.name for device in facts.machine.devices]
    if any(device.is_called(name) for device in facts.machine.devices for name in target.known_as):
        return Finding("device", OK, ", ".join(names))
    return _refused(
        "device",
        f"The kit is for '{target.name}' ({target.summary})",
        got=", ".join(names) or "no accelerator that this system tells of",
        allowed=", ".join(target.known_as),
        do="Make a kit for this device where the bundle is: edgediffusion kit BUNDLE --target NAME -o KIT.tar",
    )


def _jetpack(kit: Kit, facts: Facts) -> Finding:
    """By the release of Jetson Linux; what JetPack brought is TensorRT, whose own version is looked at too."""
    wanted = kit.target.libraries.get("tensorrt", "")
    enough = next(((number, name) for number, name, version in JETPACKS if targets.in_range(version, wanted)), None)
    release = tuple(int(part) for part in re.findall(r"\d+", facts.machine.release))
    if not release or enough is None:
        return _warning("JetPack", "The release of Jetson Linux is not known", got=facts.machine.release or "no /etc/nv_tegra_release")
    if release < enough[0]:
        known = [name for number, name, _ in JETPACKS if number <= release]
        return _refused(
            "JetPack",
            f"This JetPack is too old: its TensorRT is not {wanted}",
            got=f"Jetson Linux {facts.machine.release}, JetPack {known[-1] if known else 'older than 4'}",
            allowed=f"JetPack {enough[1]} or newer, Jetson Linux R{'.'.join(map(str, enough[0]))} or newer",
            do="Update the device: https://docs.nvidia.com/jetson/jetpack/install-setup/",
        )
    return Finding("JetPack", OK, f"Jetson Linux {facts.machine.release}")


def _library(kit: Kit, facts: Facts) -> Iterator[Finding]:
    engine, wanted = kit.engine, kit.target.libraries.get(kit.engine, "")
    jetson = "JetPack brings it: sudo apt install nvidia-jetpack. A virtual environment sees it if it was made with --system-site-packages."
    if not facts.library:
        do = jetson if engine == "tensorrt" and _is_jetson(kit) else f"pip install 'edgediffusion[{_extra(engine)}]'"
        yield _refused(engine, f"{engine} cannot be used by this Python", got=facts.library_problem, allowed=wanted or "any version", do=do)
    elif not targets.in_range(facts.library, wanted):
        newer = not targets.in_range(facts.library, ",".join(part for part in wanted.split(",") if "<" in part))
        yield _refused(
            engine,
            f"{engine} is too {'new' if newer else 'old'} for this kit",
            got=facts.library,
            allowed=wanted,
            do="Install one of these versions, or make the kit for a target of your own that takes this one: docs/targets.md.",
        )
    else:
        yield Finding(engine, OK, facts.library)
    if hasattr(find("runtimes.engines", engine), "compute_capability"):
        yield from _gpu(kit, facts)


def _gpu(kit: Kit, facts: Facts) -> Iterator[Finding]:
    wanted = kit.target.compute_capability
    if facts.compute_capability != wanted:
        yield _refused(
            "GPU",
            "The kit is for a GPU of another compute capability",
            got=facts.compute_capability or "no NVIDIA driver that answers",
            allowed=wanted,
            do="Make a kit for this device." if facts.compute_capability else "Install NVIDIA's driver, or see why it fails: sudo dmesg",
        )
    else:
        yield Finding("GPU", OK, f"compute capability {wanted}")
    if not facts.runner:
        yield _refused(
            "cuda-python",
            "Engines are run through cuda-python, which this Python lacks",
            got="no Python module 'cuda.bindings'",
            allowed="cuda-python of the CUDA version that is here, as 12.6",
            do="pip install 'cuda-python>=12.6,<13'",
        )
    else:
        yield Finding("cuda-python", OK, "installed")


def _extra(engine: str) -> str:
    return {"onnxruntime": "cpu", "tensorrt-rtx": "rtx"}.get(engine, engine)


def weights_bytes(bundle: Bundle) -> dict[str, int]:
    """Bytes of the files of each component."""
    return {c.name: bundle.size_bytes(f"{c.model.rsplit('/', 1)[0]}/") for c in bundle.components}


def _room(kit: Kit, facts: Facts) -> Iterator[Finding]:
    weights = weights_bytes(kit.bundle())
    largest = max(weights, key=lambda name: weights[name])
    yield _memory(facts, largest, weights[largest])
    yield _swap(facts, round(_PER_WEIGHT * weights[largest]) + _LEAST_BYTES)
    if facts.power_mode:
        yield Finding("power mode", OK, f"{facts.power_mode}: times are those of this mode. sudo nvpmodel -m NUMBER changes it")
    needed = round(_DISK * sum(weights.values())) + _DISK_BYTES
    if facts.free_bytes < needed:
        yield _refused(
            "disk",
            "The disk has too little room for the engines",
            got=size(facts.free_bytes),
            allowed=f"{size(needed)} or more",
            do="Free some space, or name another disk with --work and --output.",
        )
    else:
        yield Finding("disk", OK, f"{size(facts.free_bytes)} free")


def _memory(facts: Facts, largest: str, weights: int) -> Finding:
    """Refused where the weights and the engine made of them alone do not fit, swap included; a warning where it may not do."""
    available, least, usual = facts.available_bytes, 2 * weights, round(_PER_WEIGHT * weights) + _LEAST_BYTES
    swap = sum(s.bytes for s in facts.swaps if not s.compressed)
    do = "Close what is not needed, the desktop above all: sudo systemctl isolate multi-user.target."
    if not available:
        return _warning("memory", "The system does not tell how much memory is available", got="no /proc/meminfo")
    if available + swap < least:
        return _refused(
            "memory",
            f"There is too little memory to build '{largest}'",
            got=f"{size(available)} available, {size(swap)} of swap",
            allowed=f"{size(least)} or more",
            do=f"{do} Or add swap on a disk.",
        )
    if available < usual:
        return _warning(
            "memory", f"Building '{largest}' may take more memory than is available", got=f"{size(available)} of {size(usual)}", do=do
        )
    return Finding("memory", OK, f"{size(available)} of {size(facts.memory_bytes)} available")


def _swap(facts: Facts, needed: int) -> Finding:
    """Where memory is plenty, none is needed."""
    add = "Add some: sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
    if facts.available_bytes >= needed or any(not swap.compressed for swap in facts.swaps):
        return Finding("swap", OK, ", ".join(f"{s.name} {size(s.bytes)}" for s in facts.swaps) or "none, and none is needed")
    if facts.swaps:
        got = ", ".join(f"{s.name} {size(s.bytes)}" for s in facts.swaps)
        return _warning("swap", "Swap is compressed memory (zram) only, which weights do not get smaller by", got=got, do=add)
    return _warning("swap", "There is no swap: if memory runs out the system ends the build", do=add)
