"""The same picture asked of a bundle and of diffusers' pipeline, whatever that begins with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgediffusion.bundle import Sampling
from edgediffusion.export.families import flux
from edgediffusion.export.quiet import quiet
from edgediffusion.registry import require
from edgediffusion.runtimes.pipeline import Pipeline

STRENGTH = 0.6
_COARSE = (4, 6)  # pixels of which smooth pictures are made


@dataclass(frozen=True)
class Run:
    """How pictures are drawn: ``sampler`` is a name of its registry."""

    sampler: str
    steps: int
    guidance_scale: float
    seed: int


@dataclass(frozen=True)
class Asked:
    """Arguments of one picture: of ``runtimes.Request``, and of the pipeline of diffusers."""

    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]

    def draw(self, ours: Pipeline, theirs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Both pictures, [1, height, width, channels] in 0..1."""
        mine = ours(**self.ours).pixels
        with quiet():
            other = theirs(**self.theirs).images
        return mine, np.asarray(other).reshape(mine.shape)


def takes_prompt(theirs: Any) -> bool:
    return "prompt" in _parameters(theirs)


def asked(theirs: Any, sampling: Sampling, prompt: str, run: Run) -> Asked:
    """What to call both with: all that a pipeline of diffusers cannot do without, as its signature says."""
    ours: dict[str, Any] = {"num_inference_steps": run.steps, "seed": run.seed, "sampler": run.sampler}
    other: dict[str, Any] = {"num_inference_steps": run.steps, "output_type": "np", "generator": torch.Generator().manual_seed(run.seed)}
    taken = _parameters(theirs)
    both: dict[str, Any] = {"prompt": prompt, "guidance_scale": run.guidance_scale, "class_labels": [len(prompt) % (sampling.classes or 1)]}
    size = (sampling.height, sampling.width)
    led = "controlnet" in theirs.components
    if "image" in taken and not (led and "control_image" not in taken):
        both["image"] = smooth_picture(run.seed, size)
        both["strength"] = STRENGTH
    if "mask_image" in taken:
        both["mask_image"] = _right_half(size)
    both |= {"height": sampling.height, "width": sampling.width}
    both = {name: value for name, value in both.items() if name in taken}
    if "use_resolution_binning" in taken:
        other["use_resolution_binning"] = False  # sizes are drawn as asked, not the nearest of a table
    if "guidance_embeds" in getattr(theirs.components.get("transformer"), "config", {}):  # its default is that of dev
        other["max_sequence_length"] = flux.t5_tokens(theirs.transformer.config)
    if "class_labels" in taken and "guidance_scale" not in taken:
        both.pop("class_labels")
    if led:
        picture = _control_pictures(theirs, run.seed, size)
        ours["control_image"], other["control_image" if "control_image" in taken else "image"] = picture, picture
        other["controlnet_conditioning_scale"] = 1.0  # not all of them have it by default
    if "use_clipped_model_output" in taken and sampling.clip is not None:
        other["use_clipped_model_output"] = True  # as the loop here does: what is left of x_t is the noise beside a clipped x_0
    return Asked({**both, **ours}, {**both, **other})


def smooth_picture(seed: int, size: tuple[int, int]) -> Any:
    """A Pillow image of ``size`` (height, width) whose colours flow into each other."""
    image = require("PIL.Image", extra="cpu", purpose="Making a picture")
    rough = np.random.default_rng(seed).integers(0, 256, (*_COARSE, 3), dtype=np.uint8)
    return image.fromarray(rough).resize(size[::-1], image.Resampling.BICUBIC)


def _right_half(size: tuple[int, int]) -> Any:
    """A mask: what is right of the middle is painted anew."""
    image = require("PIL.Image", extra="cpu", purpose="Making a mask")
    levels = np.zeros(size, np.uint8)
    levels[:, size[1] // 2 :] = 255
    return image.fromarray(levels)


def _control_pictures(theirs: Any, seed: int, size: tuple[int, int]) -> Any:
    """One for the ControlNet, or a list with one for each."""
    count = len(getattr(theirs.controlnet, "nets", ()))
    return [smooth_picture(seed + k, size) for k in range(1, count + 1)] if count else smooth_picture(seed + 1, size)


def _parameters(theirs: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(theirs).__call__).parameters
