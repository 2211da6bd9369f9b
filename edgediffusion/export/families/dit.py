"""DiT (Peebles and Xie 2022, 2212.09748): a transformer on latents that draws a class of ImageNet.

It has places for one size of picture. The half of its output that is a variance is left out: no sampler here reads it.
"""

from __future__ import annotations

import torch

from edgediffusion.bundle import Sampling
from edgediffusion.export import autoencoder, block_cuts, latent_transformer
from edgediffusion.export.families import BATCH, Part, Tensor, check_components
from edgediffusion.export.source import Source

PIPELINES = ("DiTPipeline",)
OPTIONAL = ()
_USED = {"transformer", "vae", "scheduler"}


class Denoiser(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """sample [b, c, h, w], timestep [1], class_labels [b]: below the number of classes, or that number for none."""
        found = self.network(sample, timestep=timestep.expand(sample.shape[0]), class_labels=class_labels, return_dict=False)
        return found[0][:, : sample.shape[1]]  # type: ignore[no-any-return]


def parts(source: Source) -> tuple[Part, ...]:
    source.require_class("transformer", ("DiTTransformer2DModel",))
    check_components(source, _USED, OPTIONAL)
    config = source.settings("transformer")
    sample = (BATCH, config["in_channels"], config["sample_size"], config["sample_size"])
    denoise = Part(
        name="transformer",
        role="denoise",
        network="transformer",
        wrap=Denoiser,
        inputs=(Tensor("sample", sample), Tensor("timestep", (1,), "float32"), Tensor("class_labels", (BATCH,), "int64")),
        outputs=(Tensor("out_sample", sample),),
        cuts=block_cuts.CLASSES,
    )
    return (denoise, *autoencoder.parts(source))


def sampling(source: Source) -> Sampling:
    classes = source.settings("transformer")["num_embeds_ada_norm"]
    return latent_transformer.sampling(source, steps=50, guidance_scale=4.0, fixed_size=True, classes=classes)
