"""Tables of steps: published numbers, interpolation to other numbers of steps, lists of the caller, the cheapest path."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.registry import names
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.request import Request, plan
from edgediffusion.runtimes.samplers import resolve
from edgediffusion.runtimes.schedules import alpha_bars, levels, respaced, spaced
from edgediffusion.runtimes.spacings import ays, dp

from .tiny import SAMPLING, STABLE_DIFFUSION, write_bundle

FLOW = NoiseSchedule("flow", 1000, shift=3.0)


def picked(spacing: str, steps: int, schedule: NoiseSchedule = STABLE_DIFFUSION) -> list[float]:
    return list(spaced(respaced(schedule, spacing), steps).tolist())


class TestAys:
    @pytest.mark.parametrize(("model", "name"), [("sd", "StableDiffusionTimesteps"), ("sdxl", "StableDiffusionXLTimesteps")])
    def test_ten_steps_are_those_of_diffusers(self, model: str, name: str) -> None:
        schedules = pytest.importorskip("diffusers.schedulers")
        assert picked(f"ays:model={model}", 10) == schedules.AysSchedules[name]

    @pytest.mark.parametrize(
        ("model", "name"),
        [("sd", "StableDiffusionSigmas"), ("sdxl", "StableDiffusionXLSigmas"), ("svd", "StableDiffusionVideoSigmas")],
    )
    def test_ten_levels_are_those_of_diffusers(self, model: str, name: str) -> None:
        schedules = pytest.importorskip("diffusers.schedulers")
        assert ays.levels(10, model) == pytest.approx(schedules.AysSchedules[name][:-1], rel=1e-12)

    def test_the_two_tables_of_a_model_agree(self) -> None:
        """sigma of the timesteps is within 0.32 % of the levels for Stable Diffusion, 0.5 % for XL but for its last one (0.111)."""
        bars = alpha_bars(STABLE_DIFFUSION)
        table = np.sqrt((1 - bars) / bars)
        assert table[list(ays.TIMESTEPS["sd"])] == pytest.approx(ays.LEVELS["sd"][:-1], rel=3.2e-3)
        assert table[list(ays.TIMESTEPS["sdxl"])][:-1] == pytest.approx(ays.LEVELS["sdxl"][:-2], rel=5e-3)
        assert table[13] == pytest.approx(0.111, abs=5e-4)
        assert table[0] == pytest.approx(0.029, abs=5e-4)

    def test_other_numbers_are_interpolated_in_the_logarithm(self) -> None:
        twenty = ays.levels(20, "sd")
        assert twenty[::2] == pytest.approx(ays.LEVELS["sd"][:-1], rel=1e-12)
        assert twenty[1] == pytest.approx((14.615 * 6.475) ** 0.5, rel=1e-12)
        assert twenty[-1] == pytest.approx((0.152 * 0.029) ** 0.5, rel=1e-12)
        assert ays.levels(1, "sd").tolist() == pytest.approx([14.615])

    @pytest.mark.parametrize("steps", [1, 2, 5, 11, 30])
    def test_timesteps_lie_at_their_levels(self, steps: int) -> None:
        found, timesteps = levels(respaced(STABLE_DIFFUSION, "ays"), steps)
        # Between two timesteps one interpolates the level, the other its logarithm; at timestep 0, where levels nearly double
        # from one to the next, that is 2 % apart.
        assert found == pytest.approx(ays.levels(steps, "sd"), rel=0.02)
        assert np.all(np.diff(timesteps) < 0)

    def test_refuses_more_noise_than_was_trained(self) -> None:
        with pytest.raises(ArgumentError, match=r"'svd' begin with more noise.*Got: sigma / alpha 700.*up to 14.61"):
            picked("ays:model=svd", 10)
        assert picked("ays:model=svd", 10, replace(STABLE_DIFFUSION, zero_terminal_snr=True))[0] < 999

    def test_refuses_other_models(self) -> None:
        with pytest.raises(ArgumentError, match=r"Got: flux.*sd, sdxl, svd"):
            picked("ays:model=flux", 10)


class TestFastDpm:
    def test_golden_steps(self) -> None:
        linear, quadratic = (picked(f"fastdpm-{name}", 10)[::-1] for name in ("linear", "quadratic"))
        assert linear == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
        assert quadratic == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]

    @pytest.mark.parametrize("name", ["linear", "quadratic"])
    def test_one_step_is_the_noisiest(self, name: str) -> None:
        assert picked(f"fastdpm-{name}", 1) == [{"linear": 999, "quadratic": 800}[name]]

    def test_refuses_steps_that_fall_together(self) -> None:
        with pytest.raises(ArgumentError, match=r"steps do not fit"):
            picked("fastdpm-quadratic", 200)


class TestListed:
    def test_timesteps_are_taken_as_they_are(self) -> None:
        assert picked("timesteps:at=999/749/499.5/0", 4) == [999, 749, 499.5, 0]

    def test_sigmas_are_levels_of_a_diffusion(self) -> None:
        found, timesteps = levels(respaced(STABLE_DIFFUSION, "sigmas:at=14.6/2/0.1"), 3)
        assert found.tolist() == [14.6, 2, 0.1]
        bars = alpha_bars(STABLE_DIFFUSION)
        assert np.interp(timesteps, np.arange(1000), np.sqrt((1 - bars) / bars)) == pytest.approx(found, rel=1e-3)

    def test_sigmas_are_sigmas_of_a_flow(self) -> None:
        points = resolve("flow-euler")[1].points(respaced(FLOW, "sigmas:at=1/0.8/0.3"), 3)
        assert [p.alpha for p in points.at] == pytest.approx([0, 0.2, 0.7])
        assert [p.sigma for p in points.at] == pytest.approx([1, 0.8, 0.3])
        assert [p.timestep for p in points.at] == pytest.approx([1000, 800, 300])

    @pytest.mark.parametrize(
        ("spacing", "steps", "message"),
        [
            ("timesteps", 4, r"'timesteps' lists none.*timesteps:at=A/B/C"),
            ("sigmas", 4, r"'sigmas' lists none.*sigmas:at="),
            ("timesteps:at=999/499", 4, r"one step for each number.*Got: 4 steps and 2 timesteps"),
            ("timesteps:at=499/999", 2, r"from the largest down"),
            ("timesteps:at=999/999", 2, r"from the largest down"),
            ("timesteps:at=999/x", 2, r"Got: 999/x"),
            ("timesteps:at=999/-1", 2, r"0 and more"),
            ("timesteps:at=nan", 1, r"Got: nan"),
            ("timesteps:at=1000/1", 2, r"no such training timestep.*Got: 1000.*0 to 999"),
            ("sigmas:at=1/0", 2, r"ends at sigma 0 by itself"),
        ],
    )
    def test_says_what_is_wrong(self, spacing: str, steps: int, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            levels(respaced(STABLE_DIFFUSION, spacing), steps)


class TestTimestepsOfARequest:
    def test_are_the_steps(self) -> None:
        settled = plan(Request("", timesteps=[999, 749, 499, 187]), SAMPLING)
        assert [p.timestep for p in settled.points.at] == [999, 749, 499, 187]
        assert settled.steps == 4

    def test_of_a_flow_are_parts_of_its_training_range(self) -> None:
        flow = replace(SAMPLING, prediction="flow", schedule=FLOW, sampler="flow-euler")
        settled = plan(Request("", timesteps=[1000, 600.5, 250]), flow)
        assert [p.sigma for p in settled.points.at] == pytest.approx([1, 0.6005, 0.25])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"timesteps": []}, r"list of timesteps is empty"),
            ({"timesteps": [499, 999]}, r"from the largest down"),
            ({"timesteps": [999, 499], "num_inference_steps": 4}, r"4 steps and 2 timesteps"),
            ({"timesteps": [999], "spacing": "trailing"}, r"either.*spacing"),
            ({"timesteps": [float("nan")]}, r"Got: nan"),
            ({"timesteps": [999, 400], "sampler": "fastdpm"}, r"'fastdpm' has timesteps of its own"),
        ],
    )
    def test_says_what_is_wrong(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            plan(Request("", **options), SAMPLING)

    def test_draw(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        pipe = Pipeline.from_bundle(write_bundle(tmp_path / "bundle"), threads=1)
        listed = pipe("a red shirt", timesteps=[999, 749, 499, 249])
        trailing = pipe("a red shirt", num_inference_steps=4, spacing="trailing")
        assert listed.latents.tobytes() == trailing.latents.tobytes()


def brute_force(costs: np.ndarray, steps: int) -> tuple[float, tuple[int, ...]]:
    n = len(costs) - 1
    paths = [(n, *reversed(inner), 0) for inner in itertools.combinations(range(1, n), steps - 1)]
    sums = [sum(costs[t, s] for t, s in itertools.pairwise(path)) for path in paths]
    return min(zip(sums, paths, strict=True))


class TestDp:
    @pytest.mark.parametrize("n", range(1, 9))
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_every_path_tried(self, n: int, seed: int) -> None:
        costs = np.random.default_rng(seed).random((n + 1, n + 1))
        for steps in range(1, n + 1):
            least, path = brute_force(costs, steps)
            found = dp.cheapest(costs, steps)
            assert found == path
            assert sum(costs[t, s] for t, s in itertools.pairwise(found)) == pytest.approx(least)

    def test_costs_that_grow_with_the_square_make_even_steps(self) -> None:
        t = np.arange(1001)
        costs = (t[:, None] - t[None, :]).astype(float) ** 2
        assert dp.cheapest(costs, 4) == (1000, 750, 500, 250, 0)

    @pytest.mark.parametrize("suffix", [".npy", ".json"])
    def test_reads_both_files_and_coarse_tables(self, tmp_path: Path, suffix: str) -> None:
        t = np.arange(101)
        costs = (t[:, None] - t[None, :]).astype(float) ** 2
        file = tmp_path / f"costs{suffix}"
        if suffix == ".npy":
            np.save(file, costs)
        else:
            file.write_text(json.dumps(costs.tolist()), encoding="utf-8")
        assert picked(f"dp:costs={file}", 4) == [999, 749, 499, 249]

    def test_infinity_forbids_a_step(self) -> None:
        costs = np.ones((4, 4))
        costs[3, 0] = np.inf
        assert dp.cheapest(costs, 1) == ()
        assert dp.cheapest(costs, 3) == (3, 2, 1, 0)
        assert dp.cheapest(costs, 4) == ()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[[0, 1], [1, 0], [2, 2]]", r"cannot be used.*shape \(3, 2\)"),
            ("[[0, 1], [1]]", r"cannot be read"),
            ("[[0, 0], [NaN, 0]]", r"cannot be used"),
            ("[1, 2", r"cannot be read"),
            ('{"a": 1}', r"cannot be read"),
            ("[[1]]", r"cannot be used"),
            ("[[0,0,0,0],[1,0,0,0],[1,1,0,0],[1,1,1,0]]", r"does not fit the network's 1000.*Got: 4 rows"),
        ],
    )
    def test_refuses_other_tables(self, tmp_path: Path, content: str, message: str) -> None:
        file = tmp_path / "costs.json"
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ArgumentError, match=message):
            picked(f"dp:costs={file}", 1)

    def test_refuses_files_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match=r"needs a table of costs.*dp:costs=FILE"):
            picked("dp", 4)
        with pytest.raises(ArgumentError, match=r"nowhere.npy' cannot be read"):
            picked(f"dp:costs={tmp_path / 'nowhere.npy'}", 4)
        (tmp_path / "empty.npy").touch()
        with pytest.raises(ArgumentError, match=r"empty.npy' cannot be read"):
            picked(f"dp:costs={tmp_path / 'empty.npy'}", 4)


TABLES = ("ays", "ays:model=sdxl", "fastdpm-linear", "fastdpm-quadratic", "dp", "timesteps:at=999/700/300/50", "sigmas:at=14/2/0.5/0.1")


@pytest.mark.parametrize("sampler", names("runtimes.samplers"))
@pytest.mark.parametrize("spacing", TABLES)
def test_every_sampler_finds_the_data_at_the_steps_of_a_table(tmp_path: Path, sampler: str, spacing: str) -> None:
    """Or says that it cannot take the steps, or that its schedule is the other one."""
    if spacing == "dp":
        np.save(tmp_path / "costs.npy", np.subtract.outer(np.arange(101.0), np.arange(101.0)) ** 2)
        spacing = f"dp:costs={tmp_path / 'costs.npy'}"
    _, module = resolve(sampler)
    target = TorchNoise(1).normal((1, 4, 4, 4))
    if sampler in ("flow-euler", "flow-heun", "pndm"):
        with pytest.raises(ArgumentError, match="is not made for|common distance"):
            module.points(respaced(STABLE_DIFFUSION, spacing), 4)
        return
    points = module.points(respaced(STABLE_DIFFUSION, spacing), 4)
    *_, last = module.sample(lambda x, i: target, points.start(TorchNoise(0).normal(target.shape)), points, TorchNoise(2))
    assert last.dtype == np.float32
    # Some end at the first training timestep, where sigma is 0.029, and the parallel ones stop at their tolerance.
    np.testing.assert_allclose(last, target, rtol=0, atol=0.2)
