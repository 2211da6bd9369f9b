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
    def __init__(self, matcher: Any, operator: str):
        self._matcher, self._operator = matcher, operator
        self._no = MatchResult().fail("Another operator.")

    def match(self, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        return self._matcher.match(model, graph, node, **options) if node.op_type == self._operator else self._no


@contextmanager
def gated() -> Iterator[None]:
    """Within the block the optimizer's rules pass over nodes of another operator than the pattern's first one."""
    found: list[Any] = [
        rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule._target_pattern.output_nodes[0].op_identifier() is not None
    ]
    matchers = [rule._matcher for rule in found]
    for rule, matcher in zip(found, matchers, strict=True):
        rule._matcher = _Gate(matcher, rule._target_pattern.output_nodes[0].op_identifier()[1])
    try:
        yield
    finally:
        for rule, matcher in zip(found, matchers, strict=True):
            rule._matcher = matcher
