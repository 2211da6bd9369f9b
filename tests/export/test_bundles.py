"""An exported bundle computes what torch computes, draws what diffusers draws, and holds nothing of the machine.

Tolerance of a graph: 1e-4 of the largest output in float32, a hundred roundings of 2^-23 a layer over some dozens of
layers with room to spare (found: 2e-6). In float16 a rounding is 2^13 times as large.

One file, because a worker that runs it exports each pipeline once for all of these tests.
"""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from edgediffusion.bundle import Bundle, NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.export import export
from edgediffusion.export.pictures import Run, asked
from edgediffusion.export.validate import Validation, validate
from edgediffusion.runtimes import Pipeline

Exported = Callable[..., Bundle]
Only = Callable[..., None]
MOST_GRAPH_BYTES = 400_000
PROMPTS = ("a red shirt", "black trousers of wool, worn, and a bag of blue shoes, and a red shirt with a bag")


def graphs(bundle: Bundle) -> dict[str, onnx.ModelProto]:
    return {c.name: onnx.load(str(bundle.path / c.model), load_external_data=False) for c in bundle.components}


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


@pytest.fixture(params=["stable_diffusion", "small", "consistency", "flow", "flow_t5"])
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_every_component_equals_torch_and_pictures_equal_diffusers(source: Path, exported: Exported) -> None:
    report = compare(exported(source), source)
    assert report.relative_error < 1e-4, report.components
    assert report.largest_255 < 2, report.pictures
    assert report.psnr_db > 60


def test_every_component_is_compared_at_two_batch_sizes_and_two_picture_sizes(small: Path, exported: Exported) -> None:
    shapes = {}
    for error in compare(exported(small), small).components:
        shapes.setdefault((error.component, error.output), []).append(error.shape)
    assert {component for component, _ in shapes} == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert all([shape[0] for shape in found] == [1, 2] for found in shapes.values())
    assert shapes["vae_decoder", "sample"] == [(1, 3, 16, 16), (2, 3, 20, 16)]


@pytest.mark.parametrize("opset", [18, 20])
def test_a_lower_opset_computes_the_same_also_in_parts(small: Path, exported: Exported, opset: int) -> None:
    cuts = ("up_blocks.1.resnets.0",)
    report = compare(exported(small, opset=opset, cuts=cuts), small)
    assert ("unet_shallow_up_blocks_1_resnets_0", "out_sample") in {(error.component, error.output) for error in report.components}
    assert report.relative_error < 1e-4, report.components
    assert report.largest_255 < 2


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m"])
def test_other_samplers_draw_what_diffusers_draws(stable_diffusion: Path, exported: Exported, sampler: str) -> None:
    report = compare(exported(stable_diffusion), stable_diffusion, sampler=sampler, prompts=PROMPTS[:1])
    assert (report.sampler, report.largest_255 < 2) == (sampler, True)


def test_a_flow_draws_from_a_picture_what_diffusers_draws(flow_t5: Path, exported: Exported) -> None:
    """The bundle of the pipeline that draws from nothing: the classes have the same networks."""
    theirs = diffusers.StableDiffusion3Img2ImgPipeline.from_pretrained(flow_t5)
    theirs.set_progress_bar_config(disable=True)
    ours = Pipeline.from_bundle(exported(flow_t5), threads=1)
    mine, other = asked(theirs, ours.sampling, PROMPTS[0], Run("flow-euler", 5, 4.0, 3)).draw(ours, theirs)
    assert np.abs(mine - other).max() < 2 / 255


def test_each_of_three_encoders_reads_its_own_text(flow_t5: Path, exported: Exported) -> None:
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(flow_t5)
    theirs.set_progress_bar_config(disable=True)
    ours = Pipeline.from_bundle(exported(flow_t5), threads=1)
    texts: dict[str, Any] = {"prompt_2": "black trousers", "prompt_3": "blue shoes", "num_inference_steps": 3, "guidance_scale": 4.0}
    texts |= {"negative_prompt": "wool", "negative_prompt_3": "a bag"}
    other = theirs(PROMPTS[0], output_type="np", generator=torch.Generator().manual_seed(3), **texts).images
    found = ours(PROMPTS[0], seed=3, **texts)
    assert not found.warnings
    assert np.abs(found.pixels - other).max() < 2 / 255


def test_float16_runs_and_is_close(small: Path, exported: Exported) -> None:
    report = compare(exported(small, dtype="float16"), small, steps=4)
    assert report.relative_error < 1e-4 * 2**13 / 16, report.components
    assert report.psnr_db > 35


