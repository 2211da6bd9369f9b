"""An independent judge of fashion pictures: a small CNN that has seen real Fashion-MNIST training images only.

    python -m training.classifier      resumes; writes edgediffusion/reference/fashion-classifier

The folder's ``config.json`` lists the layers in order, so that any runtime can rebuild the network from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from edgediffusion.files import dump_json, new_folder
from training import data
from training.loop import Plan, Trainer, device

FOLDER = Path(__file__).parent.parent / "edgediffusion" / "reference" / "fashion-classifier"
PLAN = Plan(steps=2800, batch=128, learning_rate=2e-3, warmup=100, decay_part=0.6, ema=0.99)
# (channels in, channels out, stride) of the 3x3 convolutions, each followed by a ReLU.
CONVOLUTIONS = ((1, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 96, 2))


class Classifier(nn.Module):
    """Convolutions, the mean over all places, one linear layer. x is [batch, 1, 32, 32] in -1..1."""

    def __init__(self, convolutions: tuple[tuple[int, int, int], ...] = CONVOLUTIONS, classes: int = 10):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 3, stride=s, padding=1) for i, o, s in convolutions)
        self.head = nn.Linear(convolutions[-1][1], classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 96], the layer before the last; Fréchet distances are measured here."""
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def layers() -> list[dict]:
    """The network in order, as ``config.json`` tells it; ``weights`` are the tensors' names without .weight and .bias."""
    listed = [
        {"type": "conv2d", "weights": f"convolutions.{n}", "in": i, "out": o, "kernel": 3, "stride": s, "padding": 1, "then": "relu"}
        for n, (i, o, s) in enumerate(CONVOLUTIONS)
    ]
    width = CONVOLUTIONS[-1][1]
    return [*listed, {"type": "global_average_pool", "features": width}, {"type": "linear", "weights": "head", "in": width, "out": 10}]


def load(folder: Path = FOLDER) -> Classifier:
    config = json.loads((folder / "config.json").read_text())
    convolutions = tuple((c["in"], c["out"], c["stride"]) for c in config["layers"] if c["type"] == "conv2d")
    network = Classifier(convolutions, len(config["classes"]))
    network.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return network.eval()


@torch.no_grad()
def evaluate(network: Classifier, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen class [images] and the features [images, 96] of x, [images, 1, 32, 32] in -1..1."""
    features = torch.cat([network.features(part) for part in x.split(250)])
    return network.head(features).argmax(1), features


def images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Real images [n, 1, 32, 32] of 0..255 and their labels [n]."""
    arrays = np.load(data.main("fashion"))
    return torch.from_numpy(arrays[f"{split}_images"])[:, None], torch.from_numpy(arrays[f"{split}_labels"])


def as_signal(pixels: torch.Tensor) -> torch.Tensor:
    """0..255 to -1..1."""
    return pixels.float() / 127.5 - 1


def train() -> Classifier:
    """Half of each batch mirrored, all of it shifted by up to two pixels; the moving average of the weights is what is kept."""
    x, y = images("train")
    torch.manual_seed(0)
    trainer = Trainer("fashion-classifier", {"classifier": Classifier()}, PLAN)
    network = trainer.modules["classifier"]

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(x), (PLAN.batch,), generator=generator)
        down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = torch.roll(x[index], (down, right), (2, 3))
        half = PLAN.batch // 2
        batch = torch.cat([batch[:half], batch[half:].flip(3)])
        return F.cross_entropy(network(as_signal(batch).to(device())).float(), y[index].to(device()))

    trainer.run(loss_of)
    trainer.swap()
    return network.eval().cpu()


def save(network: Classifier, folder: Path, accuracy: float) -> None:
    config = {
        "what": "Fashion-MNIST classifier: pictures of 32x32, 28x28 padded by two black pixels on each side",
        "input": {"shape": ["batch", 1, 32, 32], "range": [-1, 1], "black": -1},
        "classes": [names[0] for names in data.FASHION_NAMES],
        "layers": layers(),
        "test_accuracy": accuracy,
        "data": vars(data.FASHION_SOURCE),
    }
    with new_folder(folder) as partial:
        save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, partial / "model.safetensors")
        (partial / "config.json").write_text(dump_json(config))
        (partial / "model.safetensors").chmod(0o644)


def main() -> None:
    network = train().half().float()
    x, y = images("test")
    accuracy = (evaluate(network, as_signal(x))[0] == y).float().mean().item()
    print(f"fashion-classifier: {accuracy:.2%} of the real test images", file=sys.stderr)
    save(network, FOLDER, round(accuracy, 4))


if __name__ == "__main__":
    main()
