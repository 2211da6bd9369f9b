"""What cannot be exported is refused before anything is written, in words that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgediffusion.errors import ArgumentError, EdgeDiffusionError, MissingExtra, OutputError, SourceError
from edgediffusion.export import export


def refused(source: Path, kind: type[EdgeDiffusionError] = SourceError, **arguments: Any) -> str:
    output = source.parent / "refused" / "bundle"
    with pytest.raises(kind) as caught:
        export(source, output, **arguments)
    assert not output.parent.exists() or list(output.parent.iterdir()) == []
    return str(caught.value)


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values}))


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.txt").write_text("")
    text = refused(tmp_path / "source")
    assert "no pipeline" in text
    assert "Got: notes.txt" in text
    assert "save_pretrained" in text


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "There is no folder" in refused(tmp_path / "source")


def test_a_whole_checkpoint_in_one_file(tmp_path: Path) -> None:
    for name, words in (("model.ckpt", "pickle"), ("model.safetensors", "not the folder of a pipeline")):
        (tmp_path / name).write_bytes(b"x")
        text = refused(tmp_path / name)
        assert words in text
        assert f"from_single_file('{name}')" in text


def test_a_pickle(broken: Path) -> None:
    for file in (broken / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    text = refused(broken)
    assert "'vae/diffusion_pytorch_model.bin' are a pickle" in text
    assert 'python -c "from diffusers import DiffusionPipeline; ' in text
    assert "safe_serialization=True" in text


def test_no_weights(broken: Path) -> None:
    for file in (broken / "vae").glob("*.safetensors"):
        file.unlink()
    text = refused(broken)
    assert "'vae' has no weights" in text
    assert "diffusion_pytorch_model.safetensors" in text


@pytest.mark.parametrize("left", [0, 5, 200, -4])
def test_a_truncated_file(broken: Path, left: int) -> None:
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    text = refused(broken)
    assert "'vae/diffusion_pytorch_model.safetensors' is damaged or was not copied completely" in text
    assert "Download" in text


def test_a_header_that_lies(broken: Path) -> None:
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    for header in (b"[]", b"not json", b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b'{"a":{"dtype":"F32"}}'):
        file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        assert "damaged" in refused(broken)


def test_a_missing_shard(broken: Path) -> None:
    lost = sorted((broken / "unet").glob("*-of-*.safetensors"))[0]
    lost.unlink()
    assert f"Got: {lost.name}" in refused(broken)


def test_missing_surplus_and_misshapen_tensors(broken: Path) -> None:
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    cases: dict[str, dict[str, np.ndarray]] = {
        "lacks tensors of the network": {k: v for k, v in tensors.items() if k != "decoder.conv_in.weight"},
        "has tensors that do not belong to": {**tensors, "decoder.conv_extra.weight": np.zeros(2, np.float32)},
        "has tensors of other shapes": {**tensors, "decoder.conv_in.weight": np.zeros((1, 2), np.float32)},
    }
    for words, content in cases.items():
        save_file(content, file)
        text = refused(broken)
        assert words in text
        assert "decoder.conv_" in text


def test_unknown_classes(broken: Path) -> None:
    index = broken / "model_index.json"
    whole = index.read_text()
    change(index, unet=["diffusers", "UNet3DConditionModel"])
    text = refused(broken)
    assert "Got: UNet3DConditionModel. Allowed: UNet2DConditionModel" in text
    index.write_text(whole)
    change(index, scheduler=["diffusers", "VQDiffusionScheduler"])
    text = refused(broken)
    assert "Got: VQDiffusionScheduler" in text
    assert "DPMSolverMultistepScheduler" in text
    index.write_text(whole)
    change(index, controlnet=["diffusers", "ControlNetModel"])
    assert "controlnet (ControlNetModel)" in refused(broken)
    index.write_text(whole)
    change(index, _class_name="KandinskyPipeline")
    text = refused(broken)
    assert "KandinskyPipeline" in text
    assert all(f" {name}," in text for name in ("LatentConsistencyModelPipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline"))


def test_a_missing_component(broken: Path) -> None:
    change(broken / "model_index.json", vae=[None, None])
    assert "The component 'vae' of this StableDiffusionPipeline is missing" in refused(broken)


def test_a_scheduler_that_no_sampler_here_follows(broken: Path) -> None:
    change(broken / "scheduler" / "scheduler_config.json", thresholding=True)
    text = refused(broken)
    assert "thresholding" in text
    assert "scheduler_config.json" in text


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_json_that_is_damaged_or_missing(broken: Path, file: str) -> None:
    (broken / file).write_text("{")
    assert file.rsplit("/", 1)[-1] in refused(broken)
    (broken / file).unlink()
    assert file.rsplit("/", 1)[-1] in refused(broken)


def test_a_damaged_tokenizer(broken: Path) -> None:
    (broken / "tokenizer" / "vocab.json").write_text("{")
    assert "tokenizer" in refused(broken)


def test_values_beyond_float16(broken: Path) -> None:
    file = broken / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    save_file({**tensors, name: np.full_like(tensors[name], 1e6)}, file)
    text = refused(broken, dtype="float16")
    assert "final_layer_norm.weight" in text
    assert "1e+06" in text


def test_arguments(broken: Path) -> None:
    for arguments in ({"dtype": "int8"}, {"opset": 17}, {"opset": 24}, {"weights": "move"}):
        (value,) = arguments.values()
        text = refused(broken, ArgumentError, **arguments)
        assert str(value) in text
        assert "Allowed:" in text


def test_an_output_that_exists(broken: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="exists already"):
        export(broken, output)
    assert [p.name for p in output.iterdir()] == ["mine.txt"]


def test_a_missing_extra(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    text = refused(broken, MissingExtra)
    assert "onnxscript" in text
    assert "edgediffusion[export]" in text


def test_importing_export_loads_nothing_heavy() -> None:
    code = "import sys, edgediffusion.export; print([m for m in ('torch', 'diffusers', 'onnx', 'onnx_ir') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
