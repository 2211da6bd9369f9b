"""Numbers and a sample grid of the ``emoji`` pipeline: which of the real pictures lies nearest to the one that it draws.

    python -m training.judge_emoji [--pairs 120] [--guidance 1 3 5] [--steps 20] [--seed 0]

A picture is drawn as asked where, of all real emoji of the style asked for, the one asked for is the nearest (or among the five
nearest): mean squared error over pixels that are averaged over 4x4. Pairs of label and style that training left out are counted
apart. Writes ``docs/models/emoji.json`` and ``emoji.png``, and the numbers of ``emoji.md``; ``--table`` only rewrites these.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from edgediffusion.files import new_file, sha256
from training import assemble, data, train
from training.judge import DOCS, made_by, tell

STYLES = ("noto", "gradient", "flat")
GRID = (
    "red heart",
    "grinning face",
    "pizza",
    "cat face",
    "rocket",
    "red apple",
    "house",
    "dog face",
    "sun",
    "hot beverage",
    "fire",
    "soccer ball",
)
BATCH, NEAREST = 40, 5


def draw(pipeline: DiffusionPipeline, prompts: list[str], *, steps: int, guidance: float, seed: int) -> np.ndarray:
    """Pictures [prompts, 64, 64, 3] in 0..1, as the 8-bit pictures that a user gets; batch n starts from seed + n."""
    parts = []
    for n, at in enumerate(range(0, len(prompts), BATCH)):
        generator = torch.Generator().manual_seed(seed + n)
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator, "output_type": "np"}
        parts.append(pipeline(prompts[at : at + BATCH], **settings).images)
        print(f"guidance {guidance:g}: {min(at + BATCH, len(prompts))}/{len(prompts)}", file=sys.stderr, flush=True)
    return np.round(np.concatenate(parts) * 255) / 255


def coarse(pictures: np.ndarray) -> np.ndarray:
    """[n, 64, 64, 3] averaged over 4x4 pixels, [n, 768]."""
    n, height, width, channels = pictures.shape
    return pictures.reshape(n, height // 4, 4, width // 4, 4, channels).mean((2, 4)).reshape(n, -1)


def ranks(drawn: np.ndarray, real: np.ndarray, wanted: np.ndarray, same_style: np.ndarray) -> np.ndarray:
    """How many real pictures of the style [drawn, real] are nearer than the wanted one, [drawn]."""
    distance = np.square(drawn[:, None] - real[None]).mean(2)
    own = distance[np.arange(len(drawn)), wanted]
    return ((distance < own[:, None]) & same_style).sum(1)


def choose(held_out: np.ndarray, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which captions are drawn: ``pairs``, or as many as there are, of those that training saw, and of those that it did not."""
    rng = np.random.default_rng(seed)
    seen, unseen = (rng.choice(kind, min(pairs, len(kind)), replace=False) for kind in map(np.flatnonzero, (~held_out, held_out)))
    return seen, unseen


def judge(*, pairs: int, guidances: list[float], steps: int, seed: int) -> dict:
    pipeline, arrays = assemble.load(assemble.EMOJI), np.load(data.main("emoji"))
    styles, labels = arrays["styles"], arrays["labels"]
    real = coarse(arrays["images"] / 255)
    groups = choose(train.EmojiCaptions().held_out.numpy(), pairs, seed)
    drawn = []
    for guidance in guidances:
        row: dict = {"guidance": guidance}
        for name, chosen in zip(("seen", "unseen"), groups, strict=True):
            prompts = [data.emoji_caption(styles[i], labels[i]) for i in chosen]
            pictures = coarse(draw(pipeline, prompts, steps=steps, guidance=guidance, seed=seed))
            rank = ranks(pictures, real, chosen, styles[chosen][:, None] == styles[None])
            row[name] = {"pairs": len(chosen), "first": float((rank == 0).mean()), "of_five": float((rank < NEAREST).mean())}
        drawn.append(row)
    with new_file(DOCS / "emoji.png", replace=True) as file:
        grid(pipeline, steps=steps, guidance=guidances[len(guidances) // 2], seed=seed + 1000).save(file, optimize=True)
    return {
        "name": "emoji",
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": steps,
        "seed": seed,
        "of_style": int(np.mean([np.sum(styles == style) for style in STYLES])),
        "drawn": drawn,
        "vae_round_trip_psnr_db": round_trip(pipeline, arrays["images"]),
        "made_by": made_by("training.judge_emoji"),
        "weights_sha256": {str(f.relative_to(assemble.EMOJI)): sha256(f) for f in sorted(assemble.EMOJI.rglob("*.safetensors"))},
    }


def grid(pipeline: DiffusionPipeline, *, steps: int, guidance: float, seed: int) -> Image.Image:
    """A column for each label of ``GRID``, a row for each style."""
    pictures = draw(pipeline, [data.emoji_caption(s, n) for s in STYLES for n in GRID], steps=steps, guidance=guidance, seed=seed)
    page = (pictures * 255).astype(np.uint8).reshape(len(STYLES), len(GRID), 64, 64, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(page.reshape(len(STYLES) * 64, len(GRID) * 64, 3))


@torch.no_grad()
def round_trip(pipeline: DiffusionPipeline, images: np.ndarray) -> float:
    """dB of every eighth picture through the mean of the encoder and back."""
    x = torch.from_numpy(images[::8]).permute(0, 3, 1, 2).float() / 127.5 - 1
    back = torch.cat([pipeline.vae.decode(pipeline.vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in x.split(BATCH)])
    return round(10 * float(torch.log10(4 / (back - x).square().mean())), 2)


def table(facts: dict) -> str:
    """The numbers of the model card, in Markdown."""

    def cells(group: dict) -> str:
        return f"{group['first']:.0%} | {group['of_five']:.0%}"

    seen, unseen = (facts["drawn"][0][name]["pairs"] for name in ("seen", "unseen"))
    rows = [f"| guidance {d['guidance']:g} | {cells(d['seen'])} | {cells(d['unseen'])} |" for d in facts["drawn"]]
    made, styled = facts["made_by"], facts["of_style"]
    return "\n".join(
        [
            f"{seen} captions that training saw, {unseen} pairs of label and style that it did not, {facts['steps']} steps of "
            f"`{facts['scheduler']}`, seed {facts['seed']}: is",
            f"the real picture that lies nearest to the one drawn, of some {styled} of its style, the one asked for?",
            "",
            "| pictures | nearest | among five | nearest, pair not seen | among five, pair not seen |",
            "| --- | ---: | ---: | ---: | ---: |",
            *rows,
            f"| by chance | {1 / styled:.1%} | {NEAREST / styled:.1%} | {1 / styled:.1%} | {NEAREST / styled:.1%} |",
            "",
            f"VAE round trip: {facts['vae_round_trip_psnr_db']:.2f} dB.",
            "",
            f"Made by `{made['command']}` on {made['date']}, {made['machine']}, "
            + ", ".join(f"{k} {v}" for k, v in made["versions"].items())
            + ".",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the emoji pipeline by numbers.")
    parser.add_argument("--pairs", type=int, default=120, help="captions of each kind")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0], help="the middle one also draws the grid")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only rewrite the table of the model card")
    arguments = parser.parse_args()
    facts = None
    if not arguments.table:
        if not assemble.EMOJI.exists():
            sys.exit("'emoji' is not assembled yet. Do first: python -m training.assemble emoji")
        facts = judge(pairs=arguments.pairs, guidances=arguments.guidance, steps=arguments.steps, seed=arguments.seed)
    tell("emoji", facts, table)


if __name__ == "__main__":
    main()
