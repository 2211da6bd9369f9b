"""What exporting a pipeline costs: time, memory, and bytes written; a table, and results/export_memory.json.

    python benchmarks/export_memory.py [SOURCE]

Peak memory is the largest resident set of a fresh process, beside that of a process which only imports what export
imports; linked weights are not counted as written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _report import REFERENCE, save

from edgediffusion import text

FASHION = REFERENCE / "fashion"
IMPORTS = "import torch, diffusers, transformers, onnxscript, onnx_ir; from diffusers import StableDiffusionPipeline"
EXPORT = "from edgediffusion.export import export; export(sys.argv[1], sys.argv[2], dtype=sys.argv[3])"
MEASURED = """
import json, resource, sys, time
from pathlib import Path
started, cpu = time.perf_counter(), time.process_time()
{work}
print(json.dumps({{
    "seconds": round(time.perf_counter() - started, 2),
    "processor_seconds": round(time.process_time() - cpu, 2),
    "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
}}))
"""


def measure(work: str, *arguments: str) -> dict[str, Any]:
    process = subprocess.run([sys.executable, "-c", MEASURED.format(work=work), *arguments], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def written_bytes(bundle: Path) -> int:
    """Of the files that no other folder shares."""
    return sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file() and file.stat().st_nlink == 1)


def rows(source: Path) -> list[dict[str, Any]]:
    imports = measure(IMPORTS)
    found = [{"what": "import torch, diffusers, transformers, onnxscript", **imports, "over_imports_mb": 0.0, "written_mb": 0.0}]
    with tempfile.TemporaryDirectory(dir=source.parent, prefix=".export-memory-") as folder:  # links do not cross file systems
        for dtype in ("float32", "float16"):
            bundle = Path(folder) / dtype
            exported = measure(f"{IMPORTS}\n{EXPORT}", str(source), str(bundle), dtype)
            over = round(exported["peak_mb"] - imports["peak_mb"], 1)
            found.append(
                {"what": f"export {dtype}", **exported, "over_imports_mb": over, "written_mb": round(written_bytes(bundle) / 1e6, 3)}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", nargs="?", type=Path, default=FASHION, help="a diffusers folder; the shipped one by default")
    found = rows(parser.parse_args().source)
    print(text.table(list(found[0]), [list(row.values()) for row in found]))
    save("export_memory", {"rows": found})


if __name__ == "__main__":
    main()
