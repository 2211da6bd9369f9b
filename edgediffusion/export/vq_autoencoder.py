"""The graphs of VQModel (van den Oord et al. 2017, 1711.00937; Esser et al. 2020, 2012.09841): ``decode`` and ``encode_image``.

Its decoder first takes each latent to the nearest entry of a codebook. Its encoder gives latents as they are before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from edgediffusion.errors import SourceError
from edgediffusion.export.families import BATCH, Axis, Part, Tensor
from edgediffusion.export.named import Named
from edgediffusion.export.source import Source

NAME, CLASSES = "vqvae", ("VQModel",)
_ROWS, _COLUMNS = 8, 12  # of a latent, to trace with


def downsampling(source: Source) -> int:
    return int(2 ** (len(source.config(NAME)["block_out_channels"]) - 1))


def parts(source: Source) -> tuple[Part, Part]:
    """Raises SourceError: the autoencoder is of another class, or decodes something else than latents."""
    source.require_class(NAME, CLASSES)
    config = source.config(NAME)
    if config.get("lookup_from_codebook"):
        raise SourceError(
            f"The autoencoder of this {source.class_name} decodes numbers of codes, which no denoiser here predicts",
            got="lookup_from_codebook true",
            allowed="false",
        )
    factor, channels = downsampling(source), config.get("vq_embed_dim") or config["latent_channels"]
    rows, columns = Axis("height", _ROWS), Axis("width", _COLUMNS)
    lines = [Axis(f"image_{axis.name}", axis.example * factor, factor) for axis in (rows, columns)]
    latents, pixels = (BATCH, channels, rows, columns), (BATCH, config["in_channels"], *lines)
    decode = Part(
        name="vae_decoder",
        role="decode",
        network=NAME,
        wrap=partial(Named, names=["latent_sample"], call=_decode),
        inputs=(Tensor("latent_sample", latents),),
        outputs=(Tensor("sample", (BATCH, config["out_channels"], *lines)),),
    )
    encode = replace(
        decode,
        name="vae_encoder",
        role="encode_image",
        wrap=partial(Named, names=["sample"], call=_encode),
        inputs=(Tensor("sample", pixels),),
        outputs=(Tensor("latents", latents),),
    )
    return decode, encode


def _decode(network: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The nearest entry by |z - e|^2 without |z|^2, which is the same for all entries."""
    latents = given["latent_sample"]
    codes: torch.Tensor = network.quantize.embedding.weight  # type: ignore[union-attr, assignment]
    flat = latents.permute(0, 2, 3, 1)
    nearest = ((codes**2).sum(dim=1) - 2 * flat @ codes.T).argmin(dim=-1)
    quantized = torch.nn.functional.embedding(nearest, codes).permute(0, 3, 1, 2)
    return network.decode(quantized, force_not_quantize=True, return_dict=False)[0]  # type: ignore[operator, no-any-return]


def _encode(network: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return network.encode(given["sample"], return_dict=False)[0]  # type: ignore[operator, no-any-return]
