"""Export: a trained pipeline in diffusers' folder format becomes a bundle of ONNX graphs.

    source.py       the folder as it is: index, configurations, network classes
    checkpoint.py   where in which file each tensor lies; safetensors headers, never the tensors themselves
    naming.py       which tensor of the file is which parameter of the network
    families/       one file per pipeline class: its networks as graphs with roles, and its sampling facts
    text_encoders.py, autoencoder.py   the graphs that families share
    tokenizers.py   tokenizers as a runtime reads them
    quiet.py        silence for libraries that talk on stderr
    marks.py        tensors inside a network that its graph is cut at
    skip_cuts.py, block_cuts.py        where UNets and transformers can be cut
    cut_graphs.py   parts of a graph as graphs of their own
    skeleton.py     a network without weights
    trace.py        a skeleton becomes an ONNX graph
    simplify.py     the graph made small, and free of the machine that made it
    group_norm.py   a node that CPU engines lack, written with nodes that they have
    store.py        a safetensors file written one tensor at a time
    weights.py      the graph's weights: linked, copied, or converted one tensor at a time
    schedule.py     a diffusers scheduler as data
    pipeline.py     all of it, for a whole folder
    validate.py     how far a bundle is from its source

This file loads nothing heavy: the command line asks it for help texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError
from edgediffusion.files import new_folder
from edgediffusion.registry import require

DTYPES = ("float32", "float16")
OPSETS = range(18, 24)
WEIGHTS = ("link", "copy")

Progress = Callable[[str, float], None]


def export(
    source: str | Path,
    output: str | Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    opset: int = 23,
    weights: Literal["link", "copy"] = "link",
    cuts: Sequence[str] = (),
    row_timesteps: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a diffusers folder as a bundle; the networks are traced without ever loading their weights.

    ``dtype`` is what the graphs compute in. Weights stay in the source's own safetensors files, which are linked or
    copied into the bundle; where they are wider than ``dtype`` they are converted into a new file, one tensor at a
    time. Weights that are narrower stay as they are, with a Cast node behind each. ``cuts`` are modules of the denoiser, such as
    ``up_blocks.2.resnets.1`` or ``transformer_blocks.0``: for each the bundle has graphs of the denoiser's parts (docs/caching.md).
    With ``row_timesteps`` the rows of a call of the denoiser may be at different time steps, as those of a stream are (docs/streaming.md);
    other tools expect one time step for all. ``progress`` is called with what is being done and the part of all that is done, 0 to 1.

    Raises:
        SourceError: the source cannot be read as a pipeline that is known here; the message says what to do.
        OutputError: ``output`` exists, or cannot be written. ArgumentError: an unknown dtype, opset, way to take weights or cut.
        MissingExtra: a library of the extra ``export`` is not installed.
    """
    for what, value, known in (("dtype", dtype, DTYPES), ("opset", opset, OPSETS), ("way to take weights", weights, WEIGHTS)):
        if value not in known:
            raise ArgumentError(f"No such {what}", got=repr(value), allowed=", ".join(map(str, known)))
    with new_folder(Path(output)) as folder:
        for module in ("torch", "diffusers", "transformers", "onnxscript", "onnx_ir", "safetensors"):
            require(module, extra="export", purpose="Exporting a pipeline")
        from edgediffusion.export.pipeline import write_bundle
        from edgediffusion.export.source import Source

        origin = Source.open(Path(source))
        options = {"dtype": dtype, "opset": opset, "link": weights == "link", "cuts": tuple(cuts), "row_timesteps": row_timesteps}
        write_bundle(origin, folder, **options, progress=progress)  # type: ignore[arg-type]
    return Bundle.open(output, verify=False)
