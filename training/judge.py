"""Numbers and a sample grid of a shipped fashion pipeline, by a classifier that knows real pictures only.

    python -m training.judge fashion | fashion-dit | fashion-lcm [--images 1000] [--guidance 1 2 3 5] [--steps N] [--seed 0]

Writes ``docs/models/<name>.json`` and ``docs/models/<name>.png`` and the numbers table of ``docs/models/<name>.md``.
``--table`` only rewrites the table from the JSON that is there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image

from edgediffusion.files import dump_json, new_file, sha256
from training import assemble, classifier, data, train

REFERENCE = classifier.FOLDER.parent
DOCS = Path(__file__).parent.parent / "docs" / "models"
STEPS = {"fashion": 20, "fashion-dit": 20, "fashion-lcm": 4}
GUIDANCES = {"fashion": (1.0, 2.0, 3.0, 5.0), "fashion-dit": (1.0, 2.0, 3.0, 5.0), "fashion-lcm": (2.0, 3.0, 5.0)}
BATCH = 100
GRID_TONES = (None, None, None, None, None, 0, 1, 2)
BEGIN, END = "<!-- numbers: python -m training.judge -->", "<!-- end of numbers -->"


@dataclass(frozen=True)
class Real:
    """What the real test set says under the same judge."""

    classifier_accuracy: float
    classifier_accuracy_round_trip: float
    frechet_of_training_images: float
    frechet_of_test_images_round_trip: float
    vae_round_trip_psnr_db: float


@dataclass(frozen=True)
class Drawn:
    """What one guidance scale gives."""

    guidance: float
    agreement: float
    agreement_of_class: dict[str, float]
    frechet: float


# --- drawing


def draw(pipeline: DiffusionPipeline, prompts: list[str], *, steps: int, guidance: float, seed: int) -> torch.Tensor:
    """Pictures [prompts, 1, 32, 32] in -1..1, as the 8-bit pictures that a user gets; batch n starts from seed + n."""
    parts = []
    for n, at in enumerate(range(0, len(prompts), BATCH)):
        generator = torch.Generator().manual_seed(seed + n)
        batch = prompts[at : at + BATCH]
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator, "output_type": "np"}
        images = draw_batch(pipeline, batch, settings)
        parts.append(torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round())
        print(f"guidance {guidance:g}: {at + len(batch)}/{len(prompts)}", file=sys.stderr, flush=True)
    return classifier.as_signal(torch.cat(parts))


@torch.no_grad()
def draw_batch(pipeline: DiffusionPipeline, prompts: list[str], settings: dict) -> np.ndarray:
    """Pictures [prompts, 32, 32, 1] in 0..1; of Stable Diffusion 3 with one zero token that counts 256 times, ten times faster."""
    if not isinstance(pipeline, StableDiffusion3Pipeline):
        return pipeline(prompts, **settings).images
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    conditions = dict(zip(names, pipeline.encode_prompt(prompts, None, None, max_sequence_length=1), strict=True))
    with train.stand_in_for_absent_t5():
        return pipeline(**conditions, **settings).images


def class_prompts(count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Captions without a tone, ten classes in turn, and the classes."""
    chosen, labels = np.random.default_rng(seed), torch.arange(count) % 10
    return [str(chosen.choice(data.fashion_captions(label, None))) for label in labels.tolist()], labels


