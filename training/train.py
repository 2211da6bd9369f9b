"""Train one reference model; run again after an interruption and it goes on where it stopped.

    python -m training.train fashion-vae | fashion | fashion-dit | fashion-lcm | emoji-vae | emoji

Order matters: a latent model needs its autoencoder first, ``fashion-lcm`` its teacher ``fashion``.
Curves and checkpoints: ``training/runs/<name>/``. ``training.assemble`` makes the pipelines of them, ``training.judge``
their numbers and sample grids.
"""

from __future__ import annotations

import copy
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F

from training import data, networks
from training.loop import RUNS, Plan, Trainer, device

PLANS = {
    "fashion-vae": Plan(steps=5000, batch=64, learning_rate=2e-3, warmup=50, decay_part=1.0),
    "fashion": Plan(steps=6000, batch=64, learning_rate=1.2e-3),
    "fashion-dit": Plan(steps=4500, batch=64, learning_rate=1e-3),
    "fashion-lcm": Plan(steps=2000, batch=64, learning_rate=3e-4, ema=0.99),
    "emoji-vae": Plan(steps=2500, batch=32, learning_rate=2e-3, warmup=50, decay_part=1.0),
    "emoji": Plan(steps=5000, batch=64, learning_rate=1.2e-3, ema=0.999),
}
UNCONDITIONAL_PART = 0.1
GUIDANCE_RANGE = (1.5, 7.0)
GUIDANCE_WIDTH = 256
SOLVER_STEPS = 50


# --- autoencoders


def train_vae(name: str) -> None:
    images = _images(name.removesuffix("-vae"))
    torch.manual_seed(0)
    trainer = Trainer(name, {"vae": networks.vae(images.shape[1])}, PLANS[name])
    vae = trainer.modules["vae"]

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        x = images[torch.randint(len(images), (trainer.plan.batch,), generator=generator)].to(device()).float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
        edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        rebuilt = F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges
        return rebuilt + 1e-4 * posterior.kl().float().mean() / posterior.mean[0].numel()

    trainer.run(loss_of)
    trainer.swap()
    vae.eval().save_pretrained(trainer.folder / "vae")
    x = images[:512].to(device()).float() / 127.5 - 1
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    print(f"{name}: round trip {10 * math.log10(4 / F.mse_loss(y, x).item()):.2f} dB on 512 training images", file=sys.stderr)


def _images(data_set: str) -> torch.Tensor:
    arrays = np.load(data.main(data_set))
    if data_set == "fashion":
        return torch.from_numpy(arrays["train_images"])[:, None]
    return torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()


def load_vae(data_set: str):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(RUNS / f"{data_set}-vae" / "vae").eval().to(device())


def latents(data_set: str) -> tuple[torch.Tensor, float]:
    """The data set's latents scaled to unit variance, and the scale. [images, 4, h, w]"""
    path = RUNS / f"{data_set}-vae" / "latents.pt"
    if not path.exists():
        vae, images = load_vae(data_set), _images(data_set)
        with torch.no_grad():
            parts = [vae.encode(i.to(device()).float() / 127.5 - 1).latent_dist.mean.cpu() for i in images.split(256)]
        torch.save(torch.cat(parts), path)
    z = torch.load(path, weights_only=True)
    scale = round(1 / z.std().item(), 4)
    return z * scale, scale


# --- captions


