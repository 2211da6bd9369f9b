"""Which steps cost the worst pictures: python benchmarks/worst_pictures.py fashion FLOAT INT8

Pictures of the judge's prompts, 20 steps, guidance 3, by the int8 denoiser with some steps by the float one, against the float
pipeline's from the same noise. The last row tells int8 from the pipeline's own instability: the float denoiser's predictions with white
noise of the mean square that int8's errors have at that step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from _report import save
from quantization import BATCH, GUIDANCE, PICTURES, STEPS

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.cli._progress import Progress
from edgediffusion.profiles import judges
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.engines import NOT_SHARED, Session, onnxruntime
from edgediffusion.runtimes.graph import open_graphs

HEAD = ("float steps", "PSNR median", "p10", "worst", "of pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("fashion", "fashion-dit"))
    parser.add_argument("float_bundle")
    parser.add_argument("int8_bundle")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="a multiple of 16")
    arguments = parser.parse_args()
    bench, rows = _Bench(Bundle.open(arguments.float_bundle), Bundle.open(arguments.int8_bundle), arguments.pictures), []
    spans = ((), (0,), range(4), range(4, 8), range(8, 12), range(12, 16), range(16, 20), (19,))
    exact = bench.draw(lambda binding, step: binding.run_float())
    drawn: dict[str, np.ndarray] = {}
    for steps in spans:
        name = "none" if not len(steps) else f"{steps[0] + 1}" if len(steps) == 1 else f"{steps[0] + 1}-{steps[-1] + 1}"
        drawn[name] = bench.draw(lambda binding, step, steps=steps: binding.run_float() if step in steps else binding.run_int8())
        rows.append(_row(name, drawn[name], exact))
    errors = bench.errors()
    rng = np.random.default_rng(0)
    rows.append(_row("all, with white noise as large as int8's errors", bench.draw(lambda b, step: b.run_noisy(errors[step], rng)), exact))
    save(
        f"worst_pictures_{arguments.model.replace('-', '_')}",
        {"pictures": arguments.pictures, "steps": STEPS, "guidance_scale": GUIDANCE, "rows": rows},
    )
    print(text.markdown_table(HEAD, [_shown(row) for row in rows]))


def _row(name: str, pixels: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    error = np.square(pixels.astype(np.float64) - exact).reshape(len(pixels), -1).mean(1)
    psnr = -10 * np.log10(np.maximum(error, 1e-12))
    order = np.argsort(psnr)[:5]
    return {
        "float_steps": name,
        "psnr": float(np.median(psnr)),
        "p10": float(np.percentile(psnr, 10)),
        "worst": {int(i): float(psnr[i]) for i in order},
    }


def _shown(row: Mapping[str, Any]) -> list[str]:
    worst = row["worst"]
    numbers = [f"{row[name]:.1f}" for name in ("psnr", "p10")]
    return [row["float_steps"], *numbers, f"{min(worst.values()):.1f}", ", ".join(f"{i}: {value:.1f}" for i, value in worst.items())]


@dataclass
class _Binding:
    """Both denoisers with the same buffers."""

    exact: Any
    int8: Any
    choose: Callable[[_Binding], None]

    def __post_init__(self) -> None:
        self.inputs, self.outputs = self.exact.inputs, self.exact.outputs
        (self.output,) = self.outputs.values()

    def run(self) -> None:
        self.choose(self)

    def run_float(self) -> None:
        self.exact.run()

    def run_int8(self) -> None:
        self.int8.run()

    def run_noisy(self, deviation: float, rng: np.random.Generator) -> None:
        self.exact.run()
        self.output += deviation * rng.standard_normal(self.output.shape, np.float32)

    def difference(self) -> float:
        """Mean square of int8's error for what lies in the buffers; leaves the float prediction there."""
        self.int8.run()
        given = self.output.copy()
        self.exact.run()
        return float(np.square(given - self.output).mean())


class _Session:
    def __init__(self, exact: Session, int8: Session, choose: Callable[[_Binding], None]):
        self.exact, self.int8, self.choose = exact, int8, choose
        self.inputs, self.outputs = exact.inputs, exact.outputs

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> _Binding:
        exact = self.exact.bind(axes, shared)
        return _Binding(exact, self.int8.bind(axes, {**shared, **exact.inputs, **exact.outputs}), self.choose)


class _Bench:
    def __init__(self, exact: Bundle, int8: Bundle, pictures: int):
        self.bundle, self.pictures = exact, pictures
        (self.denoiser,) = exact.with_role("denoise")
        self.sessions = [onnxruntime.open_session(bundle.path / self.denoiser.model) for bundle in (exact, int8)]
        self.others = {graph.name: graph.session for graph in open_graphs(exact, ("encode", "decode"), target="onnx", threads=None)}
        prompts = judges.load("fashion").prompts
        self.prompts = [prompts[i % len(prompts)] for i in range(pictures)]

    def draw(self, run: Callable[[_Binding, int], None], pictures: int = 0) -> np.ndarray:
        """Pixels of all pictures, or of the first few; ``run`` computes one call of the denoiser at a step."""
        calls, pictures = 0, pictures or self.pictures

        def choose(binding: _Binding) -> None:
            nonlocal calls
            run(binding, calls % STEPS)  # one call a step, batch after batch
            calls += 1

        pipeline = Pipeline(self.bundle, {**self.others, self.denoiser.name: _Session(*self.sessions, choose)})
        parts = []
        with Progress() as progress:
            for at in range(0, pictures, BATCH):
                progress("drawing", at / pictures)
                seeds = range(10_000 + at, 10_000 + at + BATCH)
                prompts = self.prompts[at : at + BATCH]
                parts.append(pipeline(prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=seeds).pixels)
        return np.concatenate(parts)

    def errors(self) -> list[float]:
        """Root mean square of int8's errors at each step, along the float trajectories of one batch."""
        found: list[float] = []
        self.draw(lambda binding, step: found.append(binding.difference() ** 0.5), BATCH)
        return found


if __name__ == "__main__":
    main()
