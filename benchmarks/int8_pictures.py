"""Do int8 pictures still show what was asked for? python benchmarks/int8_pictures.py DEMO

DEMO is the folder that ``edgediffusion demo`` wrote. Draws 50 pictures of each of the ten things with its float and its
int8 bundle from the same noise, and prints how often an independently trained classifier sees the thing that was asked
for, and the PSNR of int8 to float pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from _report import save

sys.path.insert(0, str(Path(__file__).parent.parent))

from edgediffusion import text
from edgediffusion.profiles.quality import psnr_db
from edgediffusion.runtimes import Pipeline
from training import classifier, data

STEPS, GUIDANCE, EACH, BATCH = 20, 3.0, 50, 25


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    labels = np.repeat(np.arange(10), EACH)
    prompts = [f"a photo of {data.with_article(data.FASHION_NAMES[label][0])}" for label in labels]
    drawn = {name: _draw(Path(sys.argv[1]) / name, prompts) for name in ("float32", "int8")}
    network = classifier.load()
    rows = []
    for name, pixels in drawn.items():
        seen = classifier.evaluate(network, torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2 - 1)[0].numpy()
        rows.append([name, len(labels), f"{np.mean(seen == labels):.3f}"])
    print(text.table(["bundle", "pictures", "agreement"], rows))
    psnr = np.array([psnr_db(b, a) for a, b in zip(drawn["float32"], drawn["int8"], strict=True)])
    spread = {"median": float(np.median(psnr)), "p10": float(np.percentile(psnr, 10)), "min": float(psnr.min())}
    print("\nPSNR of int8 to float in dB: " + ", ".join(f"{k} {v:.1f}" for k, v in spread.items()))
    save("int8_pictures", {"steps": STEPS, "guidance_scale": GUIDANCE, "rows": rows, "psnr_db": spread})


def _draw(bundle: Path, prompts: list[str]) -> np.ndarray:
    pipeline = Pipeline.from_bundle(bundle)
    parts = [
        pipeline(prompts[i : i + BATCH], num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=1000 + i).pixels
        for i in range(0, len(prompts), BATCH)
    ]
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