def test_a_source_of_another_class_is_refused(small: Path, flow: Path, exported: Exported) -> None:
    with pytest.raises(ArgumentError, match="another class"):
        validate(exported(small), flow)


def compare(bundle: Bundle, source: Path, **options: object) -> Validation:
    settings: dict[str, object] = {"prompts": PROMPTS, "guidance_scale": 5.0, "seed": 3, **options}
    return validate(bundle, source, **settings)  # type: ignore[arg-type]


def test_weights_are_links_and_nothing_else_is_large(stable_diffusion: Path, exported: Exported) -> None:
    bundle = exported(stable_diffusion)
    inodes = {file.stat().st_ino for file in weights(stable_diffusion)}
    assert {file.stat().st_ino for file in weights(bundle.path)} == inodes
    others = [bundle.path / name for name in bundle.files if not name.endswith(".safetensors")]
    assert sum(file.stat().st_size for file in others) < MOST_GRAPH_BYTES


def test_no_graph_holds_weights(stable_diffusion: Path, exported: Exported) -> None:
    for model in graphs(exported(stable_diffusion)).values():
        held = {i.name: len(i.raw_data) for i in model.graph.initializer if i.data_location != onnx.TensorProto.EXTERNAL}
        assert max(held.values(), default=0) <= 4096, held


def test_copied_weights_share_nothing_with_the_source_and_are_there_once(small: Path, tmp_path: Path, only: Only) -> None:
    only("vae_decoder", "vae_encoder")
    bundle = export(small, tmp_path / "bundle", weights="copy")
    found = [file.stat() for file in weights(bundle.path)]
    assert not {stat.st_ino for stat in found} & {file.stat().st_ino for file in weights(small)}
    decoder, encoder = (next((bundle.path / name).glob("*.safetensors")) for name in ("vae_decoder", "vae_encoder"))
    assert decoder.samefile(encoder)
    Bundle.open(bundle.path)  # the hashes that were taken from the source's files fit the copies


def test_hashes_fit(consistency: Path, exported: Exported) -> None:
    Bundle.open(exported(consistency).path, verify=True)


def test_float16_weights_of_a_float32_graph_stay_as_they_are(consistency: Path, exported: Exported) -> None:
    bundle = exported(consistency)
    assert {f.stat().st_ino for f in weights(bundle.path)} == {f.stat().st_ino for f in weights(consistency)}
    unet = graphs(bundle)["unet"]
    held = {i.name for i in unet.graph.initializer if i.data_type == onnx.TensorProto.FLOAT16}
    assert "conv_in.weight" in held
    assert held == {node.input[0] for node in unet.graph.node if node.op_type == "Cast" and node.input[0] in held}


def test_float32_weights_of_a_float16_graph_are_converted(small: Path, exported: Exported) -> None:
    bundle = exported(small, dtype="float16")
    source = {name: values for file in (small / "unet").glob("*.safetensors") for name, values in load_file(file).items()}
    converted = load_file(bundle.path / "unet" / "weights.safetensors")
    assert converted.keys() == source.keys()
    assert all(np.array_equal(values, source[name].astype(np.float16)) for name, values in converted.items())
    decoder = load_file(bundle.path / "vae_decoder" / "weights.safetensors")
    assert not [name for name in decoder if name.startswith("encoder.")]
    specs = {s.name: s.dtype for s in bundle.component("unet").inputs}
    assert specs == {"sample": "float16", "timestep": "float32", "encoder_hidden_states": "float16"}


def test_the_same_source_gives_the_same_bytes(small: Path, exported: Exported, tmp_path: Path) -> None:
    """In another process with another order of sets, and from another place."""
    again = tmp_path / "elsewhere" / "bundle"
    code = "import sys; from edgediffusion.export import export; export(sys.argv[1], sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, small, again], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (again / "bundle.json").read_bytes() == (exported(small).path / "bundle.json").read_bytes()


def test_nothing_tells_about_the_machine(stable_diffusion: Path, exported: Exported) -> None:
    bundle = exported(stable_diffusion)
    secrets = [
        str(bundle.path.parent.parent),
        str(stable_diffusion.parent),
        str(Path.cwd()),
        "site-packages",
        "/home",
        ".py",
        "stack_trace",
    ]
    for file in (bundle.path / name for name in [*bundle.files, "bundle.json"]):
        if file.suffix != ".safetensors":
            content = file.read_bytes()
            assert not [s for s in [*secrets, f"/{getpass.getuser()}/"] if s.encode() in content], file


