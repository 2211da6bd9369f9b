import json

import pytest

from edgediffusion.errors import ArgumentError, OutputError
from edgediffusion.optimize.state import LayerRanges, QuantizationState, TensorRange


@pytest.fixture
def state():
    layer = LayerRanges(TensorRange(-0.25, 3.0, 3.0), TensorRange(-1.0, 1.0, 1.0), (0.5, 0.25))
    return QuantizationState("0" * 64, {"strategy": "uniform", "counts": [1, 2]}, {"unet/conv": layer}, {"torch": "2"})


def test_round_trip_and_digest(tmp_path, state):
    state.save(tmp_path / "state.json")
    loaded = QuantizationState.load(tmp_path / "state.json")
    assert loaded.layers == state.layers
    assert loaded.digest == state.digest


def test_an_existing_state_is_not_overwritten(tmp_path, state):
    (tmp_path / "state.json").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        state.save(tmp_path / "state.json")
    assert (tmp_path / "state.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no quantization state"),
        ("[]", "no quantization state"),
        (json.dumps({"format": 2}), "format 2"),
        (json.dumps({"format": 1}), "lacks"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path, text, message):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ArgumentError, match=message):
        QuantizationState.load(tmp_path / "state.json")


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(ArgumentError, match="edgediffusion calibrate"):
        QuantizationState.load(tmp_path / "none.json")
