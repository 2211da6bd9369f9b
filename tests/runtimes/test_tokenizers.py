"""Token ids against transformers' CLIPTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import Tokenizer
from edgediffusion.errors import BundleError
from edgediffusion.runtimes.tokenizers import TextTokenizer

from .tiny import write_tokenizer

LENGTH = 12
TEXTS = (
    "a photo of a red shirt",
    "",
    "   ",
    "A PHOTO, of: a Shirt!!",
    "naïve café — schön",
    "漢字 🙂 emoji",
    "it's  a\tnew\nline",
    "word " * 40,
    "a very long text that has certainly more tokens than fit into twelve places of a row",
    "<|endoftext|> in the middle <|startoftext|>",
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small tokenizer of CLIP's kind, learned from the texts, and the folder that transformers saved it to."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    learned = Library(models.BPE(end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    learned.train_from_iterator(TEXTS, trainer)
    merges = [tuple(m) for m in json.loads(learned.to_str())["model"]["merges"]]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH, pad_token="<|endoftext|>")
    folder = tmp_path_factory.mktemp("clip")
    tokenizer.save_pretrained(folder)
    return tokenizer, folder


def test_equals_transformers(clip: tuple[Any, Path]) -> None:
    theirs, folder = clip
    ours = TextTokenizer(Tokenizer("tokenizer.json", LENGTH, theirs.pad_token_id), folder)
    expected = theirs(list(TEXTS), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np").input_ids
    found = ours(TEXTS)
    assert found.ids.dtype == np.int64
    np.testing.assert_array_equal(found.ids, expected)


def test_equals_transformers_one_by_one(clip: tuple[Any, Path]) -> None:
    theirs, folder = clip
    ours = TextTokenizer(Tokenizer("tokenizer.json", LENGTH, theirs.pad_token_id), folder)
    for text in TEXTS:
        expected = theirs(text, padding="max_length", truncation=True, max_length=LENGTH).input_ids
        assert ours([text]).ids[0].tolist() == expected, text


def test_says_what_did_not_fit(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    tokenize = TextTokenizer(Tokenizer("tokenizer.json", 6, 1), tmp_path)
    tokens = tokenize(["a red shirt", "a very very big red shirt of a cat", "a very very big"])
    assert tokens.cut == ("", "red shirt of a cat", "")
    assert tokens.ids.tolist()[0] == [0, 3, 4, 6, 1, 1]  # start, three words, end, padding with the end mark


def test_what_did_not_fit_is_told_as_it_was_written(clip: tuple[Any, Path]) -> None:
    theirs, folder = clip
    text = "a photo of a cat " * 20 + "beneath a Café, naïve 😀"
    [cut] = TextTokenizer(Tokenizer("tokenizer.json", LENGTH, theirs.pad_token_id), folder)([text]).cut
    assert 0 < len(cut) < len(text)
    assert text.endswith(cut)


def test_a_damaged_file_is_the_bundles_fault(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="tokenizer"):
        TextTokenizer(Tokenizer("tokenizer.json", 6, 1), tmp_path)


class TestPrefix:
    """A tokenizer that lowers texts and says something before prompts, of words as tiny.py has them."""

    @pytest.fixture
    def tokenize(self, tmp_path: Path) -> TextTokenizer:
        write_tokenizer(tmp_path / "tokenizer.json")
        # "<start> of a" are three tokens, one of which stays; with the end mark a text has room for one word less than the length
        return TextTokenizer(Tokenizer("tokenizer.json", 6, 1, lowercase=True, prefix="Of a ", prefix_tokens=2), tmp_path)

    def test_stands_before_prompts_and_before_no_negative_one(self, tokenize: TextTokenizer) -> None:
        plain, negative = tokenize(["  Red SHIRT "]).ids, tokenize(["  Red SHIRT "], negative=True).ids
        start, end, unknown, words = 0, 1, 2, ("a", "red", "blue", "shirt", "shoe", "of")
        told = [start, 3 + words.index("of"), 3, 3 + words.index("red"), 3 + words.index("shirt"), end]
        assert plain.tolist() == [[*told, 1, 1]]
        assert negative.tolist() == [[start, *told[3:], 1, 1]]
        assert unknown not in plain

    def test_spans_are_of_the_text_as_it_was_written_and_of_the_states_that_are_given(self, tokenize: TextTokenizer) -> None:
        text = "  Red SHIRT "
        for negative in (False, True):
            (spans,) = tokenize([text], negative=negative).spans
            assert [text[start:end] for start, end in spans] == ["", "Red", "SHIRT", ""]

    def test_what_does_not_fit_is_told_as_it_was_written(self, tokenize: TextTokenizer) -> None:
        text = " Red Blue Shirt Shoe CAT dog"
        assert tokenize([text]).cut == ("CAT dog",)
        assert tokenize([text], negative=True).cut == ("CAT dog",)
