"""Functions of a model that round float numbers to those of a format, written in ONNX's own operators: any engine runs them.

``edgediffusion.ReadE2M1 (x, scale)`` and its like give what is read back of x, to the bit of ``optimize/float4.py``.

A format's magnitudes lie in runs of equal steps (E2M1: four of 1/2, two of 1, one of 2). |x| is rounded in each run by itself, clipped to
it, and what each gives is summed: Round is half to even, and so half to the even code where a run begins at one. Where it begins at an
odd one, the way down from its end is rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from edgediffusion.optimize.float4 import BLOCK, E2M1_MAX, MAGNITUDES, SMALLEST_E4M3
from edgediffusion.optimize.integers import E4M3_MAX

DOMAIN = "edgediffusion"
_E4M3 = int(ir.DataType.FLOAT8E4M3FN)


def function_name(kind: str) -> str:
    return f"Read{kind.upper()}"


def add_functions(model: ir.Model, kinds: Iterable[str]) -> None:
    """Give ``model`` the functions for number formats of four bits, and for fp8."""
    opset = model.opset_imports[""]
    bodies = [_function(function_name(kind), list(_body(kind)), opset) for kind in sorted(kinds)]
    if not bodies:
        return
    text = f'<ir_version: 10, opset_import: ["": {opset}]> none (float x) => (float y) {{ y = Identity (x) }}\n' + "\n".join(bodies)
    for key, function in ir.from_onnx_text(text).functions.items():
        model.functions[key] = function
    model.opset_imports[DOMAIN] = 1


def _function(name: str, lines: list[str], opset: int) -> str:
    around = ["f = Cast <to = 1> (x)", "s = Cast <to = 1> (scale)", *lines, "y = CastLike (read, x)"]
    return f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{name} (x, scale) => (y)\n{{\n' + "\n".join(around) + "\n}"


def _body(kind: str) -> Iterator[str]:
    """From ``f`` and ``s`` to ``read``."""
    if kind == "fp8":
        largest = _number(E4M3_MAX)
        yield f"top = {largest}"
        yield "bottom = Neg (top)"
        yield "v = Div (f, s)"
        yield "clipped = Clip (v, bottom, top)"
        yield f"stored = Cast <to = {_E4M3}> (clipped)"
        yield "r = Cast <to = 1> (stored)"
        yield "read = Mul (r, s)"
    elif kind == "nvfp4":
        yield from _blocks()
        yield from _rounded("e2m1")
        yield "back = Mul (r, step)"
        yield "shape = Shape (f)"
        yield "read = Reshape (back, shape)"
    else:
        yield "v = Div (f, s)"
        yield from _rounded(kind)
        yield "read = Mul (r, s)"


def _blocks() -> Iterator[str]:
    """``v``: the blocks of ``f``, a row each, over their steps, b s."""
    yield f"rows = Constant <value_ints = [-1, {BLOCK}]> ()"
    yield "blocks = Reshape (f, rows)"
    yield "sizes = Abs (blocks)"
    yield "axis = Constant <value_ints = [1]> ()"
    yield "amax = ReduceMax <keepdims = 1> (sizes, axis)"
    yield f"most = {_number(E2M1_MAX)}"
    yield "unit = Mul (most, s)"
    yield "wanted = Div (amax, unit)"
    yield f"least_scale = {_number(SMALLEST_E4M3)}"
    yield f"most_scale = {_number(E4M3_MAX)}"
    yield "bounded = Clip (wanted, least_scale, most_scale)"
    yield f"stored = Cast <to = {_E4M3}> (bounded)"
    yield "b = Cast <to = 1> (stored)"
    yield "step = Mul (b, s)"
    yield "v = Div (blocks, step)"


def _rounded(form: str) -> Iterator[str]:
    """``r``: ``v`` rounded to the format."""
    yield "size = Abs (v)"
    total = ""
    for at, (low, step, steps, odd) in enumerate(_runs(MAGNITUDES[form])):
        yield f"low{at} = {_number(low)}"
        yield f"high{at} = {_number(low + step * steps)}"
        yield f"step{at} = {_number(step)}"
        yield f"inside{at} = Clip (size, low{at}, high{at})"
        yield f"way{at} = Sub ({f'high{at}, inside{at}' if odd else f'inside{at}, low{at}'})"
        yield f"steps{at} = Div (way{at}, step{at})"
        yield f"whole{at} = Round (steps{at})"
        yield f"done{at} = Mul (whole{at}, step{at})"
        if odd:
            yield f"span{at} = Sub (high{at}, low{at})"
            yield f"part{at} = Sub (span{at}, done{at})"
        else:
            yield f"part{at} = Identity (done{at})"
        if at:
            yield f"total{at} = Add ({total}, part{at})"
        total = f"total{at}" if at else "part0"
    yield "sign = Sign (v)"
    yield f"r = Mul (sign, {total})"


def _runs(magnitudes: tuple[float, ...]) -> list[tuple[float, float, int, bool]]:
    """Runs of equal steps: lowest magnitude, step, how many, and whether the code it begins at is odd."""
    runs: list[tuple[float, float, int, bool]] = []
    for code, (low, high) in enumerate(itertools.pairwise(magnitudes)):
        if runs and runs[-1][1] == high - low:
            start, step, steps, odd = runs[-1]
            runs[-1] = (start, step, steps + 1, odd)
        else:
            runs.append((low, high - low, 1, code % 2 == 1))
    return runs


def _number(value: float) -> str:
    return f"Constant <value = float {{{value!r}}}> ()"
