"""A comparison as text: one table of how near picture is to picture, one of what both sets are like."""

from __future__ import annotations

from edgediffusion.profiles.bootstrap import CONFIDENCE
from edgediffusion.profiles.quality import PairScore, Quality, Run, SetScore
from edgediffusion.text import table

PAIR_HEAD = ("metric", "median", "interval", "9 of 10 reach", "worst")
SET_HEAD = ("metric", "value", "interval", "reference", "interval", "ratio", "interval", "real")


def pair_row(score: PairScore) -> list[str]:
    return [_name(score), _number(score.median), _range(score.low, score.high), _number(score.tenth), _number(score.worst)]


def set_row(score: SetScore) -> list[str]:
    own = [_number(score.reference), _range(score.reference_low, score.reference_high)]
    ratio = [_number(score.relative), _range(score.relative_low, score.relative_high)]
    return [_name(score), _number(score.value), _range(score.low, score.high), *own, *ratio, _number(score.real)]


def quality_table(quality: Quality) -> str:
    parts = [table(PAIR_HEAD, [pair_row(score) for score in quality.pairs])]
    if quality.sets:
        parts.append(table(SET_HEAD, [set_row(score) for score in quality.sets]))
    parts.append("\n".join([*_facts(quality), *(f"no {metric}: {why}" for metric, why in quality.left_out.items())]))
    return "\n\n".join(parts)


def _facts(quality: Quality) -> list[str]:
    facts = [] if quality.run is None else [_drawn(quality.run)]
    seen = "" if quality.judge is None else f", {quality.judged} of them with a class to judge; judge: {quality.judge}"
    return [*facts, f"{quality.pictures} pictures{seen}", f"intervals: {CONFIDENCE:.0%} of {quality.resamples} resamples of the pictures"]


def _drawn(run: Run) -> str:
    steps = f"{run.steps} steps" + (f" ({run.reference_steps} of the reference)" if run.steps != run.reference_steps else "")
    guidance = f"guidance {run.guidance_scale:g}"
    if run.guidance_scale != run.reference_guidance_scale:
        guidance += f" ({run.reference_guidance_scale:g} of the reference)"
    return f"{run.bundle} against {run.reference}: {steps}, {guidance}, seeds from {run.seed}, {run.prompts} prompts in turn"


def _name(score: PairScore | SetScore) -> str:
    return f"{score.metric}, {score.unit}" if score.unit else score.metric


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
