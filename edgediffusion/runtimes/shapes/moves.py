"""Rules of operators that move entries about: what they make has the entries of what they read, or some of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edgediffusion.runtimes.onnx_nodes import Node, Stored
from edgediffusion.runtimes.shapes.value import SMALL, Rule, Value, Values, at, axes_of, numbers


def _constant(node: Node, given: Values) -> list[Value]:
    for key, dtype in (("value_int", "int64"), ("value_ints", "int64"), ("value_float", "float32"), ("value_floats", "float32")):
        if key in node.attributes:
            data = np.array(node.attributes[key], dtype)
            return [Value(dtype, data.shape, data)]
    value = node.attributes["value"]
    if not isinstance(value, Stored):
        raise ValueError("its value is no tensor")
    return [Value(value.dtype, value.shape, value.data)]


def _shape(node: Node, given: Values) -> list[Value]:
    shape = at(given, 0).shape
    data = np.array(shape[node.integer("start", 0) : node.integer("end", len(shape))], np.int64)
    return [Value("int64", data.shape, data)]


def _reshape(node: Node, given: Values) -> list[Value]:
    source, wanted = at(given, 0), numbers(given, 1) or []
    if not node.integer("allowzero", 0):
        wanted = [source.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    known = math.prod(size for size in wanted if size != -1)
    shape = tuple(source.entries // known if size == -1 else size for size in wanted)
    if math.prod(shape) != source.entries:
        raise ValueError(f"{source.shape} has not as many entries as {shape}")
    return [Value(source.dtype, shape)]


def _flatten(node: Node, given: Values) -> list[Value]:
    source, axis = at(given, 0), node.integer("axis", 1)
    return [Value(source.dtype, (math.prod(source.shape[:axis]), math.prod(source.shape[axis:])))]


def _transpose(node: Node, given: Values) -> list[Value]:
    source = at(given, 0)
    order = node.integers("perm") or tuple(range(len(source.shape)))[::-1]
    return [Value(source.dtype, tuple(source.shape[axis] for axis in order))]


def _unsqueeze(node: Node, given: Values) -> list[Value]:
    source, axes = at(given, 0), axes_of(node, given, 1) or []
    rank = len(source.shape) + len(axes)
    new, old = {axis % rank for axis in axes}, iter(source.shape)
    return [Value(source.dtype, tuple(1 if axis in new else next(old) for axis in range(rank)))]


def _squeeze(node: Node, given: Values) -> list[Value]:
    source, axes = at(given, 0), axes_of(node, given, 1)
    gone = {i for i, size in enumerate(source.shape) if size == 1} if axes is None else {axis % len(source.shape) for axis in axes}
    return [Value(source.dtype, tuple(size for i, size in enumerate(source.shape) if i not in gone))]


def _concat(node: Node, given: Values) -> list[Value]:
    values = [value for value in given if value is not None]
    shape = list(values[0].shape)
    shape[node.integer("axis", 0)] = sum(value.shape[node.integer("axis", 0)] for value in values)
    return [Value(values[0].dtype, tuple(shape))]


def _split(node: Node, given: Values) -> list[Value]:
    source, axis, count = at(given, 0), node.integer("axis", 0), len(node.outputs)
    even = -(-source.shape[axis] // count)
    sizes = list(node.integers("split") or numbers(given, 1) or [min(even, source.shape[axis] - even * i) for i in range(count)])
    shapes = [list(source.shape) for _ in sizes]
    for shape, size in zip(shapes, sizes, strict=True):
        shape[axis] = size
    return [Value(source.dtype, tuple(shape)) for shape in shapes]


def _slice(node: Node, given: Values) -> list[Value]:
    source = at(given, 0)
    starts, ends = numbers(given, 1) or [], numbers(given, 2) or []
    axes, steps = numbers(given, 3) or list(range(len(starts))), numbers(given, 4) or [1] * len(starts)
    shape = list(source.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # beyond the ends is the end, in ONNX as in Python, except that going back "before the first" is a number below -size
        last = None if step < 0 and end < -shape[axis] else end
        shape[axis] = len(range(*slice(start, last, step).indices(shape[axis])))
    return [Value(source.dtype, tuple(shape))]


def _gather(node: Node, given: Values) -> list[Value]:
    source, chosen = at(given, 0), at(given, 1)
    axis = node.integer("axis", 0) % len(source.shape)
    return [Value(source.dtype, source.shape[:axis] + chosen.shape + source.shape[axis + 1 :])]


def _gather_nd(node: Node, given: Values) -> list[Value]:
    source, chosen = at(given, 0), at(given, 1)
    return [Value(source.dtype, chosen.shape[:-1] + source.shape[node.integer("batch_dims", 0) + chosen.shape[-1] :])]


def _gather_elements(node: Node, given: Values) -> list[Value]:
    return [Value(at(given, 0).dtype, at(given, 1).shape)]


def _expand(node: Node, given: Values) -> list[Value]:
    source = at(given, 0)
    return [Value(source.dtype, np.broadcast_shapes(source.shape, tuple(numbers(given, 1) or ())))]


def _tile(node: Node, given: Values) -> list[Value]:
    source = at(given, 0)
    return [Value(source.dtype, tuple(size * times for size, times in zip(source.shape, numbers(given, 1) or (), strict=True)))]


def _pad(node: Node, given: Values) -> list[Value]:
    source, pads = at(given, 0), numbers(given, 1) or []
    axes = [axis % len(source.shape) for axis in numbers(given, 3) or range(len(source.shape))]
    shape = list(source.shape)
    for i, axis in enumerate(axes):
        shape[axis] += pads[i] + pads[i + len(axes)]
    return [Value(source.dtype, tuple(shape))]


def _resize(node: Node, given: Values) -> list[Value]:
    source, sizes = at(given, 0), numbers(given, 3)
    if sizes:
        return [Value(source.dtype, tuple(sizes))]
    scales = at(given, 2 if len(given) > 2 else 1)
    if scales.data is None:
        raise ValueError("its scales are only known when it runs")
    return [Value(source.dtype, tuple(math.floor(size * float(s)) for size, s in zip(source.shape, scales.data.ravel(), strict=True)))]


def _depth_to_space(node: Node, given: Values) -> list[Value]:
    (n, c, h, w), block = at(given, 0).shape, node.integer("blocksize", 1)
    if node.operator == "SpaceToDepth":
        return [Value(at(given, 0).dtype, (n, c * block * block, h // block, w // block))]
    return [Value(at(given, 0).dtype, (n, c // (block * block), h * block, w * block))]


def _filled(node: Node, given: Values) -> list[Value]:
    value = node.attributes.get("value")
    dtype = value.dtype if isinstance(value, Stored) else "float32"
    shape = tuple(numbers(given, 0) or ())
    if isinstance(value, Stored) and value.data is not None and math.prod(shape) <= SMALL:
        return [Value(dtype, shape, np.full(shape, value.data.ravel()[0]))]
    return [Value(dtype, shape)]


def _range(node: Node, given: Values) -> list[Value]:
    ends = [at(given, i).data for i in range(3)]
    if any(end is None for end in ends):
        raise ValueError("its ends are only known when it runs")
    start, end, step = (float(value) for value in ends if value is not None)
    return [Value(at(given, 0).dtype, (max(0, math.ceil((end - start) / step)),))]


MOVES: Mapping[str, Rule] = {
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _depth_to_space),
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
