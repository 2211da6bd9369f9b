"""Other quantizers, each as its own documents use it, in an environment of their own: what other_quantizers.py has run there.

    python benchmarks/_peers.py TOOL MODEL.onnx ITEMS.npz OUTPUT

MODEL is a plain float32 graph, ITEMS the network's inputs by name, [items, ...], OUTPUT an .onnx file, or .xml for OpenVINO.
The last line printed is JSON: the tool's version, the seconds it took. Only the environment's packages are imported here, and
none of edgediffusion.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# nvidia-modelopt's extra [onnx] would bring ONNX Runtime's and CuPy's CUDA builds; these are the others of its packages.
# torch's version is the one whose CPU build the benchmarks' own environment has.
PACKAGES = (
    "onnxruntime==1.31.1",
    "openvino==2026.4.1",
    "nncf==3.4.0",
    "nvidia-modelopt==0.47.0",
    "torch==2.13.0",
    "onnx==1.21.0",
    "onnxscript==0.7.2",
    "onnx-graphsurgeon==0.6.1",
    "onnxconverter-common==1.16.0",
    "onnxslim==0.1.98",
    "polygraphy==0.53.6",
    "cppimport==26.4.17",
    "lief==1.0.0",
    "ml_dtypes==0.6.0",
    "sympy==1.14.0",
)

Feeds = list[dict[str, np.ndarray]]


def environment(folder: Path) -> Path:
    """The Python of the virtual environment in ``folder``, which is made where it is not there (a few minutes, 1.6 GB)."""
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (folder / "done").touch()
    return python


def onnxruntime_static(model: str, feeds: Feeds, output: str, setting: str) -> str:
    """onnxruntime.quantization: its page's recipe, preprocessing and QDQ, with the types that it recommends for x86-64.

    ``setting`` is a calibration method, and the operators to quantize; all that it can where there are none.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._items = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._items, None)

    method, *operators = setting.split()
    # Its symbolic shape inference fails at the Attention node of opset 23 (an assertion); ONNX's own does not.
    prepared = f"{output}.prepared.onnx"
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        output,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=operators or None,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
    )
    Path(prepared).unlink()
    return version("onnxruntime")


def nncf_on(model: str, feeds: Feeds, output: str, kind: str) -> str:
    """nncf.quantize on an OpenVINO model or an ONNX one, with the preset mixed; a transformer is named as one."""
    import nncf

    options: dict[str, Any] = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(feeds)}
    if "clip_text_embeds" in feeds[0]:  # the diffusion transformer's
        options["model_type"] = nncf.ModelType.TRANSFORMER
    if kind == "openvino":
        import openvino

        quantized = nncf.quantize(openvino.Core().read_model(model), nncf.Dataset(feeds), **options)
        openvino.save_model(quantized, output, compress_to_fp16=False)
    else:
        import onnx

        onnx.save(nncf.quantize(onnx.load(model), nncf.Dataset(feeds), **options), output)
    return version("nncf")


def modelopt(model: str, feeds: Feeds, output: str, method: str) -> str:
    """modelopt.onnx.quantization: int8, where it is not told otherwise; what stays float is float32, since this runs on a CPU."""
    from modelopt.onnx.quantization import quantize

    shapes = ",".join(f"{name}:{'x'.join(map(str, array.shape))}" for name, array in feeds[0].items())
    quantize(
        model,
        quantize_mode="int8",
        calibration_method=method,
        calibration_data={name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]},
        calibration_shapes=shapes,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=output,
    )
    return version("nvidia-modelopt")


TOOLS: dict[str, tuple[Callable[[str, Feeds, str, str], str], str]] = {
    "onnxruntime-minmax": (onnxruntime_static, "MinMax"),
    "onnxruntime-layers": (onnxruntime_static, "MinMax Conv MatMul Gemm"),
    "onnxruntime-percentile": (onnxruntime_static, "Percentile"),
    "nncf-openvino": (nncf_on, "openvino"),
    "nncf-onnx": (nncf_on, "onnx"),
    "modelopt-entropy": (modelopt, "entropy"),
    "modelopt-max": (modelopt, "max"),
}


def main() -> None:
    tool, model, items, output = sys.argv[1:]
    with np.load(items) as arrays:
        named = dict(arrays)
    feeds = [dict(zip(named, parts, strict=True)) for parts in zip(*named.values(), strict=True)]
    function, setting = TOOLS[tool]
    started = time.perf_counter()
    used = function(model, feeds, output, setting)
    print(json.dumps({"version": used, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
