"""Something that a bundle can draw, whatever it wants to be told: for measuring how long that takes, and how much memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgediffusion.bundle import CONTROL, Bundle

_CHANNELS = 3


def any_picture(bundle: Bundle) -> dict[str, Any]:
    """Options of ``Request`` for one picture: an empty text, the first class, grey pictures to fill in and to be led by, as wanted."""
    found: dict[str, Any] = {}
    inputs = {spec.name: spec for component in bundle.with_role("denoise") for spec in component.inputs}
    if bundle.with_role("encode"):
        found["prompt"] = ""
    if "class_labels" in inputs:
        found["class_labels"] = 0
    facts = bundle.sampling
    channels = inputs["sample"].shape[1] if "sample" in inputs and len(inputs["sample"].shape) > 1 else None
    if facts is not None and isinstance(channels, int) and channels > facts.latent_channels:
        size = (facts.height, facts.width)
        found |= {"image": np.full((*size, _CHANNELS), 0.5, np.float32), "mask_image": np.ones(size, np.float32)}
    controls = len(bundle.with_role(CONTROL))
    if facts is not None and controls:
        grey = np.full((facts.height, facts.width, _CHANNELS), 0.5, np.float32)
        found["control_image"] = grey if controls == 1 else [grey] * controls
    return found