class FashionCaptions:
    """Token ids of every caption, and a draw of one caption for each image."""

    def __init__(self) -> None:
        arrays = np.load(data.main("fashion"))
        self.labels, self.tones = torch.from_numpy(arrays["train_labels"]), torch.from_numpy(arrays["train_tones"])
        groups = [[data.fashion_captions(label, tone) for tone in (None, 0, 1, 2)] for label in range(10)]
        captions = [c for tones in groups for group in tones for c in group]
        self.tokenizer = networks.fashion_tokenizer()
        self.ids = token_ids(self.tokenizer, ["", *captions])
        first, count, at = torch.zeros(10, 4, dtype=torch.long), torch.zeros(10, 4, dtype=torch.long), 1
        for label in range(10):
            for tone in range(4):
                first[label, tone], count[label, tone] = at, len(groups[label][tone])
                at += len(groups[label][tone])
        self.first, self.count = first, count

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Token ids [batch, tokens] of a caption for each image; every tenth is the empty one."""
        n = len(index)
        tone = torch.where(torch.rand(n, generator=generator) < 0.5, self.tones[index] + 1, 0)
        label = self.labels[index]
        which = (torch.rand(n, generator=generator) * self.count[label, tone]).long()
        caption = self.first[label, tone] + which
        caption[torch.rand(n, generator=generator) < UNCONDITIONAL_PART] = 0
        return self.ids[caption]


class EmojiCaptions:
    """As FashionCaptions; one label x style pair in twenty is held out of training."""

    def __init__(self) -> None:
        arrays = np.load(data.main("emoji"))
        captions = [data.emoji_caption(s, n) for s, n in zip(arrays["styles"], arrays["labels"], strict=True)]
        self.captions = captions
        self.tokenizer = networks.tokenizer(captions, vocabulary=3000)
        self.ids = token_ids(self.tokenizer, ["", *captions])
        labels = sorted(set(arrays["labels"]))
        counts = {n: int((arrays["labels"] == n).sum()) for n in labels}
        draw = np.random.default_rng(0).random(len(captions)) < 0.05
        self.held_out = torch.from_numpy(draw & np.array([counts[n] == 3 for n in arrays["labels"]]))
        self.kept = torch.nonzero(~self.held_out)[:, 0]

    def prompts(self, count: int) -> list[str]:
        """Captions that training saw."""
        chosen = np.random.default_rng(0).choice(self.kept.numpy(), count, replace=False)
        return [self.captions[i] for i in sorted(chosen)]

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        caption = index + 1
        caption[torch.rand(len(index), generator=generator) < UNCONDITIONAL_PART] = 0
        return self.ids[caption]


def token_ids(tokenizer, captions: list[str]) -> torch.Tensor:
    kept = tokenizer(captions, padding="max_length", truncation=True, max_length=networks.TOKENS)
    return torch.tensor(kept.input_ids)


def _captions(data_set: str):
    return FashionCaptions() if data_set == "fashion" else EmojiCaptions()


# --- denoisers


def train_unet(name: str) -> None:
    """v-prediction on uniform time steps, the text encoder learned along."""
    z, _ = latents(name)
    captions = _captions(name)
    torch.manual_seed(0)
    modules = {"unet": networks.unet(z.shape[-1]), "text_encoder": networks.text_encoder(captions.tokenizer)}
    trainer = Trainer(name, modules, PLANS[name])
    unet, text_encoder = trainer.modules["unet"], trainer.modules["text_encoder"]
    alpha_bar = networks.diffusion_schedule().alphas_cumprod.to(device())
    kept = getattr(captions, "kept", torch.arange(len(z)))

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        index = kept[torch.randint(len(kept), (trainer.plan.batch,), generator=generator)]
        x0, ids = z[index].to(device()), captions.draw(index, generator).to(device())
        t = torch.randint(0, 1000, (len(index),), generator=generator).to(device())
        noise = torch.randn(x0.shape, generator=generator).to(device())
        a, s = _rates(alpha_bar, t)
        v = unet(a * x0 + s * noise, t, text_encoder(ids).last_hidden_state).sample
        return F.mse_loss(v.float(), a * noise - s * x0)

    trainer.run(loss_of)


def train_dit(name: str) -> None:
    """Flow matching (2209.03003) with logit-normal times (2403.03206), both text encoders learned along."""
    z, _ = latents("fashion")
    captions = FashionCaptions()
    torch.manual_seed(0)
    trainer = Trainer(name, dit_modules(captions.tokenizer), PLANS[name])
    transformer = trainer.modules["transformer"]

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(z), (trainer.plan.batch,), generator=generator)
        x0, ids = z[index].to(device()), captions.draw(index, generator).to(device())
        u = torch.sigmoid(torch.randn(len(index), generator=generator)).to(device())
        noise = torch.randn(x0.shape, generator=generator).to(device())
        x = torch.lerp(x0, noise, u.view(-1, 1, 1, 1))
        context, pooled = sd3_conditions(trainer.modules, ids)
        with stand_in_for_absent_t5():
            velocity = transformer(x, context, pooled, u * 1000).sample
        return F.mse_loss(velocity.float(), noise - x0)

    trainer.run(loss_of)


def dit_modules(tokenizer) -> dict[str, torch.nn.Module]:
    encoders = [networks.text_encoder(tokenizer, width=networks.TEXT_WIDTH // 2, projection=True) for _ in range(2)]
    return {"transformer": networks.transformer(), "text_encoder": encoders[0], "text_encoder_2": encoders[1]}


def sd3_conditions(modules, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What StableDiffusion3Pipeline feeds, with ONE zero token in the place of its 256 for an absent T5."""
    parts = [modules[n](ids, output_hidden_states=True) for n in ("text_encoder", "text_encoder_2")]
    context = torch.cat([p.hidden_states[-2] for p in parts], dim=-1)
    context = F.pad(context, (0, 0, 0, 1))
    return context, torch.cat([p.text_embeds for p in parts], dim=-1)


