"""Brackets in a prompt: which words they weigh, and what a weight does to a state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgediffusion.runtimes.prompt_weights import ROUND, SQUARE, apply, parse
from edgediffusion.runtimes.text_encoder import TextEncoder

from .test_pipeline import Fakes, encode
from .tiny import TOKENS


def words(prompt: str) -> list[tuple[str, float]]:
    """Runs of characters of one weight."""
    found: list[tuple[str, float]] = []
    read = parse(prompt)
    assert len(read.text) == len(read.weights)
    for letter, weight in zip(read.text, read.weights, strict=True):
        if found and found[-1][1] == round(weight, 4):
            found[-1] = (found[-1][0] + letter, round(weight, 4))
        else:
            found.append((letter, round(weight, 4)))
    return found


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # the examples of parse_prompt_attention in AUTOMATIC1111's web UI, and of what people write
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("(a:1.5) [b]", [("a", 1.5), (" ", 1.0), ("b", 0.9091)]),
        ("at 10:30) sharp", [("at 10:30) sharp", 1.0)]),
        ("(x: 2 )", [("x", 2.0)]),
        ("(x:.5)", [("x", 0.5)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("()", []),
        ("", []),
        (r"a \\ b", [(r"a \ b", 1.0)]),
    ],
)
def test_reads_what_the_web_ui_reads(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert words(prompt) == expected


def test_brackets_undo_each_other() -> None:
    assert pytest.approx(1) == ROUND * SQUARE


def test_a_token_has_the_weight_of_its_text_and_marks_have_none() -> None:
    read = parse("a (red:1.5) shirt")
    spans = [(0, 0), (0, 1), (2, 5), (6, 11), (0, 0)]
    assert read.of(spans, 7).tolist() == [1, 1, 1.5, 1, 1, 1, 1]


def test_a_weight_moves_a_state_away_from_that_of_no_text() -> None:
    states, empty = np.full((1, 3, 2), 5.0, np.float32), np.full((1, 3, 2), 1.0, np.float32)
    moved = apply(states, empty, np.array([0, 1, 1.5], np.float32))
    assert moved.dtype == np.float32
    assert moved[0, :, 0].tolist() == [1, 5, 7]


class TestInAPipeline:
    @pytest.fixture
    def fakes(self, tmp_path: Path) -> Fakes:
        return Fakes(tmp_path / "bundle")

    def states(self, fakes: Fakes, prompt: str, **options: object) -> np.ndarray:
        fakes.pipe(prompt, num_inference_steps=1, guidance_scale=1.0, **options)  # type: ignore[arg-type]
        found: np.ndarray = fakes.denoise.calls[-1]["encoder_hidden_states"]
        return found

    def test_weighs_the_words_in_brackets_alone(self, fakes: Fakes) -> None:
        plain, empty = self.states(fakes, "a red shirt"), self.states(fakes, "")
        weighted = self.states(fakes, "a (red:1.5) shirt", prompt_weights=True)
        expected = plain.copy()
        expected[:, 2] = empty[:, 2] + 1.5 * (plain[:, 2] - empty[:, 2])
        np.testing.assert_allclose(weighted, expected, rtol=1e-6)  # float32, three operations

    def test_is_off_unless_asked_for(self, fakes: Fakes) -> None:
        self.states(fakes, "a (red:1.5) shirt")
        literal = fakes.encode.calls[-1]["input_ids"][0].tolist()
        self.states(fakes, "a (red:1.5) shirt", prompt_weights=True)
        assert fakes.encode.calls[-2]["input_ids"][0].tolist() != literal

    def test_weights_of_one_change_no_bit(self, fakes: Fakes) -> None:
        plain = self.states(fakes, "a red shirt")
        assert self.states(fakes, "a (red:1.0) shirt", prompt_weights=True).tobytes() == plain.tobytes()

    def test_what_is_cut_is_told_without_brackets(self, fakes: Fakes) -> None:
        result = fakes.pipe("a (very very very big) red [big dog]", num_inference_steps=1, prompt_weights=True)
        assert result.warnings == ("The prompt is too long; this part of it was left out: 'big dog'",)


class TestCache:
    def test_forgets_what_was_not_asked_for_the_longest_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fakes = Fakes(tmp_path / "bundle")
        one = encode({"input_ids": np.zeros((1, TOKENS), np.int64)}).nbytes
        monkeypatch.setattr("edgediffusion.runtimes.text_encoder.CACHED_BYTES", 2 * one)
        (encoder,) = fakes.pipe._conditions._encoders
        for text in ("cat", "dog", "cat", "red", "cat", "dog"):
            encoder(text)
        assert len(fakes.encode.calls) == 4  # cat, dog, red, and dog again: cat was asked for in between
        assert encoder._kept_bytes == 2 * one == sum(e.conditions["encoder_hidden_states"].nbytes for e in encoder._known.values())

    def test_a_text_larger_than_all_of_it_still_serves(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fakes = Fakes(tmp_path / "bundle")
        monkeypatch.setattr("edgediffusion.runtimes.text_encoder.CACHED_BYTES", 1)
        fakes.pipe(["cat", "dog"], num_inference_steps=1)

    def test_belongs_to_one_encoder(self, tmp_path: Path) -> None:
        first, second = (Fakes(tmp_path / name).pipe._conditions._encoders[0] for name in ("a", "b"))
        assert isinstance(first, TextEncoder)
        first("cat")
        assert not second._known
