"""A bundle that draws: engines are loaded once, buffers are bound once per shape, and the loop is the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from edgediffusion.bundle import CONTROL, Bundle, Component
from edgediffusion.errors import ArgumentError, Cancelled
from edgediffusion.runtimes import caching, correcting, preflight, windows
from edgediffusion.runtimes import noise as noises
from edgediffusion.runtimes.autoencoder import Autoencoder
from edgediffusion.runtimes.conditions import Conditions
from edgediffusion.runtimes.corrections import Deployment, Starts
from edgediffusion.runtimes.denoiser import Observe
from edgediffusion.runtimes.engines import Session
from edgediffusion.runtimes.graph import Graph, open_components
from edgediffusion.runtimes.handover import until
from edgediffusion.runtimes.loop import Loop, Result, Step, Timings, since
from edgediffusion.runtimes.network import Graphs, Policy
from edgediffusion.runtimes.painting import Start
from edgediffusion.runtimes.parts import Load, autoencoder_of, refuse_to_load, sampling_of
from edgediffusion.runtimes.request import Options, Plan, Request, plan
from edgediffusion.runtimes.rows import Rows
from edgediffusion.runtimes.samplers import refuse_company
from edgediffusion.runtimes.starts import begin
from edgediffusion.runtimes.text_encoder import TextEncoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edgediffusion.runtimes.memory_stages import Bounded

ROLES = ("encode", CONTROL, "decode")  # always loaded; of the denoising graphs those that the caching policy runs
_NOTHING: Mapping[str, np.ndarray] = MappingProxyType({})
_OF_PICTURES = {
    *("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "prompt_weights", "class_labels"),
    *("image", "mask_image", "strength", "denoising_start", "denoising_end", "height", "width", "num_images", "latents", "tile"),
    *("control_image", "guess_mode"),
}


@dataclass(frozen=True)
class Prepared:
    """A settled request: ``conditions`` are [rows, ...], the unconditional ones first where the plan is classifier-free."""

    plan: Plan
    conditions: Mapping[str, np.ndarray]
    graph: Graph
    autoencoder: Autoencoder


class Pipeline:
    """Pictures with the graphs of a bundle, from texts, classes, other pictures or nothing.

    Not for several threads at once: they would share buffers.
    """

    def __init__(
        self,
        bundle: Bundle,
        sessions: Mapping[str, Session],
        *,
        cache: str | Policy | None = None,
        load: Callable[[Sequence[Component]], Sequence[Graph]] | None = None,
        bounded: Bounded | None = None,
    ):
        """``sessions`` by component name. Components without one are not used, or opened by ``load`` when they are needed. With
        ``bounded``, plans are made to fit its memory."""
        graphs = [Graph(c, sessions[c.name]) for c in bundle.components if c.name in sessions]
        self.bundle = bundle
        self.sampling = sampling_of(bundle)
        self._bounded = bounded
        self._policy = caching.resolve(cache)
        self._graphs = Graphs(bundle, graphs, load or refuse_to_load)
        self._denoise = self._graphs.of(self._policy)[0]
        self._autoencoder = autoencoder_of(bundle, self.sampling, graphs, load)
        inputs = self._graphs.inputs(self._policy)
        wanted = {spec.name for spec in inputs}
        encoders = [TextEncoder(g, bundle.path, wanted=wanted) for g in graphs if g.component.role == "encode"]
        self._conditions = Conditions(self.sampling, self._denoise.name, inputs, encoders)
        fixed = isinstance(self._denoise.input("sample").shape[0], int)
        self._rows = Rows(self._graphs, self._policy, self.sampling.prediction, self._conditions.controls, fixed)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle | str | Path,
        *,
        target: str | None = None,
        threads: int | None = None,
        cache: str | Policy | None = None,
        rebuild: bool = False,
        max_memory: str | float | None = None,
    ) -> Pipeline:
        """Load what drawing needs.

        ``target`` names the engines to run, ``onnx`` the ONNX files. By default that is the only target that engines
        were built for, or the ONNX files where none were. ``threads`` is by default all cores this process may use. ``cache``
        is a policy of ``runtimes.caching`` for requests that name none; what another one needs is loaded when it is asked for.
        With ``rebuild``, engines that do not fit what is here are built anew first, and the bundle is replaced (``preflight.ready``).
        ``max_memory`` is what this process may have in memory, as ``6GB`` or in bytes: see ``memory.py`` for what is traded for it.

        Raises:
            BundleError: no bundle, not one that can draw, or without the cut that the policy needs.
            EngineError: engines that do not fit this machine. ArgumentError: no engines for that target.
            MissingExtra: a library is not installed.
        """
        if rebuild:
            path = bundle.path if isinstance(bundle, Bundle) else bundle
            bundle = preflight.ready(path, target=target, rebuild=True, threads=threads)
        elif not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        sampling_of(bundle)  # refused before minutes of loading
        policy = caching.resolve(cache)
        load: Load = partial(open_components, bundle, target=target, threads=threads)
        bounded = None
        if max_memory is not None:
            from edgediffusion.runtimes.memory_stages import Bounded  # reads graphs: not for those who only draw

            bounded = Bounded(bundle, max_memory, policy, target=target, threads=threads)
            load = bounded.load
        graphs = load([*(c for c in bundle.components if c.role in ROLES), *policy.components(bundle)])
        return cls(bundle, {graph.name: graph.session for graph in graphs}, cache=policy, load=load, bounded=bounded)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        callback: Callable[[Step], bool | None] | None = None,
        observe: Observe | None = None,
        correction: Starts | str | Path | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Draw. ``options`` are the other fields of ``Request``: ``num_inference_steps``, ``guidance_scale``, ``seed``, ...

        ``callback`` is called after every step; the work stops when it returns False. ``observe`` is called with the
        number of the step and the arrays before every step's call of the network. ``correction`` takes quantization
        noise out of the predictions: the file that ``edgediffusion correct`` wrote, a loaded one, or ``qncd``. With ``denoising_end``
        the result is latents alone: it has no pictures.

        Raises:
            ArgumentError: a value that cannot be used, a correction that was measured for something else.
            Cancelled: the callback stopped the work.
        """
        request = Request(prompt, **options)
        settled = self._settled(request)
        started = time.perf_counter()
        conditions, warnings = self._conditions(request, settled)
        encode_ms, times, calls, latents = since(started), [], 0, None
        for step in self._loop(request, settled, conditions, observe, correction):
            times.append(step.elapsed_ms)
            calls += step.calls
            latents = step.latents
            _tell(callback, step)
        assert latents is not None  # a plan has at least one step
        started = time.perf_counter()
        if settled.calls < len(settled.points):  # what is left to another network is no picture yet
            pixels = np.empty((0, 0, 0, 0), np.float32)
        else:
            pixels = self._autoencoder.decode(latents, tile=settled.tile)
        seeds = (request.seed,) if isinstance(request.seed, int) else tuple(request.seed)
        warnings = (*settled.warnings, *warnings, *windows.told(settled, self._apart(settled, observe)), *self._exceeded())
        return Result(pixels, latents, seeds, calls, Timings(encode_ms, tuple(times), since(started)), warnings)

    def steps(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        observe: Observe | None = None,
        correction: Starts | str | Path | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Step]:
        """The loop itself: a generator of steps, left by ``break`` or ``close``. Arguments as for a call."""
        request = Request(prompt, **options)
        settled = self._settled(request)
        conditions, _ = self._conditions(request, settled)
        return self._loop(request, settled, conditions, observe, correction)

    def predictor(self, prompt: str | Sequence[str] | None = None, **options: Unpack[Options]) -> Callable[[np.ndarray, int], np.ndarray]:
        """``predict(x, i)``: the guided prediction for x, float32 [images, c, h, w], at step i. Arguments as for a call."""
        request = Request(prompt, **options)
        settled = self._settled(request)
        start = self._begun(request, settled, self._noise(request, settled))
        denoiser = self._rows.denoiser(settled, self._conditions(request, settled)[0], start.beside)
        return lambda x, i: denoiser.predict(x, settled.points.at[i])

    def deployment(self, **options: Unpack[Options]) -> Deployment:
        """What a correction must be measured for to serve pictures that are drawn with these options."""
        return correcting.deployment(self.bundle, plan(Request(**options), self.sampling))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [images, c, h, w] of a step or a result to pixels: float32 [images, height, width, channels] in 0..1."""
        return self._autoencoder.decode(latents)

    def denoise(
        self,
        sample: np.ndarray,
        conditions: Mapping[str, np.ndarray] = _NOTHING,
        *,
        unconditional: Mapping[str, np.ndarray] | None = None,
        callback: Callable[[Step], bool | None] | None = None,
        observe: Observe | None = None,
        **options: Unpack[Options],
    ) -> np.ndarray:
        """The bare loop, for a network that draws no pictures: a policy's actions, a field that is refined.

        ``sample`` is standard normal noise, float [rows, ...] of any rank, and so is what is returned, denoised. ``conditions``
        are all other inputs of the denoiser but the time step, by name, [rows, ...] each. With ``unconditional`` ones, for
        a network with classifier-free guidance, it is guided away from them. ``options`` are those of a call, as far as
        they are neither about texts nor about pictures.

        Raises:
            ArgumentError: a condition that the denoiser does not have or lacks, a shape that it does not take, an option that
            has no meaning here. Cancelled: the callback stopped the work.
        """
        if useless := sorted(_OF_PICTURES & set(options)):
            raise ArgumentError("These options have no meaning for a bare loop", got=", ".join(useless))
        request = replace(Request(**options), num_images=len(sample))
        settled = self._settled(request)
        if unconditional is None and options.get("guidance_scale") is not None and settled.classifier_free:
            raise ArgumentError("Guidance needs the conditions that it leads away from", do="Give them as unconditional.")
        guided = settled.classifier_free and unconditional is not None
        settled = replace(settled, latent_shape=sample.shape, classifier_free=guided)
        rows = self._conditions.given(settled, conditions, unconditional)
        x = settled.points.start(sample.astype(np.float32))
        denoised = x
        for step in self._walk(request, settled, rows, Start(x), self._noise(request, settled), observe):
            denoised = step.latents
            _tell(callback, step)
        return denoised

    def prepared(self, prompt: str | Sequence[str] | None = None, **options: Unpack[Options]) -> Prepared:
        """What a loop of another shape needs, such as that of a stream. Arguments as for a call."""
        if self._conditions.controls:
            raise ArgumentError("A stream is not led by control pictures", do="Export the pipeline without its ControlNet.")
        request = Request(prompt, **options)
        settled = self._settled(request)
        return Prepared(settled, self._conditions(request, settled)[0], self._denoise, self._autoencoder)

    def _loop(
        self,
        request: Request,
        plan: Plan,
        conditions: Mapping[str, np.ndarray],
        observe: Observe | None,
        correction: Starts | str | Path | None,
    ) -> Iterator[Step]:
        """Everything is checked here, before the first step is asked for."""
        noise = self._noise(request, plan)
        return self._walk(request, plan, conditions, self._begun(request, plan, noise), noise, observe, correction)

    def _walk(
        self,
        request: Request,
        plan: Plan,
        conditions: Mapping[str, np.ndarray],
        start: Start,
        noise: noises.Noise,
        observe: Observe | None,
        correction: Starts | str | Path | None = None,
    ) -> Iterator[Step]:
        cached = (plan.cache or self._policy) != caching.resolve(None)
        stopped = plan.calls < len(plan.points)
        company = {
            "a cache": cached,
            "a correction": correction is not None,
            "mask_image": start.keep is not None,
            "denoising_end": stopped,
        }
        refuse_company(plan.sampler, plan.sampler_name, company)
        denoiser = replace(self._rows.denoiser(plan, conditions, start.beside), observe=observe)
        corrector = correcting.start(correction, self.bundle, plan, denoiser, request.seed)
        denoiser = replace(denoiser, corrector=corrector)
        pixels = partial(self._autoencoder.decode, tile=plan.tile)
        window = None
        if windows.is_parallel(plan) and not self._apart(plan, observe):
            leads = plan.control.leads(self._conditions.controls)
            window = windows.window(plan, conditions, start.beside, leads, self._rows.denoiser)
        drawn = corrector.noise(noise)
        loop = Loop(plan.sampler, plan.points, denoiser, start.x, drawn, corrector, pixels, self._named, start.keep, window)
        return until(loop, plan.calls) if stopped else iter(loop)

    def _apart(self, plan: Plan, observe: Observe | None) -> str:
        """Why a sampler that is parallel in time asks about one state after the other; empty where it does not, and for others."""
        if not windows.is_parallel(plan):
            return ""
        if observe is not None:
            return "what the network is fed is observed step by step"
        if self._bounded is not None:
            return "memory is bounded, and many at once take many times as much"
        return self._graphs.one_timestep(plan.cache or self._policy)

    def _settled(self, request: Request) -> Plan:
        """The plan of a request, as it fits the memory that there is."""
        settled = plan(request, self.sampling)
        return settled if self._bounded is None else self._bounded.settle(settled)

    def _exceeded(self) -> tuple[str, ...]:
        return () if self._bounded is None else self._bounded.exceeded()

    def _noise(self, request: Request, plan: Plan) -> noises.Noise:
        return noises.source(request.seed, plan.images, flavour=request.noise, dtype=self._denoise.input("sample").dtype)

    def _begun(self, request: Request, plan: Plan, noise: noises.Noise) -> Start:
        return begin(request, plan, noise, self._denoise, self.sampling, self._autoencoder)

    def _named(self, timestep: float) -> str:
        """The name of the denoiser that takes a time step."""
        found = [c for c in self.bundle.with_role("denoise") if c.below is not None and timestep < c.below]
        return min(found, key=lambda c: c.below or 0.0).name if found else self._denoise.name


def _tell(callback: Callable[[Step], bool | None] | None, step: Step) -> None:
    if callback is not None and callback(step) is False:
        raise Cancelled(f"Stopped after step {step.index + 1} of {step.total}")
