import numpy as np
import pytest
import torch

from training import data
from training.loop import Plan


def test_articles():
    assert data.with_article("ankle boot") == "an ankle boot"
    assert data.with_article("bright bag") == "a bright bag"
    assert data.with_article("trousers") == "trousers"
    assert data.with_article("dark pants") == "dark pants"


def test_captions_of_a_class_name_it_and_nothing_else():
    plain, dark = data.fashion_captions(5, None), data.fashion_captions(5, 0)
    assert plain == ["sandal", "a sandal", "a photo of a sandal"]
    assert dark == ["dark sandal", "a dark sandal", "a photo of a dark sandal"]


def test_no_caption_belongs_to_two_classes_or_tones():
    groups = [set(data.fashion_captions(label, tone)) for label in range(10) for tone in (None, 0, 1, 2)]
    assert len(set.union(*groups)) == sum(len(g) for g in groups)


def test_level_looks_at_the_items_own_pixels():
    images = np.zeros((2, 4, 4), np.float32)
    images[0, 0, :2] = 100
    assert data.level(images).tolist() == [100, 0]


def test_every_source_states_version_and_licence():
    for source in (data.FASHION_SOURCE, data.EMOJI_LABELS, *data.EMOJI_SOURCES.values()):
        assert source.version
        assert source.licence


def test_learning_rate_rises_holds_and_falls():
    plan = Plan(steps=1000, batch=1, learning_rate=1.0, warmup=100, decay_part=0.5)
    rates = [plan.rate(s) for s in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=1e-4)
    assert rates[100] == rates[500] == pytest.approx(1.0, rel=1e-4)
    assert rates[750] == pytest.approx(0.5, rel=1e-4)
    assert 0 < rates[-1] < 0.01
    assert sorted(rates[99:], reverse=True) == rates[99:]


def test_frechet_distance_of_gaussians_with_known_moments():
    from training.judge import frechet

    # Two point sets with the covariances I and 4 I, means 3 apart: |3|^2 + tr(I + 4 I - 2 * 2 I) = 9 + 2.
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * (3 / 4) ** 0.5
    assert frechet(square, square) == pytest.approx(0, abs=1e-9)
    assert frechet(square, 2 * square + torch.tensor([3.0, 0.0])) == pytest.approx(11)
