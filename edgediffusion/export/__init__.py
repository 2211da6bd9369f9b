"""Export: a trained pipeline in diffusers' folder format becomes a bundle of ONNX graphs.

    source.py       the folder as it is: index, configurations, network classes
    checkpoint.py   where in which file each tensor lies; safetensors headers, never the tensors themselves
    naming.py       which tensor of the file is which parameter of the network
    families/       one file per pipeline class: its networks as graphs with roles, and its sampling facts
    text_encoders.py, autoencoder.py   the graphs that families share
    conditional_unet.py, plain_unet.py, control.py, vq_autoencoder.py      those that UNet families share
    positions.py, cross_attention.py   places of tokens, and masks, in the form that engines take
    named.py        networks that take as many tensors as a graph has inputs, by name
    tokenizers.py   tokenizers as a runtime reads them
    quiet.py        silence for libraries that talk on stderr
    marks.py        tensors inside a network that its graph is cut at
    latent_transformer.py     what families of transformers on latents share
    skip_cuts.py, block_cuts.py        where UNets and transformers can be cut
    cut_graphs.py   parts of a graph as graphs of their own
    skeleton.py     a network without weights
    trace.py, translate.py             a skeleton becomes an ONNX graph
    simplify.py     the graph made small, and free of the machine that made it
    rule_gates.py   the optimizer's rules, tried where they can begin
    sample_sizes.py sizes that are read off the sample and not off residuals
    group_norm.py   a node that CPU engines lack, written with nodes that they have
    bfloat16.py     float32 at the doors of a graph that computes in bfloat16
    kept.py         modules that stay in float32
    lora.py, lora_names.py             LoRA files, and how they call a network's modules
    store.py        a safetensors file written one tensor at a time
    weights.py      the graph's weights: linked, copied, converted or changed some rows at a time
    hashing.py      sha256 beside other work
    estimate.py     what an export will read, write and need
    schedule.py     a diffusers scheduler as data
    pipeline.py     all of it, for a whole folder
    modules.py      any torch module as a bundle of one graph
    imported.py     ONNX files that somebody else exported
    bare_sampling.py                   facts about sampling from a scheduler alone
    probe.py        one run of what came from outside
    pictures.py     the same picture asked of a bundle and of diffusers
    validate.py     how far a bundle is from its source

This file loads nothing heavy: the command line asks it for help texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from edgediffusion import targets
from edgediffusion.bundle import Bundle, Sampling
from edgediffusion.errors import ArgumentError
from edgediffusion.files import new_folder
from edgediffusion.registry import require

if TYPE_CHECKING:
    from edgediffusion.export.estimate import Estimate
    from edgediffusion.export.imported import Imported

_NONE: Mapping[str, Any] = MappingProxyType({})
DTYPES = ("float32", "float16", "bfloat16")
OPSETS = range(18, 24)
WEIGHTS = ("link", "copy")

Progress = Callable[[str, float], None]
Announce = Callable[["Estimate"], None]
Lora = tuple[str | Path, float]  # a file, and the scale that it is fused with


@dataclass(frozen=True)
class Settings:
    """The arguments of ``export``, checked; ``link`` says whether weights are linked or copied."""

    dtype: str
    opset: int
    link: bool
    cuts: tuple[str, ...]
    row_timesteps: bool
    keep_float32: tuple[str, ...]
    loras: tuple[Lora, ...]


def export(
    source: str | Path,
    output: str | Path,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    opset: int | None = None,
    weights: Literal["link", "copy"] = "link",
    cuts: Sequence[str] = (),
    row_timesteps: bool = False,
    keep_float32: Sequence[str] = (),
    loras: Sequence[Lora] = (),
    target: str | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Bundle:
    """Export a diffusers folder as a bundle; the networks are traced without ever loading their weights.

    ``dtype`` is what the graphs compute in, except for the modules in ``keep_float32``: ``vae`` for a whole network,
    ``vae.decoder.up_blocks.3`` for one of its modules. Weights stay in the source's own safetensors files, which are linked or
    copied into the bundle; where they are wider than ``dtype`` they are converted into a new file, some rows at a
    time. Weights that are narrower stay as they are, with a Cast node behind each. ``loras`` are fused: a LoRA's file and its scale
    each; only weights that they change are written anew. ``cuts`` are modules of the denoiser, such as
    ``up_blocks.2.resnets.1`` or ``transformer_blocks.0``: for each the bundle has graphs of the denoiser's parts (docs/caching.md).
    With ``row_timesteps`` the rows of a call of the denoiser may be at different time steps, as those of a stream are (docs/streaming.md);
    other tools expect one time step for all. ``target`` is a device that the bundle shall be for: what it cannot hold is refused, and
    ``opset`` is by default the newest one that it reads, at most 23. ``announce`` is called with an ``Estimate`` before the work,
    ``progress`` with what is being done and the part of all that is done, 0 to 1.

    Raises:
        SourceError: the source cannot be read as a pipeline that is known here, or a LoRA does not fit it; the message says what to do.
        OutputError: ``output`` exists, or cannot be written, or its disk has too little room.
        ArgumentError: an unknown dtype, opset, way to take weights, module or cut, or a dtype that the target does not have.
        MissingExtra: a library of the extra ``export`` is not installed.
    """
    opset = _opset(opset, dtype, target)
    for what, value, known in (("dtype", dtype, DTYPES), ("opset", opset, OPSETS), ("way to take weights", weights, WEIGHTS)):
        if value not in known:
            raise ArgumentError(f"No such {what}", got=repr(value), allowed=", ".join(map(str, known)))
    settings = Settings(dtype, opset, weights == "link", tuple(cuts), row_timesteps, tuple(keep_float32), tuple(loras))
    with new_folder(Path(output)) as folder:
        for module in ("torch", "diffusers", "transformers", "onnxscript", "onnx_ir", "safetensors"):
            require(module, extra="export", purpose="Exporting a pipeline")
        from edgediffusion.export.pipeline import write_bundle
        from edgediffusion.export.source import Source

        write_bundle(Source.open(Path(source)), folder, settings, progress=progress, announce=announce)
    return Bundle.open(output, verify=False)


def export_module(
    module: Any,
    inputs: Mapping[str, Any],
    output: str | Path,
    *,
    role: str = "denoise",
    name: str = "",
    outputs: Sequence[str] = (),
    axes: Mapping[str, Mapping[int, str]] = _NONE,
    multiples: Mapping[str, int] = _NONE,
    rename: Mapping[str, str] = _NONE,
    sampling: Sampling | None = None,
    opset: int = 23,
    progress: Progress | None = None,
) -> Bundle:
    """Export any ``torch.nn.Module`` as a bundle of one graph, in the dtype that the module has.

    ``inputs`` are example tensors by the names of the arguments of its ``forward``; ``rename`` gives those of them another name in
    the bundle that the role wants so: a ``denoise`` graph takes ``sample`` and ``timestep`` (a number, or one for each row) beside
    its conditions and gives ``out_sample``, a ``decode`` graph takes ``latent_sample`` and gives ``sample``. ``outputs`` names what
    it returns, in order. ``axes`` are the free axes of an argument by place, ``{"x": {0: "batch", 1: "horizon"}}``; of one that
    it does not have it is the first, ``batch``. ``multiples`` says of which number an axis is a multiple, ``{"horizon": 4}``.
    ``sampling`` is what a loop must know, see ``bare_sampling``; a denoiser is then run by ``Pipeline.denoise``, and a one-step
    model in one step. The graph is run once and compared with the module.

    Raises:
        SourceError: the module cannot be traced, or its graph computes something else. OutputError: see ``export``.
        ArgumentError: inputs, outputs or axes that do not fit the module or the role. MissingExtra: see ``export``.
    """
    _refuse_sampling(role, sampling)
    if opset not in OPSETS:
        raise ArgumentError("No such opset", got=opset, allowed=", ".join(map(str, OPSETS)))
    with new_folder(Path(output)) as folder:
        for library in ("torch", "onnxscript", "onnx_ir"):
            require(library, extra="export", purpose="Exporting a module")
        from edgediffusion.export.modules import Interface, write_module
        from edgediffusion.export.probe import output_of

        interface = Interface(dict(inputs), tuple(outputs) or output_of(role), axes, multiples, rename)
        write_module(module, interface, folder, role=role, name=name or role, sampling=sampling, opset=opset, progress=progress)
    return Bundle.open(output, verify=False)


def import_onnx(
    models: Sequence[Imported], output: str | Path, *, sampling: Sampling | None = None, link: bool = True, progress: Progress | None = None
) -> Bundle:
    """Take ONNX files that somebody else exported as a bundle: a denoiser, a decoder, or both; see ``imported.Imported``.

    Names and axes are mapped, what tells about the machine that made a file is taken out, external weights are linked or copied,
    and every graph is run once. ``sampling`` is what a loop must know, see ``bare_sampling``.

    Raises:
        SourceError: a file is missing, damaged, or has operators that engines here do not know. EngineError: it cannot be run.
        ArgumentError: names, axes or shapes that do not fit the role. OutputError: see ``export``. MissingExtra: see ``export``.
    """
    if not models:
        raise ArgumentError("There is no ONNX file to import", do="Give one or more.")
    with new_folder(Path(output)) as folder:
        require("onnx_ir", extra="export", purpose="Importing ONNX files")
        from edgediffusion.export.imported import write_imported

        write_imported(models, folder, sampling=sampling, link=link, progress=progress)
    return Bundle.open(output, verify=False)


def _refuse_sampling(role: str, sampling: Sampling | None) -> None:
    if role == "denoise" and sampling is None:
        raise ArgumentError(
            "A denoiser needs the facts about sampling", do="Make them with edgediffusion.export.bare_sampling.sampling_of."
        )


def _opset(opset: int | None, dtype: str, target: str | None) -> int:
    """The opset to write; a target must have the dtype, and read the opset."""
    newest = OPSETS[-1]
    if target is None:
        return newest if opset is None else opset
    device = targets.load(target)
    if dtype not in device.formats:
        raise ArgumentError(f"The target '{device.name}' does not compute in {dtype}", allowed=", ".join(device.formats), do=_other(device))
    if opset is not None and opset > device.opset:
        raise ArgumentError(f"The target '{device.name}' reads older opsets", got=opset, allowed=f"{OPSETS[0]} to {device.opset}")
    return min(newest, device.opset) if opset is None else opset


def _other(device: targets.Target) -> str:
    floats = [name for name in DTYPES if name in device.formats]
    return f"Export in {' or '.join(floats)}." if floats else "Take another target."
