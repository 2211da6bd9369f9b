"""An independent judge of fashion pictures: a small CNN that has seen real Fashion-MNIST training images only.

    python -m training.classifier            resumes; writes edgediffusion/reference/fashion-classifier
    python -m training.classifier --judge    only writes the judge's files there anew, from the weights that are there

The folder's ``config.json`` lists the layers in order, so that any runtime can rebuild the network from it. Beside it lies
the same network as a judge for ``edgediffusion compare``, which knows no torch: ``judge.onnx``, ``judge.json`` and, in
``real.npz``, mean and covariance of the test images' features. docs/quality.md specifies these.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

from edgediffusion.files import dump_json, new_file, new_folder
from edgediffusion.profiles import gaussian, judges
from training import data
from training.loop import Plan, Trainer, device

FOLDER = Path(__file__).parent.parent / "edgediffusion" / "reference" / "fashion-classifier"
PLAN = Plan(steps=2800, batch=128, learning_rate=2e-3, warmup=100, decay_part=0.6, ema=0.99)
# (channels in, channels out, stride) of the 3x3 convolutions, each followed by a ReLU.
CONVOLUTIONS = ((1, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 96, 2))
YARDSTICKS = tuple(2**k for k in range(4, 14))  # numbers of real training images whose Fréchet distance is told
SUBSETS = 20  # of the training images, for each of them


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


# --- the judge


def write_onnx(network: Classifier, file: Path) -> None:
    """The network as plain ONNX operators, with every activation, the features and the logits as outputs."""
    nodes, outputs, x = [], [], "pixels"
    for n, convolution in enumerate(network.convolutions):
        stride, padding = list(convolution.stride), 2 * list(convolution.padding)
        weights = [f"convolutions.{n}.weight", f"convolutions.{n}.bias"]
        nodes.append(helper.make_node("Conv", [x, *weights], [f"sum_{n}"], f"conv_{n}", strides=stride, pads=padding))
        nodes.append(helper.make_node("Relu", [f"sum_{n}"], [x := f"layer_{n}"], x))
        outputs.append((x, ["batch", convolution.out_channels, f"height_{n}", f"width_{n}"]))
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["features"], "flatten"),
        helper.make_node("Gemm", ["features", "head.weight", "head.bias"], ["logits"], "head", transB=1),
    ]
    outputs += [("features", ["batch", network.head.in_features]), ("logits", ["batch", network.head.out_features])]
    weights = [numpy_helper.from_array(v.detach().float().numpy(), k) for k, v in network.state_dict().items()]
    graph = helper.make_graph(nodes, "fashion-classifier", [_value("pixels", ["batch", 1, 32, 32])], [_value(*o) for o in outputs], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="edgediffusion")
    onnx.checker.check_model(model, full_check=True)
    with new_file(file, replace=True) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))


def _value(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def write_judge(network: Classifier, folder: Path) -> None:
    """``judge.onnx``, ``real.npz`` and ``judge.json``; what the judge says of real images is found out by itself."""
    write_onnx(network, folder / "judge.onnx")
    content = {
        "format": judges.FORMAT,
        "what": "Fashion-MNIST classifier, trained on real images only; judges pictures of 32x32 greys, the item bright on black",
        "model": "judge.onnx",
        "input": {"layout": "nchw", "height": 32, "width": 32, "channels": 1, "mean": 0.5, "std": 0.5},
        "outputs": {"logits": "logits", "features": "features", "layers": [f"layer_{n}" for n in range(len(network.convolutions))]},
        "classes": data.FASHION_NAMES,
        "prompts": judge_prompts(),
    }
    _write_json(folder, content)
    judge = judges.load(folder)
    x, y = images("test")
    test = judge.look(as_pixels(x), layers=False)
    judges.write_real(folder / "real.npz", test.features)
    train_features = judge.look(as_pixels(images("train")[0]), layers=False).features
    accuracy = float(np.mean(test.logits.argmax(1) == y.numpy()))
    yardsticks = frechet_of_real(train_features, gaussian.fit(test.features))
    _write_json(folder, {**content, "real": {"statistics": "real.npz", "agreement": round(accuracy, 4), "frechet": yardsticks}})


def judge_prompts() -> list[str]:
    """Captions without a tone, six for each class, the classes in turn: any number of them shows every class about as often."""
    captions = [data.fashion_captions(label, None) for label in range(len(data.FASHION_NAMES))]
    return [of_class[n % len(of_class)] for n in range(6) for of_class in captions]


def frechet_of_real(train_features: np.ndarray, test: gaussian.Gaussian) -> dict[str, float]:
    """The Fréchet distance of n real training images to the test set, the mean over ``SUBSETS`` of them; and of all of them."""
    rng, root = np.random.default_rng(0), gaussian.root(test.covariance)
    found = {}
    for n in YARDSTICKS:
        subsets = [rng.choice(len(train_features), n, replace=False) for _ in range(SUBSETS)]
        found[n] = np.mean([gaussian.frechet(test, gaussian.fit(train_features[subset]), root_a=root) for subset in subsets])
    found[len(train_features)] = gaussian.frechet(test, gaussian.fit(train_features), root_a=root)
    return {str(n): round(float(value), 4) for n, value in found.items()}


def as_pixels(pixels: torch.Tensor) -> np.ndarray:
    """[n, 1, 32, 32] of 0..255 to [n, 32, 32, 1] of 0..1."""
    return (pixels.permute(0, 2, 3, 1).float() / 255).numpy()


def _write_json(folder: Path, content: dict) -> None:
    with new_file(folder / "judge.json", replace=True) as partial:
        partial.write_text(dump_json(content), encoding="utf-8")


def main() -> None:
    if sys.argv[1:] == ["--judge"]:
        write_judge(load(), FOLDER)
        return
    network = train().half().float()
    x, y = images("test")
    accuracy = (evaluate(network, as_signal(x))[0] == y).float().mean().item()
    print(f"fashion-classifier: {accuracy:.2%} of the real test images", file=sys.stderr)
    save(network, FOLDER, round(accuracy, 4))
    write_judge(network, FOLDER)


if __name__ == "__main__":
    main()
