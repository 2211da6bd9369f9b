"""Does correcting quantization noise in the sampler help? python benchmarks/corrections.py FLOAT NAME=QUANTIZED ...

FLOAT is the float bundle of the shipped ``fashion`` pipeline, each QUANTIZED a bundle made from it (``four_bits.py`` makes
one with much error of an int8 bundle). For every quantized
bundle and sampler each correction is measured on 256 pictures, by three in four of the pipeline's captions; then 64
pictures of the other captions, from other seeds, are drawn with and without it, and with the float bundle. Printed are
their PSNR to float's pictures, and the mean difference that the correction made, picture by picture, with the 95 %
interval of that mean (1.96 standard errors).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from _report import save

sys.path.insert(0, str(Path(__file__).parent.parent))

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.optimize.correct import correct
from edgediffusion.profiles.quality import psnr_db
from edgediffusion.runtimes import Pipeline
from training import data

STEPS, GUIDANCE, SAMPLES, PICTURES, BATCH, SEED = 20, 3.0, 256, 64, 16, 100_000
CAPTIONS = [c for label in range(10) for tone in (None, 0, 1, 2) for c in data.fashion_captions(label, tone)]
MEASURED_ON = [c for i, c in enumerate(CAPTIONS) if i % 4 != 3]
HELD_OUT = [c for i, c in enumerate(CAPTIONS) if i % 4 == 3]
METHODS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    "ddim": (
        ("ptqd", {}),
        ("d2-dpm", {"granularity": "channel"}),
        ("d2-dpm", {"granularity": "tensor"}),
        ("tac-qdm", {}),
    ),
    "euler-ancestral": (("ptqd", {}), ("d2-dpm", {"granularity": "channel"})),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float", type=Path)
    parser.add_argument("quantized", nargs="+", help="NAME=BUNDLE")
    arguments = parser.parse_args()
    reference = Bundle.open(arguments.float)
    rows: list[dict[str, Any]] = []
    errors: dict[str, Any] = {}
    for named in arguments.quantized:
        name, path = named.split("=", 1)
        bundle = Bundle.open(path)
        for sampler in METHODS:
            target = _draw(reference, sampler, None)
            plain = _psnr(_draw(bundle, sampler, None), target)
            rows.append(_row(name, sampler, "none", plain, plain))
            for label, correction in _corrections(bundle, reference, sampler):
                rows.append(_row(name, sampler, label, _psnr(_draw(bundle, sampler, correction), target), plain))
                print(rows[-1], flush=True)
                if not isinstance(correction, str) and "stochastic" not in label:  # which is measured as the other mode is
                    errors[f"{name} {sampler} {label}"] = correction.measurement["rms"]
    head = list(rows[0])
    print(text.table(head, [list(row.values()) for row in rows]))
    save("corrections", {"steps": STEPS, "guidance_scale": GUIDANCE, "samples": SAMPLES, "pictures": PICTURES, "rows": rows, "rms": errors})


def _corrections(bundle: Bundle, reference: Bundle, sampler: str) -> Any:
    """Labels and corrections; the two modes of D2-DPM share one measurement."""
    for method, options in METHODS[sampler]:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            settings = {"steps": STEPS, "guidance_scale": GUIDANCE, "samples": SAMPLES, "sampler": sampler}
            found = correct(
                bundle, reference, output=Path(folder) / "c.json", prompts=MEASURED_ON, method=method, options=options, **settings
            )
            print(f"measured {method} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        label = " ".join([method, *options.values()])
        yield label, found
        if method == "d2-dpm":
            yield f"{label} stochastic", replace(found, options={**asdict(found)["options"], "mode": "stochastic"})
    yield "qncd", "qncd"


def _draw(bundle: Bundle, sampler: str, correction: Any) -> np.ndarray:
    pipeline = Pipeline.from_bundle(bundle)
    parts = []
    for start in range(0, PICTURES, BATCH):
        each = range(start, start + BATCH)
        prompts, seeds = [HELD_OUT[i % len(HELD_OUT)] for i in each], [SEED + i for i in each]
        settings: Any = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "sampler": sampler, "seed": seeds}
        parts.append(pipeline(prompts, correction=correction, **settings).pixels)
    return np.concatenate(parts)


def _psnr(pixels: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.array([psnr_db(a, b) for a, b in zip(pixels, target, strict=True)])


def _row(bundle: str, sampler: str, label: str, psnr: np.ndarray, plain: np.ndarray) -> dict[str, Any]:
    gain = psnr - plain
    interval = 1.96 * gain.std(ddof=1) / np.sqrt(len(gain))
    return {
        "bundle": bundle,
        "sampler": sampler,
        "correction": label,
        "median PSNR dB": f"{np.median(psnr):.2f}",
        "lowest dB": f"{psnr.min():.2f}",
        "mean gain dB": "" if label == "none" else f"{gain.mean():+.3f} ± {interval:.3f}",
        "pictures nearer": "" if label == "none" else f"{int((gain > 0).sum())} of {len(gain)}",
    }


if __name__ == "__main__":
    main()
