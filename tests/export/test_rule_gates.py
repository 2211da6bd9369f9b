"""The optimizer's rules do behind their gates what they do without."""

from __future__ import annotations

from contextlib import nullcontext

import onnx_ir as ir
import pytest
from onnxscript.optimizer import optimize_ir

from edgediffusion.export import rule_gates
from edgediffusion.export.rule_gates import gated

# One for each kind of rule: two reshapes, two slices that are a split, a cast to what it is, a double transpose, a product with 1.
TEXT = """<ir_version: 10, opset_import: ["" : 20]>
main (float[4,8] x) => (float[8,4] y, float[4,4] a, float[4,4] b)
<int64[2] one = {2,16}, int64[2] two = {8,4}, int64[1] zero = {0}, int64[1] half = {4}, int64[1] full = {8}, int64[1] axis = {1},
 float unit = {1.0}>
{
  r1 = Reshape (x, one)
  y0 = Reshape (r1, two)
  y1 = Cast <to = 1> (y0)
  t1 = Transpose <perm = [1, 0]> (y1)
  t2 = Transpose <perm = [1, 0]> (t1)
  y = Mul (t2, unit)
  a = Slice (x, zero, half, axis)
  b = Slice (x, half, full, axis)
}"""


def operators(with_gates: bool) -> list[str]:
    model = ir.from_onnx_text(TEXT)
    with gated() if with_gates else nullcontext():
        optimize_ir(model, onnx_shape_inference=False)
    return [node.op_type for node in model.graph]


def test_the_same_graph() -> None:
    found = operators(with_gates=True)
    assert found == operators(with_gates=False)
    assert len(found) < 6


def test_afterwards_all_is_as_it_was() -> None:
    before = [rule._matcher for rule in rule_gates.rewriter._DEFAULT_REWRITE_RULES]
    with pytest.raises(KeyError), gated():
        raise KeyError
    assert [rule._matcher for rule in rule_gates.rewriter._DEFAULT_REWRITE_RULES] == before