def tone_prompts(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Captions with a tone, thirty pairs of class and tone in turn, and the tones."""
    chosen, tones = np.random.default_rng(seed), np.arange(count) // 10 % 3
    return [str(chosen.choice(data.fashion_captions(n % 10, tone))) for n, tone in enumerate(tones)], tones


def grid(pipeline: DiffusionPipeline, *, steps: int, guidance: float, seed: int) -> Image.Image:
    """A column per class; five rows without a tone, then dark, grey, bright. Enlarged twice."""
    prompts = [data.fashion_captions(label, tone)[0] for tone in GRID_TONES for label in range(10)]
    pictures = draw(pipeline, prompts, steps=steps, guidance=guidance, seed=seed)
    pixels = ((pictures + 1) * 127.5).round().byte().view(len(GRID_TONES), 10, 32, 32)
    page = pixels.permute(0, 2, 1, 3).reshape(len(GRID_TONES) * 32, 320)
    return Image.fromarray(page.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())


# --- measures


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features a, b [images, features] (1706.08500, equation 6)."""
    (m, s), (n, t) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a.double().numpy(), b.double().numpy()))
    root = np.sqrt(np.clip(np.linalg.eigvals(s @ t).real, 0, None)).sum()
    return float(((m - n) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root)


def tones(pictures: torch.Tensor) -> np.ndarray:
    """0 dark, 1 grey, 2 bright: where the mean over the item's own pixels lies among the training images' tertiles."""
    pixels = ((pictures[:, 0] + 1) * 127.5).numpy()
    return np.digitize(data.level(pixels), np.load(data.main("fashion"))["tone_edges"])


@torch.no_grad()
def round_trip(vae, x: torch.Tensor) -> torch.Tensor:
    """x [images, 1, 32, 32] through the mean of the encoder and back."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in x.split(BATCH)])


def judge_real(network: classifier.Classifier, vae, images: int) -> tuple[Real, torch.Tensor]:
    """The yardsticks, and the features of the real test set."""
    pixels, labels = classifier.images("test")
    x = classifier.as_signal(pixels)
    chosen, features = classifier.evaluate(network, x)
    back = round_trip(vae, x)
    again, back_features = classifier.evaluate(network, back)
    train, _ = classifier.images("train")
    subset = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:images]
    _, train_features = classifier.evaluate(network, classifier.as_signal(train[subset]))
    return Real(
        classifier_accuracy=_part(chosen == labels),
        classifier_accuracy_round_trip=_part(again == labels),
        frechet_of_training_images=round(frechet(train_features, features), 4),
        frechet_of_test_images_round_trip=round(frechet(back_features, features), 4),
        vae_round_trip_psnr_db=round(10 * np.log10(4 / (back - x).square().mean().item()), 2),
    ), features


def judge_drawn(network: classifier.Classifier, pictures: torch.Tensor, labels: torch.Tensor, real: torch.Tensor, guidance: float) -> Drawn:
    chosen, features = classifier.evaluate(network, pictures)
    by_class = {names[0]: _part((chosen == labels)[labels == n]) for n, names in enumerate(data.FASHION_NAMES)}
    return Drawn(guidance, _part(chosen == labels), by_class, round(frechet(features, real), 4))


def _part(hits: torch.Tensor) -> float:
    return round(hits.double().mean().item(), 4)


# --- the report


def judge(name: str, *, images: int, guidances: tuple[float, ...], steps: int, seed: int) -> dict:
    folder = REFERENCE / name
    pipeline = assemble.load(folder)
    network = classifier.load()
    real, features = judge_real(network, pipeline.vae, images)
    prompts, labels = class_prompts(images, seed)
    drawn = []
    for guidance in guidances:
        pictures = draw(pipeline, prompts, steps=steps, guidance=guidance, seed=seed)
        drawn.append(vars(judge_drawn(network, pictures, labels, features, guidance)))
    middle = guidances[len(guidances) // 2]
    asked, wanted = tone_prompts(300, seed)
    got = tones(draw(pipeline, asked, steps=steps, guidance=middle, seed=seed + 500))
    with new_file(DOCS / f"{name}.png", replace=True) as file:
        grid(pipeline, steps=steps, guidance=middle, seed=seed + 1000).save(file, optimize=True)
    return {
        "name": name,
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": steps,
        "images": images,
        "seed": seed,
        "real": vars(real),
        "drawn": drawn,
        "tone": {"guidance": middle, "images": len(wanted), "agreement": _part(torch.from_numpy(got == wanted))},
        "made_by": made_by("training.judge"),
        "weights_sha256": {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*.safetensors"))},
    }


def made_by(module: str) -> dict:
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers, np)}
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    return {"command": command, "date": datetime.date.today().isoformat(), "machine": f"{os.cpu_count()} CPU cores", "versions": versions}


def table(facts: dict) -> str:
    """The numbers of a model card, in Markdown, with the real images' numbers beside each."""
    real, best = facts["real"], facts["real"]["classifier_accuracy"]
    rows = [
        f"| guidance {d['guidance']:g} | {d['agreement']:.1%} | {d['agreement'] / best:.1%} | {d['frechet']:.2f} |" for d in facts["drawn"]
    ]
    per_class = {c: [d["agreement_of_class"][c] for d in facts["drawn"]] for c in facts["drawn"][0]["agreement_of_class"]}
    tone = facts["tone"]
    return "\n".join(
        [
            f"{facts['images']} pictures for each guidance, {facts['steps']} steps of `{facts['scheduler']}`, seed {facts['seed']}:",
            "",
            "| pictures | classifier agrees with the prompt | of what it gives real images | Fréchet distance to the real test set |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            f"| real test images | {best:.1%} | 100 % | 0 |",
            f"| real test images through the VAE | {real['classifier_accuracy_round_trip']:.1%} "
            f"| {real['classifier_accuracy_round_trip'] / best:.1%} | {real['frechet_of_test_images_round_trip']:.2f} |",
            f"| {facts['images']} real training images | | | {real['frechet_of_training_images']:.2f} |",
            "",
            f"Tone (dark, grey, bright) as asked: {tone['agreement']:.1%} of {tone['images']} pictures at guidance {tone['guidance']:g}; "
            f"a guess has 33 %. VAE round trip of the test set: {real['vae_round_trip_psnr_db']:.2f} dB.",
            "",
            "| class | " + " | ".join(f"guidance {d['guidance']:g}" for d in facts["drawn"]) + " |",
            "| --- |" + " ---: |" * len(facts["drawn"]),
            *(f"| {c} | " + " | ".join(f"{v:.0%}" for v in values) + " |" for c, values in per_class.items()),
            "",
            f"Made by `{facts['made_by']['command']}` on {facts['made_by']['date']}, {facts['made_by']['machine']}, "
            + ", ".join(f"{k} {v}" for k, v in facts["made_by"]["versions"].items())
            + ".",
        ]
    )


def with_numbers(card: str, numbers: str) -> str:
    """A model card with its numbers made anew."""
    before, rest = card.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{numbers}\n\n{END}{rest.split(END, 1)[1]}"


def tell(name: str, facts: dict | None, table: Callable[[dict], str]) -> None:
    """Keep ``facts`` as the report of ``name``, or read the one that there is; print its table and put it into the model card."""
    report, card = DOCS / f"{name}.json", DOCS / f"{name}.md"
    if facts is not None:
        with new_file(report, replace=True) as file:
            file.write_text(dump_json(facts))
    numbers = table(json.loads(report.read_text()))
    print(numbers)
    if card.exists():
        card.write_text(with_numbers(card.read_text(), numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge a shipped fashion pipeline by numbers.")
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--guidance", type=float, nargs="+", help="the middle one also draws the grid")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only rewrite the table of the model card")
    arguments = parser.parse_args()
    name, facts = arguments.name, None
    if not arguments.table:
        steps = arguments.steps or STEPS[name]
        guidances = tuple(arguments.guidance or GUIDANCES[name])
        facts = judge(name, images=arguments.images, guidances=guidances, steps=steps, seed=arguments.seed)
    tell(name, facts, table)


if __name__ == "__main__":
    main()
