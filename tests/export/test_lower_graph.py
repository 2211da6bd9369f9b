"""Lowering, operator by operator: graphs as text, computed by ONNX Runtime before and after.

Tolerance: a few roundings of the type they compute in, 2^-23 for float32 and 2^-10 for float16, relative to the largest number.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from edgediffusion.export.lower_graph import OLDEST, RULES, lower_model
from edgediffusion.optimize.passes._simulation import DOMAIN, add_functions, function_name

EPS = {"float": 2.0**-23, "float16": 2.0**-10}
NUMPY = {"float": np.float32, "float16": np.float16, "bool": np.bool_, "int64": np.int64, "int8": np.int8}

PAIR = "s = Constant <value_float = 0.1> ()\nz = Constant <value = {}> ()\nc = QuantizeLinear (x, s, z)\ny = DequantizeLinear (c, s, z)"
ATTENTION = "float[B,2,L,8] q, float[B,2,S,8] k, float[B,2,S,8] v"
MASKED = {
    "none": ("", "y = Attention (q, k, v)"),
    "scale": ("", "y = Attention <scale = 0.3> (q, k, v)"),
    "added": (", float[B,1,L,S] mask", "y = Attention (q, k, v, mask)"),
    "of truths": (", bool[L,S] mask", "y = Attention (q, k, v, mask)"),
    "causal": ("", "y = Attention <is_causal = 1> (q, k, v)"),
    "causal and masked": (", float[L,S] mask", "y = Attention <is_causal = 1> (q, k, v, mask)"),
    "softmax in float32": ("", "y = Attention <softmax_precision = 1> (q, k, v)"),
}
# name: inputs, outputs, body
GRAPHS: dict[str, tuple[str, str, str]] = {
    **{f"attention, {name}": (ATTENTION + mask, "float[B,2,L,8] y", body) for name, (mask, body) in MASKED.items()},
    "attention of known sizes, causal": (
        "float[1,2,6,8] q, float[1,2,6,8] k, float[1,2,6,8] v",
        "float[1,2,6,8] y",
        "y = Attention <is_causal = 1> (q, k, v)",
    ),
    "attention of flat heads": (
        "float[B,L,16] q, float[B,S,16] k, float[B,S,16] v, float[L,S] mask",
        "float[B,L,16] y",
        "y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v, mask)",
    ),
    "attention of fewer keys": (
        "float[B,4,L,8] q, float[B,2,S,8] k, float[B,2,S,8] v",
        "float[B,4,L,8] y",
        "y = Attention (q, k, v)",
    ),
    "attention of fewer flat keys": (
        "float[B,L,32] q, float[B,S,16] k, float[B,S,16] v",
        "float[B,L,32] y",
        "y = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v)",
    ),
    "rms": ("float[B,L,8] x, float[8] scale", "float[B,L,8] y", "y = RMSNormalization <epsilon = 0.01> (x, scale)"),
    "rms over two axes": ("float[B,2,8] x, float[2,8] scale", "float[B,2,8] y", "y = RMSNormalization <axis = 1> (x, scale)"),
    "gelu": ("float[B,8] x", "float[B,8] y", "y = Gelu (x)"),
    "gelu by tanh": ("float[B,8] x", "float[B,8] y", 'y = Gelu <approximate = "tanh"> (x)'),
    "mish": ("float[B,8] x", "float[B,8] y", "y = Mish (x)"),
    "group norm": (
        "float[B,4,L,S] x, float[4] scale, float[4] bias",
        "float[B,4,L,S] y",
        "y = GroupNormalization <num_groups = 2, epsilon = 0.01> (x, scale, bias)",
    ),
    "reduction": ("float[B,L,8] x", "float[B,8] y", "axes = Constant <value_ints = [1]> ()\ny = ReduceMean <keepdims = 0> (x, axes)"),
    "reduction of all": ("float[B,L,8] x", "float y", "y = ReduceMax <keepdims = 0> (x)"),
    "reduction of none": ("float[B,8] x", "float[B,8] y", "y = ReduceMax <noop_with_empty_axes = 1> (x)"),
    "split": ("float[B,8] x", "float[B,4] y", "y, z = Split <axis = -1, num_outputs = 2> (x)"),
    "uneven split": ("float[B,8] x", "float[B,3] y", "y, z, rest = Split <axis = 1, num_outputs = 3> (x)"),
    "pad of one axis": (
        "float[B,8] x",
        "float[B,M] y",
        "pads = Constant <value_ints = [1, 2]> ()\naxes = Constant <value_ints = [-1]> ()\ny = Pad (x, pads, , axes)",
    ),
    "q and dq": (
        "float[B,8] x",
        "float[B,8] y",
        PAIR.format("int8 {3}"),
    ),
    "q without a zero point": (
        "float[B,8] x",
        "float[B,8] y",
        "s = Constant <value_float = 0.1> ()\nc = QuantizeLinear <output_dtype = 3> (x, s)\ny = DequantizeLinear (c, s)",
    ),
    "dq by channel": (
        "float[B,4] x",
        "float[B,2] y",
        "w = Constant <value = int8[4,2] {1, -2, 3, 4, -5, 6, 7, 8}> ()\ns = Constant <value = float[2] {0.5, 0.25}> ()\n"
        "z = Constant <value = int8[2] {0, 0}> ()\nr = DequantizeLinear <axis = 1> (w, s, z)\ny = MatMul (x, r)",
    ),
    "casts and shapes": (
        "float[B,8] x",
        "float[B,8] y",
        "h = Cast <to = 10> (x)\nw = Cast <to = 1> (h)\nshape = Shape (w)\nr = Reshape (w, shape)\ny = Sin (r)",
    ),
}
HALF = (
    "attention, none",
    "attention, of truths",
    "attention, causal",
    "attention, softmax in float32",
    "rms",
    "gelu",
    "gelu by tanh",
    "group norm",
)


def model_of(inputs: str, outputs: str, body: str, *, opset: int = 23, half: bool = False) -> onnx.ModelProto:
    """Values between have no types in text; our graphs have them, and rules ask for them."""
    text = f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{\n{body}\n}}'
    text = text.replace("float[", "float16[") if half else text
    return onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))


def lowered(model: onnx.ModelProto, opset: int) -> tuple[onnx.ModelProto, Any]:
    taken = ir.from_proto(model)
    report = lower_model(taken, opset)
    return ir.to_proto(taken), report


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, feeds)


def feeds_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Normal numbers; of truths two in three."""
    sizes, rng, feeds = {"B": 2, "L": 5, "S": 7, "M": 0}, np.random.default_rng(0), {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value or sizes[d.dim_param] for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        noise = rng.standard_normal(shape)
        feeds[value.name] = noise < 0.4 if dtype == np.bool_ else noise.astype(dtype)
        if dtype == np.bool_:
            feeds[value.name][..., 0] = True  # what may look nowhere is no matter of rounding
    return feeds


def equal(before: onnx.ModelProto, after: onnx.ModelProto, eps: float) -> None:
    feeds = feeds_of(before)
    for wanted, got in zip(run(before, feeds), run(after, feeds), strict=True):
        assert (wanted.dtype, wanted.shape) == (got.dtype, got.shape)
        assert np.abs(wanted.astype(np.float64) - got).max() <= 16 * eps * np.abs(wanted).max()


@pytest.mark.parametrize("opset", [17, 18, 20, 22])
@pytest.mark.parametrize("name", GRAPHS)
def test_computes_the_same(name: str, opset: int) -> None:
    before = model_of(*GRAPHS[name])
    after, report = lowered(before, opset)
    assert report.refused == ()
    onnx.checker.check_model(after, full_check=True)
    assert (after.opset_import[0].version, report.opset_before, report.opset) == (opset, 23, opset)
    assert after.ir_version == min(10, onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset])
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
    equal(before, after, EPS["float"])


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("name", HALF)
def test_computes_the_same_in_float16(name: str, opset: int) -> None:
    before = model_of(*GRAPHS[name], half=True)
    after, report = lowered(before, opset)
    assert report.refused == ()
    equal(before, after, EPS["float16"])


