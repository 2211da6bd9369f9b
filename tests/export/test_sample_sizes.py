"""Sizes of residuals are read off the sample; everything else stays. Graphs as text, and what ONNX Runtime makes of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgediffusion.export.sample_sizes import read_off_sample

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[batch, 4, height, width] sample, float[batch, 8, "height/2", "width/2"] mid_block_additional_residual)
    => (int64[1] rows, int64[1] half, int64[4] all, float[batch, 8, "height/2", "width/2"] out) {
    rows = Shape<start = 0, end = 1>(mid_block_additional_residual)
    half = Shape<start = 3, end = 4>(mid_block_additional_residual)
    all = Shape(sample)
    out = Neg(mid_block_additional_residual)
}
"""


def parsed() -> ir.Model:
    return ir.from_onnx_text(GRAPH.replace('"height/2"', "half_height").replace('"width/2"', "half_width"))


def named() -> ir.Model:
    """As a part is traced: the text format has no names with a slash."""
    model = parsed()
    for value in (model.graph.inputs[1], model.graph.outputs[3]):
        value.shape = ir.Shape(["batch", 8, "height/2", "width/2"])
    return model


def test_sizes_are_those_of_the_sample_and_its_parts() -> None:
    model = named()
    assert read_off_sample(model) == 2
    assert {use.node.op_type for use in model.graph.inputs[1].uses()} == {"Neg"}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    fed = {"sample": np.zeros((3, 4, 12, 20), np.float32), "mid_block_additional_residual": np.zeros((3, 8, 6, 10), np.float32)}
    rows, half, *_ = session.run(None, fed)
    assert (rows.tolist(), half.tolist()) == ([3], [10])
    assert read_off_sample(model) == 0


def test_a_graph_without_residuals_stays_as_it_is() -> None:
    model = named()
    model.graph.inputs[1].name = "feature"
    before = ir.to_proto(model).SerializeToString()
    assert read_off_sample(model) == 0
    assert ir.to_proto(model).SerializeToString() == before