class stand_in_for_absent_t5:
    """Let the last key of every attention count as 256 equal ones (a bias of log 256): the same result, a quarter of the work."""

    def __enter__(self) -> None:
        self.attention = F.scaled_dot_product_attention

        def attention(q, k, v, **_):
            bias = torch.zeros(k.shape[-2], dtype=q.dtype, device=q.device)
            bias[-1] = math.log(256)
            # By hand: on a CPU the fused attention takes five times as long on its way back.
            return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, dim=-1) @ v

        F.scaled_dot_product_attention = attention

    def __exit__(self, *_) -> None:
        F.scaled_dot_product_attention = self.attention


def train_lcm(name: str) -> None:
    """Latent consistency distillation (2310.04378, algorithm 1) of ``fashion`` with its guidance built in."""
    z, _ = latents("fashion")
    captions = FashionCaptions()
    source = Trainer("fashion", {"unet": networks.unet(8), "text_encoder": networks.text_encoder(captions.tokenizer)}, PLANS["fashion"])
    source.swap()
    teacher, text_encoder = (source.modules[n].eval().requires_grad_(False) for n in ("unet", "text_encoder"))
    student = networks.unet(8, time_cond_proj_dim=GUIDANCE_WIDTH)
    student.load_state_dict(teacher.state_dict(), strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    target = copy.deepcopy(student).requires_grad_(False)
    trainer = Trainer(name, {"unet": student, "target": target}, PLANS[name])
    alpha_bar = networks.diffusion_schedule().alphas_cumprod.to(device())
    with torch.no_grad():
        context = text_encoder(captions.ids.to(device())).last_hidden_state
    lookup = {tuple(row.tolist()): i for i, row in enumerate(captions.ids)}
    jump = 1000 // SOLVER_STEPS

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        n = trainer.plan.batch
        index = torch.randint(len(z), (n,), generator=generator)
        rows = [lookup[tuple(r.tolist())] for r in captions.draw(index, generator)]
        c, empty = context[rows], context[:1].expand(n, -1, -1)
        x0, noise = z[index].to(device()), torch.randn(z[index].shape, generator=generator).to(device())
        t = (torch.randint(1, SOLVER_STEPS + 1, (n,), generator=generator) * jump - 1).to(device())
        before = (t - jump).clamp(min=0)
        w = (torch.empty(n).uniform_(*GUIDANCE_RANGE, generator=generator) - 1).to(device())
        a, s = _rates(alpha_bar, t)
        x = a * x0 + s * noise
        with torch.no_grad():
            both = teacher(torch.cat([x, x]), torch.cat([t, t]), torch.cat([empty, c])).sample.float()
            v = both[:n] + (w + 1).view(-1, 1, 1, 1) * (both[n:] - both[:n])
            a2, s2 = _rates(alpha_bar, before)
            x_before = a2 * (a * x - s * v) + s2 * (s * x + a * v)
            for p, q in zip(target.parameters(), student.parameters(), strict=True):
                p.lerp_(q, 0.05)
            goal = consistency(target, alpha_bar, x_before, before, c, w)
        error = consistency(student, alpha_bar, x, t, c, w) - goal
        return (torch.sqrt(error**2 + 1e-3**2) - 1e-3).mean()

    trainer.run(loss_of)


def consistency(unet, alpha_bar, x, t, context, w) -> torch.Tensor:
    """f(x, t) of 2310.04378 with diffusers' boundary scalings (sigma_data 0.5, time step x 10)."""
    a, s = _rates(alpha_bar, t)
    v = unet(x, t, context, timestep_cond=guidance_embedding(w)).sample.float()
    scaled = (t.float() * 10).view(-1, 1, 1, 1)
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / torch.sqrt(scaled**2 + 0.25)
    return c_skip * x + c_out * (a * x - s * v)


def guidance_embedding(w: torch.Tensor, width: int = GUIDANCE_WIDTH) -> torch.Tensor:
    frequency = torch.exp(torch.arange(width // 2, device=w.device) * -(math.log(10000.0) / (width // 2 - 1)))
    angle = 1000 * w[:, None] * frequency
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)


def _rates(alpha_bar: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at each time step, [batch, 1, 1, 1]."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


TRAINERS = {
    "fashion-vae": train_vae,
    "emoji-vae": train_vae,
    "fashion": train_unet,
    "emoji": train_unet,
    "fashion-dit": train_dit,
    "fashion-lcm": train_lcm,
}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in TRAINERS:
        sys.exit(f"usage: python -m training.train NAME, NAME one of {', '.join(TRAINERS)}")
    TRAINERS[sys.argv[1]](sys.argv[1])


if __name__ == "__main__":
    main()
