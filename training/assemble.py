"""Make the diffusers folders that ship: ``edgediffusion/reference/<name>``, of the trained moving averages, in float16; and ``emoji``.

    python -m training.assemble fashion | fashion-dit | fashion-lcm | emoji [--replace] [-o FOLDER]

The same checkpoint gives the same bytes. A folder loads with ``DiffusionPipeline.from_pretrained`` (``fashion-dit`` with
``text_encoder_3=None, tokenizer_3=None``, as diffusers asks of any Stable Diffusion 3 without T5), under transformers 4
and 5 alike: weights have the names of the hub's checkpoints, the tokenizer has its old and new files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from edgediffusion.cli._demo import prompts as fashion_prompts
from edgediffusion.files import dump_json, new_folder
from edgediffusion.optimize.calibrate import PROMPTS
from training import networks, train
from training.loop import RUNS, Trainer

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "edgediffusion" / "reference"
FASHION = ("fashion", "fashion-dit", "fashion-lcm")
EMOJI = RUNS / "emoji" / "pipeline"  # is not shipped: with it, the reference pipelines would be more than 40 MB
PROMPT_COUNT = 60  # of emoji, as many as of fashion
TOKENIZERS = ("tokenizer", "tokenizer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


# --- pipelines of modules


def stable_diffusion(vae, unet, text_encoder, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=networks.diffusion_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def latent_consistency(vae, unet, text_encoder, tokenizer: CLIPTokenizer) -> LatentConsistencyModelPipeline:
    return LatentConsistencyModelPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=networks.few_step_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_3(vae, transformer, text_encoder, text_encoder_2, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        vae=vae,
        transformer=transformer,
        scheduler=networks.flow_schedule(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


# --- modules of runs


def trained(name: str, modules: dict[str, torch.nn.Module]) -> torch.nn.ModuleDict:
    """The modules of a run with the moving average of their weights."""
    if not (RUNS / name / "checkpoint.pt").exists():
        sys.exit(f"'{name}' is not trained yet. Do first: python -m training.train {name}")
    trainer = Trainer(name, modules, train.PLANS[name])
    trainer.swap()
    return trainer.modules.eval().cpu()


def scaled_vae(data_set: str):
    """The autoencoder with the scale that its latents were trained under."""
    vae = train.load_vae(data_set).cpu()
    vae.register_to_config(scaling_factor=train.latents(data_set)[1], force_upcast=False)
    return vae


def assemble_unet(name: str) -> DiffusionPipeline:
    tokenizer = networks.fashion_tokenizer() if name == "fashion" else train.EmojiCaptions().tokenizer
    sample_size = 8 if name == "fashion" else 16
    parts = trained(name, {"unet": networks.unet(sample_size), "text_encoder": networks.text_encoder(tokenizer)})
    return stable_diffusion(scaled_vae(name), parts["unet"], parts["text_encoder"], tokenizer)


def assemble_lcm(name: str) -> DiffusionPipeline:
    tokenizer = networks.fashion_tokenizer()
    teacher = trained("fashion", {"unet": networks.unet(8), "text_encoder": networks.text_encoder(tokenizer)})
    student = networks.unet(8, time_cond_proj_dim=train.GUIDANCE_WIDTH)
    target = networks.unet(8, time_cond_proj_dim=train.GUIDANCE_WIDTH).requires_grad_(False)
    parts = trained(name, {"unet": student, "target": target})
    return latent_consistency(scaled_vae("fashion"), parts["unet"], teacher["text_encoder"], tokenizer)


def assemble_dit(name: str) -> DiffusionPipeline:
    tokenizer = networks.fashion_tokenizer()
    parts = trained(name, train.dit_modules(tokenizer))
    return stable_diffusion_3(scaled_vae("fashion"), parts["transformer"], parts["text_encoder"], parts["text_encoder_2"], tokenizer)


ASSEMBLERS: dict[str, Callable[[str], DiffusionPipeline]] = {
    "fashion": assemble_unet,
    "fashion-dit": assemble_dit,
    "fashion-lcm": assemble_lcm,
    "emoji": assemble_unet,
}


# --- folders of pipelines


def write(pipeline: DiffusionPipeline, folder: Path, prompts: Sequence[str] = ()) -> None:
    """Save a pipeline in float16, with nothing in it of the machine that made it.

    ``prompts`` are what ``edgediffusion calibrate`` draws where it is given no others.
    """
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    for name in TEXT_ENCODERS:
        if (folder / name).is_dir():
            _name_as_on_the_hub(folder / name / "model.safetensors")
            _load_as_float32(folder / name / "config.json")
    for name in TOKENIZERS:
        if (folder / name).is_dir():
            _write_tokenizer(getattr(pipeline, name), folder / name)
    if prompts:
        (folder / PROMPTS).write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    for file in sorted(folder.rglob("*")):
        if file.name.endswith(("config.json", "model_index.json")):
            facts = json.loads(file.read_text())
            file.write_text(dump_json({k: v for k, v in facts.items() if k != "_name_or_path"}))
        if file.is_file():
            file.chmod(0o644)


def _name_as_on_the_hub(file: Path) -> None:
    """transformers 5 drops the prefix ``text_model.`` that transformers 4 and the hub's checkpoints have, and reads both."""
    tensors = load_file(file)
    known = ("text_model.", "text_projection.")
    save_file({k if k.startswith(known) else f"text_model.{k}": t for k, t in tensors.items()}, file, metadata={"format": "pt"})


