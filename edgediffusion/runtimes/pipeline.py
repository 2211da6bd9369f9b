"""A bundle that draws: engines are loaded once, buffers are bound once per shape, and the loop is the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgediffusion.bundle import Bundle, Component, Sampling
from edgediffusion.errors import ArgumentError, BundleError, Cancelled
from edgediffusion.runtimes import caching
from edgediffusion.runtimes import noise as noises
from edgediffusion.runtimes.autoencoder import Autoencoder
from edgediffusion.runtimes.conditions import Conditions
from edgediffusion.runtimes.corrections import Corrector, Deployment, Run, Starts
from edgediffusion.runtimes.corrections._file import Correction, graph_digest, resolve
from edgediffusion.runtimes.denoiser import Denoiser, Observe
from edgediffusion.runtimes.engines import Session
from edgediffusion.runtimes.graph import Graph, open_components
from edgediffusion.runtimes.guidance import Guidance
from edgediffusion.runtimes.loop import Loop, Result, Step, Timings, since
from edgediffusion.runtimes.network import Graphs, Policy
from edgediffusion.runtimes.request import Options, Plan, Request, plan
from edgediffusion.runtimes.text_encoder import TextEncoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

ROLES = ("encode", "decode")  # always loaded; of the denoising graphs those that the caching policy runs
_OTHER_STREAM = 1 << 63  # added to a seed: the noise of a correction is none that a picture starts from


class Pipeline:
    """Text to image with the graphs of a bundle. Not for several threads at once: they would share buffers."""

    def __init__(
        self,
        bundle: Bundle,
        sessions: Mapping[str, Session],
        *,
        cache: str | Policy | None = None,
        load: Callable[[Sequence[Component]], Sequence[Graph]] | None = None,
    ):
        """``sessions`` by component name. Components without one are not used, or opened by ``load`` when they are needed."""
        graphs = [Graph(c, sessions[c.name]) for c in bundle.components if c.name in sessions]
        self.bundle = bundle
        self.sampling = _sampling(bundle)
        self._policy = caching.resolve(cache)
        self._graphs = Graphs(bundle, graphs, load or _refuse_to_load)
        self._denoise = self._graphs.of(self._policy)[0]
        self._autoencoder = Autoencoder(self.sampling, _only(bundle, graphs, "decode") if bundle.with_role("decode") else None)
        encoders = [TextEncoder(g, bundle.path) for g in graphs if g.component.role == "encode"]
        self._conditions = Conditions(self.sampling, self._denoise.name, self._graphs.inputs(self._policy), encoders)

    @classmethod
    def from_bundle(
        cls, bundle: Bundle | str | Path, *, target: str | None = None, threads: int | None = None, cache: str | Policy | None = None
    ) -> Pipeline:
        """Load what drawing needs.

        ``target`` names the engines to run, ``onnx`` the ONNX files. By default that is the only target that engines
        were built for, or the ONNX files where none were. ``threads`` is by default all cores this process may use. ``cache``
        is a policy of ``runtimes.caching`` for requests that name none; what another one needs is loaded when it is asked for.

        Raises:
            BundleError: no bundle, not one that can draw, or without the cut that the policy needs.
            EngineError: engines that do not fit this machine. ArgumentError: no engines for that target.
            MissingExtra: a library is not installed.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        _sampling(bundle)  # refused before minutes of loading
        load = partial(open_components, bundle, target=target, threads=threads)
        policy = caching.resolve(cache)
        graphs = load([*(c for c in bundle.components if c.role in ROLES), *policy.components(bundle)])
        return cls(bundle, {graph.name: graph.session for graph in graphs}, cache=policy, load=load)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        callback: Callable[[Step], bool | None] | None = None,
        observe: Observe | None = None,
        correction: Starts | str | Path | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Draw. ``options`` are the other fields of ``Request``: ``num_inference_steps``, ``guidance_scale``, ``seed``, ...

        ``callback`` is called after every step; the work stops when it returns False. ``observe`` is called with the
        number of the step and the arrays before every step's call of the network. ``correction`` takes quantization
        noise out of the predictions: the file that ``edgediffusion correct`` wrote, a loaded one, or ``qncd``.

        Raises:
            ArgumentError: a value that cannot be used, a correction that was measured for something else.
            Cancelled: the callback stopped the work.
        """
        request = Request(prompt, **options)
        settled = plan(request, self.sampling)
        started = time.perf_counter()
        conditions, cut = self._conditions(settled)
        encode_ms, times, latents = since(started), [], None
        for step in self._loop(request, settled, conditions, observe, correction):
            times.append(step.elapsed_ms)
            latents = step.latents
            if callback is not None and callback(step) is False:
                raise Cancelled(f"Stopped after step {step.index + 1} of {step.total}")
        assert latents is not None  # a plan has at least one step
        started = time.perf_counter()
        pixels = self._autoencoder.decode(latents)
        seeds = (request.seed,) if isinstance(request.seed, int) else tuple(request.seed)
        return Result(pixels, latents, seeds, Timings(encode_ms, tuple(times), since(started)), (*settled.warnings, *cut))

    def steps(
        self,
        prompt: str | Sequence[str],
        *,
        observe: Observe | None = None,
        correction: Starts | str | Path | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Step]:
        """The loop itself: a generator of steps, left by ``break`` or ``close``. Arguments as for a call."""
        request = Request(prompt, **options)
        settled = plan(request, self.sampling)
        conditions, _ = self._conditions(settled)
        return self._loop(request, settled, conditions, observe, correction)

    def predictor(self, prompt: str | Sequence[str], **options: Unpack[Options]) -> Callable[[np.ndarray, int], np.ndarray]:
        """``predict(x, i)``: the guided prediction for x, float32 [images, c, h, w], at step i. Arguments as for a call."""
        request = Request(prompt, **options)
        settled = plan(request, self.sampling)
        denoiser = self._denoiser(settled, self._conditions(settled)[0])
        return lambda x, i: denoiser.predict(x, settled.points.at[i])

    def deployment(self, **options: Unpack[Options]) -> Deployment:
        """What a correction must be measured for to serve pictures that are drawn with these options."""
        return self._deployment(plan(Request("", **options), self.sampling))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [images, c, h, w] of a step or a result to pixels: float32 [images, height, width, channels] in 0..1."""
        return self._autoencoder.decode(latents)

    def _loop(
        self,
        request: Request,
        plan: Plan,
        conditions: Mapping[str, np.ndarray],
        observe: Observe | None,
        correction: Starts | str | Path | None,
    ) -> Iterator[Step]:
        """Everything is checked here, before the first step is asked for."""
        denoiser = replace(self._denoiser(plan, conditions), observe=observe)
        starts = None if correction is None else resolve(correction)
        if isinstance(starts, Correction) and plan.guidance != Guidance(plan.guidance_scale):
            raise ArgumentError(
                "A correction is measured with plain guidance at every step, and holds for no other",
                got="guidance_rescale or guidance_interval",
                do="Leave them out, or the correction.",
            )
        corrector = Corrector() if starts is None else starts.start(self._run(request, plan, denoiser))
        denoiser = replace(denoiser, corrector=corrector)
        noise = noises.source(request.seed, plan.images, flavour=request.noise, dtype=self._denoise.input("sample").dtype)
        x = plan.points.start(_first_noise(request, plan, noise))
        return iter(Loop(plan.sampler, plan.points, denoiser, x, corrector.noise(noise), corrector, self._autoencoder.decode))

    def _denoiser(self, plan: Plan, conditions: Mapping[str, np.ndarray]) -> Denoiser:
        if not plan.classifier_free:
            return replace(self._rows(plan, conditions, plan.images), threshold=plan.threshold)
        guided = replace(self._rows(plan, conditions, 2 * plan.images), guidance=plan.guidance, threshold=plan.threshold)
        # Where guidance is off, half of the rows are work for nothing, unless the graph was made for so many rows only.
        if all(map(plan.guidance.is_on, plan.points.at)) or isinstance(self._denoise.input("sample").shape[0], int):
            return guided
        second = {name: rows[plan.images :] for name, rows in conditions.items()}
        return replace(guided, conditional=self._rows(plan, second, plan.images))

    def _rows(self, plan: Plan, conditions: Mapping[str, np.ndarray], rows: int) -> Denoiser:
        """A denoiser without guidance."""
        shapes = {name: rows_of.shape for name, rows_of in conditions.items()}
        shapes["sample"] = (rows, *plan.latent_shape[1:])
        network = partial(self._graphs.network, plan.cache or self._policy, shapes, len(plan.points))
        return Denoiser(network(), partial(network, aside=True), self.sampling.prediction, plan.points, conditions)

    def _run(self, request: Request, plan: Plan, denoiser: Denoiser) -> Run:
        seeds = request.seed + _OTHER_STREAM if isinstance(request.seed, int) else [seed + _OTHER_STREAM for seed in request.seed]
        noise = noises.source(seeds, plan.images, flavour="philox")
        return Run(self._deployment(plan), self.sampling.prediction, plan.sampler, plan.points, noise, denoiser.predict)

    def _deployment(self, plan: Plan) -> Deployment:
        made_by = {verb.name: verb.arguments for verb in self.bundle.history}
        return Deployment(
            model=str(made_by.get("export", {}).get("source", "")),
            graph=graph_digest(self.bundle),
            state=str(made_by.get("quantize", {}).get("state", "")),
            sampler=plan.sampler_name + (f" with spacing {plan.spacing}" if plan.spacing else ""),
            steps=plan.steps,
            guidance_scale=float(plan.guidance_scale),
        )


