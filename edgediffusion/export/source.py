"""A pipeline in diffusers' folder format, read without its weights."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from edgediffusion.errors import SourceError
from edgediffusion.export.checkpoint import Checkpoint, refuse_pickle
from edgediffusion.export.quiet import quiet

INDEX = "model_index.json"
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_SEVERAL = ("MultiControlNetModel", "ControlNetModel")
_KEPT_APART = ("_class_name", "_diffusers_version", "_name_or_path")


@dataclass(frozen=True)
class Source:
    """``index`` is model_index.json: the pipeline's class, and the library and class of every component."""

    path: Path
    index: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Source:
        """Raises SourceError: no such folder, or no pipeline in it."""
        if path.is_file():
            _refuse_single_file(path)
        if not path.is_dir():
            raise SourceError(f"There is no folder '{path}'", do="Give the folder of a diffusers pipeline.")
        if not (path / INDEX).is_file():
            _refuse_folder(path)
        index = _read_json(path / INDEX)
        if not isinstance(index.get("_class_name"), str):
            raise SourceError(f"'{path / INDEX}' names no pipeline class", do="Save the pipeline with diffusers' save_pretrained.")
        return cls(path, index)

    @property
    def class_name(self) -> str:
        return str(self.index["_class_name"])

    @cached_property
    def components(self) -> Mapping[str, str]:
        """Class name of every component that is there."""
        pairs = {k: v for k, v in self.index.items() if k not in _KEPT_APART and isinstance(v, list) and len(v) == 2}
        found = {name: str(kind) for name, (library, kind) in pairs.items() if kind is not None}
        for name in [name for name, kind in found.items() if kind == _SEVERAL[0]]:  # which diffusers saves side by side
            others = sorted((p.name for p in self.path.glob(f"{name}_*") if p.is_dir()), key=lambda other: (len(other), other))
            found |= dict.fromkeys((name, *others), _SEVERAL[1])
        return found

    def config(self, name: str) -> dict[str, Any]:
        """``config.json`` of a component, or the configuration of the scheduler."""
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        return _read_json(self.path / name / file)

    def settings(self, name: str) -> dict[str, Any]:
        """``config.json`` of a network of diffusers, and what its class has by default where the file is silent: old files are."""
        parameters = inspect.signature(self._class(name).__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty} | self.config(name)

    def require_class(self, name: str, allowed: tuple[str, ...]) -> str:
        """The class name of a component.

        Raises:
            SourceError: the pipeline lacks it, or it is of a class that is not known in this place.
        """
        kind = self.components.get(name)
        if kind in allowed:
            return kind
        raise SourceError(
            f"The component '{name}' of this {self.class_name} is missing"
            if kind is None
            else f"The component '{name}' is of a class that is not known",
            got=kind,
            allowed=", ".join(allowed),
            do=f"Load the pipeline in diffusers with a {name} of such a class, save it, and export that.",
        )

    def network(self, name: str) -> torch.nn.Module:
        """The network of a component as its configuration describes it, with whatever values it begins with."""
        kind = self._class(name)
        config = self.config(name)
        with quiet():
            if issubclass(kind, transformers.PreTrainedModel):
                module = kind(kind.config_class.from_dict(config))
            else:
                module = kind.from_config(config)
        return module.eval()  # type: ignore[no-any-return]

    def load(self, name: str) -> torch.nn.Module:
        """The network of a component with its weights, in float32."""
        variant = self._variant(name)
        with quiet():
            kind = self._class(name)
            key = "dtype" if issubclass(kind, transformers.PreTrainedModel) else "torch_dtype"
            options = {key: torch.float32, "local_files_only": True, "variant": variant}
            return kind.from_pretrained(self.path / name, **options).eval()  # type: ignore[no-any-return]

    def checkpoint(self, name: str) -> Checkpoint:
        library = "transformers" if issubclass(self._class(name), transformers.PreTrainedModel) else "diffusers"
        return Checkpoint.read(self.path / name, _STEMS[library])

    def variant(self) -> str | None:
        """The variant that must be named to diffusers to load the whole pipeline, such as ``fp16``."""
        variants = {self._variant(name) for name in self.components if any((self.path / name).glob("*.safetensors"))}
        return next((v for v in sorted(filter(None, variants))), None)

    def digest(self, sha256_of: Mapping[Path, str]) -> str:
        """Identity of the source: its index, its configurations and the hashes of the weight files that were read."""
        files = [p for p in sorted(self.path.rglob("*.json")) if ".safetensors." not in p.name]
        lines = [f"{p.relative_to(self.path).as_posix()} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in files]
        lines += sorted(f"{p.relative_to(self.path).as_posix()} {digest}" for p, digest in sha256_of.items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _class(self, name: str) -> Any:
        for library in _LIBRARIES.values():
            kind = getattr(library, self.components[name], None)
            if kind is not None:
                return kind
        raise SourceError(f"The class of the component '{name}' is not in the installed diffusers", got=self.components[name])

    def _variant(self, name: str) -> str | None:
        stem = self.checkpoint(name).files[0].name.split("-")[0].removesuffix(".safetensors")
        return stem.split(".", 1)[1] if "." in stem else None


def _read_json(file: Path) -> dict[str, Any]:
    short = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        raise SourceError(f"The pipeline lacks the file '{short}'", do="Download or save it completely.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"The file '{short}' cannot be read: {error}", do="Download or save it again.") from None
    if not isinstance(content, dict):
        raise SourceError(f"The file '{short}' is not a JSON object", do="Download or save it again.")
    return content


def _refuse_single_file(path: Path) -> None:
    refuse_pickle(path)
    raise SourceError(
        f"'{path}' is a file, not the folder of a pipeline",
        do='If it is a whole checkpoint in one file, make a folder of it: python -c "from diffusers import StableDiffusionPipeline; '
        f"StableDiffusionPipeline.from_single_file('{path.name}').save_pretrained('FOLDER')\"",
    )


def _refuse_folder(path: Path) -> None:
    refuse_pickle(path)
    found = sorted(p.name for p in path.iterdir())[:8]
    raise SourceError(
        f"'{path}' is no pipeline: it has no {INDEX}",
        got=", ".join(found) or "an empty folder",
        do="Give the folder that diffusers' save_pretrained wrote.",
    )
