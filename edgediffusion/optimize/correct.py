"""Correct: measure what quantization does to a denoiser's predictions, so that the sampling loop can undo it.

The float pipeline draws with the deployment's sampler, steps and guidance. At each step the quantized denoiser is asked
about the same (x_t, t), and the pair of guided predictions goes into sums (float64): no prediction is kept. What a
method makes of the sums, and what the loop does with that, is in ``runtimes/corrections``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Bundle, Sampling
from edgediffusion.errors import ArgumentError, OutputError
from edgediffusion.runtimes.corrections import Corrector, Measured, Parameters, Run
from edgediffusion.runtimes.corrections._file import Correction, graph_digest, measured
from edgediffusion.runtimes.corrections._moments import Bounds, Moments
from edgediffusion.runtimes.pipeline import Pipeline

Progress = Callable[[str, float], None]
BATCH = 8  # trajectories at a time


def correct(
    bundle: Bundle,
    reference: Bundle,
    *,
    output: str | Path,
    prompts: Sequence[str],
    method: str = "ptqd",
    options: Mapping[str, Any] | None = None,
    samples: int = 256,
    steps: int | None = None,
    sampler: str | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    progress: Progress = lambda label, part: None,
) -> Correction:
    """Measure the correction ``method`` of a quantized ``bundle`` against the float ``reference``; write it to ``output``.

    ``samples`` trajectories, each with its own noise and one of ``prompts`` (cycled), are drawn with the sampler, steps and
    guidance of the deployment, by default the bundle's own: the correction serves these and no others. ``options`` are the
    fields of the method.

    Raises:
        UnknownName: no such method or sampler. OutputError: ``output`` exists.
        ArgumentError: no samples or prompts, bundles that are no pair, an option that the method does not have.
    """
    if samples < 1 or not prompts:
        raise ArgumentError("A correction is measured on at least one picture and prompt", got=f"{samples} and {len(prompts)}")
    if Path(output).exists():
        raise OutputError(f"The output '{output}' exists already", do="Choose another name, or remove it first.")
    rule = measured(method, options or {})
    _check_pair(bundle, reference)
    pair = _Pair(Pipeline.from_bundle(reference), Pipeline.from_bundle(bundle), tuple(_batches(prompts, samples, seed)), progress)
    settings: dict[str, Any] = {"num_inference_steps": steps, "sampler": sampler, "guidance_scale": guidance_scale}
    deployment = pair.quantized.deployment(**settings)
    # A folded bundle may recommend other steps than the reference: both draw as this one does.
    settings = {"num_inference_steps": deployment.steps, "sampler": deployment.sampler, "guidance_scale": deployment.guidance_scale}
    first = moments = pair.moments(deployment.steps, settings)
    if rule.OUTLIERS is not None:
        moments = pair.moments(deployment.steps, settings, bounds=Bounds.of(first, rule.OUTLIERS))
    parameters = rule.fit(moments)
    measurement = {
        "samples": samples,
        "seed": seed,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "rms": _rms(first, rule, parameters),
    }
    found = Correction(method, dict(vars(rule)), deployment, parameters, measurement)
    if rule.DRIFT:
        found = replace(found, parameters={**parameters, "drift": pair.drift(found, settings)})
    found.save(Path(output))
    return found


@dataclass(frozen=True)
class _Batch:
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class _Pair:
    """Both pipelines, and the pictures that they draw."""

    reference: Pipeline
    quantized: Pipeline
    batches: Sequence[_Batch]
    progress: Progress

    def moments(self, steps: int, settings: Mapping[str, Any], *, bounds: Bounds | None = None) -> Moments:
        """Of the pairs of predictions at every state of the float trajectories."""
        moments = Moments.empty(steps, self.quantized.sampling.latent_channels)
        label = "pairs" if bounds is None else "pairs without outliers"
        for at, batch in enumerate(self.batches):
            options = {**settings, "seed": batch.seeds}
            listener = _Listener(moments, self.quantized.predictor(batch.prompts, **options), bounds)
            for step in self.reference.steps(batch.prompts, correction=listener, **options):
                self.progress(label, (at + (step.index + 1) / step.total) / len(self.batches))
        return moments

    def drift(self, correction: Correction, settings: Mapping[str, Any]) -> np.ndarray:
        """float64 [steps, channels]: how far the float trajectories are, in the mean, from the corrected quantized ones.

        All trajectories go step by step together, and each step's drift is taken away before the next is measured.
        """
        steps = correction.deployment.steps
        drift = np.zeros((steps, self.quantized.sampling.latent_channels))
        loops = [self._loops(batch, correction, settings) for batch in self.batches]
        for i in range(1, steps):
            states = [(next(float_loop).latents, next(loop).latents) for float_loop, loop in loops]
            apart = np.concatenate([x.astype(np.float64) - y for x, y in states])
            drift[i] = np.moveaxis(apart, 1, 0).reshape(apart.shape[1], -1).mean(axis=1)
            for _, state in states:  # a yielded state is ours to change until the next step is asked for
                state += drift[i].astype(np.float32).reshape(-1, 1, 1)
            self.progress("drift", (i + 1) / steps)
        return drift

    def _loops(self, batch: _Batch, correction: Correction, settings: Mapping[str, Any]) -> tuple[Iterator[Any], Iterator[Any]]:
        options = {**settings, "seed": batch.seeds}
        return self.reference.steps(batch.prompts, **options), self.quantized.steps(batch.prompts, correction=correction, **options)


class _Listener(Corrector):
    """Changes nothing: asks the quantized network about each state, and adds up what both say."""

    def __init__(self, moments: Moments, predict: Callable[[np.ndarray, int], np.ndarray], bounds: Bounds | None):
        self._moments, self._predict, self._bounds = moments, predict, bounds

    def start(self, run: Run) -> Corrector:
        return self

    def prediction(self, output: np.ndarray, x: np.ndarray, i: int) -> None:
        self._moments.add(i, output, self._predict(x, i), bounds=self._bounds)


def _batches(prompts: Sequence[str], samples: int, seed: int) -> Iterator[_Batch]:
    """Every picture has its own seed, so that what is measured does not depend on the size of a batch."""
    order = np.random.default_rng(seed).permutation(samples)
    chosen = [prompts[int(i) % len(prompts)] for i in order]
    for start in range(0, samples, BATCH):
        part = range(start, min(start + BATCH, samples))
        yield _Batch(tuple(chosen[i] for i in part), tuple(seed + i for i in part))


def _rms(moments: Moments, rule: Measured, parameters: Parameters) -> dict[str, list[float]]:
    """Root mean squares by step, over these samples: of the float prediction, and of the error without and with correction."""
    terms = rule.terms(parameters)
    zero = np.zeros_like(terms.scale)
    prediction = (moments.covariance[..., 0, 0] + moments.mean[..., 0] ** 2).mean(axis=1)
    corrected = moments.errors(terms.scale, terms.shift) + (0.0 if terms.spread is None else terms.spread**2)
    return {
        "prediction": np.sqrt(prediction).tolist(),
        "error": np.sqrt(moments.errors(zero + 1.0, zero).mean(axis=1)).tolist(),
        "corrected": np.sqrt(corrected.mean(axis=1)).tolist(),
    }


def _network_facts(bundle: Bundle) -> Sampling | None:
    """What folding a bundle does not change."""
    return bundle.sampling and replace(bundle.sampling, folded=None, sampler="", steps=0)


def _check_pair(bundle: Bundle, reference: Bundle) -> None:
    sources = [next((verb.arguments.get("source") for verb in b.history if verb.name == "export"), None) for b in (bundle, reference)]
    if sources[0] != sources[1] or _network_facts(bundle) != _network_facts(reference):
        raise ArgumentError(
            f"'{reference.path}' is not the float bundle that '{bundle.path}' was quantized from",
            do="Give the bundle that 'edgediffusion quantize' was given.",
        )
    if graph_digest(bundle) == graph_digest(reference):
        raise ArgumentError(
            f"The bundles '{bundle.path}' and '{reference.path}' have the same denoiser: there is nothing to correct",
            do="Give the quantized bundle, and the float bundle it was made from as the reference.",
        )
    if any(verb.name == "quantize" for verb in reference.history):
        raise ArgumentError(f"The reference '{reference.path}' is quantized itself", do="Give the float bundle it was made from.")
