import pytest
import torch

from training import loop
from training.loop import Plan, Trainer


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(loop, "RUNS", tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)


def tiny(name: str, steps: int) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        name, {"net": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3))}, Plan(steps, 8, 1e-2)
    )


def run(trainer: Trainer, *, stop_at: int | None = None) -> Trainer:
    def loss_of(generator: torch.Generator) -> torch.Tensor:
        if trainer.step == stop_at:
            trainer.save()
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator)
        return (trainer.modules["net"](x) - x).square().mean()

    if stop_at is None:
        trainer.run(loss_of)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(loss_of)
    return trainer


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_run_that_was_interrupted_ends_with_the_same_weights():
    whole = run(tiny("whole", 4))
    run(tiny("broken", 4), stop_at=2)
    resumed = tiny("broken", 4)
    assert resumed.step == 2
    run(resumed)
    assert same(resumed.parameters, whole.parameters)
    assert same(resumed.average, whole.average)


def test_a_finished_run_resumes_to_nothing_and_changes_nothing():
    first = run(tiny("done", 4))
    assert same(run(tiny("done", 4)).parameters, first.parameters)


def test_swapping_twice_changes_nothing():
    trainer = run(tiny("swap", 4))
    before, average = [p.detach().clone() for p in trainer.parameters], [e.clone() for e in trainer.average]
    trainer.swap()
    assert same(trainer.parameters, average)
    trainer.swap()
    assert same(trainer.parameters, before)


def test_frozen_modules_are_kept_but_not_trained(runs):
    frozen = torch.nn.Linear(3, 3).requires_grad_(False)
    trainer = Trainer("frozen", {"net": torch.nn.Linear(3, 3), "target": frozen}, Plan(1, 8, 1e-2))
    assert len(trainer.parameters) == 2
    trainer.save()
    kept = torch.load(runs / "frozen" / "checkpoint.pt", weights_only=True)["modules"]
    assert torch.equal(kept["target.weight"], frozen.weight)
