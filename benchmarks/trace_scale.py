"""Seconds and memory to trace networks of real size, to the optimized graph, without any weights.

    python benchmarks/trace_scale.py                     all of _shapes.py, a process each
    python benchmarks/trace_scale.py flux-dev transformer

Weights add nothing but links (export_scale.py, which writes whole bundles): graphs point into the checkpoint's own files.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _shapes import SHAPES, write_configurations


def traced(shape: str, component: str) -> dict[str, object]:
    """Trace all graphs of one network; memory is the peak of this process, of which ``libraries`` was there before."""
    import onnx_ir as ir

    from edgediffusion.export.families import family_of
    from edgediffusion.export.pipeline import _graph
    from edgediffusion.export.skeleton import skeleton
    from edgediffusion.export.source import Source

    import torch  # isort: skip

    with tempfile.TemporaryDirectory() as folder:
        write_configurations(SHAPES[shape](), Path(folder) / "source")
        source = Source.open(Path(folder) / "source")
        parts = [part for part in family_of(source)[1].parts(source) if part.network == component]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = []
        for part in parts:
            started, processor = time.perf_counter(), time.process_time()
            bones = skeleton(lambda part=part: source.network(part.network), torch.float32)
            parameters = sum(p.numel() for p in bones.network.parameters())
            model = _graph(part, bones, 23, ())
            taken = (time.perf_counter() - started, time.process_time() - processor)
            for name, value in model.graph.initializers.items():
                if value.const_value is None:
                    value.const_value = ir.ExternalTensor("w", 0, 0, value.dtype, shape=value.shape, name=name)
            size = len(ir.to_proto(model).SerializeToString())
            found.append({"graph": part.name, "billion": round(parameters / 1e9, 2), "seconds": round(taken[0], 1)})
            found[-1] |= {"processor_seconds": round(taken[1], 1), "nodes": len(model.graph), "graph_bytes": size}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"shape": shape, "graphs": found, "peak_mb": round(peak / 1024), "libraries_mb": round(before / 1024)}


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(traced(sys.argv[1], sys.argv[2])))
        return
    for shape, described in SHAPES.items():
        for component in (name for name in described() if name not in ("_class_name", "scheduler")):
            subprocess.run([sys.executable, __file__, shape, component], check=True)


if __name__ == "__main__":
    main()
