"""An int8 bundle with coarser weights, for benchmarks that want more error: python benchmarks/four_bits.py INT8 OUTPUT

Every int8 weight is rounded to the nearest of 15 levels, -7..7 times 127/7, of its channel's scale: what symmetric 4-bit
weights by channel would be, without any of the care that a 4-bit recipe takes.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np

from edgediffusion.bundle import Bundle, Component, write
from edgediffusion.files import link_or_copy, new_folder

LEVEL = 127 / 7


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    bundle = Bundle.open(sys.argv[1])
    with new_folder(Path(sys.argv[2])) as folder:
        (denoiser,) = bundle.with_role("denoise")
        for name in (n for n in bundle.files if not n.startswith("engines/")):
            if name.endswith(".safetensors") and _is_of(denoiser, name):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(_rounded((bundle.path / name).read_bytes()))
            else:
                link_or_copy(bundle.path / name, folder / name)
        write(folder, family=bundle.family, components=bundle.components, sampling=bundle.sampling, history=bundle.history)


def _is_of(component: Component, name: str) -> bool:
    return name.startswith(component.model.rsplit("/", 1)[0] + "/")


def _rounded(content: bytes) -> bytes:
    """The .safetensors file with its int8 matrices and kernels rounded in place; nothing moves, so graphs still find them."""
    raw = bytearray(content)
    (length,) = struct.unpack("<Q", raw[:8])
    for name, tensor in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__" and tensor["dtype"] == "I8" and len(tensor["shape"]) >= 2:
            start, end = (8 + length + offset for offset in tensor["data_offsets"])
            codes = np.frombuffer(raw, np.int8, end - start, start).astype(np.float64)
            raw[start:end] = (np.clip(np.round(codes / LEVEL), -7, 7) * LEVEL).round().astype(np.int8).tobytes()
    return bytes(raw)


if __name__ == "__main__":
    main()
