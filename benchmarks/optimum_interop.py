"""Does a bundle open in another project's pipeline class, and draw the same picture there?

    python benchmarks/optimum_interop.py [SOURCE] [--environment FOLDER]

Exports SOURCE, makes a virtual environment with optimum-onnx in it, and draws with its ORTStableDiffusionPipeline, or
what it calls SOURCE's class (ORTStableDiffusionXLPipeline), and with our runtime from the same starting noise. The
environment is made in a temporary folder, or in FOLDER, where it is found again by the next run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
from _report import REFERENCE, save

from edgediffusion.export import export
from edgediffusion.runtimes.pipeline import Pipeline

FASHION = REFERENCE / "fashion"
# optimum-onnx pins transformers below 5, and diffusers knows it by the version that was current then.
PACKAGES = ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6", "diffusers==0.35.2")
ALLOWED_255 = 2.0
THEIRS = """
import sys, json
import numpy as np, torch
from optimum import onnxruntime
bundle, noise, prompt, steps, scale, output = sys.argv[1:]
kind = json.load(open(bundle + "/model_index.json"))["_class_name"]
pipeline = getattr(onnxruntime, "ORT" + kind).from_pretrained(bundle)
pipeline.set_progress_bar_config(disable=True)
images = pipeline(
    prompt, num_inference_steps=int(steps), guidance_scale=float(scale), latents=torch.from_numpy(np.load(noise)), output_type="np",
    height=int(np.load(noise).shape[2]) * pipeline.vae_scale_factor, width=int(np.load(noise).shape[3]) * pipeline.vae_scale_factor,
).images
np.save(output, images)
"""


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with optimum-onnx."""
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (folder / "done").touch()
    return python


def compare(source: Path, python: Path, folder: Path, *, prompt: str, steps: int, scale: float) -> dict[str, object]:
    bundle = export(source, folder / "bundle")
    sampling = bundle.sampling
    assert sampling is not None
    size = (sampling.latent_channels, sampling.height // sampling.downsampling, sampling.width // sampling.downsampling)
    noise = np.random.default_rng(0).standard_normal((1, *size), dtype=np.float32)
    np.save(folder / "noise.npy", noise)
    arguments = [bundle.path, folder / "noise.npy", prompt, str(steps), str(scale), folder / "theirs.npy"]
    subprocess.run([python, "-c", THEIRS, *arguments], check=True, cwd=folder)
    ours = Pipeline.from_bundle(bundle)(prompt, num_inference_steps=steps, guidance_scale=scale, latents=noise).pixels
    theirs = np.load(folder / "theirs.npy").reshape(ours.shape)
    largest = float(np.abs(ours - theirs).max() * 255)
    return {"prompt": prompt, "steps": steps, "largest_255": largest, "allowed_255": ALLOWED_255, "packages": PACKAGES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", nargs="?", type=Path, default=FASHION, help="a diffusers folder; the shipped one by default")
    parser.add_argument("--environment", type=Path, help="where the virtual environment is, or is made and kept")
    parser.add_argument("--prompt", default="a black ankle boot")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = environment(arguments.environment or Path(folder) / "venv")
        found = compare(
            arguments.source, python, Path(folder), prompt=arguments.prompt, steps=arguments.steps, scale=arguments.guidance_scale
        )
    print(json.dumps(found, indent=1))
    save("optimum_interop" if arguments.source == FASHION else f"optimum_interop_{arguments.source.name}", found)
    return 0 if float(str(found["largest_255"])) <= ALLOWED_255 else 1


if __name__ == "__main__":
    sys.exit(main())