@pytest.mark.parametrize("name", GRAPHS)
def test_of_its_own_opset_a_graph_stays_as_it_is(name: str) -> None:
    before = model_of(*GRAPHS[name])
    after, report = lowered(before, 23)
    assert (report.rewritten, report.opset) == ({}, 23)
    assert Counter(node.op_type for node in after.graph.node) == Counter(node.op_type for node in before.graph.node)


def test_an_opset_that_has_the_operator_keeps_it() -> None:
    after, report = lowered(model_of(*GRAPHS["gelu"]), 20)
    assert ([node.op_type for node in after.graph.node], report.rewritten) == (["Gelu"], {})
    after, report = lowered(model_of(*GRAPHS["group norm"]), 21)
    assert ([node.op_type for node in after.graph.node], report.rewritten) == (["GroupNormalization"], {})


def test_a_value_keeps_its_name_for_those_who_cut_there() -> None:
    body = "between = Gelu (x)\ny = Sin (between)"
    after, _ = lowered(model_of("float[B,8] x", "float[B,8] y", body), 17)
    assert "between" in {name for node in after.graph.node for name in node.output}
    assert after.graph.node[-1].input == ["between"]


def test_the_product_of_quantized_queries_and_keys_stays_one_of_integers() -> None:
    """Nothing but a transposition between DequantizeLinear and MatMul; the scale is behind it."""
    pair = "{0}c = QuantizeLinear ({0}, s, z)\n{0}d = DequantizeLinear ({0}c, s, z)\n"
    constants = "s = Constant <value_float = 0.05> ()\nz = Constant <value = int8 {0}> ()\n"
    before = model_of(ATTENTION, "float[B,2,L,8] y", constants + "".join(pair.format(v) for v in "qkv") + "y = Attention (qd, kd, vd)")
    after, _ = lowered(before, 20)
    made = {name: node for node in after.graph.node for name in node.output}
    scores = next(node for node in after.graph.node if node.op_type == "MatMul")
    assert made[scores.input[0]].op_type == "DequantizeLinear"
    assert made[made[scores.input[1]].input[0]].op_type == "DequantizeLinear"
    assert next(node for node in after.graph.node if scores.output[0] in node.input).op_type == "Mul"
    equal(before, after, EPS["float"])


