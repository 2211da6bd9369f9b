"""What of a balance's figure is luck: python benchmarks/balances.py fashion

Weights are rounded once, and what that loses is the same in every picture: two balances of the same expected error can differ in PSNR by
which way the weights happened to fall. Here the factors of each balance are multiplied with numbers near 1 (a standard deviation of
three hundredths), several times: what is expected stays, and all weights round anew. The error is that of the network's predictions, and
of the guided ones, with layers simulated in torch, on 16 items, over the mean square of the float predictions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _report import REFERENCE, save
from quantization import FORMATS, GUIDANCE, SAMPLES, STEPS

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.cli._progress import Progress
from edgediffusion.export.families import family_of
from edgediffusion.export.source import Source
from edgediffusion.optimize.balance import Balance
from edgediffusion.optimize.balances import by_statistics
from edgediffusion.optimize.items import Drawing, draw_items
from edgediffusion.optimize.measure import _layers, _Named
from edgediffusion.optimize.observe import observe, tensors
from edgediffusion.optimize.recipe import Recipe, with_preset
from edgediffusion.optimize.simulate import simulated
from edgediffusion.profiles import judges

METHODS = ("none", "smoothquant", "csb", "ditas", "search")
JITTER, EVERY = 0.03, 16
HEAD = ("format", "balance", "error of predictions, dB", "of one rounding", "error of guided ones, dB", "of one rounding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("fashion", "fashion-dit"))
    parser.add_argument("bundle", help="the float bundle of it")
    parser.add_argument("--roundings", type=int, default=10)
    arguments = parser.parse_args()
    bench, rows = _Bench(arguments.model, Bundle.open(arguments.bundle)), []
    for form in ("W8A8", "W4A8"):
        recipe = with_preset(Recipe(form, *FORMATS[form], ranges="mse"), "ends")
        for method in METHODS:
            errors = bench.errors(recipe, method, arguments.roundings)
            rows.append({"format": form, "balance": method, "mean": errors.mean(0).tolist(), "deviation": errors.std(0).tolist()})
            save(f"balances_{arguments.model.replace('-', '_')}", {"roundings": arguments.roundings, "jitter": JITTER, "rows": rows})
    print(text.markdown_table(HEAD, [_shown(row) for row in rows]))


def _shown(row: Mapping[str, Any]) -> list[str]:
    (plain, guided), (first, second) = row["mean"], row["deviation"]
    return [row["format"], row["balance"], f"{plain:.1f}", f"± {first:.1f}", f"{guided:.1f}", f"± {second:.1f}"]


class _Bench:
    """A network in torch with what its layers saw, and its float predictions of a few items."""

    def __init__(self, model: str, bundle: Bundle):
        source = Source.open(REFERENCE / model)
        (denoiser,) = bundle.with_role("denoise")
        part = next(p for p in family_of(source)[1].parts(source) if p.name == denoiser.name)
        network = source.load(part.network)
        self.module = part.wrap(network)
        self.prefix = next(f"{name}." for name, child in self.module.named_children() if child is network)
        drawing = Drawing("uniform", SAMPLES, STEPS, guidance_scale=GUIDANCE)
        with Progress() as progress:
            items = draw_items(bundle, judges.load("fashion").prompts, drawing, progress=progress).items
        self.seen = observe(self.module, [(item.step, item.feeds) for item in items])
        feeds = [tensors(item.feeds) for item in items[5::EVERY]]
        self.batch = {n: torch.cat([f[n] if len(f[n]) == 2 else f[n].expand(2, *f[n].shape[1:]) for f in feeds]) for n in feeds[0]}
        with torch.no_grad():
            self.exact = self.module(**self.batch)

    def errors(self, recipe: Recipe, method: str, roundings: int) -> np.ndarray:
        """dB [roundings, 2]: of the predictions and of the guided ones."""
        balances = by_statistics(self.seen, replace(recipe, balance=method), self.prefix)
        rng = np.random.default_rng(0)
        return np.array([self._error(recipe, _jittered(balances, rng)) for _ in range(roundings)])

    def _error(self, recipe: Recipe, balances: Mapping[str, Balance]) -> tuple[float, float]:
        named = _Named(recipe, self.prefix)
        layers = _layers(self.seen, balances, named)
        wanted = {name: named.bits(name) for name, layer in layers.items() if not (named.excludes(name) or layer.is_constant)}
        with torch.no_grad(), simulated(self.module, layers, wanted):
            lost = self.module(**self.batch) - self.exact
        rows = lost.view(-1, 2, *lost.shape[1:])
        guided = rows[:, 0] + GUIDANCE * (rows[:, 1] - rows[:, 0])
        power = float(self.exact.square().mean())
        return tuple(10 * np.log10(float(error.square().mean()) / power) for error in (lost, guided))  # type: ignore[return-value]


def _jittered(balances: Mapping[str, Balance], rng: np.random.Generator) -> dict[str, Balance]:
    """Layers that share their factors share what they are multiplied with."""
    shared: dict[int, Balance] = {}
    for balance in balances.values():
        noise = np.exp(JITTER * rng.standard_normal(len(balance.factors)))
        shared.setdefault(id(balance.factors), Balance((balance.factors * noise).astype(np.float32)))
    return {name: shared[id(balance.factors)] for name, balance in balances.items()}


if __name__ == "__main__":
    main()
