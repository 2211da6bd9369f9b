"""The choice of layers that stay float, from errors and times that are made up; and the report that it ends in."""

import json
import math
from dataclasses import dataclass, field

import pytest

from edgediffusion.errors import ArgumentError, OutputError
from edgediffusion.optimize.sensitivity_bench import Trial
from edgediffusion.optimize.sensitivity_choice import Bound, choose
from edgediffusion.optimize.sensitivity_plan import (
    LayerCost,
    Steps,
    first_that_holds,
    is_ugly,
    predicted_error,
    predicted_ratio,
    ranking,
    share,
)
from edgediffusion.optimize.sensitivity_report import Sensitivity
from edgediffusion.optimize.sensitivity_times import Measured

# error alone, float ms, quantized ms, noise ms
GOOD = LayerCost("good", 0.01, 1.0, 0.5, 0.01)
SLOW = LayerCost("slow", 0.01, 0.2, 0.6, 0.01)
NOISY = LayerCost("noisy", 0.005, 0.31, 0.30, 0.01)
UGLY = LayerCost("ugly", 0.03, 0.8, 0.4, 0.01)
SMALL = LayerCost("small", 0.001, 0.9, 0.3, 0.01)
UNSEEN = LayerCost("unseen", 0.002)
LAYERS = (GOOD, SLOW, NOISY, UGLY, SMALL, UNSEEN)
STEPS = Steps(4.0, 3.0)


@dataclass
class FakeBench:
    """Whole graphs that are as the parts say, but for a step that takes ``longer`` with the layer ``slow`` float."""

    layers: tuple[LayerCost, ...] = LAYERS
    steps: Steps = STEPS
    longer: float = 0.0
    trials: dict = field(default_factory=dict)

    def trial(self, kept):
        ratio = predicted_ratio(self.layers, kept, self.steps) + self.longer * ("slow" in kept)
        to_quantized = ratio / predicted_ratio(self.layers, (), self.steps)
        self.trials[kept] = Trial(predicted_error(self.layers, kept), Measured(ratio, 0.001), Measured(to_quantized, 0.001))
        return self.trials[kept]

    def known(self, kept):
        return self.trials.get(kept)


def chosen(bench=None, bound=None):
    bench = bench or FakeBench()
    return choose(bench.layers, bench, bound, "cpu-x86-64")


# --- what is predicted


def test_independent_errors_add_as_squares_and_times_as_they_are():
    assert predicted_error((GOOD, UGLY), ()) == pytest.approx(math.hypot(0.01, 0.03))
    assert predicted_error((GOOD, UGLY), {"ugly"}) == pytest.approx(0.01)
    assert predicted_ratio(LAYERS, (), STEPS) == 0.75
    assert predicted_ratio(LAYERS, {"slow"}, STEPS) == pytest.approx((3.0 - 0.4) / 4)
    assert predicted_ratio(LAYERS, {"good"}, STEPS) == pytest.approx((3.0 + 0.5) / 4)


def test_a_layer_is_slower_only_beyond_noise():
    assert [layer.name for layer in LAYERS if layer.is_slower] == ["slow"]
    assert LayerCost("x", 0.1, 0.30, 0.31, 0.004).is_slower
    assert not UNSEEN.is_slower


def test_a_layer_is_ugly_that_is_worth_a_decibel():
    """10 log10(1 / (1 - share)) = 1 at a share of 0.2057."""
    assert [layer.name for layer in LAYERS if is_ugly(layer, LAYERS)] == ["ugly"]
    pair = LayerCost("a", math.sqrt(0.2055)), LayerCost("b", math.sqrt(0.7945))
    assert share(pair[0], pair) == pytest.approx(0.2055)
    assert not is_ugly(pair[0], pair)
    assert is_ugly(LayerCost("a", math.sqrt(0.206)), (LayerCost("a", math.sqrt(0.206)), LayerCost("b", math.sqrt(0.794))))
    assert not is_ugly(LayerCost("a", 0.0), (LayerCost("a", 0.0),))


def test_the_ranking_takes_slower_layers_first_then_error_for_time():
    names = [layer.name for layer in ranking(LAYERS)]
    assert names == ["slow", "unseen", "noisy", "ugly", "good", "small"]  # by 4, 0.0025, 0.00225, 0.0002, 0.0000017


def test_a_loss_within_noise_counts_as_the_noise():
    quiet, loud = LayerCost("quiet", 0.01, 0.31, 0.30, 0.02), LayerCost("loud", 0.02, 0.305, 0.30, 0.001)
    assert [layer.name for layer in ranking((quiet, loud))] == ["loud", "quiet"]


@pytest.mark.parametrize(("first", "low", "high", "expected"), [(3, 0, 9, 3), (0, 0, 9, 0), (9, 0, 9, 9), (2, 5, 9, 5), (10, 0, 9, None)])
def test_the_first_that_holds(first, low, high, expected):
    asked = []
    assert first_that_holds(lambda n: asked.append(n) or n >= first, low, high) == expected
    assert asked[0] == high
    assert len(asked) <= 6


# --- what is chosen


