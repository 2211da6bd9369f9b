from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgediffusion.bundle import FORMAT, MANIFEST, Bundle, axis_size, write
from edgediffusion.errors import BundleError
from edgediffusion.files import dump_json

GOLDEN = Path(__file__).parent / "golden_bundle.json"
Make = Callable[[Path], Bundle]


@pytest.fixture
def folder(tmp_path: Path, make_bundle: Make) -> Path:
    return make_bundle(tmp_path / "bundle").path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and make its own hash fit again, as somebody would who means harm."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(content)
    content.pop("sha256", None)
    digest = hashlib.sha256(dump_json(content).encode()).hexdigest()
    (folder / MANIFEST).write_text(dump_json({**content, "sha256": digest}), encoding="utf-8")


def test_the_manifest_is_these_bytes(folder: Path) -> None:
    """A change of this file is a change of the format: raise FORMAT, and keep reading the old one."""
    assert (folder / MANIFEST).read_bytes() == GOLDEN.read_bytes()


def test_the_same_content_is_the_same_bytes_wherever_it_lies(tmp_path: Path, make_bundle: Make) -> None:
    a, b = make_bundle(tmp_path / "a"), make_bundle(tmp_path / "elsewhere" / "b")
    assert (a.path / MANIFEST).read_bytes() == (b.path / MANIFEST).read_bytes()
    assert a.digest == b.digest == json.loads((a.path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    assert str(tmp_path) not in (a.path / MANIFEST).read_text(encoding="utf-8")


def test_what_was_written_is_read(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert [c.name for c in bundle.components] == ["text_encoder", "unet"]
    assert bundle.component("unet").inputs[0].shape == ("batch", 4, "height", "width")
    assert bundle.component("text_encoder").feeds == {"last_hidden_state": "encoder_hidden_states"}
    assert bundle.sampling is not None
    assert bundle.sampling.schedule.train_steps == 1000
    assert bundle.history[0].arguments == {"dtype": "float32", "opset": 23}
    assert bundle.with_role("denoise") == (bundle.component("unet"),)
    assert bundle.targets == ()
    assert bundle.size_bytes("unet/") == len("graph of unet")


def test_an_unknown_component_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(BundleError, match="no component 'vae'. Allowed: text_encoder, unet"):
        Bundle.open(folder).component("vae")


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no bundle.json. Make one with: edgediffusion export"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"format": "1"}'])
def test_a_damaged_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"is damaged|is not a bundle manifest"):
        Bundle.open(folder)


def test_a_changed_byte_is_found_even_at_the_same_size(folder: Path) -> None:
    (folder / "unet/model.onnx").write_bytes(b"graph of unEt")
    with pytest.raises(BundleError, match="'unet/model.onnx' .*was changed"):
        Bundle.open(folder)
    assert Bundle.open(folder, verify=False).family == "stable-diffusion"


def test_a_changed_size_is_found_without_hashing(folder: Path) -> None:
    (folder / "unet/model.onnx").write_bytes(b"longer than it was")
    with pytest.raises(BundleError, match="was changed"):
        Bundle.open(folder, verify=False)


def test_a_changed_manifest_is_found(folder: Path) -> None:
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    (folder / MANIFEST).write_text(text.replace('"guidance_scale": 5.0', '"guidance_scale": 6.0'), encoding="utf-8")
    with pytest.raises(BundleError, match="its own sha256 does not fit"):
        Bundle.open(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"lacks the file 'tokenizer/tokenizer.json'"):
        Bundle.open(folder)


def test_a_newer_format_is_refused_whatever_else_it_says(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT + 1}), encoding="utf-8")
    with pytest.raises(BundleError, match=f"newer edgediffusion. Got: format {FORMAT + 1}. Allowed: format {FORMAT} and older"):
        Bundle.open(folder)


@pytest.mark.parametrize("path", ["../evil.onnx", "/etc/passwd", "unet/../../evil.onnx", "..\\evil.onnx", ""])
@pytest.mark.parametrize("place", ["model", "tokenizer", "files"])
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, path: str, place: str) -> None:
    (folder.parent / "evil.onnx").write_bytes(b"evil")

    def change(content: dict[str, Any]) -> None:
        content["files"][path] = {"sha256": hashlib.sha256(b"evil").hexdigest(), "bytes": 4}
        if place == "model":
            content["components"][1]["model"] = path
        if place == "tokenizer":
            content["components"][0]["tokenizer"]["file"] = path

    rewrite(folder, change)
    with pytest.raises(BundleError, match="a path that leaves its folder"):
        Bundle.open(folder)


