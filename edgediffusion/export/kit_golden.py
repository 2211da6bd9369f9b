"""Golden outputs: what each graph of a bundle gives for one call, by ONNX Runtime on this processor.

Inputs follow each other as in a picture: token ids of two prompts, the encoders' outputs to the denoiser, noise and a time step from the
middle for the rest. Of a quantized graph Q and DQ are computed as they stand, in float: kernels for integers round otherwise than other
engines do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.files import link_or_copy
from edgediffusion.registry import find
from edgediffusion.runtimes.graph import Graph, require_finite
from edgediffusion.runtimes.kit import GOLDEN, Golden, Progress
from edgediffusion.runtimes.onnx_header import read_header
from edgediffusion.runtimes.pick import call_inputs
from edgediffusion.runtimes.sizes import Sizes
from edgediffusion.runtimes.tokenizers import TextTokenizer

PROMPTS = ("", "a photo")
Arrays = Mapping[str, np.ndarray]

# By how much of its norm what an engine gives may be off: some ten times what two right ways to compute a graph were found to differ by, or
# inputs with the ten bits of TF32 from those with all (docs/kit.md; benchmarks/lowering.py). What is wrong is off by about 1.
TOLERANCES = {"float32": 0.01, "float16": 0.01, "bfloat16": 0.1, "int8": 0.1, "int4": 0.1, "fp8": 0.1, "fp4": 0.1}
_QUANTIZED = ("int8", "int4", "fp8", "fp4")  # in the order in which a graph is named after them


def write_golden(source: Bundle, folder: Path, sizes: Sizes, progress: Progress) -> dict[str, Golden]:
    """Write ``golden/<component>.npz`` of every component into the kit in ``folder``; ``source`` is the bundle as it was before lowering.

    Raises:
        EngineError: ONNX Runtime cannot run a graph, or it gives numbers that are not finite.
    """
    (folder / GOLDEN).mkdir()
    found = {}
    for at, (name, (feeds, outputs)) in enumerate(golden_inputs(source, sizes, folder / GOLDEN, progress)):
        file, precision = f"{GOLDEN}/{name}.npz", precision_of(source, source.component(name))
        arrays = {**{f"in.{n}": a for n, a in feeds.items()}, **{f"out.{n}": a for n, a in outputs.items()}}
        with open(folder / file, "wb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]
        found[name] = Golden(file, precision, TOLERANCES[precision])
        progress(f"golden outputs of {name}", (at + 1) / len(source.components))
    return found


def golden_inputs(
    bundle: Bundle, sizes: Sizes, place: Path, progress: Progress = lambda label, part: None
) -> Iterator[tuple[str, tuple[Arrays, Arrays]]]:
    """The inputs of one call of each component, encoders first, and what its graph gives for them; as ``run_graph``."""
    given: dict[str, np.ndarray] = {}
    for at, component in enumerate(sorted(bundle.components, key=lambda c: c.role != "encode")):
        progress(f"golden outputs of {component.name}", at / len(bundle.components))
        feeds = _feeds(bundle, component, sizes, given)
        outputs = run_graph(bundle, component, feeds, place, quantized=precision_of(bundle, component) in _QUANTIZED)
        given.update({component.feeds.get(name, name): array for name, array in outputs.items()})
        yield component.name, (feeds, outputs)


def precision_of(bundle: Bundle, component: Component) -> str:
    """What an engine computes the graph in, as far as it decides how far its outputs are off."""
    formats = read_header(bundle.path / component.model).formats
    quantized = next((name for name in reversed(_QUANTIZED) if name in formats), None)
    floats = [spec.dtype for spec in component.outputs if spec.dtype.startswith("float")]
    return quantized or (floats[0] if floats else "float32")


def _feeds(bundle: Bundle, component: Component, sizes: Sizes, given: Arrays) -> dict[str, np.ndarray]:
    feeds = call_inputs(component, bundle.sampling, sizes)
    if component.tokenizer is not None:
        rows = len(feeds[component.tokenizer.input])
        texts = [PROMPTS[row % len(PROMPTS)] for row in range(rows)]
        feeds[component.tokenizer.input][...] = TextTokenizer(component.tokenizer, bundle.path)(texts).ids
    for name, array in feeds.items():
        if name in given and given[name].shape == array.shape and given[name].dtype == array.dtype:
            feeds[name] = given[name]
    return feeds


def run_graph(bundle: Bundle, component: Component, feeds: Arrays, place: Path, *, quantized: bool) -> dict[str, np.ndarray]:
    """What the graph gives. A quantized one is given the name of an optimized graph, which ONNX Runtime's engine computes as it stands; its
    files are linked into ``place`` for that."""
    session = find("runtimes.engines", "onnxruntime")
    file = bundle.path / component.model
    linked: list[Path] = []
    try:
        if quantized:
            for name in bundle.files:
                if name.startswith(component.model.rsplit("/", 1)[0] + "/") and not name.endswith(".json"):
                    linked.append(place / (f"{component.name}{session.suffix}" if name == component.model else name.rsplit("/", 1)[1]))
                    link_or_copy(bundle.path / name, linked[-1])
            file = place / f"{component.name}{session.suffix}"
        binding = Graph(component, session.open_session(file)).bind({name: array.shape for name, array in feeds.items()})
        for name, array in feeds.items():
            binding.inputs[name][...] = array
        binding.run()
    finally:
        for path in linked:
            path.unlink(missing_ok=True)
    for array in binding.outputs.values():
        if array.dtype.kind == "f":
            require_finite(array, component.name)
    return {name: array.copy() for name, array in binding.outputs.items()}
