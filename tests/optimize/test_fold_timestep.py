"""Folding the time embedding: what the pass takes and leaves on tiny graphs, and that real bundles draw the same pictures."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from edgediffusion.bundle import Bundle, Folded, manifest
from edgediffusion.errors import ArgumentError, BundleError, OutputError, UnknownName
from edgediffusion.export import export
from edgediffusion.export.families import stable_diffusion as family
from edgediffusion.optimize import calibrate, correct, fold, quantize
from edgediffusion.optimize.passes.fold_timestep import block_model, fold_timestep, time_block
from edgediffusion.registry import find
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.request import Request, plan
from tests.export.conftest import CAPTIONS, clip_config, saved, small_unet, small_vae
from tests.runtimes.tiny import DENOISE, ENCODE, SAMPLING, write_bundle
from training import networks

TIMES = np.array([900, 601.5, 300], np.float32)

# A time embedding as diffusers has it, which meets the picture in two places; the sum of both is what "meets" asks for.
MODEL = """
<ir_version: 10, opset_import: ["": 21]>
network ({kind}[{one}] timestep, float[n, 2, h, w] sample, float[n, 4] condition) => (float[n, 2, h, w] y)
<float[n, 8] embedded, float[n, 4] first, float[n, 2] second, float[n, 4, 1, 1] wide, float[n, 2, 1, 1] narrow,
 float[n, 4, h, w] features, float[n, 2, h, w] back, float[n, 4] said>
{{
  batch = Shape <start = 0, end = 1> (sample)
  {cast}
  rows = Expand (time, batch)
  axis = Constant <value_ints = [1]> ()
  column = Unsqueeze (rows, axis)
  angle = Mul (column, frequencies)
  sines = Sin (angle)
  cosines = Cos (angle)
  waves = Concat <axis = 1> (sines, cosines)
  hidden = Gemm <transB = 1> (waves, w1, b1)
  gate = Sigmoid (hidden)
  embedded = Mul (hidden, gate)
  first = Gemm <transB = 1> (embedded, w2, b2)
  second = Gemm <transB = 1> (embedded, w3, b3)
  axes = Constant <value_ints = [2, 3]> ()
  {meets}
  features = Conv (sample, kernel)
  added = Add (features, wide)
  active = Relu (added)
  back = Conv (active, kernel2)
  narrow = Unsqueeze (second, axes)
  y = Add (back, narrow)
}}
"""
ALONE = "wide = Unsqueeze (first, axes)"
WITH_A_CONDITION = "said = Add (first, condition) \n wide = Unsqueeze (said, axes)"


def parse(meets=ALONE, kind="float", one="1"):
    cast = "time = Identity (timestep)" if kind == "float" else "time = Cast <to = 1> (timestep)"
    model = onnx.parser.parse_model(MODEL.format(kind=kind, one=one, cast=cast, meets=meets))
    if not one:  # the text format has no scalars
        model.graph.input[0].type.tensor_type.shape.SetInParent()
    rng = np.random.default_rng(0)
    shapes = {"frequencies": (1, 4), "w1": (8, 8), "b1": (8,), "w2": (4, 8), "b2": (4,), "w3": (2, 8), "b3": (2,)}
    shapes |= {"kernel": (4, 2, 1, 1), "kernel2": (2, 4, 1, 1)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights["frequencies"] /= 500
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def session_of(model):
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def feeds(session, time, batch=2):
    rng = np.random.default_rng(1)
    values = {"sample": rng.standard_normal((batch, 2, 3, 5)), "condition": rng.standard_normal((batch, 4))}
    values = {name: array.astype(np.float32) for name, array in values.items()}
    (shape,) = (i.shape for i in session.get_inputs() if i.name == "timestep") if "timestep" in names_of(session) else ((),)
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    kind = next((i.type for i in session.get_inputs() if i.name == "timestep"), "tensor(float)")
    values["timestep"] = np.full(shape, time, dtypes[kind])
    return {name: values[name] for name in names_of(session)}


def names_of(session):
    return [i.name for i in session.get_inputs()]


def folded(proto, times=TIMES):
    """The folded model, the block, and what the block gave at each time: [steps, ...] by name."""
    model = ir.from_proto(proto)
    block = time_block(model.graph)
    alone = session_of(block_model(model, block))
    outputs = [o.name for o in alone.get_outputs()]
    found = [alone.run(outputs, feeds(alone, time)) for time in times]
    assert all((array == array[:1]).all() for arrays in found for array in arrays)
    rows = {name: np.concatenate([arrays[i][:1] for arrays in found]) for i, name in enumerate(outputs)}
    fold_timestep(model, block, times, rows)
    return model, block, rows


@pytest.mark.parametrize("one", ["1", ""], ids=["one time", "scalar"])
def test_a_folded_graph_gives_the_same_bits_with_fewer_nodes_and_without_the_weights(one):
    proto = parse(one=one)
    model, block, _ = folded(proto)
    assert [value.name for value in block.frontier] == ["wide", "narrow"]
    assert block.joined == ()
    before, after = session_of(proto), session_of(model)
    for time in TIMES:
        for batch in (1, 2, 3):
            assert (before.run(None, feeds(before, time, batch))[0] == after.run(None, feeds(after, time, batch))[0]).all()
    ops = [node.op_type for node in model.graph]
    # Which step it is, and one table for both values; the network itself is as it was.
    assert ops == ["Sub", "Abs", "ArgMin", "Gather", "Split", "Conv", "Add", "Relu", "Conv", "Add"]
    assert set(model.graph.initializers) & {"w1", "b1", "w2", "b2", "w3", "b3", "frequencies"} == set()


def test_the_table_is_what_the_block_gives_in_the_whole_graph():
    proto = parse()
    _, _, rows = folded(proto)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, 1, ["n", c, 1, 1]) for n, c in (("wide", 4), ("narrow", 2)))
    whole = session_of(proto)
    for step, time in enumerate(TIMES):
        wide, narrow = whole.run(["wide", "narrow"], feeds(whole, time))
        assert (wide == rows["wide"][step]).all()
        assert (narrow == rows["narrow"][step]).all()


def test_what_a_condition_joins_stays():
    proto = parse(WITH_A_CONDITION)
    model, block, _ = folded(proto)
    assert [value.name for value in block.frontier] == ["first", "narrow"]
    assert block.joined == ("condition",)
    before, after = session_of(proto), session_of(model)
    assert (before.run(None, feeds(before, 300))[0] == after.run(None, feeds(after, 300))[0]).all()
    assert [node.op_type for node in model.graph].count("Gather") == 2  # the values have not the same rank


def test_a_node_that_does_not_broadcast_gets_every_row():
    proto = parse(
        "joint = Concat <axis = 1> (first, condition) \n mixed = Gemm <transB = 1> (joint, w1, b1) \n"
        "part = Slice (mixed, axis_0, axis_4, axis) \n wide = Unsqueeze (part, axes)"
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.array([n]), f"axis_{n}") for n in (0, 4))
    model, block, _ = folded(proto)
    assert block.joined == ("condition",)
    assert [node.op_type for node in model.graph].count("Expand") == 1
    before, after = session_of(proto), session_of(model)
    for batch in (1, 3):
        assert (before.run(None, feeds(before, 900, batch))[0] == after.run(None, feeds(after, 900, batch))[0]).all()


@pytest.mark.parametrize(("kind", "dtype"), [("int64", np.int64), ("float16", np.float16)])
def test_time_steps_of_other_types(kind, dtype):
    proto = parse(kind=kind)
    model, _, _ = folded(proto, np.array([900, 601, 300], dtype))
    before, after = session_of(proto), session_of(model)
    assert (before.run(None, feeds(before, 601))[0] == after.run(None, feeds(after, 601))[0]).all()


def test_a_time_step_that_an_engine_rounds_finds_its_row():
    proto = parse()
    model, _, _ = folded(proto)
    before, after = session_of(proto), session_of(model)
    assert (before.run(None, feeds(before, 601.5))[0] == after.run(None, feeds(after, np.float16(601.5) + 0.25))[0]).all()


def test_random_numbers_and_shapes_of_pictures_are_not_folded():
    proto = parse("noise = RandomNormalLike (first) \n said = Add (first, noise) \n wide = Unsqueeze (said, axes)")
    block = time_block(ir.from_proto(proto).graph)
    assert [value.name for value in block.frontier] == ["first", "narrow"]
    proto = parse("size = Shape (sample) \n part = Cast <to = 1> (size) \n said = Add (first, part) \n wide = Unsqueeze (said, axes)")
    assert [value.name for value in time_block(ir.from_proto(proto).graph).frontier] == ["first", "narrow"]


# --- bundles


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
    return saved(pipeline, tmp_path_factory.mktemp("fold") / "source")


@pytest.fixture(scope="module")
def plain(source):
    """Latents are compared, so the decoder need not be traced."""
    with pytest.MonkeyPatch.context() as patch:
        parts = family.parts
        patch.setattr(family, "parts", lambda source: tuple(p for p in parts(source) if p.network != "vae"))
        yield export(source, source.parent / "float")


@pytest.fixture(scope="module")
def int8(source, plain):
    state = calibrate(plain, source=source, output=source.parent / "state", prompts=CAPTIONS[:2], samples=8, steps=4)
    return quantize(plain, state, source.parent / "int8")


@pytest.fixture(scope="module")
def twenty(plain):
    return fold(plain, plain.path.parent / "twenty", steps=20)


def latents(bundle, **options):
    return Pipeline.from_bundle(bundle, threads=1)(["a bag", "a red shirt"], seed=5, **options).latents


@pytest.mark.parametrize("which", ["plain", "int8"])
def test_a_folded_bundle_draws_the_same_pictures_and_is_smaller(which, request, tmp_path):
    bundle = request.getfixturevalue(which)
    made = fold(bundle, tmp_path / "folded", steps=6, sampler="euler")
    options = {"num_inference_steps": 6, "sampler": "euler"}
    assert np.abs(latents(bundle, **options) - latents(made)).max() <= 1e-6  # found: 0; it draws so without being told
    report = made.history[-1].arguments["graphs"]["unet"]
    assert report["nodes_after"] < report["nodes_before"]
    assert report["bytes_after"] < report["bytes_before"]
    assert report["joined"] == []
    files = [made.files[name].bytes for name in made.files if name.startswith("unet/") and name.endswith((".onnx", ".safetensors"))]
    assert sum(files) == report["bytes_after"]
    graph = ir.load(made.path / "unet/model.onnx").graph
    assert len(graph) == report["nodes_after"]
    assert [name for name in graph.initializers if "time_emb" in name] == []
    assert [verb.name for verb in made.history] == [*(verb.name for verb in bundle.history), "fold"]


def test_the_same_arguments_give_the_same_bytes(plain, twenty, tmp_path):
    assert fold(plain, tmp_path / "again", steps=20).digest == twenty.digest


def test_the_manifest_says_what_it_was_folded_for(twenty):
    facts = Bundle.open(twenty.path).sampling
    assert facts.folded.sampler == facts.sampler == "ddim"
    assert facts.folded.steps == facts.steps == 20
    assert facts.folded.timesteps == tuple(p.timestep for p in find("runtimes.samplers", "ddim").points(facts.schedule, 20).at)


@pytest.mark.parametrize("options", [{"num_inference_steps": 10}, {"sampler": "euler"}, {"num_inference_steps": 4}])
def test_other_steps_whose_times_are_among_them_draw_too(plain, twenty, options):
    assert np.abs(latents(plain, **options) - latents(twenty, **options)).max() <= 1e-6


@pytest.mark.parametrize("options", [{"num_inference_steps": 13}, {"sampler": "lcm", "num_inference_steps": 8}])
def test_other_times_are_refused_before_the_first_step(twenty, options):
    with pytest.raises(ArgumentError, match="folded for 20 steps of the sampler 'ddim'") as error:
        Pipeline.from_bundle(twenty).steps("a bag", **options)
    steps, sampler = options["num_inference_steps"], options.get("sampler", "ddim")
    assert f"edgediffusion fold BUNDLE --steps {steps} --sampler {sampler} -o NEW" in str(error.value)
    assert "999, 949, 899" in str(error.value)


def test_times_are_compared_as_they_are_fed():
    """In float32, as the manifest has them: a flow's times have more digits."""
    facts = replace(SAMPLING, prediction="flow", schedule=replace(SAMPLING.schedule, kind="flow", shift=3.0), sampler="flow-euler")
    points = find("runtimes.samplers", "flow-euler").points(facts.schedule, 7)
    times = tuple(float(np.float32(point.timestep)) for point in points.at)
    assert times != tuple(point.timestep for point in points.at)
    known = replace(facts, folded=Folded("flow-euler", 7, times))
    assert len(plan(Request("", num_inference_steps=7), known).points) == 7
    with pytest.raises(ArgumentError, match=r"Got: 8 steps of 'flow-euler'"):
        plan(Request("", num_inference_steps=8), known)


