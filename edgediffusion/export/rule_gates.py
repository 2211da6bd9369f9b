"""onnxscript's rewrite rules, tried where they can begin.

A rule is tried at every node, and one with two outputs looks at all other nodes before it looks at the operator of the first: the
time goes with the square of the graph's size. What a rule does is not changed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import MatchResult


class _Gate:
    def __init__(self, rule: Any):
        first, *others = rule._target_pattern.output_nodes
        self._matcher, self._operator = rule._matcher, first.op_identifier()[1]
        self._of_one_tensor = bool(others) and all(node.inputs[0] is first.inputs[0] for node in others)
        self._no = MatchResult().fail("Another operator.")

    def match(self, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        if node.op_type != self._operator:
            return self._no
        return self._matcher.match(model, _Siblings(graph, node) if self._of_one_tensor else graph, node, **options)


class _Siblings:
    """A graph of which only the nodes are looked at that take the tensor that ``node`` takes first."""

    def __init__(self, graph: Any, node: ir.Node):
        self.graph, self._node = graph, node

    def __iter__(self) -> Iterator[ir.Node]:
        taken = self._node.inputs[0]
        return iter(() if taken is None else taken.consumers())


@contextmanager
def gated() -> Iterator[None]:
    """Within the block the optimizer's rules pass over nodes of another operator than the pattern's first one."""
    found: list[Any] = [
        rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule._target_pattern.output_nodes[0].op_identifier() is not None
    ]
    matchers = [rule._matcher for rule in found]
    for rule in found:
        rule._matcher = _Gate(rule)
    try:
        yield
    finally:
        for rule, matcher in zip(found, matchers, strict=True):
            rule._matcher = matcher
