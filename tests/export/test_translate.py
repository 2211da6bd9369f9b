"""A program that is not traced a second time gives the graph that it would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from edgediffusion.export.simplify import simplify
from edgediffusion.export.translate import translate

X = torch.linspace(-1, 1, 2 * 6 * 8).reshape(2, 6, 8)


def idle(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x.to(torch.float32).contiguous().detach(), 0.5, training=False).type_as(x) * 2


def last_is_idle(x: torch.Tensor) -> torch.Tensor:
    return (x + 1).contiguous()


def heads(x: torch.Tensor) -> torch.Tensor:
    first, second = x.unflatten(2, (2, 4)).transpose(1, 2).chunk(2, dim=1)
    return (first * second).flatten(2)


def parts_of_free_sizes(x: torch.Tensor) -> torch.Tensor:
    rows = x.shape[1] // 2
    first, second, third = x.split([1, rows, x.shape[1] - rows - 1], dim=1)
    return torch.cat([third, first * 2, second + 1], dim=1)


def rewritten(x: torch.Tensor) -> torch.Tensor:
    signs = ((x > 0).__and__(x < 0.5)).to(torch.float64).movedim(-1, 1)
    return 3 - torch.max(torch.rsub(signs.to(x), 1.5, alpha=2).movedim(1, 2), torch.min(x, x * 2))


def in_place_unseen(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y += x
    return y.contiguous()


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 1:].mul_(3)
    return y.contiguous()


def promoted(x: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(x.shape[1], device=x.device)
    return x * rows[:, None] + torch.sin(rows)[:, None] / 3 + (x > 0)


def divided_by_a_size(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(8, dtype=torch.float32) / (x.shape[1] // 2) + x


def one_dtype(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x * 2 + 1, 2**-x) / 3 - 1


def drops_out_always(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x, 1e-9, training=True)


def without_translation(x: torch.Tensor) -> torch.Tensor:
    return torch.hstack([torch.nan_to_num(x.contiguous()), x.rot90(2, (1, 2))])


def with_a_graph_within(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return x.contiguous() @ x.transpose(1, 2)


TRANSLATED = [idle, last_is_idle, heads, parts_of_free_sizes, rewritten, promoted, divided_by_a_size, one_dtype, in_place_unseen]
NETWORKS = [*TRANSLATED, in_place, without_translation, with_a_graph_within]


class Network(torch.nn.Module):
    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


def export(call: Callable[[torch.Tensor], torch.Tensor]) -> torch.export.ExportedProgram:
    free = torch.export.Dim.DYNAMIC
    return torch.export.export(Network(call), (X,), dynamic_shapes={"x": {0: free, 1: free}}, strict=False)


@pytest.mark.parametrize("call", NETWORKS, ids=lambda call: call.__name__)
def test_the_network(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    session = ort.InferenceSession(ir.to_proto(translate(export(call), 23).model).SerializeToString())
    for x in (X, torch.cat([X, X + 0.3])[:3, :4]):
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, call(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", [idle, last_is_idle, heads], ids=lambda call: call.__name__)
def test_no_larger_graph_without_a_second_trace(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    models = [translate(export(call), 23).model, torch.onnx.export(export(call), dynamo=True, opset_version=23, optimize=False).model]
    for model in models:
        simplify(model)
    ours, theirs = (Counter(node.op_type for node in model.graph) for model in models)
    assert ours <= theirs


def test_no_sequences() -> None:
    """torch's own translation of a split into parts of free sizes makes one, which TensorRT does not read."""
    operators = [node.op_type for node in translate(export(parts_of_free_sizes), 23).model.graph]
    assert "Slice" in operators
    assert not any("Sequence" in operator for operator in operators)


def test_dropping_out_on_purpose_stays() -> None:
    assert any(node.op_type == "Dropout" for node in translate(export(drops_out_always), 23).model.graph)


@pytest.mark.parametrize("call", NETWORKS, ids=lambda call: call.__name__)
def test_decompositions_run_where_they_are_needed(call: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    decompose = torch.export.ExportedProgram.run_decompositions

    def counted(*arguments: object) -> torch.export.ExportedProgram:
        runs.append(1)
        return decompose(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    translate(export(call), 23)
    assert len(runs) == (call not in TRANSLATED)
