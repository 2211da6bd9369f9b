"""The steps of a kit on its device, each from where the last run stopped: check, build, verify, profile, results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgediffusion.errors import EngineError, OutputError
from edgediffusion.files import dump_json, new_file
from edgediffusion.runtimes.kit import Kit, Progress
from edgediffusion.runtimes.kit.build import build_engines
from edgediffusion.runtimes.kit.checks import OK, Finding, check, refused
from edgediffusion.runtimes.kit.machine import look
from edgediffusion.runtimes.kit.results import RESULTS, results, write_bundle
from edgediffusion.runtimes.kit.verify import Verified, require_good, verify
from edgediffusion.text import size, table

STEPS = ("check", "build", "verify", "profile", "results")
RUNS = 30


@dataclass(frozen=True)
class Asked:
    """``last`` is the step to end with; ``root`` where the system's files are, another than ``/`` for a recorded device."""

    folder: Path
    work: Path
    output: Path
    last: str = STEPS[-1]
    root: Path = Path("/")
    runs: int = RUNS
    workspace_bytes: int | None = None


def run(asked: Asked, say: Callable[[str], None], progress: Progress) -> None:
    """Take the steps up to ``asked.last``; ``say`` is given what is to be told, line by line.

    Raises:
        BundleError: the kit is damaged. EngineError: the device is not the one, an engine cannot be built, or computes something else.
        OutputError: a result cannot be written, or is there already.
    """
    kit, wanted = Kit.open(asked.folder), STEPS[: STEPS.index(asked.last) + 1]
    if "results" in wanted and asked.output.exists():
        raise OutputError(
            f"The output '{asked.output}' exists already", do="This kit has been built. To do it again remove it, or name another."
        )
    say(f"kit of edgediffusion {kit.version} for {kit.target.name}: {kit.target.summary}")
    facts = look(kit.engine, asked.work, asked.root)
    _tell(check(kit, facts, progress), say)
    if "build" not in wanted:
        return
    built = build_engines(kit, facts, asked.work, workspace_bytes=asked.workspace_bytes, root=asked.root, progress=progress)
    rows = [
        (n, "kept" if b.kept else f"{b.seconds:.0f} s", size(b.peak_bytes), size(b.workspace_bytes) if b.workspace_bytes else "-")
        for n, b in built.items()
    ]
    say(table(("component", "built in", "peak memory", "workspace"), rows))
    if "verify" not in wanted:
        return
    found = verify(kit, built, runs=asked.runs if "profile" in wanted else 0, progress=progress)
    say(_table(found, times="profile" in wanted))
    with new_file(asked.work / RESULTS, replace=True) as file:
        file.write_text(dump_json(results(kit, facts, built, found)), encoding="utf-8")
    require_good(found)
    if "results" not in wanted:
        return
    made = write_bundle(kit, facts, built, found, asked.output)
    say(f"{asked.output}: a bundle with engines for {kit.target.name}, {size(made.size_bytes())}")
    say(f'draw with it: pip install {kit.wheel} tokenizers pillow; edgediffusion run {asked.output} --prompt "..." -o picture.png')


def _tell(findings: tuple[Finding, ...], say: Callable[[str], None]) -> None:
    for finding in findings:
        mark = "" if finding.state == OK else f"{finding.state}: "
        say(f"  {finding.about}: {mark}{finding.text}")
    if wrong := refused(findings):
        raise EngineError(
            "This machine cannot build the kit",
            got=", ".join(finding.about for finding in wrong),
            do="Put right what is refused above, and start again; nothing was built.",
        )


def _table(found: dict[str, Verified], *, times: bool) -> str:
    head = ("component", "error", "allowed", "", "load ms", *(("median ms", "p90 ms", "runs") if times else ()))
    rows = [
        (
            name,
            "not finite" if one.error is None else f"{one.error:.2g}",
            f"{one.tolerance:g}",
            "good" if one.good else "WRONG",
            f"{one.load_ms:.1f}",
            *((f"{one.median_ms:.2f}", f"{one.p90_ms:.2f}", str(one.runs)) if times else ()),
        )
        for name, one in found.items()
    ]
    return table(head, rows)
