"""What a graph takes, worked out from its file: shapes against onnx's own inference, sums against counts made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import edgediffusion
from edgediffusion.errors import EngineError
from edgediffusion.runtimes.onnx_nodes import read_nodes
from edgediffusion.runtimes.work import GraphWork, _values, graph_work

REFERENCE = Path(edgediffusion.__file__).parent / "reference"


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def written(folder: Path, text: str, **weights: np.ndarray) -> Path:
    """A model of ONNX text with the given initializers."""
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def graph(signature: str, body: str) -> str:
    return f'<ir_version: 10, opset_import: ["" : 23]> g {signature} {{ {body} }}'


# One node of each operator, of x [2, 8, 6, 4] float32 and constants; what it makes is called z.
NODES = {
    "same": "z = Softmax <axis = 1> (x)",
    "cast": "z = Cast <to = 10> (x)",
    "cast like": "z = CastLike (x, one_two)",
    "broadcast": "z = Add (x, row)",
    "compared": "z = LessOrEqual (x, row)",
    "where": "b = Equal (x, row) z = Where (b, row, x)",
    "quantized": "z = QuantizeLinear (x, one, byte)",
    "quantized, by type": "z = QuantizeLinear <output_dtype = 3> (x, one)",
    "dequantized": "q = QuantizeLinear (x, one, byte) z = DequantizeLinear (q, one, byte)",
    "dynamic": "z, s, p = DynamicQuantizeLinear (x)",
    "reshape": "z = Reshape (x, to)",
    "computed shape": "s = Shape (x) i = Gather <axis = 0> (s, one_two) t = Concat <axis = 0> (i, rest) z = Reshape (x, t)",
    "part of a shape": "s = Shape <start = -3, end = -1> (x) z = Cast <to = 1> (s)",
    "flatten": "z = Flatten <axis = 2> (x)",
    "transpose": "z = Transpose <perm = [0, 2, 3, 1]> (x)",
    "unsqueeze": "z = Unsqueeze (x, ends)",
    "squeeze": "u = Unsqueeze (x, ends) z = Squeeze (u, ends)",
    "concat": "z = Concat <axis = 2> (x, x, x)",
    "split evenly": "z, y, c = Split <axis = 1, num_outputs = 3> (x)",
    "split": "z, y = Split <axis = 1> (x, parts)",
    "slice": "z = Slice (x, from, until, axes, steps)",
    "gather": "z = Gather <axis = 2> (x, table)",
    "gather nd": "z = GatherND (x, places)",
    "expand": "z = Expand (row, wide)",
    "tile": "z = Tile (x, times)",
    "pad": "z = Pad (x, pads)",
    "resize by scales": "z = Resize (x, , scales)",
    "resize to sizes": "z = Resize (x, , , wide)",
    "depth to space": "z = DepthToSpace <blocksize = 2> (x)",
    "filled": "z = ConstantOfShape (wide)",
    "range": "r = Range (zero, five, one) z = Neg (r)",
    "product": "z = MatMul (x, m)",
    "product with a vector": "z = MatMul (x, v)",
    "gemm": "t = Reshape (x, flat) z = Gemm <transA = 1, transB = 1> (t, long)",
    "strided window": "z = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 0, 1, 0], dilations = [1, 1]> (x, w)",
    "groups": "z = Conv <kernel_shape = [3, 3], group = 4> (x, wg)",
    "transposed": "z = ConvTranspose <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 0]> (x, wt)",
    "pool": "z = MaxPool <kernel_shape = [3, 2], strides = [2, 2], ceil_mode = 1> (x)",
    "global pool": "z = GlobalAveragePool (x)",
    "attention of four axes": "z = Attention (x, x, x)",
    "attention of three axes": "t = Reshape (x, to) z = Attention <q_num_heads = 2, kv_num_heads = 2> (t, t, t)",
    "reduced": "z = ReduceMean <keepdims = 0> (x, axes)",
    "all reduced": "z = ReduceMax (x)",
    "argmax": "z = ArgMax <axis = 1, keepdims = 0> (x)",
    "einsum": 'z = Einsum <equation = "abcd,de->abce"> (x, m)',
}
CONSTANTS = {
    "row": zeros(4),
    "one": np.float32(1).reshape(()),
    "zero": np.float32(0).reshape(()),
    "five": np.float32(5).reshape(()),
    "byte": np.uint8(0).reshape(()),
    "to": np.array([2, -1, 8], "int64"),
    "flat": np.array([16, 24], "int64"),
    "one_two": np.array([0, 1], "int64"),
    "rest": np.array([-1], "int64"),
    "second": np.array(1, "int64"),
    "two": np.array([2, 2, 2, 2], "int64"),
    "from": np.array([1], "int64"),
    "until": np.array([3], "int64"),
    "ends": np.array([0, -1], "int64"),
    "parts": np.array([3, 5], "int64"),
    "axes": np.array([-1], "int64"),
    "steps": np.array([2], "int64"),
    "table": np.array([[0, 1, 2]], "int64"),
    "places": np.array([[0, 1], [1, 2]], "int64"),
    "wide": np.array([2, 3, 5, 4], "int64"),
    "times": np.array([1, 2, 1, 3], "int64"),
    "pads": np.array([0, 1, 2, 0, 0, 0, 1, 3], "int64"),
    "scales": np.array([1, 1, 2, 1.5], "float32"),
    "m": zeros(4, 7),
    "v": zeros(4),
    "long": zeros(9, 16),
    "w": zeros(5, 8, 3, 3),
    "wg": zeros(8, 2, 3, 3),
    "wt": zeros(8, 5, 3, 3),
}


@pytest.mark.parametrize("name", NODES)
def test_sizes_are_those_that_onnx_infers(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, graph("(float[2, 8, 6, 4] x) => (z)", NODES[name]), **CONSTANTS)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True, data_prop=True)
    ours = _values(read_nodes(file), {}, "test")
    (output,) = inferred.graph.output
    tensor = output.type.tensor_type
    assert ours["z"].shape == tuple(dimension.dim_value for dimension in tensor.shape.dim)
    assert np.dtype(ours["z"].dtype) == helper.tensor_dtype_to_np_dtype(tensor.elem_type)


def test_shapes_are_computed_where_onnx_gives_up(tmp_path: Path) -> None:
    body = "s = Shape (x) h = Div (s, two) p = Slice (h, from, until) t = Concat <axis = 0> (p, rest) z = Reshape (x, t)"
    file = written(tmp_path, graph("(float[2, 8, 6, 4] x) => (z)", body), **CONSTANTS)
    assert _values(read_nodes(file), {}, "test")["z"].shape == (4, 3, 2 * 8 * 6 * 4 // 12)


def test_parts_of_a_sequence_are_known_where_onnx_gives_up(tmp_path: Path) -> None:
    body = "p = SplitToSequence <axis = 1, keepdims = 1> (x, parts) z = SequenceAt (p, second)"
    file = written(tmp_path, graph("(float[2, 8, 6, 4] x) => (z)", body), **CONSTANTS)
    assert _values(read_nodes(file), {}, "test")["z"].shape == (2, 5, 6, 4)


def test_sizes_of_a_shipped_network_are_those_that_it_runs_with() -> None:
    """Every value of the classifier that ships, as ONNX Runtime makes them."""
    file = REFERENCE / "fashion-classifier" / "judge.onnx"
    model = onnx.load(file)
    names = [name for node in model.graph.node for name in node.output if name]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    sizes = {axis: 3 if i == 0 else 32 for i, axis in enumerate(given.shape) if isinstance(axis, str)}
    shape = [sizes.get(axis, axis) for axis in given.shape]
    found = session.run(names, {given.name: np.zeros(shape, np.float32)})
    ours = _values(read_nodes(file), sizes, "test")
    assert {name: ours[name].shape for name in names} == {name: array.shape for name, array in zip(names, found, strict=True)}


def test_operations_of_a_convolution_and_of_products(tmp_path: Path) -> None:
    text = graph(
        '(float["n", 3, "height", "width"] x) => (float z)',
        "y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x, w) s = Shape <start = 0, end = 2> (y) "
        "e = Concat <axis = 0> (s, rest) r = Reshape (y, e) z = MatMul (r, m)",
    )
    file = written(tmp_path, text, w=zeros(5, 3, 3, 3), m=zeros(24, 7), rest=np.array([-1], "int64"))
    work = graph_work(file, {"n": 2, "height": 8, "width": 12})
    conv, matmul = work.nodes
    assert conv.operations == 2 * (2 * 5 * 4 * 6) * (3 * 3 * 3)
    assert matmul.operations == 2 * (2 * 5 * 7) * 24
    assert (conv.read_bytes, conv.written_bytes, conv.weight_bytes) == (4 * 2 * 3 * 8 * 12, 4 * 2 * 5 * 4 * 6, 4 * 5 * 27)
    assert work.weight_bytes == 4 * (5 * 27 + 24 * 7)


def test_attention_counts_both_products_and_its_scores(tmp_path: Path) -> None:
    file = written(
        tmp_path, graph("(float[2, 4, 16, 8] q, float[2, 4, 9, 8] k, float[2, 4, 9, 6] v) => (float z)", "z = Attention (q, k, v)")
    )
    work = graph_work(file, {})
    assert work.operations == 2 * 2 * 4 * 16 * 9 * (8 + 6)
    inputs, output, scores = 4 * 2 * 4 * (16 * 8 + 9 * 8 + 9 * 6), 4 * 2 * 4 * 16 * 6, 4 * 2 * 4 * 16 * 9
    assert work.peak_bytes == inputs + output + scores
    assert graph_work(file, {}, scores=False).peak_bytes == inputs + output


def test_values_live_from_their_maker_to_their_last_reader(tmp_path: Path) -> None:
    """x and the output are there throughout; a lives until the Add, b until c is made, and a view takes nothing."""
    body = "a = Exp (x) b = Sin (a) v = Unsqueeze (b, first) c = Squeeze (v, first) d = Cos (c) e = Add (d, a) z = Neg (e)"
    file = written(tmp_path, graph('(float["n"] x) => (float z)', body), first=np.array([0], "int64"))
    assert graph_work(file, {"n": 1000}).peak_bytes == 4000 * (2 + 3)  # a, b and d at once


def test_what_depends_on_no_input_is_a_weight_of_the_size_that_is_left(tmp_path: Path) -> None:
    body = "wide = Cast <to = 1> (half) turned = Transpose <perm = [1, 0]> (wide) z = MatMul (x, turned)"
    file = written(tmp_path, graph("(float[1, 30] x) => (float z)", body), half=zeros(20, 30, dtype="float16"))
    work = graph_work(file, {})
    assert work.weight_bytes == 4 * 20 * 30
    assert [node.operator for node in work.nodes] == ["MatMul"]


QDQ = (
    "xq = QuantizeLinear (x, s, u) xd = DequantizeLinear (xq, s, u) wd = DequantizeLinear (w, s, i) "
    "y = Conv <kernel_shape = [1, 1]> (xd, wd) {after}"
)


def test_a_product_of_codes_runs_in_int8_and_its_floats_are_nowhere(tmp_path: Path) -> None:
    text = graph("(float[1, 8, 10, 10] x) => (float z)", QDQ.format(after="yq = QuantizeLinear (y, s, u) z = DequantizeLinear (yq, s, u)"))
    scale = {"s": np.float32(1).reshape(()), "u": np.uint8(0).reshape(()), "i": np.int8(0).reshape(())}
    work = graph_work(written(tmp_path, text, w=zeros(16, 8, 1, 1, dtype="int8"), **scale), {})
    conv = next(node for node in work.nodes if node.operator == "Conv")
    assert (conv.format, conv.quantized_output) == ("int8", True)
    assert (conv.read_bytes, conv.written_bytes, conv.weight_bytes) == (800, 1600, 16 * 8)
    assert work.weight_bytes == 16 * 8 + 4 + 1  # codes, and the scale and zero point that Q and DQ of activations read
    assert [node.operator for node in work.nodes] == ["QuantizeLinear", "Conv", "DequantizeLinear"]


def test_weights_alone_in_codes_leave_a_product_in_float(tmp_path: Path) -> None:
    text = graph("(float[1, 8, 10, 10] x) => (float z)", "wd = DequantizeLinear (w, s, i) z = Conv <kernel_shape = [1, 1]> (x, wd)")
    file = written(tmp_path, text, w=zeros(16, 8, 1, 1, dtype="int8"), s=np.float32(1).reshape(()), i=np.int8(0).reshape(()))
    work = graph_work(file, {})
    assert (work.nodes[0].format, work.weight_bytes) == ("float32", 16 * 8)


def test_calls_of_the_files_own_functions_are_their_nodes(tmp_path: Path) -> None:
    twice = helper.make_function(
        "local", "Twice", ["a"], ["c"], [helper.make_node("Exp", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])],
        [helper.make_opsetid("", 23)],
    )  # fmt: skip
    nodes = [helper.make_node("Twice", ["x"], ["y"], domain="local"), helper.make_node("Twice", ["y"], ["z"], domain="local")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [5])
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("local", 1)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [z]), functions=[twice], opset_imports=opsets), tmp_path / "m.onnx")
    assert [node.operator for node in graph_work(tmp_path / "m.onnx", {}).nodes] == ["Exp", "Neg", "Exp", "Neg"]


def test_more_rows_are_more_work_and_the_same_weights() -> None:
    file = REFERENCE / "fashion-classifier" / "judge.onnx"
    (axis,) = {size for size in read_nodes(file).inputs.popitem()[1].shape or () if isinstance(size, str)}  # type: ignore[attr-defined]
    one, four = (graph_work(file, {axis: rows}) for rows in (1, 4))
    assert one.weight_bytes == four.weight_bytes
    assert four.operations == 4 * one.operations
    assert four.peak_bytes == 4 * one.peak_bytes


@pytest.mark.parametrize(
    ("body", "sizes", "message"),
    [
        ("z = Exp (x)", {}, "axes of unknown size.*'n'"),
        ("z = Unheard (x)", {"n": 3}, r"\(Unheard\).*no rule for this operator"),
        ("z = MatMul (x, x)", {"n": 3}, r"\(MatMul\).*\(3, 4\) times \(3, 4\)"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, body: str, sizes: dict[str, int], message: str) -> None:
    file = written(tmp_path, graph('(float["n", 4] x) => (z)', body))
    with pytest.raises(EngineError, match=message):
        graph_work(file, sizes)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model at all")
    for file in (tmp_path / "model.onnx", tmp_path / "none.onnx"):
        with pytest.raises(EngineError, match="is missing or is no ONNX file"):
            graph_work(file, {})


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = written(tmp_path, graph("(float[3, 4] x) => (float z)", "z = MatMul (x, m)"), m=zeros(4, 5)).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.onnx").write_bytes(whole[:length])
        try:
            work = graph_work(tmp_path / "cut.onnx", {})
        except EngineError:
            continue
        assert isinstance(work, GraphWork)
