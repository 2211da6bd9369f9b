"""How LoRA files call a network's modules.

The component comes first:

1. with a dot, as diffusers has it (``unet.``, ``text_encoder_2.``), or PEFT and other tools (``base_model.model.``, ``diffusion_model.``);
2. with underscores all through, as kohya's scripts have it: ``lora_unet_down_blocks_0_...``, ``lora_te_...``, ``lora_te1_...``;
3. not at all: it is the denoiser.

Then the module: by its own name, or by that of the code it was first published in, where one module may be several of diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

_DENOISER = ""  # stands for the pipeline's denoiser, whatever it is called
_DOTTED = {
    "unet.": _DENOISER,
    "transformer.": _DENOISER,
    "model.diffusion_model.": _DENOISER,
    "diffusion_model.": _DENOISER,
    "base_model.model.": _DENOISER,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}
_FLAT = {
    "lora_unet_": _DENOISER,
    "lora_transformer_": _DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# Flux as Black Forest Labs published it: a block's module, and those of diffusers whose weights, stacked, are its weight.
_FLUX: Mapping[tuple[str, str], Mapping[str, tuple[str, ...]]] = {
    ("double_blocks", "transformer_blocks"): {
        "img_attn.qkv": _QKV,
        "txt_attn.qkv": _ADDED,
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
    },
    ("single_blocks", "single_transformer_blocks"): {
        "linear1": (*_QKV, "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
}
# UNets as CompVis and Stability AI published them: parts of a residual block, and modules outside the blocks.
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_OLD_TEXT = {".q_proj": ".to_q", ".k_proj": ".to_k", ".v_proj": ".to_v", ".out_proj": ".to_out.0"}
# A part of a name, or the width of the texts that cross-attention reads, and what has it.
_MARKS = {
    "double_blocks": "FLUX.1",
    "single_transformer_blocks": "FLUX.1",
    "joint_blocks": "Stable Diffusion 3",
    "context_block": "Stable Diffusion 3",
    "ff_context": "Stable Diffusion 3",
}
_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}

Targets = Mapping[str, tuple[str, ...]]


def modules_of(shapes: Mapping[str, Sequence[int]]) -> Targets:
    """All names of a network's modules that have a matrix, dotted and flat, each with the modules that it stands for."""
    own = [name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) > 1]
    found: dict[str, tuple[str, ...]] = {}
    for name, modules in (*_aliases(own), *((spelling, (module,)) for module in own for spelling in _spellings(module))):
        found[name] = found[name.replace(".", "_")] = modules
    return found


def place(name: str, targets: Mapping[str, Targets], denoiser: str) -> tuple[str, tuple[str, ...]]:
    """The component and the modules that a file means by ``name``; no modules if there are none."""
    for prefixes in (_DOTTED, _FLAT):
        for prefix, component in prefixes.items():
            rest = name.removeprefix(prefix)
            modules = targets.get(component or denoiser, {}).get(rest, ())
            if rest != name and modules:
                return component or denoiser, modules
    return denoiser, targets[denoiser].get(name, ())


def family_told(names: Iterable[str], downs: Mapping[str, Sequence[int]]) -> str:
    """The family that a LoRA was made for, as far as its names and shapes tell; empty if they do not."""
    for name in names:
        for mark, family in _MARKS.items():
            if mark in name:
                return family
    return next((_WIDTHS[downs[n][1]] for n in names if re.search(r"attn2[._]to[._]k$", n) and downs[n][1] in _WIDTHS), "")


def _spellings(module: str) -> Iterator[str]:
    """CLIP's text models have the prefix ``text_model.`` in some versions, and modules of attention have had diffusers' names."""
    for name in (module, f"text_model.{module}", module.removeprefix("text_model.")):
        yield name
        for new, old in _OLD_TEXT.items():
            if name.endswith(f"self_attn{new}"):
                yield name.removesuffix(new) + old


def _aliases(modules: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    known = set(modules)
    for (theirs, ours), parts in _FLUX.items():
        for block in _numbers(modules, ours):
            for part, several in parts.items():
                found = tuple(f"{ours}.{block}.{module}" for module in several)
                if known.issuperset(found):
                    yield f"{theirs}.{block}.{part}", found
    if "down_blocks.0.resnets.0.conv1" in known:
        yield from ((theirs, (ours,)) for theirs, ours in _OUTSIDE.items() if ours in known)
        for theirs, ours in _blocks(modules):
            if ours in known:
                yield theirs, (ours,)
            inside = (module for module in modules if module.startswith(f"{ours}."))
            yield from ((f"{theirs}.{_part(module.removeprefix(f'{ours}.'))}", (module,)) for module in inside)


def _part(module: str) -> str:
    return next((theirs for theirs, ours in _RESNET.items() if module == ours), module)


def _blocks(modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The blocks of a UNet by both names: those on the way down and up are numbered through."""
    yield from (("middle_block.0", "mid_block.resnets.0"), ("middle_block.1", "mid_block.attentions.0"))
    yield ("middle_block.2", "mid_block.resnets.1")
    number = 1  # 0 is conv_in
    for block in _numbers(modules, "down_blocks"):
        for layer in _numbers(modules, f"down_blocks.{block}.resnets"):
            yield f"input_blocks.{number}.0", f"down_blocks.{block}.resnets.{layer}"
            yield f"input_blocks.{number}.1", f"down_blocks.{block}.attentions.{layer}"
            number += 1
        if any(module.startswith(f"down_blocks.{block}.downsamplers") for module in modules):
            yield f"input_blocks.{number}.0.op", f"down_blocks.{block}.downsamplers.0.conv"
            number += 1
    number = 0
    for block in _numbers(modules, "up_blocks"):
        layers = _numbers(modules, f"up_blocks.{block}.resnets")
        attends = any(module.startswith(f"up_blocks.{block}.attentions") for module in modules)
        for layer in layers:
            yield f"output_blocks.{number}.0", f"up_blocks.{block}.resnets.{layer}"
            yield f"output_blocks.{number}.1", f"up_blocks.{block}.attentions.{layer}"
            if layer == layers[-1]:
                yield f"output_blocks.{number}.{2 if attends else 1}", f"up_blocks.{block}.upsamplers.0"
            number += 1


def _numbers(modules: Sequence[str], path: str) -> list[int]:
    found = {name.removeprefix(f"{path}.").split(".")[0] for name in modules if name.startswith(f"{path}.")}
    return sorted(int(number) for number in found if number.isdecimal())
