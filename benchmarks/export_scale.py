"""What exporting pipelines of real sizes costs: python benchmarks/export_scale.py [ROWS] [--folder FOLDER] [--peers FOLDER]

Checkpoints of the right shapes (_shapes.py): random numbers for Stable Diffusion 1.5, holes in the file for the others. Each row is
a process of its own. Seconds are those of the export, after the imports, which are said beside; peak memory is VmHWM; written are the
files that no other folder shares. The estimate is what the export itself said before it began.

    sd15             text encoder, UNet, VAE decoder and encoder from float32 files
    sd15-fp16        the same, cast to float16
    sdxl, sd35-medium, sana-1.6b, pixart-alpha, dit-xl-2, flux-dev      the denoiser
    t5-xxl           the text encoder of Stable Diffusion 3 and FLUX.1
    sha256           reading and hashing the files of sd15 alone, which is a part of its seconds
    optimum-onnx, optimum-intel      sd15 by these exporters, with --peers, in environments that are made there (11 GB of memory)

What was made is kept in --folder, and results/export_scale.json keeps the rows of earlier runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
from _report import RESULTS, save
from _shapes import make

from edgediffusion import text

SD15 = ("text_encoder", "unet", "vae")
# A row: the pipeline, the networks that have weights, the parts to export (all of them where none is named), the dtype.
EXPORTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str]] = {
    "sd15": ("sd15", SD15, (), "float32"),
    "sd15-fp16": ("sd15", SD15, (), "float16"),
    "sdxl": ("sdxl", ("unet",), ("unet",), "float32"),
    "sd35-medium": ("sd35-medium", ("transformer",), ("transformer",), "float32"),
    "sana-1.6b": ("sana-1.6b", ("transformer",), ("transformer",), "float32"),
    "pixart-alpha": ("pixart-alpha", ("transformer",), ("transformer",), "float32"),
    "dit-xl-2": ("dit-xl-2", ("transformer",), ("transformer",), "float32"),
    "flux-dev": ("flux-dev", ("transformer",), ("transformer",), "float32"),
    "t5-xxl": ("sd35-medium", ("text_encoder_3",), ("text_encoder_3",), "float32"),
}
PEERS = {
    "optimum-onnx": (
        ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6", "diffusers==0.35.2", "accelerate"),
        ("export", "onnx", "--model", "SOURCE", "--task", "text-to-image", "OUTPUT"),
    ),
    "optimum-intel": (
        ("torch==2.13.0", "optimum-intel[openvino]==2.2.0", "transformers==4.57.6", "diffusers==0.35.2", "accelerate"),
        ("export", "openvino", "--model", "SOURCE", "--task", "text-to-image", "OUTPUT"),
    ),
}
HEAD = ("row", "parameters", "seconds", "peak MB", "written MB", "said seconds", "said MB", "imports s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=[*EXPORTS, "sha256"], help=f"of: {', '.join((*EXPORTS, 'sha256', *PEERS))}")
    parser.add_argument("--folder", type=Path, help="where sources and bundles are kept; a temporary folder by default")
    parser.add_argument("--peers", type=Path, help="where environments of other exporters are, or are made")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(export_one(given.one, given.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="export-scale-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        file = RESULTS / "export_scale.json"
        found = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}
        for row in given.rows:
            found[row] = measured(row, folder, given.peers)
            print(row, found[row], flush=True)
            save("export_scale", {"rows": found})
    print(text.table(HEAD, [(name, *(row.get(key, "") for key in _KEYS)) for name, row in found.items()]))
    print(fitted([row for name, row in found.items() if "weights" in row and EXPORTS[name][3] == "float32"]))


_KEYS = ("parameters", "seconds", "peak_mb", "written_mb", "said_seconds", "said_mb", "import_seconds")


def fitted(rows: list[dict[str, Any]]) -> str:
    """The constants of export/estimate.py, by least squares over exports that converted nothing."""
    if len(rows) < 3:
        return ""
    counts = np.array([[row["graphs"], row["weights"]] for row in rows], float)
    part_s, weight_s = np.linalg.lstsq(counts, np.array([row["seconds"] for row in rows]), rcond=None)[0]
    single = [row for row in rows if row["graphs"] == 1]
    sizes = np.array([[1.0, row["weights"]] for row in single])
    base, each = np.linalg.lstsq(sizes, np.array([row["peak_mb"] for row in single]), rcond=None)[0]
    graph = sum(row["written_mb"] for row in rows) / counts[:, 1].sum() * 1e6
    time_said = f"{part_s:.2f} s a graph, {weight_s:.4f} s a weight"
    return f"fitted: {time_said}; {base:.0f} MB and {each:.3f} MB a weight; {graph:.0f} B a weight written"


def measured(row: str, folder: Path, peers: Path | None) -> dict[str, Any]:
    if row in PEERS:
        return by_peer(row, folder, peers or folder / "peers")
    if row == "sha256":
        return hashes(source_of("sd15", SD15, folder)[0])
    name, networks, _, _ = EXPORTS[row]
    source, parameters = source_of(name, networks, folder)
    command = [sys.executable, __file__, "--one", row, "--folder", str(folder)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    written = sum(f.stat().st_size for f in (folder / f"{row}.bundle").rglob("*") if f.is_file() and f.stat().st_nlink == 1)
    shutil.rmtree(folder / f"{row}.bundle")
    read = sum(f.stat().st_size for f in source.rglob("*.safetensors"))
    return {"parameters": parameters, "read_mb": round(read / 1e6), "written_mb": round(written / 1e6, 1), **result}


def source_of(name: str, networks: tuple[str, ...], folder: Path) -> tuple[Path, int]:
    source = folder / f"{name}-{'-'.join(networks)}"
    known = folder / f"{source.name}.json"
    if not known.is_file():
        shutil.rmtree(source, ignore_errors=True)
        known.write_text(json.dumps(make(name, source, networks, holes=name != "sd15")), encoding="utf-8")
    return source, sum(json.loads(known.read_text(encoding="utf-8")).values())


def export_one(row: str, folder: Path) -> dict[str, Any]:
    """One export, here. Only the wanted parts of the family are made, as if it had no others."""
    started = time.perf_counter()
    from edgediffusion.export import export
    from edgediffusion.export.families import family_of
    from edgediffusion.export.source import Source

    imported = time.perf_counter()
    name, networks, wanted, dtype = EXPORTS[row]
    source = source_of(name, networks, folder)[0]
    if wanted:
        family: Any = family_of(Source.open(source))[1]
        parts = family.parts
        family.parts = lambda origin: tuple(part for part in parts(origin) if part.name in wanted)
    shutil.rmtree(folder / f"{row}.bundle", ignore_errors=True)
    said: list[Any] = []
    begun, cpu = time.perf_counter(), time.process_time()
    export(source, folder / f"{row}.bundle", dtype=dtype, announce=said.append)  # type: ignore[arg-type]
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "processor_seconds": round(time.process_time() - cpu, 1),
        "peak_mb": peak_mb(),
        "graphs": said[0].graphs,
        "weights": said[0].weights,
        "said_seconds": said[0].seconds,
        "said_mb": round(said[0].memory_bytes / 1e6),
        "said_written_mb": round(said[0].written_bytes / 1e6, 1),
        "import_seconds": round(imported - started, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


def hashes(source: Path) -> dict[str, Any]:
    from edgediffusion.files import sha256

    files = sorted(source.rglob("*.safetensors"))
    begun = time.perf_counter()
    for file in files:
        sha256(file)
    seconds = time.perf_counter() - begun
    read = sum(file.stat().st_size for file in files)
    return {
        "seconds": round(seconds, 1),
        "read_mb": round(read / 1e6),
        "mb_per_s": round(read / 1e6 / seconds),
        "load_average": round(os.getloadavg()[0], 1),
    }


def by_peer(row: str, folder: Path, environments: Path) -> dict[str, Any]:
    """Another exporter, in its own process with its children: their largest resident set."""
    packages, arguments = PEERS[row]
    home = environments / row
    if not (home / "done").exists():
        venv.create(home, with_pip=True, clear=True)
        pip = [home / "bin" / "python", "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", *packages], check=True)
        # Neither needs it, and PyPI's is built for CUDA: beside a torch for processors its import fails, and theirs with it.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
        (home / "done").touch()
    output = folder / f"{row}.output"
    shutil.rmtree(output, ignore_errors=True)
    named = {"SOURCE": str(source_of("sd15", SD15, folder)[0]), "OUTPUT": str(output)}
    command = [str(home / "bin" / "optimum-cli"), *(named.get(word, word) for word in arguments)]
    timed = (
        "import json, resource, subprocess, sys, time; t = time.perf_counter(); "
        "subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr); "
        "print(json.dumps([time.perf_counter() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))"
    )
    process = subprocess.run([sys.executable, "-c", timed, *command], stdout=subprocess.PIPE, text=True, check=True)
    seconds, kilobytes = json.loads(process.stdout.splitlines()[-1])
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    shutil.rmtree(output)
    return {"seconds": round(seconds, 1), "peak_mb": round(kilobytes * 1024 / 1e6), "written_mb": round(written / 1e6, 1)}


def peak_mb() -> int:
    """VmHWM of /proc/self/status: that of this process's own program, where getrusage counts its parent's before exec too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return round(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")) / 1e6)


if __name__ == "__main__":
    main()
