"""What a pipeline takes from a bundle: its facts, and the graphs of each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgediffusion.bundle import Bundle, Component, Sampling
from edgediffusion.errors import BundleError
from edgediffusion.runtimes.autoencoder import Autoencoder
from edgediffusion.runtimes.graph import Graph

Load = Callable[[Sequence[Component]], Sequence[Graph]]


def sampling_of(bundle: Bundle) -> Sampling:
    """
    Raises:
        BundleError: it cannot draw.
    """
    if bundle.sampling is None or not bundle.with_role("denoise"):
        raise BundleError(
            f"The bundle '{bundle.path}' cannot draw: it has no denoiser, or no facts about sampling",
            got=", ".join(f"{c.name} ({c.role})" for c in bundle.components) or "no components",
            do="Export a whole pipeline.",
        )
    return bundle.sampling


def autoencoder_of(bundle: Bundle, sampling: Sampling, graphs: Sequence[Graph], load: Load | None) -> Autoencoder:
    """The encoder is opened when a picture is to be encoded: most pipelines never do."""
    decoder = _only(bundle, graphs, "decode") if bundle.with_role("decode") else None
    opened = [graph for graph in graphs if graph.component.role == "encode_image"]
    components = bundle.with_role("encode_image")
    if opened:
        return Autoencoder(sampling, decoder, lambda: opened[0])
    return Autoencoder(sampling, decoder, (lambda: load(components)[0]) if load is not None and components else None)


def channels_of(denoiser: Graph, sampling: Sampling) -> int:
    """Of the denoiser's sample, where it says how many."""
    shape = denoiser.input("sample").shape
    return shape[1] if len(shape) > 1 and isinstance(shape[1], int) else sampling.latent_channels


def refuse_to_load(components: Sequence[Component]) -> Sequence[Graph]:
    raise BundleError("The pipeline was made without some graphs that it needs", got=", ".join(c.name for c in components))


def _only(bundle: Bundle, graphs: Sequence[Graph], role: str) -> Graph:
    found = [graph for graph in graphs if graph.component.role == role]
    if len(found) != 1:
        raise BundleError(f"A pipeline runs one '{role}' graph", got=f"{len(found)} in '{bundle.path}'")
    return found[0]
