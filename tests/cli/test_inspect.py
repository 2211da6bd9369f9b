from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgediffusion.bundle import Bundle
from edgediffusion.cli import main


@pytest.fixture
def bundle(tmp_path: Path, make_bundle: Callable[[Path], Bundle]) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def inspect(bundle: Bundle, *flags: str) -> Result:
    return CliRunner().invoke(main, ["inspect", str(bundle.path), *flags])


def test_everything_that_a_bundle_is_for_is_shown(bundle: Bundle) -> None:
    output = inspect(bundle).output
    for text in ("stable-diffusion", bundle.digest[:12], "unet", "denoise", "batch x 4 x height x width", "float32"):
        assert text in output
    assert re.search(r"guidance_scale +5.0\n", output)
    assert "text_encoder  tokenizer/tokenizer.json, 8 tokens" in output
    assert "export  dtype=float32, opset=23" in output
    assert "none yet: edgediffusion build" in output


def test_json_holds_the_same(bundle: Bundle) -> None:
    answer = json.loads(inspect(bundle, "--json").output)
    assert answer["digest"] == bundle.digest
    assert answer["components"][1]["inputs"][0]["shape"] == ["batch", 4, "height", "width"]
    assert answer["components"][0]["feeds"] == {"last_hidden_state": "encoder_hidden_states"}
    assert answer["sampling"]["schedule"]["train_steps"] == 1000
    assert answer["files"]["unet/model.onnx"]["bytes"] == len("graph of unet")
    assert answer["engines"] == {}


def test_a_changed_file_is_found_unless_one_is_in_a_hurry(bundle: Bundle) -> None:
    (bundle.path / "unet/model.onnx").write_bytes(b"graph of unEt")
    assert inspect(bundle).exit_code == 1
    assert "was changed after it was written" in inspect(bundle).stderr
    assert inspect(bundle, "--quick").exit_code == 0
