"""The verb ``calibrate`` on a small random pipeline: a killed run ends in the same bytes, and each bad input is told."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from edgediffusion.cli import main
from edgediffusion.errors import ArgumentError, Cancelled, OutputError
from edgediffusion.export import export
from edgediffusion.export.families import stable_diffusion as family
from edgediffusion.optimize import QuantizationState, calibrate
from edgediffusion.optimize.features import tapped
from tests.export.conftest import CAPTIONS, clip_config, saved, small_unet, small_vae
from training import networks

PROMPTS = ["a red shirt", "a pair of blue shoes", "a bag"]
SETTINGS = {"strategy": "tdac", "samples": 40, "steps": 3, "seed": 7, "guidance_scale": 3.0}
WITHOUT = ("torch", "diffusers", "transformers", "modelopt", "onnxscript")
LEAVE_OUT_THE_DECODER = """
from edgediffusion.export.families import stable_diffusion as family
parts = family.parts
family.parts = lambda source: tuple(p for p in parts(source) if p.network != "vae")
"""


@pytest.fixture(scope="module", autouse=True)
def _without_the_decoder():
    """Drawing items decodes nothing, and it is half of what there is to trace."""
    parts = family.parts
    exec(LEAVE_OUT_THE_DECODER, {})
    yield
    family.parts = parts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = networks.tokenizer(CAPTIONS, 600)
    pipeline = StableDiffusionPipeline(
        vae=small_vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 32)),
        tokenizer=tokenizer,
        unet=small_unet(),
        scheduler=networks.diffusion_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = saved(pipeline, tmp_path_factory.mktemp("calibrate") / "source")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bundle(source):
    return export(source, source.parent / "bundle")


@pytest.fixture(scope="module")
def undisturbed(source, bundle):
    """The bytes of a state that nothing came between."""
    calibrate(bundle, source=source, output=source.parent / "undisturbed", **SETTINGS)
    return content(source.parent / "undisturbed")


def content(state):
    """Names and bytes of all that a state is."""
    files = [state] if state.is_file() else [file for file in sorted(state.rglob("*")) if file.is_file()]
    assert files
    return {str(file.relative_to(state)): file.read_bytes() for file in files}


def interrupt_after(part):
    def progress(label, done):
        if label == "items" and done >= part:
            raise KeyboardInterrupt

    return progress


def test_the_state_says_how_its_items_were_drawn(source, undisturbed):
    record = QuantizationState.load(source.parent / "undisturbed").calibration
    assert record["strategy"] == "tdac"
    assert record["options"] == {"setting": "auto", "radius": None, "variety": None, "cut": "mid_block.attentions.0"}
    assert sum(record["counts"]) == 40
    assert len(record["counts"]) == 3


def test_without_the_source_layers_see_what_torch_sees(tmp_path, source, bundle, undisturbed):
    """The graph is the network, to float32's rounding: every range, and what is made of them."""
    found = calibrate(bundle, output=tmp_path / "state", **SETTINGS)
    expected = QuantizationState.load(source.parent / "undisturbed")
    assert (found.calibration["observer"], expected.calibration["observer"]) == ("onnxruntime", "torch")
    assert set(found.versions) == {"onnxruntime"}
    assert {**found.calibration, "observer": "torch"} == expected.calibration
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        for part in ("input_low", "input_high", "output_low", "output_high"):
            seen, there = getattr(found.layers[name], part), getattr(layer, part)
            np.testing.assert_allclose(seen, there, atol=1e-4 * np.abs(there).max(), err_msg=f"{name}: {part}")