def test_names_are_those_of_other_tools(stable_diffusion: Path, exported: Exported) -> None:
    bundle = exported(stable_diffusion)
    names = {c.name: ([i.name for i in c.inputs], [o.name for o in c.outputs]) for c in bundle.components}
    assert names == {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
    }
    assert bundle.component("text_encoder").feeds == {"last_hidden_state": "encoder_hidden_states"}
    for name, model in graphs(bundle).items():
        assert ([i.name for i in model.graph.input], [o.name for o in model.graph.output]) == names[name]
        assert (bundle.path / name / "config.json").is_file()
    parameters = {i.name for i in graphs(bundle)["unet"].graph.initializer}
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.weight" in parameters


def test_the_manifest_says_what_the_graphs_say(stable_diffusion: Path, flow_t5: Path, exported: Exported) -> None:
    for source in (stable_diffusion, flow_t5):
        bundle = exported(source)
        for name, model in graphs(bundle).items():
            component = bundle.component(name)
            for specs, values in ((component.inputs, model.graph.input), (component.outputs, model.graph.output)):
                for spec, value in zip(specs, values, strict=True):
                    dims = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
                    assert dims == spec.shape, (name, spec.name)


def test_sampling_facts(stable_diffusion: Path, small: Path, consistency: Path, flow_t5: Path, exported: Exported) -> None:
    facts = exported(stable_diffusion).sampling
    assert facts is not None
    assert facts.schedule == NoiseSchedule("scaled_linear", 1000, 0.00085, 0.025, spacing="trailing", steps_offset=1)
    assert (facts.prediction, facts.guidance, facts.sampler, facts.downsampling) == ("v", "classifier-free", "ddim", 4)
    assert (facts.height, facts.width, facts.size_multiple, facts.latent_channels) == (32, 32, 16, 4)
    outdated = exported(small).sampling
    assert outdated is not None
    assert outdated.schedule.steps_offset == 1  # StableDiffusionPipeline overrules an outdated configuration
    few = exported(consistency).sampling
    assert few is not None
    assert (few.guidance, few.guidance_width, few.sampler, few.steps) == ("embedded", 16, "lcm", 4)
    flowing = exported(flow_t5).sampling
    assert flowing is not None
    assert (flowing.schedule, flowing.prediction, flowing.sampler) == (NoiseSchedule("flow", 1000, shift=3.0), "flow", "flow-euler")
    assert flowing.size_multiple == 4


def test_the_tokenizer_gives_the_ids_of_the_source(small: Path, exported: Exported) -> None:
    bundle = exported(small)
    spec = bundle.component("text_encoder").tokenizer
    assert spec is not None
    theirs = CLIPTokenizer.from_pretrained(small / "tokenizer")
    ours = Tokenizer.from_file(str(bundle.path / spec.file))
    for text in ("a red shirt", "", "Zebra! 12,5 \u00e9"):
        assert ours.encode(text).ids == theirs(text).input_ids
    assert (spec.length, spec.pad_id) == (16, theirs.pad_token_id)


def test_the_history_says_how_and_from_what(small: Path, exported: Exported) -> None:
    first, other = (exported(small, **arguments).history for arguments in ({}, {"dtype": "float16"}))
    (verb,) = first
    assert verb.name == "export"
    assert verb.arguments["dtype"] == "float32"
    assert verb.arguments["source"] == other[0].arguments["source"]
    assert set(verb.versions) == {"torch", "diffusers", "transformers", "onnx-ir", "onnxscript"}


def test_optional_components_and_origins_are_left_out(broken: Path, tmp_path: Path, only: Only) -> None:
    only("text_encoder")
    index = json.loads((broken / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "_name_or_path": "/ho" + "me/somebody/models"}
    (broken / "model_index.json").write_text(json.dumps(index))
    file = broken / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_name_or_path": "/ho" + "me/somebody/models/clip"}))
    bundle = export(broken, tmp_path / "bundle")
    assert json.loads((bundle.path / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert not [name for name in bundle.files if b"somebody" in (bundle.path / name).read_bytes()]


def test_progress_goes_from_0_to_1(small: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []

    def stop(label: str, part: float) -> None:
        told.append((label, part))
        if part > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(small, tmp_path / "bundle", progress=stop)
    assert told == [("exporting text_encoder", 0.0), ("exporting unet", 0.25)]
    assert list(tmp_path.iterdir()) == []


def test_after_a_kill_the_same_call_works(small: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from edgediffusion.export import export; "
        "export(sys.argv[1], sys.argv[2], progress=lambda label, part: os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", code, small, tmp_path / "bundle"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name.startswith(".bundle.partial-") for path in tmp_path.iterdir()] == [True]

    def stop(label: str, part: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(small, tmp_path / "bundle", progress=stop)
    assert list(tmp_path.iterdir()) == []