@pytest.mark.parametrize("opset", [17, 19, 20])
def test_float16_scales_become_float32_where_older_nodes_want_it(opset: int) -> None:
    body = (
        "w = Constant <value_float = 0.1> ()\ns = Cast <to = 10> (w)\nz = Constant <value = int8 {0}> ()\n"
        "c = QuantizeLinear (x, s, z)\ny = DequantizeLinear (c, s, z)"
    )
    before = model_of("float16[B,8] x", "float16[B,8] y", body)
    after, report = lowered(before, opset)
    onnx.checker.check_model(after, full_check=True)
    kinds = Counter(node.op_type for node in after.graph.node)
    assert (kinds["Cast"] > 1, bool(report.rewritten)) == (opset < 19, opset < 19)
    feeds = feeds_of(before)
    (wanted,), (got,) = run(before, feeds), run(after, feeds)
    np.testing.assert_array_equal(wanted, got)


def test_a_row_that_may_look_nowhere_gives_numbers() -> None:
    before = model_of(ATTENTION + ", bool[L,S] mask", "float[B,2,L,8] y", "y = Attention (q, k, v, mask)")
    after, _ = lowered(before, 20)
    feeds = {**feeds_of(before), "mask": np.zeros((5, 7), bool)}
    assert np.isfinite(run(after, feeds)[0]).all()


FUNCTION = """<ir_version: 10, opset_import: ["": 23, "mine": 1]> g (float[B,8] x) => (float[B,1] y) {
  y = mine.Largest (x)
}
<domain: "mine", opset_import: ["": 23]> Largest (x) => (y) {
  axis = Constant <value_ints = [1]> ()
  size = Abs (x)
  y = ReduceMax <keepdims = 1> (size, axis)
}"""


def test_functions_of_the_model_are_lowered_too() -> None:
    before = onnx.parser.parse_model(FUNCTION)
    after, report = lowered(before, 17)
    assert report.rewritten == {"ReduceMax": 1}
    assert {o.domain: o.version for o in after.functions[0].opset_import}[""] == 17
    onnx.checker.check_model(after)
    equal(before, after, EPS["float"])


