"""Picture quality of one bundle against another: the same prompts, the same noise, every metric with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError
from edgediffusion.profiles.bootstrap import Bootstrap
from edgediffusion.profiles.judge import Judge, Look
from edgediffusion.profiles.metrics import Seen, View, of_kind
from edgediffusion.profiles.metrics.psnr import psnr_db
from edgediffusion.profiles.scores import PairScore, Quality, Run, SetScore, beside, pair_score, set_score
from edgediffusion.runtimes.pipeline import Pipeline

__all__ = ["PairScore", "Quality", "Reference", "Run", "SetScore", "compare", "measure", "psnr_db"]

BATCH = 16  # pictures that are compared at once, and drawn at once where they are small
SMALL = 32 * 32  # pixels; of larger pictures so many fewer are drawn at once, for memory
USUAL = Bootstrap()

Progress = Callable[[str, float], None]


def _silent(label: str, part: float) -> None:
    pass


# --- what is measured


def compare(
    bundle: Bundle,
    reference: Bundle,
    *,
    prompts: Sequence[str] | None = None,
    samples: int = 256,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    judge: Judge | None = None,
    target: str | None = None,
    cache: str | None = None,
    bootstrap: Bootstrap = USUAL,
    progress: Progress = _silent,
) -> Quality:
    """Draw ``samples`` pictures with both bundles, the prompts in turn, and measure the first's against the second's.

    Picture i has the noise of ``seed`` + i in both. Steps and guidance that are None are each bundle's own. Without
    ``prompts``, those of the judge are drawn. ``target`` names the engines to run, as for ``Pipeline.from_bundle``; a
    reference that was not built for it runs as it does by default. ``cache`` is a caching policy for ``bundle`` alone. Pictures
    are let go as soon as they are measured.

    Raises:
        ArgumentError: no prompts, too few samples, or bundles that draw different sizes. BundleError: one that cannot draw.
    """
    asked = _asked(prompts, judge)
    if samples < 2:
        raise ArgumentError("Too few pictures to compare", got=samples, allowed="two and more")
    engines = target if target in (None, "onnx", *reference.targets) else None
    pair = Pipeline.from_bundle(bundle, target=target, cache=cache), Pipeline.from_bundle(reference, target=engines)
    all_prompts = [asked[i % len(asked)] for i in range(samples)]
    tally = _Tally(_Yard(judge, _wanted(all_prompts, samples, judge), bootstrap))
    batch = max(1, BATCH * SMALL // max(SMALL, pair[0].sampling.height * pair[0].sampling.width))
    warnings: dict[str, None] = {}
    for at in range(0, samples, batch):
        drawn, part = [], all_prompts[at : at + batch]
        for second, pipeline in enumerate(pair):
            progress("drawing", (at + second * len(part) / 2) / samples)
            seeds = range(seed + at, seed + at + len(part))
            result = pipeline(part, num_inference_steps=steps, guidance_scale=guidance_scale, seed=seeds)
            warnings |= dict.fromkeys(result.warnings)
            drawn.append(result.pixels)
        _refuse_shapes(*drawn)
        tally.add(*drawn)
    progress("drawing", 1.0)
    run = _run(pair, steps, guidance_scale, seed=seed, prompts=len(asked), warnings=tuple(warnings))
    return replace(tally.quality(progress), run=run)


def measure(
    pixels: np.ndarray,
    reference: np.ndarray,
    *,
    prompts: Sequence[str] = (),
    judge: Judge | None = None,
    bootstrap: Bootstrap = USUAL,
    progress: Progress = _silent,
) -> Quality:
    """Measure pictures against a reference's pictures of the same prompts and noise; both float [n, h, w, c] in 0..1.

    For several sets of pictures against one reference, make the ``Reference`` once. Raises as it does.
    """
    return Reference(reference, prompts=prompts, judge=judge, bootstrap=bootstrap).measure(pixels, progress=progress)


class Reference:
    """Pictures that others are measured against; its own figures and their intervals are found out once."""

    def __init__(self, pixels: np.ndarray, *, prompts: Sequence[str] = (), judge: Judge | None = None, bootstrap: Bootstrap = USUAL):
        """``pixels`` is float [n, h, w, c] in 0..1; ``prompts`` has one for each picture, or is empty.

        Raises:
            ArgumentError: less than two pictures, or another number of prompts.
        """
        if pixels.ndim != 4 or len(pixels) < 2:
            raise ArgumentError("These are no pictures to compare with", got=pixels.shape, allowed="[n, h, w, c], n of two and more")
        self._pixels = pixels
        self._yard = _Yard(judge, _wanted(prompts, len(pixels), judge), bootstrap)

    def measure(self, pixels: np.ndarray, *, progress: Progress = _silent) -> Quality:
        """Measure pictures of the same prompts and noise as the reference's, in the same order.

        Raises:
            ArgumentError: not of the reference's shape.
        """
        _refuse_shapes(pixels, self._pixels)
        tally = _Tally(self._yard)
        for at in range(0, len(pixels), BATCH):
            progress("comparing", at / len(pixels))
            tally.add(pixels[at : at + BATCH], self._pixels[at : at + BATCH])
        progress("comparing", 1.0)
        return tally.quality(progress)


def _asked(prompts: Sequence[str] | None, judge: Judge | None) -> tuple[str, ...]:
    asked = tuple(prompts) if prompts is not None else () if judge is None else judge.prompts
    if not asked:
        raise ArgumentError("There is nothing to draw", got="no prompts", do="Give some (--prompts), or a judge with its own (--judge).")
    return asked


def _refuse_shapes(pixels: np.ndarray, reference: np.ndarray) -> None:
    if pixels.shape != reference.shape:
        raise ArgumentError(
            "Pictures of different shapes cannot be compared",
            got=f"{pixels.shape} and, of the reference, {reference.shape}",
            do="Compare pipelines that draw the same size.",
        )


def _refuse_values(pixels: np.ndarray) -> None:
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # nor is NaN
        raise ArgumentError("These values are no pictures", got=f"{low:.4g} to {high:.4g}", allowed="0 to 1")


def _run(
    pair: Sequence[Pipeline], steps: int | None, guidance_scale: float | None, *, seed: int, prompts: int, warnings: tuple[str, ...]
) -> Run:
    (of_bundle, of_reference) = (p.sampling for p in pair)
    return Run(
        bundle=str(pair[0].bundle.path),
        reference=str(pair[1].bundle.path),
        prompts=prompts,
        seed=seed,
        steps=of_bundle.steps if steps is None else steps,
        reference_steps=of_reference.steps if steps is None else steps,
        guidance_scale=of_bundle.guidance_scale if guidance_scale is None else guidance_scale,
        reference_guidance_scale=of_reference.guidance_scale if guidance_scale is None else guidance_scale,
        warnings=warnings,
    )


# --- how it is measured


@dataclass(frozen=True)
class _Yard:
    """What pictures are measured with. ``own`` keeps the reference's values of each metric, which are the same every time."""

    judge: Judge | None
    wanted: np.ndarray
    bootstrap: Bootstrap
    own: dict[str, np.ndarray] = field(default_factory=dict)

    def split(self, kind: str) -> tuple[dict[str, ModuleType], dict[str, str]]:
        """The metrics of a kind that can be taken, and why the others cannot."""
        metrics = of_kind(kind)
        lacking = {name: why for name, metric in metrics.items() if (why := self._lacking(metric.NEEDS))}
        return {name: metric for name, metric in metrics.items() if name not in lacking}, lacking

    def _lacking(self, needs: str) -> str | None:
        if not needs:
            return None
        if self.judge is None:
            return "it needs a judge"
        if needs not in self.judge.has:
            return f"the judge '{self.judge.name}' has no {'statistics of real pictures' if needs == 'real' else needs}"
        if needs == "classes" and not (self.wanted >= 0).any():
            return "no prompt names one class of the judge"
        return None


