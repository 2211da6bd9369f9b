"""Round the time embedding's weights for what it gives at the sampler's steps: TIAR, of TFMQ-DM (Huang et al. 2023, 2311.16503).

The temporal information block of a UNet is the embedding's layers and, in every residual block, the one that projects it. Its input is
the time step alone, of which a sampler has a few: so the block can be fitted to what it gives at all of them,

    sum over blocks of |emb_q(t) - emb(t)|^2,    the mean over t,    + 0.01 sum (1 - |2 h - 1|^b)

by AdaRound on all of its layers at once, with the authors' 20 000 iterations, b from 20 to 2 after a fifth of them. Their ranges by step
are not taken: ``stages`` has these. A sampler whose steps are fixed needs none of this, since ``edgediffusion fold`` puts the float
embedding's own values in the place of the block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.observe import tensors
from edgediffusion.optimize.rounding import Job
from edgediffusion.optimize.simulate import AdaRoundLayer, anneal, rounding_loss, simulated
from edgediffusion.optimize.state import LayerState

EMBEDDING, PROJECTION = re.compile(r"^(.*\.)?time_embedding\."), re.compile(r"^(.+\.)time_emb_proj$")
ITERATIONS, RATE, PENALTY, WARM_UP = 20_000, 1e-3, 0.01, 0.2


@dataclass(frozen=True)
class _Steps:
    """The block at the items' distinct time steps: what the embedding is called with, and what each projection gives in float."""

    arguments: tuple[Any, ...]
    targets: Mapping[str, torch.Tensor]


def tiar(job: Job) -> dict[str, LayerState]:
    """The quantized layers of the temporal information block with codes that were learned on it; none where nearest ones are better.

    Raises:
        ArgumentError: the network has no such block, all of it stays float, or what its projections read is not the embedding alone.
    """
    names = [name for name in job.layers if EMBEDDING.match(name) or PROJECTION.match(name)]
    wanted = {name: job.bits(name) for name in names if job.is_quantized(name)}
    _check(job, names, wanted)
    steps = _steps(job, [name for name in names if PROJECTION.match(name)])
    with torch.no_grad(), simulated(job.module, job.layers, wanted):
        nearest = float(_lost(job, steps))
    with simulated(job.module, job.layers, wanted, lambda bits: AdaRoundLayer) as simulation:
        _fit(job, steps, [layer for layer in simulation.values() if isinstance(layer, AdaRoundLayer)])
        learned = {name: layer.learned(job.layers[name]) for name, layer in simulation.items()}  # every weight now up or down
        with torch.no_grad():
            return learned if float(_lost(job, steps)) < nearest else {}


def _fit(job: Job, steps: _Steps, layers: Sequence[AdaRoundLayer]) -> None:
    optimizer = torch.optim.Adam([layer.rounding for layer in layers], lr=RATE)
    for iteration in range(ITERATIONS):
        done = iteration / ITERATIONS
        loss = _lost(job, steps)
        if done >= WARM_UP:
            b = anneal(done, warm_up=WARM_UP)
            loss = loss + PENALTY * torch.stack([rounding_loss(layer, b) for layer in layers]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if iteration % 100 == 0:
            job.progress(done)


def _lost(job: Job, steps: _Steps) -> torch.Tensor:
    given = _given(job, steps)
    return torch.stack([(given[name] - target).square().sum(-1).mean() for name, target in steps.targets.items()]).sum()


def _check(job: Job, names: list[str], wanted: Mapping[str, tuple[int, int]]) -> None:
    if not any(map(EMBEDDING.match, names)) or not any(map(PROJECTION.match, names)):
        raise ArgumentError(
            f"'{job.recipe.name}' asks to fit a block that depends on the time step alone, and the network has none",
            got="no layers 'time_embedding' and 'time_emb_proj'",
            do="Leave out temporal: it is for UNets.",
        )
    if not wanted:
        raise ArgumentError(
            f"'{job.recipe.name}' asks to fit the rounding of the time embedding, and keeps all of its layers float",
            got=f"preset = {job.recipe.preset!r}, exclude = {list(job.recipe.exclude)}",
            do="Leave out temporal, or let the embedding's layers be quantized.",
        )


def _steps(job: Job, projections: list[str]) -> _Steps:
    """Run the float network at every distinct time step of the items."""
    owner = next(m[0] for name in job.layers if (m := EMBEDDING.match(name))).rstrip(".")
    called: list[tuple[Any, ...]] = []
    targets: dict[str, list[torch.Tensor]] = {name: [] for name in projections}

    def note(name: str, output: torch.Tensor) -> None:
        targets[name].append(output.detach()[:1])

    handles = [job.module.get_submodule(owner).register_forward_pre_hook(lambda _m, args: called.append(args))]
    for name in projections:
        handles.append(job.module.get_submodule(name).register_forward_hook(lambda _m, _x, output, name=name: note(name, output)))
    times = {float(item["timestep"].max()): item for item in job.items}
    with torch.no_grad():
        for _, item in sorted(times.items()):
            job.module(**tensors(item))
    for handle in handles:
        handle.remove()
    columns = zip(*called, strict=True)
    joined = tuple(torch.cat([value[:1] for value in column]) if column[0] is not None else None for column in columns)
    steps = _Steps((owner, *joined), {name: torch.cat(parts) for name, parts in targets.items()})
    with torch.no_grad():
        exact = _given(job, steps)
    if not all(torch.allclose(exact[name], target, rtol=1e-3, atol=1e-4) for name, target in steps.targets.items()):
        raise ArgumentError(
            f"'{job.recipe.name}' asks to fit the time embedding, which is not all that the residual blocks read",
            got="another condition beside the time step, or another function between",
            do="Leave out temporal.",
        )
    return steps


def _given(job: Job, steps: _Steps) -> dict[str, torch.Tensor]:
    """What the projections give: each residual block puts the embedding through its own nonlinearity first."""
    owner, *arguments = steps.arguments
    embedding = job.module.get_submodule(owner)(*arguments)
    found = {}
    for name in steps.targets:
        block: Any = job.module.get_submodule(name.rpartition(".")[0])
        found[name] = job.module.get_submodule(name)(block.nonlinearity(embedding))
    return found