def _sampling(bundle: Bundle) -> Sampling:
    if bundle.sampling is None or not bundle.with_role("denoise"):
        raise BundleError(
            f"The bundle '{bundle.path}' cannot draw: it has no denoiser, or no facts about sampling",
            got=", ".join(f"{c.name} ({c.role})" for c in bundle.components) or "no components",
            do="Export a whole pipeline.",
        )
    return bundle.sampling


def _only(bundle: Bundle, graphs: Sequence[Graph], role: str) -> Graph:
    found = [graph for graph in graphs if graph.component.role == role]
    if len(found) != 1:
        raise BundleError(f"A pipeline runs one '{role}' graph", got=f"{len(found)} in '{bundle.path}'")
    return found[0]


def _refuse_to_load(components: Sequence[Component]) -> Sequence[Graph]:
    raise BundleError("The pipeline was made without some graphs that it needs", got=", ".join(c.name for c in components))


def _first_noise(request: Request, plan: Plan, noise: noises.Noise) -> np.ndarray:
    if request.latents is None:
        return noise.normal(plan.latent_shape)
    if request.latents.shape != plan.latent_shape:
        raise ArgumentError("The latents have another shape", got=request.latents.shape, allowed=str(plan.latent_shape))
    return request.latents.astype(np.float32)
