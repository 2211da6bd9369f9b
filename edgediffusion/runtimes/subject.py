"""What a request asks to be drawn: texts and classes, one of each to an image, and the size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgediffusion.bundle import Sampling
from edgediffusion.errors import ArgumentError

if TYPE_CHECKING:
    from edgediffusion.runtimes.request import Request


Texts = tuple[str, ...]  # what the first, second and third text encoder read


def texts(request: Request) -> tuple[tuple[Texts, ...], tuple[Texts, ...]]:
    """Prompt and negative prompt of each image: all images of the first prompt, then those of the second, and so on.

    Raises:
        ArgumentError: no prompt in a list, no image of a prompt, or lists that do not go together.
    """
    prompts = _prompts(request)
    if not prompts:
        raise ArgumentError("The list of prompts is empty", do="Give at least one; it may be an empty text.")
    if request.num_images < 1:
        raise ArgumentError("The number of images per prompt cannot be used", got=request.num_images, allowed="1 and more")
    negatives = _each("negative_prompt", request.negative_prompt, ("",) * len(prompts))
    for what, given in (("pictures", request.image), ("masks", request.mask_image)):
        if isinstance(given, Sequence) and len(given) not in (1, len(prompts)):
            raise ArgumentError(f"A list of {what} has one per prompt", got=f"{len(given)} for {len(prompts)} prompts")
    return _of_encoders(request, "prompt", prompts), _of_encoders(request, "negative_prompt", negatives)


def labels(request: Request, sampling: Sampling, images: int) -> tuple[int, ...]:
    """The class of each image; empty where none were given.

    Raises:
        ArgumentError: a class that there is not, or another number of them than of prompts.
    """
    given = request.class_labels
    if given is None:
        return ()
    each: tuple[int, ...] = tuple(given) if isinstance(given, Sequence) else (given,)
    most = sampling.classes
    if wrong := [label for label in each if label < 0 or (most is not None and label >= most)]:
        known = "0 and above" if most is None else f"0 to {most - 1}"
        raise ArgumentError("There is no such class", got=", ".join(map(str, wrong)), allowed=known)
    prompts = images // request.num_images
    if isinstance(given, Sequence) and len(each) != prompts:
        raise ArgumentError("A list of class labels has one per prompt", got=f"{len(each)} for {prompts} prompts")
    return tuple(int(each[i * len(each) // images]) for i in range(images))


def size(request: Request, sampling: Sampling, shown: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of what is drawn: as asked for, else those of a picture that is ``shown`` to the network, else the bundle's.

    Raises:
        ArgumentError: a size that the network cannot draw.
    """
    multiple = sampling.size_multiple
    if shown is None or sampling.fixed_size:
        own = (sampling.height, sampling.width)
    else:  # rounded down, as diffusers does
        height, width = (max(multiple, length // multiple * multiple) for length in shown)
        own = (height, width)
    height, width = (usual if asked is None else asked for asked, usual in zip((request.height, request.width), own, strict=True))
    if sampling.fixed_size and (height, width) != own:
        raise ArgumentError(
            "This network draws one size only",
            got=f"{height} x {width} (height x width)",
            allowed=f"{sampling.height} x {sampling.width}",
            do="Leave the size out, or export with dynamic sizes where the network can do them.",
        )
    if height < multiple or width < multiple or height % multiple or width % multiple:
        near = " x ".join(str(max(multiple, round(length / multiple) * multiple)) for length in (height, width))
        raise ArgumentError(
            "The size of the picture cannot be used",
            got=f"{height} x {width} (height x width)",
            allowed=f"multiples of {multiple}",
            do=f"The nearest is {near}.",
        )
    return height, width


def check_tile(tile: int | None, sampling: Sampling) -> None:
    """Refuse a tile whose quarter, by which tiles overlap, is no whole number of latents.

    Raises:
        ArgumentError: another multiple is needed.
    """
    step = 4 * sampling.downsampling
    if tile is not None and (tile < step or tile % step):
        raise ArgumentError("The size of a tile cannot be used", got=tile, allowed=f"multiples of {step} pixels")


def _prompts(request: Request) -> tuple[str, ...]:
    if request.prompt is None:
        return ("",) * (len(request.class_labels) if isinstance(request.class_labels, Sequence) else 1)
    return (request.prompt,) if isinstance(request.prompt, str) else tuple(request.prompt)


def _of_encoders(request: Request, name: str, first: Texts) -> tuple[Texts, ...]:
    """The texts of each image; ``first`` are those of the first encoder, one per prompt."""
    others = [_each(f"{name}_{k}", getattr(request, f"{name}_{k}"), first) for k in (2, 3)]
    return tuple(row for row in zip(first, *others, strict=True) for _ in range(request.num_images))


def _each(name: str, given: str | Sequence[str] | None, usual: Texts) -> Texts:
    """One for each prompt: those that are given, or the usual ones."""
    if given is None:
        return usual
    found = (given,) * len(usual) if isinstance(given, str) else tuple(given)
    if len(found) != len(usual):
        raise ArgumentError(f"A list for {name} has one text per prompt", got=f"{len(found)} for {len(usual)} prompts")
    return found
