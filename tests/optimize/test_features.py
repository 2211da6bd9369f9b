"""Which tensor enters a module, on small graphs written by hand; that it is torch's own, test_calibrate.py checks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from edgediffusion.errors import ArgumentError, EngineError, UnknownName
from edgediffusion.optimize.features import OUTPUT, default_cut, tapped, tensor_entering
from edgediffusion.runtimes import Pipeline
from tests.runtimes.tiny import DENOISE, ENCODE, write_bundle

# A residual block, an attention-like block behind a normalization whose scale and shift lie apart, and a Concat. The
# middle one's scale has a cast and another axis order, as exported graphs have them; `shift` comes from the time step.
UNET = """
<ir_version: 10, opset_import: ["": 21]>
network (float[batch, 4, height, width] sample, float[] timestep, float[batch, 8, 6] encoder_hidden_states)
    => (float[batch, 4, height, width] out_sample)
{
  a = Conv <pads = [1, 1, 1, 1]> (sample, conv_in__weight)
  column = Constant <value_ints = [1, 4]> ()
  clock = Reshape (timestep, one)
  time = Mul (clock, time_embedding__weight)
  t = Reshape (time, column)
  shift = MatMul (t, mid_block__resnets__0__time_emb_proj__weight)
  shift4 = Unsqueeze (shift, last_axes)
  b = Conv <pads = [1, 1, 1, 1]> (a, mid_block__resnets__0__conv1__weight)
  c = Add (b, shift4)
  x = Add (c, a)
  shape = Shape (x)
  groups = Constant <value_ints = [0, 2, -1]> ()
  d = Reshape (x, groups)
  e = InstanceNormalization (d, ones, zeros)
  f = Reshape (e, shape)
  wide = Cast <to = 1> (mid_block__attentions__0__norm__weight)
  turned = Unsqueeze (wide, inner_axes)
  g = Mul (f, turned)
  h = Conv (g, mid_block__attentions__0__proj_in__weight)
  y = Add (h, x)
  both = Concat <axis = 1> (y, a)
  out_sample = Conv (both, up_blocks__0__resnets__0__conv1__weight)
}
"""
# Blocks of a transformer: normalization without weights, then scale and shift of the time step; two streams.
TRANSFORMER = """
<ir_version: 10, opset_import: ["": 21]>
network (float[batch, 4, height, width] sample, float[] timestep, float[batch, 8, 6] encoder_hidden_states)
    => (float[batch, 4, height, width] out_sample)
{
  shape = Shape (sample)
  flat = Constant <value_ints = [0, 4, -1]> ()
  a = Reshape (sample, flat)
  b = Transpose <perm = [0, 2, 1]> (a)
  x0 = MatMul (b, embed__weight)
  clock = Reshape (timestep, one)
  scale = Mul (clock, transformer_blocks__0__norm1__linear__weight)
  n0 = LayerNormalization (x0, ones)
  m0 = Mul (n0, scale)
  q0 = MatMul (m0, transformer_blocks__0__to_q__weight)
  x1 = Add (x0, q0)
  n1 = LayerNormalization (x1, ones)
  m1 = Mul (n1, scale)
  q1 = MatMul (m1, transformer_blocks__1__to_q__weight)
  x2 = Add (x1, q1)
  n2 = LayerNormalization (x2, ones)
  m2 = Mul (n2, scale)
  q2 = MatMul (m2, transformer_blocks__2__to_q__weight)
  x3 = Add (x2, q2)
  back = Transpose <perm = [0, 2, 1]> (x3)
  out_sample = Reshape (back, shape)
}
"""
SHAPES = {
    "conv_in.weight": (4, 4, 3, 3),
    "time_embedding.weight": (4,),
    "mid_block.resnets.0.time_emb_proj.weight": (4, 4),
    "mid_block.resnets.0.conv1.weight": (4, 4, 3, 3),
    "mid_block.attentions.0.norm.weight": (4,),
    "mid_block.attentions.0.proj_in.weight": (4, 4, 1, 1),
    "up_blocks.0.resnets.0.conv1.weight": (4, 8, 1, 1),
    "embed.weight": (4, 4),
    "transformer_blocks.0.norm1.linear.weight": (4,),
    **{f"transformer_blocks.{i}.to_q.weight": (4, 4) for i in range(3)},
}
CONSTANTS = {"one": np.array([1]), "last_axes": np.array([2, 3]), "inner_axes": np.array([1, 2])}


def model_of(text):
    model = onnx.parser.parse_model(text)
    size = 2 if "InstanceNormalization" in text else 4
    constants = {**CONSTANTS, "ones": np.ones(size, np.float32), "zeros": np.zeros(size, np.float32)}
    rng = np.random.default_rng(0)
    weights = {name: (rng.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in SHAPES.items()}
    weights["mid_block.attentions.0.norm.weight"] = weights["mid_block.attentions.0.norm.weight"].astype(np.float16)
    for node in model.graph.node:  # the text format has no dots in names, checkpoints have
        node.input[:] = [name.replace("__", ".") for name in node.input]
    read = {name for node in model.graph.node for name in node.input}
    for name, array in {**constants, **weights}.items():
        if name in read:
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for tensor in model.graph.initializer:
        if "." in tensor.name:
            onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    return model


@pytest.fixture(params=[UNET, TRANSFORMER], ids=["unet", "transformer"])
def graph(request, tmp_path):
    return graph_of(request.param, tmp_path)


def graph_of(text, folder):
    onnx.save(model_of(text), folder / "model.onnx")
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(folder / "model.onnx", load_external_data=False))).graph


@pytest.mark.parametrize(
    ("cut", "tensor"),
    [
        ("mid_block.attentions.0", "x"),  # back through the normalization to the residual sum
        ("mid_block.attentions.0.proj_in", "g"),  # what a layer's own weights made is as far as it goes
        ("mid_block.resnets.0", "a"),  # not `t`, which enters its projection of the time step first
        ("up_blocks.0.resnets.0", "both"),
        ("conv_in", "sample"),
    ],
)
def test_what_enters_a_module_of_a_unet(tmp_path, cut, tensor):
    assert tensor_entering(graph_of(UNET, tmp_path), cut).name == tensor


@pytest.mark.parametrize(
    ("cut", "tensor"), [("embed", "b"), ("transformer_blocks.0", "x0"), ("transformer_blocks.1", "x1"), ("transformer_blocks.2", "x2")]
)
def test_what_enters_a_module_of_a_transformer(tmp_path, cut, tensor):
    assert tensor_entering(graph_of(TRANSFORMER, tmp_path), cut).name == tensor


def test_a_module_that_never_sees_the_picture_is_refused(tmp_path):
    for cut in ("time_embedding", "mid_block.resnets.0.time_emb_proj"):
        with pytest.raises(ArgumentError, match=f"enters the module '{cut}'"):
            tensor_entering(graph_of(UNET, tmp_path), cut)


def test_an_unknown_module_lists_the_blocks(tmp_path):
    with pytest.raises(UnknownName, match=r"mid_block.attentions.0, mid_block.resnets.0, .*Did you mean 'mid_block.attentions.0'"):
        tensor_entering(graph_of(UNET, tmp_path), "mid_block.attentions.00")
    with pytest.raises(UnknownName):
        tensor_entering(graph_of(UNET, tmp_path), "mid_bloc")  # a beginning of a name is no module


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["down_blocks.0.a.weight", "mid_block.attentions.0.norm.weight"], "mid_block.attentions.0"),
        (
            [f"transformer_blocks.{i}.a.weight" for i in range(12)] + [f"single_blocks.{i}.a.weight" for i in range(30)],
            "transformer_blocks.6",
        ),
        ([f"layers.{i}.a.weight" for i in range(5)] + ["heads.0.a.weight"], "layers.2"),
    ],
    ids=["unet", "transformer", "other"],
)
def test_the_default_is_the_middle(names, expected):
    assert default_cut(names) == expected


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ArgumentError, match="--option cut="):
        default_cut(["conv.weight"])


@pytest.fixture(params=[(UNET, "mid_block.attentions.0", "x"), (TRANSFORMER, "transformer_blocks.1", "x1")], ids=["unet", "transformer"])
def bundle(request, tmp_path, monkeypatch):
    text, cut, tensor = request.param

    def write(folder: Path, component=DENOISE):
        (folder / "unet").mkdir()
        onnx.save(model_of(text), folder / "unet" / "model.onnx")

    monkeypatch.setattr("tests.runtimes.tiny.write_denoiser", write)
    return write_bundle(tmp_path / "bundle"), cut, tensor


def test_features_are_the_tensor_of_every_step_and_the_pictures_stay_the_same(bundle, tmp_path):
    made, cut, tensor = bundle
    (tmp_path / "work").mkdir()
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "seed": 2}
    with tapped(made, made.component("unet"), None, folder=tmp_path / "work") as tap:
        assert tap.cut == cut
        features = tap.draw(["a red shirt", "a cat"], progress=lambda label, part: None, **options)
        latents = [step.latents for step in tap.pipeline.steps(["a red shirt", "a cat"], **options)]
    assert not list((tmp_path / "work").iterdir())
    fed = []
    plain = [s.latents for s in Pipeline.from_bundle(made).steps(["a red shirt", "a cat"], observe=lambda i, f: fed.append(f), **options)]
    np.testing.assert_allclose(latents, plain, atol=1e-5)
    model = onnx.load(made.path / "unet" / "model.onnx")
    values = [onnx.reference.ReferenceEvaluator(model).run(None, feeds, intermediate=True)[tensor] for feeds in fed]
    expected = [np.moveaxis(v, 1, -1).reshape(-1, 4) if v.ndim == 4 else v.reshape(-1, 4) for v in values]
    assert features.values.dtype == np.float32
    assert features.values.shape == (3, 4 * 8 * 8, 4)
    np.testing.assert_allclose(features.values, np.stack(expected), atol=1e-5 * np.abs(expected).max())


def test_the_extra_output_is_kept_from_the_loop(bundle):
    made, _, _ = bundle
    with tapped(made, made.component("unet"), None) as tap:
        assert OUTPUT not in [spec.name for spec in tap.pipeline._denoise.session.outputs]


def test_features_that_are_not_finite_are_refused_by_the_step(tmp_path, monkeypatch):
    def write(folder: Path, component=DENOISE):
        model = model_of(UNET)
        (folder / "unet").mkdir()
        for tensor in model.graph.initializer:
            if tensor.name == "mid_block.attentions.0.proj_in.weight":
                tensor.raw_data = np.full((4, 4, 1, 1), np.nan, np.float32).tobytes()
        onnx.save(model, folder / "unet" / "model.onnx")

    monkeypatch.setattr("tests.runtimes.tiny.write_denoiser", write)
    made = write_bundle(tmp_path / "bundle", components=(ENCODE, replace(DENOISE)))
    with tapped(made, made.component("unet"), None) as tap, pytest.raises(EngineError, match="not finite in step 1 of 2"):
        tap.draw(["a cat"], progress=lambda label, part: None, num_inference_steps=2, seed=0)
