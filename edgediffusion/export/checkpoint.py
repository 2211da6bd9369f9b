"""Where the tensors of a network lie on disk. Only headers are read; format: https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgediffusion.errors import SourceError

MOST_HEADER_BYTES = 100_000_000
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file: ``bytes`` from ``offset`` on, counted from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a network by name, from one file or several shards."""

    folder: Path
    tensors: Mapping[str, Stored]

    @classmethod
    def read(cls, folder: Path, stem: str) -> Checkpoint:
        """The checkpoint ``stem``.safetensors, or its shards, or a variant such as ``stem``.fp16.safetensors.

        Raises:
            SourceError: none is there, or it is only there as a pickle, or a file is damaged or missing.
        """
        tensors: dict[str, Stored] = {}
        for file in _files(folder, stem):
            tensors.update(read_header(file)[0])
        return cls(folder, tensors)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({stored.file for stored in self.tensors.values()}))


def refuse_pickle(path: Path) -> None:
    """Raise the SourceError that says how a pickle becomes safetensors, if ``path`` is one or is a folder with one."""
    if path.suffix in PICKLES:
        raise _pickle_error(path, f"StableDiffusionPipeline.from_single_file('{path.name}')")
    pickles = sorted(p for p in path.glob("*") if p.suffix in PICKLES) if path.is_dir() else []
    if pickles:
        raise _pickle_error(pickles[0], "DiffusionPipeline.from_pretrained('SOURCE', use_safetensors=False)")


def _pickle_error(path: Path, load: str) -> SourceError:
    name = load.split(".")[0]
    return SourceError(
        f"The weights '{path.parent.name}/{path.name}' are a pickle, which can run code of its maker's when it is read",
        allowed="safetensors files",
        do="If you trust its maker, convert it: "
        f"python -c \"from diffusers import {name}; {load}.save_pretrained('CONVERTED', safe_serialization=True)\"",
    )


def _files(folder: Path, stem: str) -> tuple[Path, ...]:
    for name in _candidates(folder, stem):
        if name.endswith(".safetensors") and (folder / name).is_file():
            return (folder / name,)
        if not name.endswith(".safetensors") and (folder / name).is_file():
            return _shards(folder / name)
    refuse_pickle(folder)
    raise SourceError(
        f"The component '{folder.name}' has no weights",
        got=", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder",
        allowed=f"{stem}.safetensors, or its shards with {stem}.safetensors.index.json",
        do="Download or save the pipeline completely.",
    )


def _candidates(folder: Path, stem: str) -> Iterator[str]:
    """The plain names first: full weights are better than those of a variant."""
    yield from (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    variants = sorted(p.name for p in folder.glob(f"{stem}.*.safetensors"))
    yield from (name for name in variants if "-of-" not in name)
    yield from sorted(p.name for p in folder.glob(f"{stem}.safetensors.index.*.json"))


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SourceError(f"The index '{_short(index)}' cannot be read", do="Download it again.") from None
    lacking = sorted(name for name in names if not (index.parent / name).is_file())
    if lacking:
        raise SourceError(f"Shards that '{_short(index)}' names are missing", got=", ".join(lacking), do="Download them.")
    if any(Path(name).name != name for name in names):
        raise SourceError(f"The index '{_short(index)}' names files outside its folder", do="Do not use this checkpoint.")
    return tuple(index.parent / name for name in sorted(names))


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file, and what its maker noted beside them.

    Raises:
        SourceError: the file is damaged, or has tensors of a type that is not known.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MOST_HEADER_BYTES or 8 + length > size:
            raise _damaged(file, f"a header of {length} bytes in a file of {size}")
        text = stream.read(length)
    try:
        entries = dict(json.loads(text).items())
        notes = dict(entries.pop("__metadata__", None) or {})
        tensors = {name: _stored(file, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"{type(error).__name__} {error} in its header") from None
    needed = max((t.offset + t.bytes for t in tensors.values()), default=8 + length)
    if needed != size:
        raise _damaged(file, f"{size} bytes where its header says {needed}")
    return tensors, notes


def _stored(file: Path, entry: Mapping[str, Any], base: int) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in BYTES:
        raise SourceError(f"'{_short(file)}' has tensors of a type that is not known", got=entry["dtype"], allowed=", ".join(BYTES))
    if begin < 0 or end - begin != math.prod(shape) * BYTES[entry["dtype"]]:
        raise ValueError(f"data_offsets {begin}, {end}")
    return Stored(file, entry["dtype"], shape, base + begin, end - begin)


def _damaged(file: Path, got: str) -> SourceError:
    return SourceError(f"The file '{_short(file)}' is damaged or was not copied completely", got=got, do="Download or save it again.")


def _short(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"
