from __future__ import annotations

import inspect

import pytest

from edgediffusion import errors
from edgediffusion.errors import BundleError, EdgeDiffusionError, MissingExtra, UnknownName

KINDS = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, EdgeDiffusionError)]


def test_the_tree_at_the_top_of_the_file_names_every_error_under_its_parent() -> None:
    depth: dict[str, int] = {}
    parents: dict[str, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ")
        name = words.split()[0] if words.split() else ""
        if not hasattr(errors, name):
            continue
        depth[name] = len(words) - len(words.lstrip())
        above = [other for other in depth if depth[other] < depth[name]]
        parents[name] = above[-1] if above else "Exception"
    assert parents == {kind.__name__: kind.__mro__[1].__name__ for kind in KINDS}


def test_a_message_has_its_four_parts_in_order() -> None:
    error = BundleError("The size cannot be used.", got="33 x 32", allowed="multiples of 4.", do="Use 32 x 32.")
    assert str(error) == "The size cannot be used. Got: 33 x 32. Allowed: multiples of 4. Use 32 x 32."


@pytest.mark.parametrize("got", [0, "", False])
def test_a_falsy_value_that_was_found_is_still_told(got: object) -> None:
    assert f"Got: {got}." in str(EdgeDiffusionError("It is wrong", got=got))


def test_a_message_without_parts_is_one_sentence() -> None:
    assert str(EdgeDiffusionError("It is wrong")) == "It is wrong."


def test_an_unknown_name_lists_the_known_ones_and_the_near_one() -> None:
    assert str(UnknownName("sampler", "eular", {"euler", "ddim"})) == (
        "No sampler is called 'eular'. Allowed: ddim, euler. Did you mean 'euler'?"
    )
    assert str(UnknownName("sampler", "x", ())) == "No sampler is called 'x'. Allowed: none."
    assert str(UnknownName("target", "x", ("cpu",), do="Or give a path.")).endswith("Allowed: cpu. Or give a path.")


def test_a_missing_extra_gives_the_command_that_installs_it() -> None:
    error = MissingExtra("onnxruntime", "cpu", "Running a bundle")
    assert str(error) == (
        "Running a bundle needs the Python module 'onnxruntime', which is not installed. Install it with: pip install 'edgediffusion[cpu]'"
    )
    assert (error.module, error.extra) == ("onnxruntime", "cpu")