def test_a_link_that_leaves_the_folder_is_refused(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes((folder / "unet/model.onnx").read_bytes())
    (folder / "unet/model.onnx").unlink()
    (folder / "unet/model.onnx").symlink_to(secret)
    with pytest.raises(BundleError, match="a link that leaves its folder"):
        Bundle.open(folder)


def test_a_bundle_may_itself_be_reached_by_a_link(folder: Path) -> None:
    (folder.parent / "alias").symlink_to(folder)
    assert Bundle.open(folder.parent / "alias").digest == Bundle.open(folder).digest


def test_a_graph_that_the_manifest_does_not_list_is_refused(folder: Path) -> None:
    rewrite(folder, lambda content: content["files"].pop("unet/model.onnx"))
    with pytest.raises(BundleError, match="uses a file that its manifest does not list"):
        Bundle.open(folder)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "an unknown field": lambda c: c.update(colour="red"),
    "an unknown field of a component": lambda c: c["components"][0].update(colour="red"),
    "an unknown field of a tensor": lambda c: c["components"][0]["inputs"][0].update(colour="red"),
    "an unknown field of sampling": lambda c: c["sampling"].update(colour="red"),
    "an unknown field of the schedule": lambda c: c["sampling"]["schedule"].update(colour="red"),
    "a missing field": lambda c: c["sampling"].pop("height"),
    "a missing part": lambda c: c.pop("history"),
    "an unknown role": lambda c: c["components"][0].update(role="dance"),
    "an unknown prediction": lambda c: c["sampling"].update(prediction="tea leaves"),
    "an unknown guidance": lambda c: c["sampling"].update(guidance="spiritual"),
    "a list where an object belongs": lambda c: c.update(sampling=[]),
    "a cut of what is no part of a denoiser": lambda c: c["components"][1].update(cut="up_blocks.0"),
    "a cut without a name": lambda c: c["components"][1].update(role="denoise.shallow", cut=""),
    "a name fed by no output": lambda c: c["components"][0].update(feeds={"nothing": "encoder_hidden_states"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_field_that_the_format_does_not_know_is_refused(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite(folder, change)
    with pytest.raises(BundleError, match=r"lacks or misstates a field.*docs/bundle-format.md"):
        Bundle.open(folder)


def test_a_field_that_came_later_may_be_missing(folder: Path) -> None:
    rewrite(folder, lambda content: content["components"][0].pop("feeds"))
    assert Bundle.open(folder).component("text_encoder").feeds == {}


def test_engines_are_listed_by_target(tmp_path: Path, make_bundle: Make) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    engine = bundle.path / "engines" / "cpu-x86-64" / "unet.bin"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b"engine")
    digest = hashlib.sha256(b"engine").hexdigest()
    rewrite(bundle.path, lambda content: content["files"].update({"engines/cpu-x86-64/unet.bin": {"sha256": digest, "bytes": 6}}))
    assert Bundle.open(bundle.path).targets == ("cpu-x86-64",)


def test_parts_of_a_denoiser_are_found_by_their_cut(folder: Path) -> None:
    def cut(content: dict[str, Any]) -> None:
        for name, role, module in (("a", "denoise.head", "blocks.0"), ("b", "denoise.tail", "blocks.0"), ("c", "denoise.head", "blocks.1")):
            content["components"].append({**content["components"][1], "name": name, "role": role, "cut": module})

    assert Bundle.open(folder).cuts == ()
    with pytest.raises(BundleError, match=r"no graphs for the cut 'blocks.0'. Allowed: none.*export SOURCE -o BUNDLE --cut blocks.0"):
        Bundle.open(folder).with_cut("blocks.0")
    rewrite(folder, cut)
    bundle = Bundle.open(folder)
    assert bundle.cuts == ("blocks.0", "blocks.1")
    assert {role: c.name for role, c in bundle.with_cut("blocks.0").items()} == {"denoise.head": "a", "denoise.tail": "b"}
    with pytest.raises(BundleError, match=r"no graphs for the cut 'blocks.2'. Allowed: blocks.0, blocks.1"):
        bundle.with_cut("blocks.2")


@pytest.mark.parametrize(
    ("axis", "size"),
    [
        ("height", 12),
        ("height/4", 3),
        ("height*width/4", 24),
        ("height*width", 96),
        ("height/5", None),  # no whole number
        ("height/0", None),
        ("height/x", None),
        ("depth", None),
        ("depth*height", None),
        ("", None),
    ],
)
def test_the_size_of_an_axis_that_is_a_part_of_others(axis: str, size: int | None) -> None:
    assert axis_size(axis, {"height": 12, "width": 8}) == size


def test_a_file_with_several_names_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr("edgediffusion.bundle.checks.sha256", lambda file: read.append(file) or "0" * 64)
    (folder / "unet" / "again.bin").hardlink_to(folder / "unet" / "model.onnx")
    bundle = Bundle.open(folder, verify=False)
    write(folder, family="x", components=bundle.components, sampling=None, history=())
    assert len(read) == len(bundle.files)


FACTS = {"clip": 1.0, "time_ids": ["original_height", "crop_left", "aesthetic_score"], "zero_unconditional": True}


def test_facts_that_may_be_missing_are_read_and_written_only_if_they_say_something(folder: Path) -> None:
    plain = (folder / MANIFEST).read_bytes()
    assert not any(key.encode() in plain for key in FACTS)
    rewrite(folder, lambda content: content["sampling"].update(FACTS))
    stated, bundle = (folder / MANIFEST).read_bytes(), Bundle.open(folder)
    assert bundle.sampling is not None
    assert (bundle.sampling.clip, bundle.sampling.zero_unconditional) == (1.0, True)
    assert bundle.sampling.time_ids == ("original_height", "crop_left", "aesthetic_score")
    write(folder, family=bundle.family, components=bundle.components, sampling=bundle.sampling, history=bundle.history)
    assert (folder / MANIFEST).read_bytes() == stated


@pytest.mark.parametrize("facts", [{"clip": 0}, {"clip": "1"}, {"time_ids": ["height"]}])
def test_facts_that_cannot_be_are_refused(folder: Path, facts: dict[str, Any]) -> None:
    rewrite(folder, lambda content: content["sampling"].update(facts))
    with pytest.raises(BundleError, match=f"{next(iter(facts))} "):
        Bundle.open(folder)


def test_graphs_of_controlnets_are_no_parts_of_the_denoiser(folder: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        unet = content["components"][1]
        control = {**unet, "name": "controlnet", "role": "control"}
        content["components"] += [control, {**control, "role": "control.shallow", "cut": "up_blocks.1.resnets.0"}]

    rewrite(folder, add)
    bundle = Bundle.open(folder)
    assert (len(bundle.with_role("control")), len(bundle.with_role("control.shallow"))) == (1, 1)
    assert bundle.cuts == ()
    with pytest.raises(BundleError, match="no graphs for the cut"):
        bundle.with_cut("up_blocks.1.resnets.0")