def test_without_torch_a_stopped_run_goes_on_and_ends_in_the_same_bytes(tmp_path, bundle):
    calibrate(bundle, output=tmp_path / "undisturbed", **SETTINGS)
    output = tmp_path / "state"
    with pytest.raises(Cancelled):
        calibrate(bundle, output=output, progress=interrupt_after(0.5), **SETTINGS)
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    script = f"import sys\nsys.modules.update(dict.fromkeys({WITHOUT}))\nfrom edgediffusion.cli import main\nmain(sys.argv[1:])"
    arguments = ["calibrate", str(bundle.path), *settings, "-o", str(output)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "16 of 40 items were there already" in done.stderr
    assert content(output) == content(tmp_path / "undisturbed")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state", "undisturbed"]


def test_ctrl_c_keeps_what_there_is_and_the_same_call_ends_in_the_same_bytes(tmp_path, source, bundle, undisturbed):
    output = tmp_path / "state"
    with pytest.raises(Cancelled, match="kept. The same command goes on from it"):
        calibrate(bundle, source=source, output=output, progress=interrupt_after(0.5), **SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == [".state.parts"]
    told = []
    labels = set()
    calibrate(bundle, source=source, output=output, tell=told.append, progress=lambda label, part: labels.add(label), **SETTINGS)
    assert told == ["16 of 40 items were there already, from a run that was stopped."]
    assert "features" not in labels, "the allocation is kept too"
    assert content(output) == undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_killed_process_goes_on_and_ends_in_the_same_bytes(tmp_path, source, bundle, undisturbed):
    output = tmp_path / "state"
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    script = f"{LEAVE_OUT_THE_DECODER}\nimport sys\nfrom edgediffusion.cli import main\nmain(sys.argv[1:])"
    arguments = ["calibrate", str(bundle.path), "--source", str(source), *settings, "-o", str(output)]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 300
    while not list(tmp_path.rglob("items-*.part")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    assert not output.exists()
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    assert "of 40 items were there already" in done.stderr
    assert content(output) == undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_the_command_says_that_it_keeps_what_it_has(tmp_path, source, bundle, monkeypatch):
    def stopped(*arguments, **settings):
        raise Cancelled("Stopped. What was done so far is kept", do="The same command goes on from it.")

    monkeypatch.setattr("edgediffusion.optimize.calibrate", stopped)
    result = CliRunner().invoke(main, ["calibrate", str(bundle.path), "--source", str(source), "-o", str(tmp_path / "s")])
    assert result.exit_code == 130
    assert result.stderr == "Stopped. What was done so far is kept. The same command goes on from it.\n"


def test_features_are_what_torch_feeds_the_module(source, bundle):
    fed, entered = [], []
    with tapped(bundle, bundle.component("unet"), None) as tap:
        options = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 1}
        features = tap.draw(PROMPTS[:2], progress=lambda label, part: None, **options)
        for _ in tap.pipeline.steps(PROMPTS[:2], observe=lambda step, feeds: fed.append(feeds), **options):
            pass
    network = UNet2DConditionModel.from_pretrained(source / "unet").eval()
    network.mid_block.attentions[0].register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        for feeds in fed:
            network(*(torch.from_numpy(feeds[name]) for name in ("sample", "timestep", "encoder_hidden_states")))
    expected = np.stack([tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1]).numpy() for tensor in entered])
    assert features.cut == "mid_block.attentions.0"
    np.testing.assert_allclose(features.values, expected, atol=1e-4 * np.abs(expected).max())


# --- what cannot be used


def refused(error, message, bundle, source, output, **settings):
    with pytest.raises(error, match=message):
        calibrate(bundle, source=source, output=output, **{**SETTINGS, **settings})
    assert not list(output.parent.glob(".*"))


def test_an_output_that_exists_is_refused_before_anything_is_drawn(tmp_path, source, bundle):
    output = tmp_path / "state"
    output.write_text("mine")
    refused(OutputError, "exists already", bundle, source, output)
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "at least one item"),
        ({"strategy": "ndtc", "options": {"variant": "skew"}}, "ndtc has no such variant. Got: 'skew'. Allowed: code, paper"),
        ({"strategy": "stride", "samples": 2}, "2 items for 3 of 3 steps"),
        ({"options": {"cut": "time_embedding"}}, "enters the module 'time_embedding'"),
        ({"options": {"cut": "mid_block.nope"}}, "No module of the network is called 'mid_block.nope'"),
        ({"prompts": []}, "--prompts FILE"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_and_nothing_stays(tmp_path, source, bundle, settings, message):
    refused(ArgumentError, message, bundle, source, tmp_path / "state", **settings)


def test_a_recipe_that_learns_says_that_it_needs_the_source(tmp_path, bundle):
    refused(ArgumentError, "rounding 'straight-through'.*--source FOLDER", bundle, None, tmp_path / "state", recipe="w4a8")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no prompts.txt in '.*--prompts FILE"), (b"\n  \n", "has no prompts"), (b"a \xff", "not text in UTF-8")],
    ids=["absent", "empty", "no-text"],
)
def test_a_source_without_prompts_is_refused(tmp_path, source, bundle, content, message):
    other = shutil.copytree(source, tmp_path / "source")
    (other / "prompts.txt").unlink()
    if content is not None:
        (other / "prompts.txt").write_bytes(content)
    refused(ArgumentError, message, bundle, other, tmp_path / "state")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "variant"], "NAME=VALUE. Got: 'variant'"),
        (["--option", "=paper"], "NAME=VALUE. Got: '=paper'"),
        (["--option", "clip=drop", "--option", "clip=clamp"], "'clip' is given twice"),
        (["--strategy", "ndtc", "--option", "std_part=wide"], "Got: 'wide'. Allowed: a number"),
        (["--strategy", "ndtc", "--option", "width=1"], "has no option 'width'. Allowed: variant (text, by default code)"),
        (["--strategy", "ndct"], "Did you mean 'ndtc'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_refuses_arguments_with_what_is_allowed(tmp_path, source, bundle, arguments, message):
    result = CliRunner().invoke(main, ["calibrate", str(bundle.path), "--source", str(source), "-o", str(tmp_path / "s"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_prompts_that_are_no_text_are_refused(tmp_path, source, bundle):
    (tmp_path / "prompts").write_bytes(b"a bag\n\xff\xfe\n")
    arguments = ["calibrate", str(bundle.path), "--source", str(source), "-o", str(tmp_path / "s")]
    result = CliRunner().invoke(main, [*arguments, "--prompts", str(tmp_path / "prompts")])
    assert result.exit_code == 2
    assert "not text in UTF-8" in result.stderr
