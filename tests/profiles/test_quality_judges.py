"""A judge of any folder: what it may look like, what it sees, and how a folder that does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save
from PIL import Image

import edgediffusion
from edgediffusion.errors import ArgumentError, EdgeDiffusionError, EngineError
from edgediffusion.profiles import gaussian, judges

CLASSES = [["red", "crimson"], "green", ["blue"]]
CONTENT: dict[str, Any] = {
    "format": 1,
    "model": "net.onnx",
    "input": {"layout": "nchw", "height": 4, "width": 6, "channels": 3, "mean": [0.5, 0.25, 0.0], "std": [0.5, 1.0, 2.0]},
    "outputs": {"logits": "logits", "features": "features", "layers": ["map"]},
    "classes": CLASSES,
}
Make = Callable[..., Path]


def write_network(file: Path, *, batch: int | str = "batch", layout: str = "nchw") -> None:
    """map is twice the input, features are the means of its channels, logits are those in another order."""
    shape = [batch, 3, 4, 6] if layout == "nchw" else [batch, 4, 6, 3]
    places = "height_width" if layout == "nchw" else "inside"
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["map"]),
        helper.make_node("ReduceMean", ["map", places], ["features"], keepdims=0),
        helper.make_node("MatMul", ["features", "swap"], ["logits"]),
    ]
    weights = {
        "two": np.float32(2).reshape(()),
        "height_width": np.array([2, 3]),
        "inside": np.array([1, 2]),
        "swap": np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]], np.float32),
    }
    used = {name: weights[name] for node in nodes for name in node.input if name in weights}
    outputs = {"map": shape, "features": [batch, 3], "logits": [batch, 3]}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in used.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), str(file))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(changes: Mapping[str, Any] | None = None, **network: Any) -> Path:
        folder = tmp_path / "judge"
        folder.mkdir()
        write_network(folder / "net.onnx", **network)
        (folder / "judge.json").write_text(json.dumps({**CONTENT, **(changes or {})}), encoding="utf-8")
        return folder

    return write


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 4, 6, 3))


# --- what it sees


@pytest.mark.parametrize("batch", ["batch", 1, 3])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_network_of_either_layout_and_any_batch_sees_the_same(make: Make, layout: str, batch: int | str) -> None:
    judge = judges.load(make({"input": {**CONTENT["input"], "layout": layout}}, layout=layout, batch=batch))
    shown = pixels(70)
    look = judge.look(shown)
    fed = 2 * (shown - [0.5, 0.25, 0.0]) / [0.5, 1.0, 2.0]
    assert look.features == pytest.approx(fed.mean((1, 2)), abs=1e-6)  # float32
    assert look.logits == pytest.approx(fed.mean((1, 2))[:, [1, 0, 2]], abs=1e-6)
    (layer,) = look.layers
    assert layer == pytest.approx(fed.reshape(70, 24, 3).transpose(0, 2, 1), abs=1e-6)
    assert judge.look(shown, layers=False).layers == ()


def test_a_grey_picture_is_shown_to_a_network_of_colours(make: Make) -> None:
    judge = judges.load(make())
    grey = pixels(2)[..., :1]
    assert np.array_equal(judge.look(grey).features, judge.look(np.repeat(grey, 3, axis=3)).features)
    with pytest.raises(ArgumentError, match="cannot see these colours. Got: 4 channels"):
        judge.look(np.zeros((1, 4, 6, 4)))


def test_a_picture_of_another_size_is_resized_as_pillow_does_it(make: Make) -> None:
    judge = judges.load(make())
    large = np.random.default_rng(0).random((2, 20, 18, 1)).astype(np.float32)
    small = [np.asarray(Image.fromarray(p[..., 0]).resize((6, 4), Image.Resampling.BILINEAR)) for p in large]
    assert np.array_equal(judge.look(large).features, judge.look(np.stack(small)[..., None]).features)


def test_a_judge_has_what_its_file_names(make: Make) -> None:
    folder = make({"outputs": {"features": "features"}, "classes": []})
    judge = judges.load(folder)
    assert judge.has == {"features"}
    look = judge.look(pixels(1))
    assert look.logits is None
    assert look.layers == ()


# --- what it knows


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of a t-shirt", "t-shirt"),
        ("a dark shirt", "shirt"),
        ("A Bright RUNNING SHOE", "sneaker"),
        ("ankle boot", "ankle boot"),
        ("handbag", "bag"),
        ("a dress shirt", None),
        ("a t-shirt and a shirt", None),
        ("two shirts", None),
        ("a red heart", None),
        ("", None),
    ],
)
def test_the_class_of_a_prompt(prompt: str, expected: str | None) -> None:
    judge = judges.load("fashion")
    assert judge.class_of(prompt) == (-1 if expected is None else [words[0] for words in judge.classes].index(expected))


def test_the_judge_that_ships() -> None:
    judge = judges.load("fashion")
    assert judges.shipped() == ("fashion",)
    assert judge.has == {"features", "layers", "classes", "real"}
    assert judge.real is not None
    assert judge.real.items == 10_000
    classes = [judge.class_of(prompt) for prompt in judge.prompts]
    assert np.bincount(classes).tolist() == [6] * 10  # in turn, so that any number of them is balanced
    assert classes[:10] == list(range(10))
    assert judge.yardstick("agreement", 50) == 0.9109
    assert judge.yardstick("psnr", 50) is None


def test_a_yardstick_between_two_numbers_is_linear_in_one_over_n(make: Make) -> None:
    folder = make({"real": {"frechet": {"10": 5.0, "20": 3.0, "100": 2.0}}})
    judge = judges.load(folder)
    assert [judge.yardstick("frechet", n) for n in (10, 20, 100)] == [5.0, 3.0, 2.0]
    assert judge.yardstick("frechet", 15) == pytest.approx(3 + 2 * (1 / 15 - 1 / 20) / (1 / 10 - 1 / 20))
    assert judge.yardstick("frechet", 9) is None
    assert judge.yardstick("frechet", 101) is None


def test_statistics_that_are_written_are_those_that_are_read(make: Make) -> None:
    folder = make({"real": {"statistics": "real.npz"}})
    features = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    judges.write_real(folder / "real.npz", features)
    first = (folder / "real.npz").read_bytes()
    judges.write_real(folder / "real.npz", features)
    assert (folder / "real.npz").read_bytes() == first
    real = judges.load(folder).real
    assert real is not None
    assert np.array_equal(real.mean, gaussian.fit(features).mean)
    assert np.array_equal(real.covariance, np.asarray(gaussian.fit(features).covariance))
    assert real.items == 12


def test_the_example_of_the_document_is_one(tmp_path: Path) -> None:
    text = (Path(edgediffusion.__file__).parent.parent / "docs" / "quality.md").read_text(encoding="utf-8")
    (tmp_path / "judge.json").write_text(text.split("```json\n")[1].split("```")[0], encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"there is no file 'real\.npz'"):  # all fields were read before the files were
        judges.load(tmp_path)


# --- what is refused


def test_no_judge_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="No judge is called 'fashoin'. Allowed: fashion. Name one of these, or a folder"):
        judges.load("fashoin")
    with pytest.raises(ArgumentError, match=r"is not a judge: it has no judge\.json"):
        judges.load(tmp_path)


INPUT = CONTENT["input"]
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": 2}, "has a format that is not known here. Got: 2. Allowed: 1"),
    "unknown": ({"colour": 1}, "the file has unknown fields: colour; known are classes, format"),
    "unknown of the input": ({"input": {**INPUT, "size": 4}}, "'input' has unknown fields: size"),
    "no input": ({"input": None}, "cannot be used"),
    "no layout": ({"input": {k: v for k, v in INPUT.items() if k != "layout"}}, "layout"),
    "layout": ({"input": {**INPUT, "layout": "chwn"}}, "layout 'chwn' is none of nchw, nhwc"),
    "height": ({"input": {**INPUT, "height": 5}}, r"an input of \['n', 3, 5, 6\]; the network takes \['batch', 3, 4, 6\]"),
    "height as text": ({"input": {**INPUT, "height": "4"}}, "cannot be used"),
    "std": ({"input": {**INPUT, "std": 0}}, "std is 0, not above zero"),
    "means": ({"input": {**INPUT, "mean": [1, 2]}}, "cannot be used"),
    "model": ({"model": "other.onnx"}, "there is no file 'other.onnx'"),
    "model elsewhere": ({"model": "../net.onnx"}, "leaves the folder"),
    "model as a number": ({"model": 3}, "cannot be used"),
    "output": ({"outputs": {"logits": "logit"}}, r"outputs \['logit'\]; the network has \['features', 'logits', 'map'\]"),
    "no output": ({"outputs": {}}, r"outputs \[\]"),
    "features": ({"outputs": {"features": "map"}}, r"features of shape \(1, 3, 4, 6\), which is not one row"),
    "classes": ({"classes": ["red", "green"]}, r"2 classes, and logits of shape \(1, 3\)"),
    "words": ({"classes": [["red"], ["green"], [3]]}, "classes are lists of words"),
    "prompts": ({"prompts": [["a", 3]]}, "prompts are a list of texts"),
    "yardstick": ({"real": {"frechet": {"many": 3}}}, "cannot be used"),
    "statistics": ({"real": {"statistics": "real.npz"}}, "there is no file 'real.npz'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_not_fit_is_refused(make: Make, name: str) -> None:
    changes, message = BROKEN[name]
    with pytest.raises(ArgumentError, match=message):
        judges.load(make(changes))


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"format": 1}'])
def test_a_damaged_file_is_refused(make: Make, text: str) -> None:
    folder = make()
    (folder / "judge.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"judge\.json"):
        judges.load(folder)


@pytest.mark.parametrize("kind", ["text", "two features", "no numbers", "lacking", "pickle"])
def test_statistics_that_do_not_fit_are_refused(make: Make, kind: str) -> None:
    folder = make({"real": {"statistics": "real.npz"}})
    arrays: dict[str, Any] = {"mean": np.zeros(3), "covariance": np.eye(3), "items": np.int64(9)}
    if kind == "text":
        (folder / "real.npz").write_text("mean 3")
    else:
        changed = {
            "two features": {"mean": np.zeros(2), "covariance": np.eye(2)},
            "no numbers": {"mean": np.full(3, np.nan)},
            "lacking": {},
            "pickle": {"mean": np.array([None, None, None])},
        }[kind]
        arrays |= changed
        np.savez(folder / "real.npz", **{k: v for k, v in arrays.items() if (kind, k) != ("lacking", "items")})
    with pytest.raises(ArgumentError, match="cannot be used"):
        judges.load(folder)


def test_a_network_that_cannot_be_loaded_is_the_engines_error(make: Make) -> None:
    folder = make()
    (folder / "net.onnx").write_bytes(b"no network")
    with pytest.raises(EngineError, match=r"could not load 'judge/net\.onnx'"):
        judges.load(folder)


def test_a_file_of_the_shipped_judge_that_is_missing_is_told(tmp_path: Path) -> None:
    origin = Path(edgediffusion.__file__).parent / "reference" / "fashion-classifier"
    for name in ("judge.onnx", "real.npz"):
        folder = tmp_path / name
        shutil.copytree(origin, folder)
        (folder / name).unlink()
        with pytest.raises(EdgeDiffusionError, match=f"there is no file '{name}'"):
            judges.load(folder)
