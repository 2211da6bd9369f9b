"""What the denoiser is fed beside the state and the time step: texts as their encoders see them, classes, embedded guidance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from edgediffusion.bundle import Sampling
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.runtimes.denoiser import guidance_embedding
from edgediffusion.runtimes.request import Plan, Request
from edgediffusion.runtimes.text_encoder import TextEncoder

_LABELS, _EMBEDDED = "class_labels", "timestep_cond"
_LOOP_INPUTS = ("sample", "timestep", _EMBEDDED)


class Conditions:
    """Arrays by the names of the denoiser's inputs: one row per image, or two with the unconditional ones first."""

    def __init__(self, sampling: Sampling, denoiser: str, inputs: Iterable[str], encoders: Sequence[TextEncoder]):
        """``denoiser`` is the name of the graph, for a person, and ``inputs`` all that the denoising graphs take.

        Raises:
            BundleError: an input of the denoiser is given by two encoders.
        """
        self._sampling, self._denoiser, self._encoders = sampling, denoiser, tuple(encoders)
        self._wanted = set(inputs) - set(_LOOP_INPUTS)
        given = [name for encoder in self._encoders for name in encoder.names.values()]
        if twice := {name for name in self._wanted if given.count(name) > 1}:
            raise BundleError("Two encoders give the same condition", got=", ".join(sorted(twice)), do="Export the pipeline again.")

    def __call__(self, request: Request, plan: Plan) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """What a request is fed with, and warnings.

        Raises:
            ArgumentError: it lacks a prompt or a class. BundleError: no encoder gives what the denoiser takes.
        """
        conditions, warnings = self._texts(request, plan)
        warnings += self._classes(plan, conditions)
        lacking = self._wanted - set(conditions)
        if _LABELS in lacking:
            raise ArgumentError("This network draws one class or another", do="Say which with class_labels.")
        if lacking:
            raise BundleError(
                f"No encoder gives what the graph '{self._denoiser}' takes",
                got=", ".join(sorted(lacking)),
                allowed=", ".join(sorted(self._wanted - lacking)) or "nothing",
                do="Export the pipeline again; a network that draws no pictures is run by Pipeline.denoise.",
            )
        return {**conditions, **self._embedded(plan)}, warnings

    def given(
        self, plan: Plan, conditions: Mapping[str, np.ndarray], unconditional: Mapping[str, np.ndarray] | None
    ) -> dict[str, np.ndarray]:
        """Conditions that the caller has: arrays [images, ...] by name, and those that guidance leads away from.

        Raises:
            ArgumentError: a name that the denoiser does not have, one that is missing, or another number of rows.
        """
        rows = {name: np.asarray(array) for name, array in conditions.items()}
        for what, arrays in (("The conditions", rows), ("The unconditional conditions", unconditional)):
            if arrays is not None and set(arrays) != self._wanted:
                got, allowed = (", ".join(sorted(names)) or "none" for names in (arrays, self._wanted))
                raise ArgumentError(f"{what} are not those that the graph '{self._denoiser}' takes", got=got, allowed=allowed)
        if unconditional is not None and plan.classifier_free:
            rows = {name: np.concatenate([np.asarray(unconditional[name]), array]) for name, array in rows.items()}
        wanted = plan.images * (2 if plan.classifier_free else 1)
        for name, array in rows.items():
            if array.shape[:1] != (wanted,):
                raise ArgumentError(
                    f"The condition '{name}' has a row for each row of the sample", got=array.shape, allowed=f"{wanted} rows"
                )
        return {**rows, **self._embedded(plan)}

    def _texts(self, request: Request, plan: Plan) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        if request.prompt is None and self._encoders:
            raise ArgumentError("This network draws what a text says", do="Give a prompt; it may be an empty text.")
        texts = (*plan.negatives, *plan.prompts) if plan.classifier_free else plan.prompts
        encoded = [encoder(text, weighted=request.prompt_weights) for text in texts for encoder in self._encoders]
        gathered: dict[str, list[np.ndarray]] = {}
        for item in encoded:
            for name in self._wanted & set(item.conditions):
                gathered.setdefault(name, []).append(item.conditions[name])
        cut = dict.fromkeys(item.cut for item in encoded if item.cut)
        warnings = [f"The prompt is too long; this part of it was left out: '{text}'" for text in cut]
        if any(texts) and not self._encoders:
            warnings.append("The prompt has no effect: this network takes no text.")
        return {name: np.concatenate(rows) for name, rows in gathered.items()}, tuple(warnings)

    def _classes(self, plan: Plan, conditions: dict[str, np.ndarray]) -> tuple[str, ...]:
        if _LABELS not in self._wanted:
            return ("class_labels have no effect: this network takes none.",) if plan.labels else ()
        none = self._sampling.classes
        if plan.classifier_free and none is None:
            raise BundleError("The bundle does not say which label stands for no class", do="Export it again, or set guidance_scale to 1.")
        if plan.labels:
            conditions[_LABELS] = np.array([*([none] * plan.images if plan.classifier_free else []), *plan.labels], np.int64)
        return ()

    def _embedded(self, plan: Plan) -> dict[str, np.ndarray]:
        if self._sampling.guidance != "embedded":
            return {}
        row = guidance_embedding(plan.guidance_scale - 1.0, self._sampling.guidance_width)
        return {_EMBEDDED: np.tile(row, (plan.images, 1))}
