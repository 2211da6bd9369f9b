"""What a manifest says, as records: graphs with their roles, the facts of sampling, verbs and files. ``docs/bundle-format.md``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CUT_ROLES = ("denoise.shallow", "denoise.head", "denoise.tail")
CONTROL, SHALLOW_CONTROL = "control", "control.shallow"
ROLES = ("encode", CONTROL, SHALLOW_CONTROL, "denoise", *CUT_ROLES, "decode", "encode_image")
PREDICTIONS = ("epsilon", "v", "sample", "flow")
GUIDANCE = ("none", "classifier-free", "embedded")
SIZES = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
TIME_IDS = (*SIZES, "aesthetic_score")  # what a number of the input ``time_ids`` may be


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy dtype name and shape of a graph's input or output; a dynamic axis is its name.

    The name may be a product of other axes' names over an integer, such as ``height/2`` or ``height*width/4``: ``axis_size``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Tokenizer:
    """How text becomes the token ids of an ``encode`` component: a ``tokenizer.json``, cut and padded to ``length``.

    With ``lowercase`` a text is lowered and stripped of the space around it first. ``prefix`` is what is said before every
    prompt and no negative one: such a text has ``prefix_tokens`` more ids, whose states, behind the first one's, the graph leaves out.
    """

    file: str
    length: int
    pad_id: int
    input: str = "input_ids"
    lowercase: bool = False
    prefix: str = ""
    prefix_tokens: int = 0


@dataclass(frozen=True)
class Component:
    """One exported graph. ``model`` is its ONNX file, relative to the bundle.

    ``feeds`` says under which name an output is fed to other graphs, where that is not its own: the text encoder's
    ``last_hidden_state`` is the denoiser's ``encoder_hidden_states``. Outputs that it does not list keep their name.
    There may be several denoisers: each but the first takes the time steps ``below`` a number, as far as the next one.
    A part of a denoiser has one of ``CUT_ROLES``; ``cut`` is the module of the source's network that it was cut at. A part of a
    ``control`` graph gives what the shallow graph of that cut takes.
    """

    name: str
    role: str
    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tokenizer: Tokenizer | None = None
    feeds: Mapping[str, str] = field(default_factory=dict)
    below: float | None = None
    cut: str | None = None


@dataclass(frozen=True)
class DynamicShift:
    """The shift of a flow for a picture of n tokens, squares of ``token_pixels`` a side: e^mu or, if not ``exponential``, mu.

    mu is linear in n: ``base`` for ``base_tokens``, and ``most`` for ``most_tokens``.
    """

    base: float
    most: float
    base_tokens: int
    most_tokens: int
    token_pixels: int
    exponential: bool = True


@dataclass(frozen=True)
class NoiseSchedule:
    """The training schedule. ``kind`` is diffusers' ``beta_schedule``, or ``flow`` for x_t = (1 - t) x_0 + t noise.

    ``dynamic_shift`` stands for ``shift`` where that depends on the size of the picture.
    """

    kind: str
    train_steps: int
    beta_start: float = 0.0
    beta_end: float = 0.0
    zero_terminal_snr: bool = False
    set_alpha_to_one: bool = True
    spacing: str = "leading"
    steps_offset: int = 0
    shift: float = 1.0
    dynamic_shift: DynamicShift | None = None


@dataclass(frozen=True)
class Folded:
    """The time steps that a denoiser has rows for in place of its time embedding: those of ``steps`` of ``sampler``."""

    sampler: str
    steps: int
    timesteps: tuple[float, ...]


@dataclass(frozen=True)
class Sampling:
    """What a sampling loop must know and no graph can say.

    ``prediction`` is what ``denoise`` returns; ``guidance_width`` the length of the embedding of w for embedded
    guidance, 0 if the network takes the scale itself, as its input ``guidance``; a picture of H x W pixels has latents of
    H / downsampling; sizes are multiples of ``size_multiple``; ``decode`` takes latents / latent_scale + latent_shift.
    ``folded`` is there if the denoiser takes some time steps only, ``classes`` if it takes ``class_labels``: labels are below
    it, and it is the label of no class. Estimates of x_0 are kept within -``clip``..``clip``. ``time_ids`` says what the
    numbers in a row of that input are, of ``TIME_IDS``. With ``zero_unconditional`` the unconditional rows of what encoders
    give are zeros where no negative prompt was given, and not what they make of the empty text.
    """

    prediction: str
    guidance: str
    schedule: NoiseSchedule
    latent_channels: int
    downsampling: int
    latent_scale: float
    latent_shift: float
    height: int
    width: int
    size_multiple: int
    fixed_size: bool
    sampler: str
    steps: int
    guidance_scale: float
    guidance_width: int = 0
    folded: Folded | None = None
    classes: int | None = None
    clip: float | None = None
    time_ids: tuple[str, ...] = ()
    zero_unconditional: bool = False


@dataclass(frozen=True)
class Verb:
    """One step of a bundle's history: what was done, with which arguments, by which versions."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class File:
    sha256: str
    bytes: int


def axis_size(axis: str, sizes: Mapping[str, int]) -> int | None:
    """The size of a named axis: its own in ``sizes``, or that of a product of names over an integer. None where one is lacking."""
    if axis in sizes:
        return sizes[axis]
    product, _, part = axis.partition("/")
    names = product.split("*")
    if not all(name in sizes for name in names) or not (part.isdecimal() or not part):
        return None
    size, divisor = math.prod(sizes[name] for name in names), int(part or 1)
    return size // divisor if divisor and size % divisor == 0 else None
