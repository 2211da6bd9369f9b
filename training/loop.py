"""A resumable training loop: same seed, same steps, same weights, whether or not it was interrupted.

Every step draws from a generator seeded by ``(seed, step)``, so a run that was killed goes on from its last
checkpoint as if nothing had happened. Losses go to ``losses.csv``; the plot and the sample grids lie beside it.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

RUNS = Path(__file__).parent / "runs"
# One thread fewer than cores: threads of one process wait for each other hundreds of times a step, and as soon as
# anything else wants a core, two threads on two cores are slower than one (0.8 steps a second against 2 to 4).
THREADS = int(os.environ.get("TRAINING_THREADS", max(1, (os.cpu_count() or 2) - 1)))


@dataclass(frozen=True)
class Plan:
    """How long and how fast: constant learning rate after the warm-up, linear decay over the last part."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    decay_part: float = 0.45
    ema: float = 0.998
    seed: int = 0

    def rate(self, step: int) -> float:
        left = (self.steps - step) / max(1.0, self.steps * self.decay_part)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, left) + 1e-7


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Trainer:
    """Weights, their moving average, the optimizer and the files of one run."""

    def __init__(self, name: str, modules: dict[str, torch.nn.Module], plan: Plan):
        torch.set_num_threads(THREADS)
        self.folder = RUNS / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name, self.plan = name, plan
        self.modules = torch.nn.ModuleDict(modules).to(device())
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self._resume()

    def run(self, loss_of: Callable[[torch.Generator], torch.Tensor], *, checkpoint_s: float = 120.0) -> None:
        """Train to the end of the plan. ``loss_of`` draws its batch from the generator it is given."""
        started, saved, shown, first = time.time(), time.time(), 0.0, self.step
        recent: list[float] = []
        while self.step < self.plan.steps:
            generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step)
            torch.manual_seed(self.plan.seed * 1_000_003 + self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.rate(self.step)
            with torch.autocast(device().type, torch.bfloat16):
                loss = loss_of(generator)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            keep = min(self.plan.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)
            recent.append(loss.item())
            if self.step % 50 == 0:
                self.losses.append((self.step, sum(recent) / len(recent)))
                recent = []
            if time.time() - shown > 5 or self.step == self.plan.steps:
                shown = time.time()
                self._show(started, first)
            if time.time() - saved > checkpoint_s:
                saved = time.time()
                self.save()
        self.save()

    def swap(self) -> None:
        """Exchange the weights and their moving average."""
        for p, e in zip(self.parameters, self.average, strict=True):
            held = p.detach().clone()
            p.data.copy_(e)
            e.copy_(held)

    def save(self) -> None:
        state = {
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
        }
        partial = self.folder / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, self.folder / "checkpoint.pt")
        with open(self.folder / "losses.csv", "w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *self.losses])
        self._plot()

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=device(), weights_only=True)
        self.modules.load_state_dict(state["modules"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.losses = [tuple(row) for row in state["losses"]]
        print(f"{self.name}: resumed at step {self.step}", file=sys.stderr)

    def _show(self, started: float, first: int) -> None:
        seconds = time.time() - started
        rate = (self.step - first) / max(seconds, 1e-9)
        left = (self.plan.steps - self.step) / max(rate, 1e-9)
        loss = self.losses[-1][1] if self.losses else float("nan")
        print(
            f"{self.name}: step {self.step}/{self.plan.steps}  loss {loss:.4f}  {rate * self.plan.batch:.0f} images/s  "
            f"{seconds:.0f} s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def _plot(self) -> None:
        if len(self.losses) < 2:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
        axes.plot(*zip(*self.losses, strict=True))
        axes.set(title=self.name, xlabel="step", ylabel="loss", yscale="log")
        figure.savefig(self.folder / "losses.png", dpi=100)
        pyplot.close(figure)