def test_by_default_slower_and_ugly_layers_stay_float_each_with_its_reason():
    found = chosen()
    assert set(found.kept) == {"slow", "ugly"}
    assert found.kept["slow"] == "slower when quantized: 600 us for 200 us on cpu-x86-64"
    assert found.kept["ugly"].startswith("quantized alone it changes the prediction by 3.00%, 8")
    (point,) = [p for p in found.points if "chosen" in p.label]
    assert point.float_layers == 2
    assert point.ratio == pytest.approx(0.75)
    assert point.error == pytest.approx(predicted_error(LAYERS, found.kept))
    assert found.notes == ()


def test_slower_layers_are_quantized_when_whole_steps_do_not_confirm_it():
    found = chosen(FakeBench(longer=0.2))
    assert set(found.kept) == {"ugly"}
    assert "1 layers are slower alone when quantized, yet" in found.notes[0]


def test_it_is_said_when_quantizing_saves_no_time():
    found = chosen(FakeBench(steps=Steps(2.0, 3.0)))
    assert "saves memory, not time" in found.notes[-1]


@pytest.mark.parametrize("bound", [0.034, 0.02, 0.0101, 0.003])
def test_an_error_is_held_with_as_few_layers_as_do(bound):
    found = chosen(bound=Bound("error", bound))
    order = [layer.name for layer in ranking(LAYERS)]
    assert set(found.kept) == set(order[: len(found.kept)])
    assert predicted_error(LAYERS, found.kept) <= bound
    fewer = order[: len(found.kept) - 1]
    assert fewer == [] or predicted_error(LAYERS, fewer) > bound
    assert found.bound == {"error": bound}
    assert all("needed to hold the error" in reason for name, reason in found.kept.items() if name != "slow")


@pytest.mark.parametrize("bound", [0.66, 0.75, 0.8, 0.99])
def test_a_latency_is_held_with_as_many_layers_float_as_do(bound):
    found = chosen(bound=Bound("latency", bound))
    order = [layer.name for layer in ranking(LAYERS)]
    assert predicted_ratio(LAYERS, found.kept, STEPS) <= bound
    more = order[: len(found.kept) + 1]
    assert len(more) == len(LAYERS) or predicted_ratio(LAYERS, more, STEPS) > bound


def test_a_bound_that_cannot_be_held_says_the_best_that_can():
    with pytest.raises(ArgumentError, match=r"error of 1e-06.*Got: 0\.001 with one layer quantized, 0\.0336 with all 6"):
        chosen(bound=Bound("error", 1e-6))
    with pytest.raises(ArgumentError, match=r"step of 0\.5 of the float.*Got: 0\.650 for the fastest, with 1 of 6 layers float"):
        chosen(bound=Bound("latency", 0.5))


def test_the_pareto_table_is_monotone():
    """Error falls with every layer; once the slower ones are float, time rises."""
    points = [p for p in chosen(bound=Bound("error", 0.02)).points]
    assert [p.float_layers for p in points] == list(range(len(LAYERS) + 1))
    errors, ratios = [p.predicted_error for p in points], [p.predicted_ratio for p in points]
    assert errors == sorted(errors, reverse=True)
    assert ratios[1:] == sorted(ratios[1:])
    assert ratios[1] < ratios[0]
    assert points[0].label == "all quantized"
    assert points[-1].error == 0
    assert points[-1].ratio == 1


def test_no_layer_is_slower_and_none_ugly():
    layers = tuple(LayerCost(f"l{i}", 0.01, 1.0, 0.5, 0.01) for i in range(6))
    found = chosen(FakeBench(layers=layers))
    assert found.kept == {}
    assert "0 of 6 layers stay float." in found.text()


# --- the report


@pytest.fixture
def report():
    return chosen()


def test_a_report_is_read_as_it_was_written(tmp_path, report):
    report.save(tmp_path / "report.json")
    assert Sensitivity.load(tmp_path / "report.json") == report
    report.save(tmp_path / "again.json")
    assert (tmp_path / "report.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    with pytest.raises(OutputError, match="exists"):
        report.save(tmp_path / "report.json")


def test_its_text_has_the_table_the_choice_and_the_worst_layers(report):
    text = report.text()
    assert "2 of 6 layers stay float:" in text
    assert "all quantized" in text
    assert text.index("slower when quantized") < text.index("error alone")
    assert report.markdown().startswith("| float layers |")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no sensitivity report"),
        ("{", "is no sensitivity report"),
        ("[]", "of the format 1"),
        ('{"format": 9}', "of the format 1"),
        ('{"format": 1}', "lacks or misstates a field"),
    ],
    ids=["absent", "no-json", "list", "newer", "empty"],
)
def test_a_file_that_is_no_report_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ArgumentError, match=message):
        Sensitivity.load(tmp_path / "report.json")


@pytest.mark.parametrize("change", [{"kept": {"a": 1}}, {"kept": []}, {"layers": [{"name": "a"}]}, {"points": [3]}, {"more": 1}], ids=str)
def test_a_report_with_a_wrong_field_is_refused(tmp_path, report, change):
    report.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "wrong.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ArgumentError, match="lacks or misstates a field"):
        Sensitivity.load(tmp_path / "wrong.json")


@pytest.mark.parametrize(
    ("what", "message"), [("weights", "another model"), ("state", "another quantization state"), ("recipe", "another recipe")]
)
def test_a_report_of_something_else_is_refused(report, what, message):
    right = {"weights": "", "state": "", "recipe": "", "target": "cpu-x86-64", "placement": ""}
    report.check(**right)
    with pytest.raises(ArgumentError, match=message):
        report.check(**{**right, what: "other"})
