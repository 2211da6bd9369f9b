"""The graphs of autoencoders: ``decode`` and ``encode_image``, named as optimum names them.

AutoencoderKL     an encoder's output is the mean and the logarithm of the variance of its latents
AutoencoderTiny   it is the latents themselves (TAESD, Bohan 2023)
AutoencoderDC     the same (Chen et al. 2024, 2410.10733)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from edgediffusion.errors import SourceError
from edgediffusion.export.families import BATCH, Axis, Part, Tensor
from edgediffusion.export.source import Source

NAME = "vae"
_ROWS, _COLUMNS = 8, 12  # of a latent, to trace with


class Decoder(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """[b, latent channels, h, w] to pictures in -1..1, [b, channels, h * downsampling, w * downsampling]."""
        return self.network.decode(latent_sample, return_dict=False)[0]  # type: ignore[operator, no-any-return]


class Encoder(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Pictures to the mean and the logarithm of the variance of their latents, [b, 2 * latent channels, h, w]."""
        return self.network._encode(sample)  # type: ignore[operator, no-any-return]


class ExactEncoder(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Pictures to their latents, [b, latent channels, h, w]."""
        return self.network.encode(sample, return_dict=False)[0]  # type: ignore[operator, no-any-return]


@dataclass(frozen=True)
class Latents:
    """What a sampling loop must know of an autoencoder: see ``bundle.Sampling``."""

    channels: int
    downsampling: int
    scale: float
    shift: float


@dataclass(frozen=True)
class _Kind:
    """``levels`` is the setting with an entry for each size of a picture on its way."""

    levels: str
    encoder: Callable[[torch.nn.Module], torch.nn.Module]


_KINDS: Mapping[str, _Kind] = {
    "AutoencoderKL": _Kind("block_out_channels", Encoder),
    "AutoencoderTiny": _Kind("decoder_block_out_channels", ExactEncoder),
    "AutoencoderDC": _Kind("encoder_block_out_channels", ExactEncoder),
}
CLASSES = tuple(_KINDS)


def facts(source: Source) -> Latents:
    """Raises SourceError: the pipeline has no autoencoder of a known class, or one whose channels are scaled each in its own way."""
    kind = _KINDS[source.require_class(NAME, CLASSES)]
    config = source.settings(NAME)
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise SourceError(
            f"The autoencoder of this {source.class_name} scales each channel of its latents in its own way",
            got=f"latents_mean {config.get('latents_mean')}, latents_std {config.get('latents_std')}",
            allowed="null for both: one scaling_factor and one shift_factor",
            do="Take an autoencoder without these settings.",
        )
    return Latents(
        channels=config["latent_channels"],
        downsampling=int(2 ** (len(config[kind.levels]) - 1)),
        scale=config["scaling_factor"],
        shift=config.get("shift_factor") or 0.0,
    )


def parts(source: Source) -> tuple[Part, Part]:
    latents, kind = facts(source), _KINDS[source.require_class(NAME, CLASSES)]
    factor, channels = latents.downsampling, latents.channels
    config = source.settings(NAME)
    in_channels, out_channels = config["in_channels"], config.get("out_channels", config["in_channels"])
    rows, columns = Axis("height", _ROWS), Axis("width", _COLUMNS)
    lines = [Axis(f"image_{axis.name}", axis.example * factor, factor) for axis in (rows, columns)]
    exact = kind.encoder is ExactEncoder
    decode = Part(
        name="vae_decoder",
        role="decode",
        network=NAME,
        wrap=Decoder,
        inputs=(Tensor("latent_sample", (BATCH, channels, rows, columns)),),
        outputs=(Tensor("sample", (BATCH, out_channels, *lines)),),
    )
    encode = Part(
        name="vae_encoder",
        role="encode_image",
        network=NAME,
        wrap=kind.encoder,
        inputs=(Tensor("sample", (BATCH, in_channels, *lines)),),
        outputs=(Tensor("latents" if exact else "latent_parameters", (BATCH, channels if exact else 2 * channels, rows, columns)),),
    )
    return decode, encode
