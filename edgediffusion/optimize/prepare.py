"""Give a module of torch the layers that a recipe quantizes: what ``quantize.prepared_graph`` does to the bundle's graph."""

from __future__ import annotations

from pathlib import Path

import torch

from edgediffusion.optimize.graph_file import load_graph
from edgediffusion.optimize.passes.rotate import rotatable
from edgediffusion.optimize.passes.split_concat import joined
from edgediffusion.optimize.recipe import Recipe
from edgediffusion.optimize.rotation import rotate_module
from edgediffusion.optimize.split import split_module


def prepare_module(module: torch.nn.Module, graph: Path, recipe: Recipe, prefix: str = "") -> None:
    """Split and rotate layers of ``module``, in place. ``graph`` is the same network's, and says where tensors are joined."""
    if recipe.split or recipe.rotate:
        model = load_graph(graph)
        split_module(module, joined(model, recipe), prefix)
        rotate_module(module, rotatable(model, recipe), prefix)
