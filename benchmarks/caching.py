"""What caching policies spare and cost on a shipped pipeline: python benchmarks/caching.py fashion [--times]

256 pictures of the judge's prompts, 50 steps of the bundle's own sampler, guidance 3: each policy against the uncached pictures from
the same noise. Policies that look at the pictures to decide draw them one by one, since a batch decides as one.

With ``--times``, times are measured instead, which wants a quiet machine: ``--rounds`` pictures, each drawn by every policy in
turn and without a cache, two untimed steps before each; the median over the pictures of loop over uncached loop.

Both parts fill one results file, and rows that are in it are not measured again; ``--fresh`` begins the part anew. ``--only TEXT``
takes the policies whose text contains it. ``--plot`` draws docs/images/caching.png from the results of both pipelines.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _curves import draw_curves, stack
from _report import REFERENCE, RESULTS, save

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.cli._progress import Progress
from edgediffusion.profiles import judges
from edgediffusion.profiles.cache_record import watch
from edgediffusion.profiles.quality import Quality, Reference
from edgediffusion.runtimes import Pipeline

PICTURES, BATCH, STEPS, GUIDANCE, SEED = 256, 16, 50, 3.0, 10_000
CUTS = {
    "fashion": ("up_blocks.2.resnets.1", "up_blocks.2.resnets.0", "up_blocks.1.resnets.1", "up_blocks.1.resnets.0"),
    "fashion-dit": ("transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.3"),
}
INTERVALS = {"fashion": (2, 3, 4, 5, 6, 7, 8, 9, 10), "fashion-dit": (2, 3, 4, 6)}
HEAD = ("policy", "time", "whole calls", "PSNR median", "p10", "worst", "SSIM", "Fréchet", "agreement")
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "caching.png"
_NOT_PLOTTED = ("up_blocks.2.resnets.0", "up_blocks.1.resnets.0")  # two of four cuts are enough to look at
_LOOKING = ("deepcache-adaptive", "adaptive-diffusion", "first-block", "teacache")
Rows = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(CUTS))
    parser.add_argument("--bundle", type=Path, help="the pipeline's float bundle with the cuts of CUTS; exported by default")
    parser.add_argument("--times", action="store_true", help="measure times instead of pictures")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--plot", action="store_true", help="draw the results that there are, and measure nothing")
    arguments = parser.parse_args()
    name = f"caching_{arguments.model.replace('-', '_')}"
    known = _known(name)
    if arguments.plot:
        IMAGE.parent.mkdir(exist_ok=True)
        plot().save(IMAGE)
        return
    with tempfile.TemporaryDirectory(dir=REFERENCE.parent, prefix=".caching-") as folder:  # links do not cross file systems
        pipeline = Pipeline.from_bundle(_bundle(arguments.model, arguments.bundle, Path(folder)))
        fitted = known.get("fitted") or ({} if arguments.model == "fashion" else _fitted(pipeline))
        policies = {label: policy for label, policy in _policies(arguments.model, fitted).items() if arguments.only in policy}
        rows: Rows = {row["label"]: row for row in known.get("rows", [])}
        part = _times(pipeline, policies, rows, arguments) if arguments.times else _pictures(pipeline, policies, rows, arguments.fresh)
        for label, found in part:
            rows[label] = {**rows.get(label, {}), "label": label, "policy": policies[label], **found}
            ordered = [rows[label] for label in _policies(arguments.model, fitted) if label in rows]
            save(name, {"pictures": PICTURES, "steps": STEPS, "guidance_scale": GUIDANCE, "fitted": fitted, "rows": ordered})
    print(text.markdown_table(HEAD, [shown(row) for row in _known(name).get("rows", [])]))


def shown(row: Mapping[str, Any]) -> list[str]:
    """A row of the table; what has not been measured is left empty."""
    cells = [f"`{row['label']}`", f"{row['time']['ratio']:.2f}" if "time" in row else ""]
    if "psnr" not in row:
        return [*cells, *[""] * (len(HEAD) - len(cells))]
    psnr, frechet = row["psnr"], row["frechet"]
    cells += [
        f"{row['calls']:.2f}",
        f"{psnr['value']:.1f} ({psnr['low']:.1f}..{psnr['high']:.1f})",
        f"{row['p10']:.1f}",
        f"{row['worst']:.1f}",
    ]
    return [
        *cells,
        f"{row['ssim']:.3f}",
        f"{frechet['value']:.1f} ({frechet['low']:.1f}..{frechet['high']:.1f})",
        f"{row['agreement']:.1%}",
    ]


def _known(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _bundle(model: str, given: Path | None, folder: Path) -> Bundle:
    if given is not None:
        return Bundle.open(given)
    from edgediffusion.export import export

    with Progress() as progress:
        return export(REFERENCE / model, folder / "bundle", cuts=CUTS[model], progress=progress)


def _fitted(pipeline: Pipeline) -> dict[str, str]:
    """TeaCache's polynomial and MagCache's ratios of this network, from prompts and seeds that are not drawn below."""
    prompts = judges.load("fashion").prompts

    def draw(recorder: Any, i: int) -> object:
        return pipeline(prompts[-1 - i], num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=i, cache=recorder)

    with Progress() as progress:
        changes = watch(draw, 8, progress)
    return {"polynomial": changes.polynomial, "ratios": changes.ratios}


def _policies(model: str, fitted: Mapping[str, str]) -> dict[str, str]:
    """Labels as in the table, and what is given to ``cache``."""
    return _of_unet() if model == "fashion" else _of_transformer(fitted)


def _of_unet() -> dict[str, str]:
    texts = []
    for cut in CUTS["fashion"]:
        texts += [f"deepcache:interval={n},cut={cut}" for n in INTERVALS["fashion"]]
        texts += [f"deepcache:schedule=non-uniform,interval={n},cut={cut}" for n in INTERVALS["fashion"]]
        texts += [f"deepcache-adaptive:threshold={t},{more}cut={cut}" for more in ("", "ahead=true,") for t in (0.05, 0.1, 0.2, 0.4)]
    return {policy: policy for policy in (*texts, *_any())}


def _of_transformer(fitted: Mapping[str, str]) -> dict[str, str]:
    _, second, middle = CUTS["fashion-dit"]
    intervals = INTERVALS["fashion-dit"]
    texts = [f"fora:interval={n}" for n in intervals]
    texts += [f"taylorseer:interval={n},order={m}" for m in (1, 2) for n in intervals]
    texts += [f"taylorseer:interval={n},order=2,form=newton" for n in intervals]
    texts += [f"delta-dit:interval={n},cut={middle}" for n in intervals]
    texts += [f"first-block:threshold={t},cut={second}" for t in (0.03, 0.05, 0.1, 0.2)]
    texts += [f"teacache:threshold={t}{more}" for more in ("", ",polynomial=flux") for t in (0.05, 0.1, 0.2, 0.4)]
    policies = {policy: policy for policy in texts}
    policies |= {
        f"teacache:threshold={t}, fitted": f"teacache:threshold={t},polynomial={fitted['polynomial']}" for t in (0.05, 0.1, 0.2, 0.4)
    }
    policies |= {f"magcache:threshold={t}": f"magcache:threshold={t},ratios={fitted['ratios']}" for t in (0.03, 0.06, 0.12, 0.24)}
    return {**policies, **{policy: policy for policy in _any()}}


def _any() -> list[str]:
    return [f"adaptive-diffusion:threshold={t}" for t in (0.002, 0.005, 0.01, 0.02, 0.05)]


def _pictures(pipeline: Pipeline, policies: Mapping[str, str], rows: Rows, fresh: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    judge = judges.load("fashion")
    prompts = [judge.prompts[i % len(judge.prompts)] for i in range(PICTURES)]
    wanted = [label for label in policies if fresh or "psnr" not in rows.get(label, {})]
    wanted = [label for first in range(4) for label in wanted[first::4]]  # so that a run that is stopped has some of every kind
    reference = Reference(_draw(pipeline, prompts, "none")[0], prompts=prompts, judge=judge) if wanted else None
    for label in wanted:
        assert reference is not None
        pixels, calls = _draw(pipeline, prompts, policies[label])
        yield label, {"calls": calls, **_figures(reference.measure(pixels))}
        print(label, flush=True)


def _draw(pipeline: Pipeline, prompts: Sequence[str], policy: str) -> tuple[np.ndarray, float]:
    """All pictures, and how many whole calls of the network a step took in the mean."""
    batch, parts, whole = 1 if policy.startswith(_LOOKING) else BATCH, [], 0

    def count(i: int, fed: Mapping[str, np.ndarray]) -> None:
        nonlocal whole
        whole += 1

    for at in range(0, PICTURES, batch):
        seeds = range(SEED + at, SEED + at + batch)
        drawn = pipeline(
            prompts[at : at + batch], num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=seeds, cache=policy, observe=count
        )
        parts.append(drawn.pixels)
    return np.concatenate(parts), whole / (STEPS * PICTURES / batch)


def _figures(quality: Quality) -> dict[str, Any]:
    psnr, frechet, agreement = quality.pair("psnr"), quality.set("frechet"), quality.set("agreement")
    return {
        "psnr": {"value": psnr.median, "low": psnr.low, "high": psnr.high},
        "p10": psnr.tenth,
        "worst": psnr.worst,
        "ssim": quality.pair("ssim").median,
        "frechet": {"value": frechet.value, "low": frechet.low, "high": frechet.high, "uncached": frechet.reference},
        "agreement": agreement.value,
        "agreement_uncached": agreement.reference,
    }


def _times(
    pipeline: Pipeline, policies: Mapping[str, str], rows: Rows, arguments: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    wanted = [label for label in policies if arguments.fresh or "time" not in rows.get(label, {})]
    prompts = judges.load("fashion").prompts
    spent: dict[str, list[float]] = {label: [] for label in ("none", *wanted)}
    with Progress() as progress:
        for i in range(arguments.rounds):
            for at, label in enumerate(spent):
                progress("timing", (i + at / len(spent)) / arguments.rounds)
                spent[label].append(_loop_ms(pipeline, prompts[i % len(prompts)], policies.get(label, "none"), seed=i))
    for label in wanted:
        ratios = np.array(spent[label]) / np.array(spent["none"])
        low, high = np.percentile(ratios, (25, 75))
        uncached = float(np.median(spent["none"]))
        time = {"ratio": float(np.median(ratios)), "quarter": float(low), "three_quarters": float(high), "uncached_ms": uncached}
        yield label, {"time": {**time, "rounds": arguments.rounds, "load_average": round(os.getloadavg()[0], 1)}}


def _loop_ms(pipeline: Pipeline, prompt: str, policy: str, *, seed: int) -> float:
    """Milliseconds of the loop of one picture, after two steps that warm the graphs of the policy."""
    pipeline(prompt, num_inference_steps=2, guidance_scale=GUIDANCE, cache="none")
    for _ in zip(range(2), pipeline.steps(prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, cache=policy), strict=False):
        pass
    drawn = pipeline(prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=seed, cache=policy)
    return sum(drawn.timings.step_ms)


def plot() -> Any:
    """For each pipeline, PSNR over the time of the loop, or over whole calls where times were not measured."""
    charts = []
    for model in sorted(CUTS):
        found = _known(f"caching_{model.replace('-', '_')}").get("rows", [])
        rows = [r for r in found if r.get("calls", 1) < 1 and not any(cut in r["label"] for cut in _NOT_PLOTTED)]
        if not rows:
            continue
        timed = all("time" in row for row in rows)
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            x = row["time"]["ratio"] if timed else row["calls"]
            series.setdefault(_family(row["label"]), []).append((x, row["psnr"]["value"]))
        what = "time of the loop, uncached = 1" if timed else "whole calls of the network, uncached = 1"
        charts.append(draw_curves(f"{model}, {STEPS} steps", series, x_label=what, y_label="PSNR to uncached pictures, dB"))
    return stack(charts)


def _family(label: str) -> str:
    """What stays the same along a curve: a label without the numbers that are varied."""
    name, _, options = label.partition(":")
    options = options.replace("ahead=true", "ahead")
    kept = [part.split("=")[-1].strip() for part in options.split(",") if not part.strip().startswith(("interval=", "threshold="))]
    return " ".join(
        [name, *(part.replace("up_blocks.", "up ").replace(".resnets.", ".").replace("transformer_blocks.", "block ") for part in kept)]
    )


if __name__ == "__main__":
    main()
