"""The graphs of AutoencoderKL: ``decode`` and ``encode_image``, named as optimum names them."""

from __future__ import annotations

from typing import Any

import torch

from edgediffusion.export.families import BATCH, Axis, Part, Tensor
from edgediffusion.export.source import Source

CLASSES = ("AutoencoderKL",)
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


def downsampling(config: dict[str, Any]) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


def parts(source: Source) -> tuple[Part, Part]:
    source.require_class(NAME, CLASSES)
    config = source.config(NAME)
    factor, channels = downsampling(config), config["latent_channels"]
    rows, columns = Axis("height", _ROWS), Axis("width", _COLUMNS)
    lines = [Axis(f"image_{axis.name}", axis.example * factor, factor) for axis in (rows, columns)]
    decode = Part(
        name="vae_decoder",
        role="decode",
        network=NAME,
        wrap=Decoder,
        inputs=(Tensor("latent_sample", (BATCH, channels, rows, columns)),),
        outputs=(Tensor("sample", (BATCH, config["out_channels"], *lines)),),
    )
    encode = Part(
        name="vae_encoder",
        role="encode_image",
        network=NAME,
        wrap=Encoder,
        inputs=(Tensor("sample", (BATCH, config["in_channels"], *lines)),),
        outputs=(Tensor("latent_parameters", (BATCH, 2 * channels, rows, columns)),),
    )
    return decode, encode