class _Tally:
    """What has been found out about the pictures so far; the pictures themselves are let go."""

    def __init__(self, yard: _Yard):
        self._yard = yard
        self._metrics, self._left_out = yard.split("pairs")
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in self._metrics}
        self._looks: tuple[list[Look], list[Look]] = ([], [])

    def add(self, pixels: np.ndarray, reference: np.ndarray) -> None:
        views = []
        for shown in (pixels, reference):
            _refuse_values(shown)
        for shown, looks in zip((pixels, reference), self._looks, strict=True):
            look = Look(None, None, ()) if self._yard.judge is None else self._yard.judge.look(shown)
            views.append(View(shown, look.layers))
            looks.append(replace(look, layers=()))
        for name, metric in self._metrics.items():
            self._values[name].append(metric.pairs(*views))

    def quality(self, progress: Progress) -> Quality:
        yard, items = self._yard, len(self._yard.wanted)
        draws = yard.bootstrap.draws(items)
        pairs = (pair_score(name, m, np.concatenate(self._values[name]), draws) for name, m in self._metrics.items())
        alone, lacking = yard.split("alone")
        between, also_lacking = yard.split("between")
        sets, counts = [], yard.bootstrap.counts(items)
        for at, (name, metric) in enumerate({**alone, **between}.items()):
            progress(name, at / (len(alone) + len(between)))
            sets.append(self._set(name, metric, counts))
        progress("measured", 1.0)
        return Quality(
            pictures=items,
            judge=None if yard.judge is None else yard.judge.name,
            judged=int((yard.wanted >= 0).sum()),
            resamples=yard.bootstrap.resamples,
            pairs=tuple(pairs),
            sets=tuple(sets),
            left_out={**self._left_out, **lacking, **also_lacking},
        )

    def _set(self, name: str, metric: ModuleType, counts: np.ndarray) -> SetScore:
        yard, (seen, reference) = self._yard, (_seen(looks, self._yard.wanted) for looks in self._looks)
        assert yard.judge is not None  # no metric of sets can be taken without one
        if hasattr(metric, "between"):
            return set_score(name, metric, metric.between(seen, reference, yard.judge, counts))
        if name not in yard.own:
            yard.own[name] = metric.alone(reference, yard.judge, counts)
        values = metric.alone(seen, yard.judge, counts)
        score = beside(set_score(name, metric, values), values, yard.own[name])
        return replace(score, real=yard.judge.yardstick(name, len(yard.wanted)))


def _wanted(prompts: Sequence[str], pictures: int, judge: Judge | None) -> np.ndarray:
    """The class that each prompt asks for, int [pictures]; -1 for none."""
    if len(prompts) not in (0, pictures):
        raise ArgumentError("There is one prompt for each picture, or none at all", got=f"{len(prompts)} prompts for {pictures} pictures")
    if judge is None or not prompts:
        return np.full(pictures, -1)
    classes = {prompt: judge.class_of(prompt) for prompt in set(prompts)}
    return np.array([classes[prompt] for prompt in prompts])


def _seen(looks: Sequence[Look], wanted: np.ndarray) -> Seen:
    """All batches joined. What the judge has no output for is empty; a metric that needs it is not taken."""
    return Seen(
        features=_joined(look.features for look in looks),
        chosen=_joined(None if look.logits is None else look.logits.argmax(1) for look in looks),
        wanted=wanted,
    )


def _joined(parts: Iterator[np.ndarray | None]) -> np.ndarray:
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else np.empty((0, 0))
