"""What the denoiser is fed beside the state and the time step: texts as their encoders see them, classes, embedded guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgediffusion.bundle import Sampling, TensorSpec
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.runtimes import no_effect
from edgediffusion.runtimes.control import PICTURE, SCALE
from edgediffusion.runtimes.denoiser import guidance_embedding
from edgediffusion.runtimes.request import Plan, Request
from edgediffusion.runtimes.text_encoder import Encoded, TextEncoder

_LABELS, _EMBEDDED, _SCALE, _SIZES = "class_labels", "timestep_cond", "guidance", "time_ids"
_LOOP_INPUTS = ("sample", "timestep", _EMBEDDED, _SCALE)


class Conditions:
    """Arrays by the names of the denoiser's inputs: one row per image, or two with the unconditional ones first."""

    def __init__(self, sampling: Sampling, denoiser: str, inputs: Sequence[TensorSpec], encoders: Sequence[TextEncoder]):
        """``denoiser`` is the name of the graph, for a person, and ``inputs`` all that the denoising graphs take.

        Raises:
            BundleError: several encoders give an input, and side by side it is not as wide as it is taken.
        """
        self._sampling, self._denoiser, self._encoders = sampling, denoiser, tuple(encoders)
        self._wanted = {spec.name for spec in inputs if not spec.name.startswith(SCALE)} - set(_LOOP_INPUTS)
        self._pictures = sorted((spec for spec in inputs if spec.name.startswith(PICTURE)), key=lambda spec: spec.name)
        for spec in inputs:
            widths = [encoder.widths[spec.name] for encoder in self._encoders if spec.name in encoder.widths]
            if len(widths) > 1 and sum(widths) != spec.shape[-1]:
                raise BundleError(
                    "Several encoders give one condition, and side by side it is not as wide as it is taken",
                    got=f"{spec.name} of {' + '.join(map(str, widths))} numbers",
                    allowed=str(spec.shape[-1]),
                    do="Export the pipeline again.",
                )

    def __call__(self, request: Request, plan: Plan) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """What a request is fed with, and warnings.

        Raises:
            ArgumentError: it lacks a prompt or a class. BundleError: no encoder gives what the denoiser takes.
        """
        conditions, warnings = self._texts(request, plan)
        warnings += self._classes(plan, conditions)
        self._sizes(plan, conditions)
        warnings += self._lead(request, plan, conditions)
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
        negatives = plan.negatives if plan.classifier_free else ()
        texts = (*negatives, *plan.prompts)
        numbered = list(enumerate(self._encoders))
        encoded = [
            [encoder(said[min(k, len(said) - 1)], weighted=request.prompt_weights, negative=i < len(negatives)) for k, encoder in numbered]
            for i, said in enumerate(texts)
        ]
        conditions = {name: np.concatenate([_side_by_side(name, row) for row in encoded]) for name in self._given()}
        if plan.classifier_free and self._sampling.zero_unconditional and _says_no_negative(request):
            for rows in conditions.values():
                rows[: plan.images] = 0
        cut = dict.fromkeys(item.cut for row in encoded for item in row if item.cut)
        warnings = [f"The prompt is too long; this part of it was left out: '{text}'" for text in cut]
        warnings += no_effect.unread(request, len(self._encoders))
        if any(map(any, texts)) and not self._encoders:
            warnings.append("The prompt has no effect: this network takes no text.")
        return conditions, tuple(warnings)

    def _given(self) -> list[str]:
        """The conditions that encoders give."""
        return sorted({name for encoder in self._encoders for name in encoder.names.values() if name in self._wanted})

    def _classes(self, plan: Plan, conditions: dict[str, np.ndarray]) -> tuple[str, ...]:
        if _LABELS not in self._wanted:
            return ("class_labels have no effect: this network takes none.",) if plan.labels else ()
        none = self._sampling.classes
        if plan.classifier_free and none is None:
            raise BundleError("The bundle does not say which label stands for no class", do="Export it again, or set guidance_scale to 1.")
        if plan.labels:
            conditions[_LABELS] = np.array([*([none] * plan.images if plan.classifier_free else []), *plan.labels], np.int64)
        return ()

    def _sizes(self, plan: Plan, conditions: dict[str, np.ndarray]) -> None:
        if _SIZES in self._wanted and plan.time_ids:
            told, away = plan.time_ids
            conditions[_SIZES] = np.array([*([away] * plan.images if plan.classifier_free else []), *([told] * plan.images)], np.float32)

    def _lead(self, request: Request, plan: Plan, conditions: dict[str, np.ndarray]) -> tuple[str, ...]:
        if not self._pictures:
            given = {"control_image": request.control_image is not None, "guess_mode": request.guess_mode}
            return tuple(f"{name} has no effect: no ControlNet is in this bundle." for name, there in given.items() if there)
        size = (plan.latent_shape[2] * self._sampling.downsampling, plan.latent_shape[3] * self._sampling.downsampling)
        shown = plan.control.arrays(self._pictures, size, plan.images, plan.images // request.num_images)
        rows = 2 if plan.classifier_free else 1
        conditions |= {name: np.concatenate([levels] * rows) for name, levels in shown.items()}
        return ()

    @property
    def controls(self) -> int:
        """How many ControlNets lead the denoiser."""
        return len(self._pictures)

    def _embedded(self, plan: Plan) -> dict[str, np.ndarray]:
        if self._sampling.guidance != "embedded":
            return {}
        if not self._sampling.guidance_width:
            return {_SCALE: np.full(plan.images, plan.guidance_scale, np.float32)}
        row = guidance_embedding(plan.guidance_scale - 1.0, self._sampling.guidance_width)
        return {_EMBEDDED: np.tile(row, (plan.images, 1))}


def _says_no_negative(request: Request) -> bool:
    return request.negative_prompt is request.negative_prompt_2 is request.negative_prompt_3 is None


def _side_by_side(name: str, encoded: Sequence[Encoded]) -> np.ndarray:
    """A condition of one text, [1, ..., width]: what the encoders that give it say, one beside the other."""
    found = [item.conditions[name] for item in encoded if name in item.conditions]
    return found[0] if len(found) == 1 else np.concatenate(found, axis=-1)
