"""What the emoji pipeline is judged by: places among real pictures, with answers that are known."""

import json

import numpy as np

from training import judge, judge_emoji


def test_a_picture_is_compared_by_the_means_of_its_4x4_pixels():
    pictures = np.zeros((2, 64, 64, 3))
    pictures[1, :4, 4:8, 2] = 1
    means = judge_emoji.coarse(pictures)
    assert means.shape == (2, 16 * 16 * 3)
    assert means[1].sum() == means[1, 1 * 3 + 2] == 1


def test_the_rank_counts_nearer_pictures_of_the_same_style_alone():
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    drawn, wanted = np.array([[1.6], [0.4]]), np.array([3, 0])
    styles = np.array(["a", "a", "b", "b"])
    same = styles[wanted][:, None] == styles[None]
    assert judge_emoji.ranks(drawn, real, wanted, same).tolist() == [1, 0]
    assert judge_emoji.ranks(drawn, real, wanted, np.ones((2, 4), bool)).tolist() == [2, 0]


def test_pairs_are_drawn_from_both_kinds_and_again_the_same():
    held_out = np.arange(100) % 20 == 0
    seen, unseen = judge_emoji.choose(held_out, 30, seed=0)
    assert len(set(seen)) == 30
    assert not held_out[seen].any()
    assert sorted(unseen) == [0, 20, 40, 60, 80]
    np.testing.assert_array_equal(judge_emoji.choose(held_out, 30, seed=0)[0], seen)


def test_the_model_card_tells_the_numbers_of_the_report():
    card, report = judge.DOCS / "emoji.md", judge.DOCS / "emoji.json"
    facts = json.loads(report.read_text(encoding="utf-8"))
    text = card.read_text(encoding="utf-8")
    assert judge.with_numbers(text, judge_emoji.table(facts)) == text
