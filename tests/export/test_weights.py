"""Where weights lie, what is written anew, in which dtype, and what is said before: on graphs of three weights, without tracing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from edgediffusion.errors import ArgumentError, Cancelled, OutputError, SourceError
from edgediffusion.export import _opset, weights
from edgediffusion.export.bfloat16 import speak_float32
from edgediffusion.export.checkpoint import Stored, read_header
from edgediffusion.export.estimate import Estimate, Work, estimate, refuse_full_disk
from edgediffusion.export.hashing import hashing
from edgediffusion.export.kept import keep, kept_by_diffusers, read_kept
from edgediffusion.export.lora import LowRank
from edgediffusion.export.skeleton import skeleton
from edgediffusion.export.source import Source
from edgediffusion.export.weights import attach, converted_bytes
from edgediffusion.files import sha256

FLOAT, HALF, BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
SHAPES = {"a": (6, 4), "b": (5,), "c": (3, 2, 2)}


def values(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def stored_in(folder: Path, tensors: dict[str, torch.Tensor], *, files: int = 1) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for number in range(files):
        file = folder / f"source-{number}.safetensors"
        save_torch({name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % files == number}, file)
        found |= read_header(file)[0]
    return found


def graph(dtype: ir.DataType, **others: ir.DataType) -> ir.Model:
    """Every weight goes through a node of its own to an output."""
    weights = [ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(others.get(name, dtype))) for name, shape in SHAPES.items()]
    nodes = [ir.node("Identity", [value]) for value in weights]
    made = ir.Graph([], [node.outputs[0] for node in nodes], nodes=nodes, opset_imports={"": 20}, name="main")
    for value in weights:
        made.initializers[str(value.name)] = value
    return ir.Model(made, ir_version=10)


def held(model: ir.Model, folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """File and values of every weight, read from the place that its initializer names."""
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        content = (folder / str(tensor.location)).read_bytes()[tensor.offset : (tensor.offset or 0) + (tensor.length or 0)]
        found[name] = (str(tensor.location), np.frombuffer(content, tensor.dtype.numpy()).reshape(SHAPES[name]))
    return found


@pytest.fixture(params=[8, 1 << 24], ids=["blocks of a row", "at once"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
class TestAttach:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        (tmp_path / "source").mkdir()
        return tmp_path / "source"

    @pytest.mark.parametrize(("dtype", "name"), [(HALF, "float16"), (BRAIN, "bfloat16")])
    def test_casts_are_torchs(self, source: Path, tmp_path: Path, dtype: ir.DataType, name: str) -> None:
        model, tensors = graph(dtype), values()
        (tmp_path / "out").mkdir()
        attach(model, stored_in(source, tensors), tmp_path / "out", link=True, placed={})
        assert [file.name for file in (tmp_path / "out").iterdir()] == [weights.CONVERTED]
        written = load_torch(tmp_path / "out" / weights.CONVERTED)
        assert all(torch.equal(written[key], tensor.to(getattr(torch, name))) for key, tensor in tensors.items())
        assert not [node for node in model.graph if node.op_type == "Cast"]

    def test_a_change_moves_one_weight_alone(self, source: Path, tmp_path: Path) -> None:
        """The others stay in their two linked files; what changes is float32 of the right sum."""
        (tmp_path / "lora").mkdir()
        down, up = np.ones((2, 4), np.float32), np.arange(12, dtype=np.float32).reshape(6, 2)
        save_file({"down": down, "up": up}, tmp_path / "lora" / "l.safetensors")
        halves = read_header(tmp_path / "lora" / "l.safetensors")[0]
        change = {"a": [LowRank(halves["down"], halves["up"], 0.5, 0, 6)]}
        model, tensors, folder = graph(FLOAT), values(), tmp_path / "out"
        folder.mkdir()
        at = stored_in(source, tensors, files=3)
        attach(model, at, folder, link=True, placed={}, changes=change)
        found = held(model, folder)
        assert {name: file for name, (file, _) in found.items()} == {
            "a": weights.CONVERTED,
            "b": "source-1.safetensors",
            "c": "source-2.safetensors",
        }
        assert sorted(file.name for file in folder.iterdir()) == ["source-1.safetensors", "source-2.safetensors", weights.CONVERTED]
        assert (folder / "source-1.safetensors").samefile(source / "source-1.safetensors")
        np.testing.assert_allclose(found["a"][1], tensors["a"].numpy() + 0.5 * up @ down, rtol=1e-6)
        assert converted_bytes(at, dict.fromkeys(SHAPES, FLOAT), change) == (folder / weights.CONVERTED).stat().st_size - _header(folder)

    def test_a_change_of_a_half_weight_is_as_exact_as_the_graph(self, source: Path, tmp_path: Path) -> None:
        save_file({"down": np.ones((1, 4), np.float32), "up": np.full((6, 1), 1e-3, np.float32)}, tmp_path / "l.safetensors")
        halves = read_header(tmp_path / "l.safetensors")[0]
        model, tensors, folder = graph(FLOAT), values(torch.float16), tmp_path / "out"
        folder.mkdir()
        change = {"a": [LowRank(halves["down"], halves["up"], 1.0, 0, 6)]}
        attach(model, stored_in(source, tensors), folder, link=True, placed={}, changes=change)
        found = held(model, folder)
        assert found["a"][1].dtype == np.float32
        np.testing.assert_allclose(found["a"][1], tensors["a"].float().numpy() + 1e-3, rtol=1e-6)
        assert found["b"][1].dtype == np.float16

    def test_modules_kept_in_float32_are_written_as_they_were(self, source: Path, tmp_path: Path) -> None:
        model, tensors, folder = graph(HALF, b=FLOAT), values(), tmp_path / "out"
        folder.mkdir()
        attach(model, stored_in(source, tensors), folder, link=True, placed={})
        found = held(model, folder)
        assert [file.name for file in folder.iterdir()] == [weights.CONVERTED]
        assert found["a"][1].dtype == np.float16
        assert found["b"][1].tobytes() == tensors["b"].numpy().tobytes()

    def test_bfloat16_does_not_fit_into_float16(self, source: Path, tmp_path: Path) -> None:
        tensors = {**values(torch.bfloat16), "b": torch.full((5,), 1e6, dtype=torch.bfloat16)}
        (tmp_path / "out").mkdir()
        with pytest.raises(
            SourceError, match=r"'b' does not fit into float16\. Got: a magnitude of 999424\. Allowed: up to 65504\..*--keep-fp32"
        ):
            attach(graph(HALF), stored_in(source, tensors), tmp_path / "out", link=True, placed={})


def _header(folder: Path) -> int:
    return 8 + int.from_bytes((folder / weights.CONVERTED).read_bytes()[:8], "little")


class TestBfloat16:
    def test_speaks_float32_and_cuts_too(self) -> None:
        """x, 2x and 6x: what is given and read again is rounded once."""
        text = """<ir_version: 10, opset_import: ["" : 20]>
        main (bfloat16[4] x) => (bfloat16[4] cut, bfloat16[4] y) { cut = Add (x, x)  two = Add (cut, cut)  y = Add (two, cut) }"""
        model = ir.from_onnx_text(text)
        speak_float32(model.graph)
        graph = model.graph
        assert [(value.name, value.dtype) for value in (*graph.inputs, *graph.outputs)] == [(n, FLOAT) for n in ("x", "cut", "y")]
        (given,) = (node for node in graph if node.outputs[0].name == "cut")
        assert {use.node.op_type for use in given.outputs[0].uses()} == {"Cast"}
        graph.sort()
        assert [node.op_type for node in graph].count("Cast") == 4


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.last = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.large[0](x))  # type: ignore[no-any-return]


class TestKept:
    def test_a_kept_module_computes_in_float32_between_halves(self) -> None:
        network = Inner().half()
        network.large[0].float()
        keep(network, "vae", ("large.0",), torch.float16)
        seen: list[torch.dtype] = []
        network.large[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
        network.last.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
        assert network(torch.zeros(1, 4, dtype=torch.float16)).dtype == torch.float16
        assert seen == [torch.float32, torch.float16]

    def test_refuses_what_is_not_there(self) -> None:
        with pytest.raises(ArgumentError, match=r"no component 'vea'.* Got: vea\.decoder\. Allowed: unet, vae"):
            read_kept(("vea.decoder",), ("vae", "unet"))
        with pytest.raises(ArgumentError, match=r"'vae' has no module 'large\.7'.* Allowed: vae\.large\.0"):
            keep(Inner(), "vae", ("large.7",), torch.float16)
        with pytest.raises(ArgumentError, match=r"'vae\.large' is a list of modules"):
            keep(Inner(), "vae", ("large",), torch.float16)

    @pytest.mark.parametrize(
        ("pipeline", "flag", "kept"),
        [("StableDiffusionXLPipeline", True, ("vae",)), ("StableDiffusionXLPipeline", False, ()), ("StableDiffusionPipeline", True, ())],
    )
    def test_the_autoencoder_of_classes_that_heed_its_flag(self, tmp_path: Path, pipeline: str, flag: bool, kept: tuple[str, ...]) -> None:
        (tmp_path / "vae").mkdir()
        (tmp_path / "vae" / "config.json").write_text(json.dumps({"force_upcast": flag}))
        source = Source(tmp_path, {"_class_name": pipeline, "vae": ["diffusers", "AutoencoderKL"]})
        assert kept_by_diffusers(source) == kept


class TestTargets:
    def test_a_dtype_that_a_target_lacks_is_refused(self) -> None:
        with pytest.raises(ArgumentError, match=r"'cpu-x86-64' does not compute in bfloat16\. Allowed: float32, int8\. Export in float32"):
            _opset(None, "bfloat16", "cpu-x86-64")

    def test_the_opset_is_the_targets(self) -> None:
        assert (_opset(None, "float16", "jetson-orin-nano"), _opset(None, "float32", "cpu-x86-64"), _opset(None, "float32", None)) == (
            20,
            23,
            23,
        )
        assert _opset(18, "float16", "jetson-orin-nano") == 18
        with pytest.raises(ArgumentError, match="reads older opsets. Got: 21. Allowed: 18 to 20"):
            _opset(21, "float16", "jetson-orin-nano")


class TestEstimate:
    def files(self, folder: Path, megabytes: int) -> list[Path]:
        file = folder / "big.safetensors"
        with open(file, "wb") as stream:
            stream.truncate(megabytes * 1_000_000)
        return [file]

    def test_links_write_graphs_alone_and_copies_all(self, tmp_path: Path) -> None:
        files = self.files(tmp_path, 3000)
        linked, copied = (estimate([Work(686, 0)], files, tmp_path, link=link) for link in (True, False))
        assert linked.read_bytes == copied.read_bytes == 3_000_000_000
        assert linked.written_bytes < 10_000_000
        assert copied.written_bytes - linked.written_bytes == 3_000_000_000
        assert copied.seconds > linked.seconds

    def test_casts_write_what_they_make(self, tmp_path: Path) -> None:
        found = estimate([Work(100, 1_500_000_000)], self.files(tmp_path, 3000), tmp_path, link=False)
        assert 1_500_000_000 < found.written_bytes < 1_510_000_000

    def test_is_one_line(self) -> None:
        assert (
            str(Estimate(4, 1000, 3_400_000_000, 12_000_000, 600_000_000, 15.2))
            == "will read 3.4 GB, write 12 MB, need about 600 MB of memory and 15 s"
        )

    def test_a_full_disk_is_said_before_the_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1_000_000))
        with pytest.raises(
            OutputError, match=r"too full for this bundle\. Got: 1 MB free\. Allowed: 2 GB and more\. Free some space.*link"
        ):
            refuse_full_disk(Estimate(1, 1, 1, 2_000_000_000, 1, 1.0), tmp_path / "bundle")
        refuse_full_disk(Estimate(1, 1, 1, 900_000, 1, 1.0), tmp_path / "bundle")


class TestHashing:
    def test_is_sha256(self, tmp_path: Path) -> None:
        files = [tmp_path / name for name in ("one", "two", "none")]
        for file, content in zip(files, (b"x" * 3_000_000, b"y", b""), strict=True):
            file.write_bytes(content)
        with hashing(files) as digests:
            assert digests() == {file: sha256(file) for file in files}

    def test_leaving_ends_it(self, tmp_path: Path) -> None:
        with open(tmp_path / "big", "wb") as stream:
            stream.truncate(1 << 40)  # hours of work
        kept: list[Any] = []
        with pytest.raises(KeyboardInterrupt), hashing([tmp_path / "big"]) as digests:
            kept.append(digests)
            raise KeyboardInterrupt
        with pytest.raises(Cancelled):
            kept[0]()


class Positions(torch.nn.Module):
    """A network with a table that a checkpoint holds, and perhaps one that it does not."""

    def __init__(self, extra: bool, attribute: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(8.0))
        if extra:
            self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)
        if attribute:
            self.plain = torch.ones(2)


class TestSkeleton:
    def test_stored_tables_are_not_computed(self) -> None:
        devices: list[str] = []

        def build() -> torch.nn.Module:
            network = Positions(extra=False)
            devices.append(network.get_buffer("table").device.type)
            return network

        bones = skeleton(build, torch.float16)
        assert devices == ["meta"]
        assert bones.shapes == {"layer.weight": (4, 4), "layer.bias": (4,), "table": (8,)}
        assert bones.network.get_buffer("table").dtype == torch.float16

    @pytest.mark.parametrize("options", [{"extra": True}, {"extra": False, "attribute": True}])
    def test_values_that_no_checkpoint_holds_are(self, options: dict[str, bool]) -> None:
        bones = skeleton(lambda: Positions(**options), torch.float32)
        if options["extra"]:
            assert bones.constants["scale"].tolist() == [3.0, 3.0]
        else:
            assert bones.network.plain.tolist() == [1.0, 1.0]  # type: ignore[operator, union-attr]
        assert set(bones.shapes) == {"layer.weight", "layer.bias", "table"}

    def test_a_constructor_that_looks_at_values_is_run_with_values(self) -> None:
        def build() -> torch.nn.Module:
            assert torch.arange(3.0).sum().item() == 3
            return Positions(extra=False)

        assert skeleton(build, torch.float32).network.get_buffer("table").shape == (8,)
