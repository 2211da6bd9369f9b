"""Latents on their way from one network to another: a NumPy file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgediffusion.errors import ArgumentError
from edgediffusion.files import new_file

if TYPE_CHECKING:
    import numpy as np

SUFFIX = ".npy"


def write_latents(latents: np.ndarray, file: Path, *, replace: bool) -> None:
    import numpy as np

    with new_file(file, replace=replace) as partial, partial.open("wb") as opened:
        np.save(opened, latents, allow_pickle=False)


def read_latents(file: Path) -> np.ndarray:
    """
    Raises:
        ArgumentError: the file is missing, damaged or none of this kind.
    """
    import numpy as np

    try:
        with file.open("rb") as opened:
            return np.lib.format.read_array(opened, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ArgumentError(
            f"'{file}' cannot be read as latents", got=what, allowed=f"what 'edgediffusion run --denoising-end' wrote, a {SUFFIX} file"
        ) from None