def test_a_folded_bundle_can_be_corrected_against_the_float_one(plain, int8, tmp_path):
    made = fold(int8, tmp_path / "folded", steps=5, sampler="euler")
    found = correct(made, plain, output=tmp_path / "ptqd.json", prompts=CAPTIONS[:2], samples=2)
    assert (found.deployment.steps, found.deployment.sampler) == (5, "euler")
    assert len(latents(made, correction=tmp_path / "ptqd.json")) == 2
    with pytest.raises(ArgumentError, match="the denoiser's files"):
        latents(int8, correction=tmp_path / "ptqd.json", num_inference_steps=5, sampler="euler")


# --- what cannot be folded


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"sampler": "dim"}, UnknownName, "Did you mean 'ddim'"),
        ({"steps": 0}, ArgumentError, "Allowed: 1 to 1000"),
        ({"steps": 1001}, ArgumentError, "Allowed: 1 to 1000"),
        ({"sampler": "flow-euler"}, ArgumentError, "not made for a schedule"),
    ],
)
def test_bad_arguments_leave_nothing(plain, tmp_path, options, kind, words):
    with pytest.raises(kind, match=words):
        fold(plain, tmp_path / "new", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_folded_once(twenty, tmp_path):
    with pytest.raises(ArgumentError, match=r"folded already, for 20 steps of the sampler 'ddim'\. Fold the bundle that it was made from"):
        fold(twenty, tmp_path / "new", steps=20)


def test_what_exists_is_not_replaced(plain, tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        fold(plain, tmp_path / "new", steps=4)


def test_a_bundle_without_a_time_step(tmp_path):
    components = (ENCODE, replace(DENOISE, inputs=tuple(spec for spec in DENOISE.inputs if spec.name != "timestep")))
    bundle = write_bundle(tmp_path / "bundle", components=(ENCODE, DENOISE))
    with pytest.raises(BundleError, match="has no input 'timestep'.*Got: sample, encoder_hidden_states"):
        fold(replace(bundle, components=components), tmp_path / "new", steps=4)


def test_a_time_step_for_each_row(tmp_path):
    specs = tuple(replace(spec, shape=("batch",)) if spec.name == "timestep" else spec for spec in DENOISE.inputs)
    bundle = write_bundle(tmp_path / "bundle", components=(ENCODE, DENOISE))
    with pytest.raises(BundleError, match=r"only one for all rows can be folded.*\['batch'\]"):
        fold(replace(bundle, components=(ENCODE, replace(DENOISE, inputs=specs))), tmp_path / "new", steps=4)


def test_a_bundle_that_cannot_draw(tmp_path):
    with pytest.raises(BundleError, match="cannot draw"):
        fold(write_bundle(tmp_path / "bundle", sampling=None), tmp_path / "new", steps=4)


@pytest.mark.parametrize("timesteps", [[], ["now"], [float("nan")], 5])
def test_a_manifest_with_damaged_time_steps_is_refused(tmp_path, timesteps):
    bundle = write_bundle(tmp_path / "bundle", sampling=replace(SAMPLING, folded=Folded("ddim", 3, (901.0, 601.0, 301.0))))
    content = json.loads((bundle.path / "bundle.json").read_text())
    assert content["sampling"]["folded"] == {"sampler": "ddim", "steps": 3, "timesteps": [901.0, 601.0, 301.0]}
    content["sampling"]["folded"]["timesteps"] = timesteps
    content.pop("sha256")
    (bundle.path / "bundle.json").write_text(json.dumps({**content, "sha256": manifest.digest(content)}))
    with pytest.raises(BundleError, match="lacks or misstates a field"):
        Bundle.open(bundle.path)
