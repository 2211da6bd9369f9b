"""The judge that ``edgediffusion compare`` uses is the classifier that was trained."""

import numpy as np
import pytest
import torch

from edgediffusion.files import sha256
from edgediffusion.profiles import gaussian, judges
from training import classifier, data, judge


def noise(count):
    return torch.from_numpy(np.random.default_rng(0).random((count, 1, 32, 32), np.float32))


def test_the_onnx_judge_sees_what_the_network_sees():
    network, loaded, pixels = classifier.load(), judges.load("fashion"), noise(5)
    with torch.no_grad():
        x, layers = pixels * 2 - 1, []
        for convolution in network.convolutions:
            layers.append(x := torch.relu(convolution(x)))
        features = x.mean((2, 3))
    look = loaded.look(pixels.permute(0, 2, 3, 1).numpy())
    size = float(features.abs().max())
    assert look.features == pytest.approx(features.numpy(), abs=1e-5 * size)  # float32 sums in another order
    assert look.logits == pytest.approx(network.head(features).detach().numpy(), abs=1e-4)
    for mine, theirs in zip(look.layers, layers, strict=True):
        assert mine == pytest.approx(theirs.flatten(2).numpy(), abs=1e-5 * float(theirs.max()))


def test_the_onnx_file_is_made_of_the_weights_bit_for_bit(tmp_path):
    classifier.write_onnx(classifier.load(), tmp_path / "judge.onnx")
    assert sha256(tmp_path / "judge.onnx") == sha256(classifier.FOLDER / "judge.onnx")


def test_every_caption_names_its_class_to_the_judge():
    loaded = judges.load("fashion")
    for label in range(10):
        for tone in (None, 0, 1, 2):
            assert {loaded.class_of(caption) for caption in data.fashion_captions(label, tone)} == {label}


def test_the_judges_prompts_are_those_that_were_written():
    assert judges.load("fashion").prompts == tuple(classifier.judge_prompts())


def test_the_model_cards_distance_is_that_of_the_profiles():
    a, b = (np.random.default_rng(seed).normal(seed, 1, (50, 8)).astype(np.float32) for seed in (0, 1))
    expected = gaussian.frechet(gaussian.fit(a), gaussian.fit(b))
    assert judge.frechet(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9)


def test_yardsticks_are_of_subsets_and_of_all(monkeypatch):
    monkeypatch.setattr(classifier, "YARDSTICKS", (10, 20))
    features = np.random.default_rng(0).normal(size=(200, 3))
    test = gaussian.Gaussian(np.zeros(3), np.eye(3), 1000)
    found = classifier.frechet_of_real(features, test)
    assert list(found) == ["10", "20", "200"]
    assert found["10"] > found["20"] > found["200"] == round(gaussian.frechet(test, gaussian.fit(features)), 4)
    assert found == classifier.frechet_of_real(features, test)
