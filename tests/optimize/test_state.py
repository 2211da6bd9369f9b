import json

import numpy as np
import pytest

from edgediffusion.errors import ArgumentError, OutputError
from edgediffusion.optimize.state import VECTORS, LayerState, QuantizationState


@pytest.fixture
def state():
    def vector(*values):
        return np.array(values, np.float32)

    layer = LayerState(
        vector(1, 2, 4),
        vector(-0.25, -1, 0),
        vector(3, 1, 8),
        vector(-1, -2),
        vector(1, 2),
        vector(0.5, 0.25),
        input_clip=0.5,
        codes=np.array([[1, -7, 0], [3, 2, 1]], np.int8),
    )
    recipe = {"name": "int8", "weights": "int8"}
    return QuantizationState("0" * 64, {"strategy": "uniform", "counts": [1, 2]}, {"unet/conv": layer}, recipe, {"torch": "2"})


def test_round_trip_and_digest(tmp_path, state):
    state.save(tmp_path / "state")
    loaded = QuantizationState.load(tmp_path / "state")
    assert loaded.digest == state.digest
    np.testing.assert_array_equal(loaded.layers["unet/conv"].codes, state.layers["unet/conv"].codes)
    assert loaded.layers["unet/conv"].bias is None


def test_the_same_state_is_the_same_bytes(tmp_path, state):
    for name in ("a", "b"):
        state.save(tmp_path / name)
    for file in ("state.json", VECTORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_ranges_are_of_the_balanced_input(state):
    layer = state.layers["unet/conv"]
    assert layer.input_range() == (-0.25, 1.5)  # (-0.25/1, -1/2, 0/4) and (3/1, 1/2, 8/4), halved
    assert layer.input_range(slice(1, None)) == (-0.25, 1.0)
    assert layer.output_range() == (-2, 2)


def test_an_existing_state_is_not_overwritten(tmp_path, state):
    (tmp_path / "state").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        state.save(tmp_path / "state")
    assert (tmp_path / "state").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no quantization state"),
        ("[]", "no quantization state"),
        (json.dumps({"format": 1}), "format 1"),
        (json.dumps({"format": 4}), "format 4. Allowed: format 3"),
    ],
)
def test_a_bad_manifest_is_refused_with_its_reason(tmp_path, text, message):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ArgumentError, match=message):
        QuantizationState.load(tmp_path)


def test_a_manifest_that_lacks_a_field(tmp_path, state):
    state.save(tmp_path / "state")
    file = tmp_path / "state" / "state.json"
    content = json.loads(file.read_text())
    del content["layers"]["unet/conv"]["input"]
    file.write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match="lacks"):
        QuantizationState.load(tmp_path / "state")


def test_vectors_of_another_state_or_none_or_cut(tmp_path, state):
    state.save(tmp_path / "state")
    file = tmp_path / "state" / VECTORS
    content = file.read_bytes()
    for damaged, message in ((content[:-1] + b"\x7f", "not the file"), (content[:-3], "cannot be read")):
        file.write_bytes(damaged)
        with pytest.raises(ArgumentError, match=message):
            QuantizationState.load(tmp_path / "state")
    file.unlink()
    with pytest.raises(ArgumentError, match="lacks its file"):
        QuantizationState.load(tmp_path / "state")


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(ArgumentError, match="edgediffusion calibrate"):
        QuantizationState.load(tmp_path / "none.json")