def _load_as_float32(file: Path) -> None:
    """transformers 5 loads in the type that the configuration names, diffusers in float32 unless told: name float32, or they clash."""
    file.write_text(dump_json(json.loads(file.read_text()) | {"dtype": "float32"}))


def _write_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The files of transformers 4 (vocab.json, merges.txt, the map of special tokens) and of transformers 5 (tokenizer.json)."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(folder / "tokenizer.json"))
    model = json.loads(backend.to_str())["model"]
    words = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    marks = {"bos_token": networks.START, "eos_token": networks.END, "pad_token": networks.END, "unk_token": networks.END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": networks.TOKENS, "do_lower_case": True, "errors": "replace"}
    (folder / "vocab.json").write_text(json.dumps(words, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in model["merges"])]) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(dump_json(marks))
    (folder / "tokenizer_config.json").write_text(dump_json(marks | settings))


def load(folder: Path) -> DiffusionPipeline:
    """``DiffusionPipeline.from_pretrained``, which wants to be told of a Stable Diffusion 3 folder that it has no T5."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {k: None for k in ("text_encoder_3", "tokenizer_3") if index.get(k) == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def replace_folder(folder: Path, pipeline: DiffusionPipeline, prompts: Sequence[str] = ()) -> None:
    """Write beside ``folder``, and only then put the result in its place."""
    fresh = folder.with_name(f"{folder.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    with new_folder(fresh) as partial:
        write(pipeline, partial, prompts)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a diffusers folder of a trained run.")
    parser.add_argument("name", choices=ASSEMBLERS)
    parser.add_argument("-o", "--output", type=Path, help=f"default: edgediffusion/reference/NAME; for emoji {EMOJI.relative_to(ROOT)}")
    parser.add_argument("--replace", action="store_true", help="put it in the place of the folder that is there")
    arguments = parser.parse_args()
    folder = arguments.output or (EMOJI if arguments.name == "emoji" else REFERENCE / arguments.name)
    if folder.exists() and not arguments.replace:
        sys.exit(f"'{folder}' exists already. Give --replace, or another name with -o.")
    prompts = fashion_prompts() if arguments.name in FASHION else train.EmojiCaptions().prompts(PROMPT_COUNT)
    replace_folder(folder, ASSEMBLERS[arguments.name](arguments.name), prompts)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