BLOCKS = (
    "w = Constant <value = int8[4,2] {1, 2, 3, 4, 5, 6, 7, 8}> ()\ns = Constant <value = float[2,2] {1, 2, 3, 4}> ()\n"
    "r = DequantizeLinear <axis = 0, block_size = 2> (w, s)\ny = MatMul (x, r)"
)
FLOAT8 = "h = Cast <to = 17> (x)\ny = Cast <to = 1> (h)"
REFUSED = {
    "blocks": ("float[B,4] x", "float[B,2] y", BLOCKS, 20, "DequantizeLinear with a scale for each block is of opset 21"),
    "fp8": ("float[B,8] x", "float[B,8] y", FLOAT8, 18, "Cast (of|to) float8e4m3fn is of a later opset"),
    "int16": (
        "float[B,8] x",
        "float[B,8] y",
        PAIR.format("int16 {0}"),
        20,
        "QuantizeLinear of int16 is of opset 21",
    ),
    "precision": (
        "float[B,8] x",
        "float[B,8] y",
        "s = Constant <value_float = 0.1> ()\nz = Constant <value = int8 {0}> ()\nc = QuantizeLinear <precision = 1> (x, s, z)\n"
        "y = DequantizeLinear (c, s, z)",
        22,
        "with a precision of its own is of opset 23",
    ),
    "softcap": (ATTENTION, "float[B,2,L,8] y", "y = Attention <softcap = 5.0> (q, k, v)", 20, "Attention with softcap"),
    "a cache of keys": (
        ATTENTION + ", float[B,2,P,8] pk, float[B,2,P,8] pv",
        "float[B,2,L,8] y",
        "y, k2, v2 = Attention (q, k, v, , pk, pv)",
        20,
        "Attention with past_key",
    ),
    "keys that it gives": (
        ATTENTION,
        "float[B,2,L,8] y, float[B,2,S,8] k2",
        "y, k2, v2 = Attention (q, k, v)",
        20,
        "Attention that gives 'present_key' too",
    ),
    "an operator without a rule": (
        "float[1,2,4,8] x, float[10,4] c, float[10,4] s, int64[1,4] at",
        "float[1,2,4,8] y",
        "y = RotaryEmbedding (x, c, s, at)",
        20,
        "RotaryEmbedding is of opset 23",
    ),
    "a word that came later": (
        "float[B,8] x",
        "float[B,M] y",
        'pads = Constant <value_ints = [0, 1, 0, 1]> ()\ny = Pad <mode = "wrap"> (x, pads)',
        18,
        "Pad with mode 'wrap' is of opset 19",
    ),
    "axes that are computed": (
        "float[B,8] x, int64[1] axes",
        "float y",
        "y = ReduceMean <keepdims = 0> (x, axes)",
        17,
        "ReduceMean over axes that are computed",
    ),
    "an attribute that came later": (
        "float[1,1,8,8] x",
        "float[1,1,4,4] y",
        "y = AveragePool <kernel_shape = [3, 3], dilations = [2, 2]> (x)",
        18,
        "AveragePool with dilations .* is of a later opset",
    ),
    "bfloat16 convolutions": (
        "bfloat16[1,1,8,8] x, bfloat16[1,1,3,3] w",
        "bfloat16[1,1,6,6] y",
        "y = Conv (x, w)",
        20,
        "Conv of bfloat16 is of a later opset",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_older_set_cannot_say_is_refused_with_the_reason(name: str) -> None:
    *graph, opset, reason = REFUSED[name]
    report = lower_model(ir.from_proto(model_of(*graph)), opset)
    assert any(re.search(reason, said) for said in report.refused), report.refused


@pytest.mark.parametrize("kind", ["e2m1", "e1m2", "fp8", "nvfp4"])
def test_the_functions_that_simulate_number_formats(kind: str) -> None:
    model = ir.from_proto(model_of("float[B,16] x, float scale", "float[B,16] y", "y = Identity (x)"))
    add_functions(model, [kind])
    model.graph[0].op_type, model.graph[0].domain = function_name(kind), DOMAIN
    model.graph[0].resize_inputs(2)
    model.graph[0].replace_input_with(1, model.graph.inputs[1])
    before = ir.to_proto(model)
    after, report = lowered(before, 19)
    assert report.refused == ()
    assert {o.version for f in after.functions for o in f.opset_import if not o.domain} == {19}
    feeds = {"x": feeds_of(before)["x"], "scale": np.array(0.3, np.float32)}
    np.testing.assert_array_equal(run(before, feeds)[0], run(after, feeds)[0])
    refused = lowered(before, 18)[1].refused
    assert refused == ((r"Cast to float8e4m3fn is of a later opset",) if kind in ("fp8", "nvfp4") else ())


def test_an_operator_that_onnx_does_not_know() -> None:
    model = ir.from_proto(model_of("float[B,8] x", "float[B,8] y", "y = Sin (x)"))
    model.graph[0].op_type = "Sinus"
    assert lower_model(model, 20).refused == ("'Sinus' is no operator of opset 23",)


def changed() -> list[str]:
    """Every operator that came, or came to take other inputs or attributes, after the oldest opset and up to 23."""
    found = []
    for name in sorted({s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}):
        schemas = []
        for opset in (OLDEST, 23):
            try:
                schemas.append(onnx.defs.get_schema(name, opset, ""))
            except onnx.defs.SchemaError:
                schemas.append(None)
        old, new = schemas
        if new is None or new.since_version <= OLDEST:
            continue
        if old is None or len(old.inputs) != len(new.inputs) or set(old.attributes) != set(new.attributes):
            found.append(name)
    return found


# Those that have no rule: their new attributes are refused unless they say the default, what is wholly new is refused.
WITHOUT_RULES = {
    *("AffineGrid", "AveragePool", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "CenterCropPad", "Col2Im"),
    *("DFT", "DeformConv", "ImageDecoder", "LpPool", "RegexFullMatch", "Resize", "RotaryEmbedding", "StringConcat", "StringSplit"),
}


def test_every_operator_that_changed_has_a_rule_or_is_known_to_need_none() -> None:
    assert set(changed()) == {*RULES, *WITHOUT_RULES}
