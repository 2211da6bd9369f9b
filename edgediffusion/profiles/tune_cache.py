"""Which caching policy suits a bundle: what changes along its pictures, and what each policy costs and spares on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError
from edgediffusion.profiles.cache_record import Changes, watch
from edgediffusion.profiles.metrics.psnr import MOST_DB, psnr_db
from edgediffusion.runtimes.caching import resolve
from edgediffusion.runtimes.caching._cuts import HEAD, is_first
from edgediffusion.runtimes.loop import Result
from edgediffusion.runtimes.pipeline import Pipeline

_INTERVALS = (2, 3, 5, 8)
_WATCHED = 4  # pictures at the most: changes differ little between prompts
_CENTER = 0.3  # of the calls, as DeepCache's 15 of 50

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Outcome:
    """One policy: ``calls`` of the whole network a picture and the time of the loop, both in parts of the uncached picture's.

    PSNR is to the uncached picture from the same noise: the median, what nine of ten pictures reach, and the worst. ``best`` says
    that no other policy is both faster and nearer.
    """

    policy: str
    calls: float
    time: float
    psnr_db: float
    psnr_p10_db: float
    psnr_worst_db: float
    best: bool = False


@dataclass(frozen=True)
class Tuned:
    """``chosen`` is the fastest policy of which nine pictures of ten reach ``quality_db``; None if there is none."""

    bundle: str
    pictures: int
    steps: int
    quality_db: float
    uncached_ms: float
    chosen: str | None
    outcomes: tuple[Outcome, ...]
    changes: Changes = field(repr=False)


def tune_cache(
    bundle: Bundle,
    prompts: Sequence[str],
    *,
    quality_db: float = 30.0,
    samples: int = 8,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
    policies: Sequence[str] = (),
    target: str | None = None,
    progress: Progress = lambda label, part: None,
) -> Tuned:
    """Draw ``samples`` pictures, the prompts in turn, without a cache and with every policy, from the same noise.

    ``policies`` are tried in place of those that suit the bundle. Each picture is drawn by all policies before the next one is begun,
    and times are ratios to its own uncached drawing, so that what disturbs one disturbs all.

    Raises:
        ArgumentError: no prompts, a number that cannot be used, or a policy that the bundle cannot run. BundleError: one that cannot
        draw.
    """
    if not prompts or samples < 1:
        raise ArgumentError("There is nothing to draw", got=f"{len(prompts)} prompts, {samples} samples", do="Give prompts (--prompts).")
    for policy in policies:  # refused before anything is drawn
        resolve(policy).components(bundle)
    pipeline = Pipeline.from_bundle(bundle, target=target)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}

    def draw(cache: object, picture: int) -> tuple[Result, int]:
        whole: list[int] = []
        drawn = pipeline(
            prompts[picture % len(prompts)],
            seed=seed + picture,
            cache=cache,  # type: ignore[arg-type]
            observe=lambda i, fed: whole.append(i),
            **options,  # type: ignore[arg-type]
        )
        return drawn, len(whole)

    changes = watch(draw, min(samples, _WATCHED), progress)
    calls = draw("none", 0)[1]
    tried = tuple(policies) or candidates(bundle, calls, changes)
    outcomes, uncached_ms = _measure(draw, tried, samples, progress)
    good = [outcome for outcome in outcomes if outcome.psnr_p10_db >= quality_db and outcome.time < 1]
    chosen = min(good, key=lambda outcome: outcome.time).policy if good else None
    return Tuned(str(bundle.path), samples, calls, quality_db, uncached_ms, chosen, outcomes, changes)


def candidates(bundle: Bundle, calls: int, changes: Changes) -> tuple[str, ...]:
    """Policies that suit a bundle's cuts, with settings from gentle to harsh."""
    found = [f"adaptive-diffusion:threshold={t}" for t in (0.005, 0.01, 0.02, 0.05)]
    if bundle.with_role(HEAD):
        return (*found, *_of_transformers(bundle, changes))
    for cut in bundle.cuts:
        found += [f"deepcache:interval={n},cut={cut}" for n in _INTERVALS if n < calls]
        found += [
            f"deepcache:schedule=non-uniform,interval={n},center={int(_CENTER * calls)},cut={cut}" for n in _INTERVALS if 2 * n <= calls
        ]
        found += [f"deepcache-adaptive:threshold={t},ahead=true,cut={cut}" for t in (0.05, 0.1, 0.2, 0.4)]
    return tuple(found)


def _of_transformers(bundle: Bundle, changes: Changes) -> list[str]:
    found = []
    inner = [cut for cut in bundle.cuts if not is_first(cut)]
    for cut in bundle.cuts:
        found += [f"fora:interval={n},cut={cut}" for n in _INTERVALS[:3]]
        found += [f"taylorseer:interval={n},order={m},cut={cut}" for n in (2, 3, 5) for m in (1, 2)]
    if len(inner) < len(bundle.cuts):  # the cut before the first block is there
        found += [f"teacache:threshold={t},polynomial={changes.polynomial}" for t in (0.05, 0.1, 0.2, 0.4)]
        found += [f"magcache:threshold={t},ratios={changes.ratios}" for t in (0.03, 0.06, 0.12)]
        found += [f"delta-dit:interval={n},cut={cut}" for cut in inner for n in (2, 3)]
    return [*found, *(f"first-block:threshold={t},cut={cut}" for cut in inner for t in (0.05, 0.1, 0.2))]


def _measure(
    draw: Callable[[object, int], tuple[Result, int]], tried: Sequence[str], samples: int, progress: Progress
) -> tuple[tuple[Outcome, ...], float]:
    seen: dict[str, list[tuple[float, float, float]]] = {policy: [] for policy in tried}
    uncached_ms = []
    for picture in range(samples):
        plain, calls = draw("none", picture)
        uncached_ms.append(sum(plain.timings.step_ms))
        for at, policy in enumerate(tried):
            progress("trying", (picture + at / len(tried)) / samples)
            if picture == 0:
                draw(policy, picture)  # its buffers are made, and the engine's
            drawn, whole = draw(policy, picture)
            psnr = min(MOST_DB, psnr_db(drawn.pixels[0], plain.pixels[0]))
            seen[policy].append((whole / calls, sum(drawn.timings.step_ms) / uncached_ms[-1], psnr))
    progress("tried", 1.0)
    return best_marked([_outcome(policy, rows) for policy, rows in seen.items()]), float(np.median(uncached_ms))


def _outcome(policy: str, rows: Sequence[tuple[float, float, float]]) -> Outcome:
    calls, times, psnr = np.array(rows).T
    tenth, worst = np.percentile(psnr, (10, 0))
    return Outcome(policy, float(calls.mean()), float(np.median(times)), float(np.median(psnr)), float(tenth), float(worst))


def best_marked(outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """By time, the fastest first; those that no other one beats in time and tenth percentile are marked (Pareto)."""
    ordered, highest, marked = sorted(outcomes, key=lambda o: (o.time, -o.psnr_p10_db)), -np.inf, []
    for outcome in ordered:
        best = outcome.psnr_p10_db > highest
        highest = max(highest, outcome.psnr_p10_db)
        marked.append(replace(outcome, best=best))
    return tuple(marked)
