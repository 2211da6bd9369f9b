"""Whether a pipeline fits: what is counted, in which order is traded, and what is said where nothing helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgediffusion import targets
from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError
from edgediffusion.profiles.fit import fit
from edgediffusion.profiles.fit_machine import processor_of, this_processor
from edgediffusion.profiles.fit_report import fit_table
from edgediffusion.profiles.fit_work import narrowed, pieces
from edgediffusion.runtimes.work import graph_work
from edgediffusion.targets.fit import Processor
from tests.runtimes.tiny import SAMPLING, write_bundle

PROCESSOR = Processor(2e11, 1e11, 2e10, 16 << 30, ("avx2", "avx512_vnni"))
CPU, GPU = targets.load("cpu-x86-64"), targets.load("rtx-4090")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("fit") / "bundle")


def test_every_component_with_its_calls(bundle: Bundle) -> None:
    found = fit(bundle, CPU, processor=PROCESSOR, steps=7)
    assert [(part.name, part.calls) for part in found.components] == [("text_encoder", 2), ("unet", 7), ("vae_decoder", 1)]
    assert found.picture_s == pytest.approx(sum(part.seconds * part.calls for part in found.components))
    assert found.step_s == found.components[1].seconds
    assert found.needed_bytes == found.idle_bytes + sum(part.total_bytes for part in found.components)
    for part in found.components:
        assert part.total_bytes == part.weight_bytes + part.activation_bytes + part.workspace_bytes


def test_guidance_doubles_the_rows(bundle: Bundle) -> None:
    with_it, without = (fit(bundle, CPU, processor=PROCESSOR, guidance=guidance) for guidance in (None, False))
    unet, half = with_it.components[1], without.components[1]
    assert unet.operations == 2 * half.operations
    assert [part.calls for part in without.components] == [1, 3, 1]


def test_a_larger_picture_takes_more(bundle: Bundle) -> None:
    small, large = (fit(bundle, CPU, processor=PROCESSOR, height=side, width=side) for side in (16, 64))
    assert large.components[2].operations == 16 * small.components[2].operations
    assert large.picture_s > small.picture_s
    assert large.components[1].weight_bytes == small.components[1].weight_bytes


def test_pictures_share_a_batch(bundle: Bundle) -> None:
    found = fit(bundle, CPU, processor=PROCESSOR, batch=4)
    assert [part.calls for part in found.components] == [8, 3, 4]  # a prompt and a picture at a time, as the runtime has it
    assert found.components[1].operations == 4 * fit(bundle, CPU, processor=PROCESSOR).components[1].operations


def test_trades_in_order_and_stops_where_it_fits(bundle: Bundle) -> None:
    asked = {"height": 512, "width": 512, "batch": 4, "processor": PROCESSOR}
    whole = fit(bundle, CPU, **asked)
    assert [way.name for way in whole.tried] == ["as it is"]
    staged = fit(bundle, CPU, max_memory=whole.needed_bytes - 1, **asked)
    assert [way.fits for way in staged.tried] == [False, True]
    assert "one stage in memory at a time" in staged.tried[1].name
    least = fit(bundle, CPU, max_memory=1, **asked)
    assert [way.name for way in least.tried] == [
        "as it is",
        "one stage in memory at a time, encoders unloaded after encoding",
        "denoiser in int8",  # processors have no float16 kernels
        "the decoder in tiles of 256 pixels",
        "the decoder in tiles of 128 pixels",
        "2 at a time",
        "1 at a time",
    ]
    needed = [way.needed_bytes for way in least.tried]
    assert needed == sorted(needed, reverse=True)
    for before, after in zip(least.tried, least.tried[1:], strict=False):
        if after.needed_bytes < before.needed_bytes:
            again = fit(bundle, CPU, max_memory=after.needed_bytes, **asked)
            assert again.fits
            assert again.tried[-1].needed_bytes <= after.needed_bytes
            assert "tiles" in after.name or again.tried[-1].name == after.name  # with more room the decoder may do without tiles


def test_float16_is_tried_where_there_are_kernels_for_it(bundle: Bundle) -> None:
    tried = [way.name for way in fit(bundle, GPU, max_memory=1).tried]
    assert tried[2:4] == ["graphs in float16", "denoiser in int8"]


def test_a_clear_no_names_what_would_do(bundle: Bundle) -> None:
    found = fit(bundle, GPU, max_memory=1)
    assert not found.fits
    assert found.smallest_target is not None
    assert f"It does not fit: with all that can be traded it takes {found.needed_bytes // 10**6} MB" in fit_table(found)
    assert f"'{found.smallest_target}'" in fit_table(found)


def test_tiles_are_called_as_often_as_the_runtime_does(bundle: Bundle) -> None:
    found = fit(bundle, CPU, processor=PROCESSOR, height=512, width=256, max_memory=1)
    decoder = found.components[2]
    assert decoder.calls == 6 * 3  # tiles of 128 begin every 96 pixels
    assert "the decoder in tiles of 128 pixels" in [way.name for way in found.tried]


def test_half_of_the_bytes_and_the_same_operations(bundle: Bundle) -> None:
    work = graph_work(bundle.path / "unet/model.onnx", {"batch": 2, "height": 8, "width": 8})
    half, codes = narrowed(work, "float16"), narrowed(work, "int8")
    assert half.operations == codes.operations == work.operations
    assert half.peak_bytes == pytest.approx(work.peak_bytes / 2, abs=1)
    assert half.weight_bytes == pytest.approx(work.weight_bytes / 2, abs=1)
    kernels = [node for node in work.nodes if node.operations and node.weight_bytes]
    assert work.weight_bytes - codes.weight_bytes == sum(node.weight_bytes - node.weight_bytes // 4 for node in kernels)
    assert {piece.format for piece in pieces(codes, "onnxruntime") if piece.operations} == {"int8"}
    assert narrowed(codes, "int8").weight_bytes == codes.weight_bytes


def test_what_tensorrt_fuses_is_no_kernel(bundle: Bundle) -> None:
    work = graph_work(bundle.path / "unet/model.onnx", {"batch": 2, "height": 8, "width": 8})
    assert len(pieces(work, "onnxruntime")) == len(work.nodes)
    assert len(pieces(work, "tensorrt")) == sum(node.operator in ("Conv", "MatMul", "ReduceMean") for node in work.nodes)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"height": 17}, "The height cannot be drawn. Got: 17. Allowed: multiples of 4"),
        ({"steps": 0}, "'steps' is too small"),
        ({"batch": 0}, "'batch' is too small"),
    ],
)
def test_what_cannot_be_drawn_is_refused(bundle: Bundle, asked: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        fit(bundle, CPU, processor=PROCESSOR, **asked)


def test_guidance_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    plain = write_bundle(tmp_path / "plain", sampling=replace(SAMPLING, guidance="none"))
    assert fit(plain, CPU, processor=PROCESSOR).components[1].calls == SAMPLING.steps
    with pytest.raises(ArgumentError, match="no guidance that doubles the rows"):
        fit(plain, CPU, processor=PROCESSOR, guidance=True)


def test_another_size_of_a_fixed_pipeline_is_refused(tmp_path: Path) -> None:
    fixed = write_bundle(tmp_path / "fixed", sampling=replace(SAMPLING, fixed_size=True))
    with pytest.raises(ArgumentError, match="draws one width only"):
        fit(fixed, CPU, processor=PROCESSOR, width=32)


def test_a_bundle_of_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="does not say how it is drawn from"):
        fit(write_bundle(tmp_path / "graphs", sampling=None), CPU, processor=PROCESSOR)


def test_this_processor_is_measured_within_reason() -> None:
    found = this_processor()
    assert 1e9 < found.float32 < 1e14
    assert 1e8 < found.bandwidth <= found.cached_bandwidth < 1e13
    assert found.memory_bytes > 1 << 28


def test_a_target_with_figures_of_its_own_is_not_measured() -> None:
    assert processor_of(GPU) is None
    assert processor_of(replace(CPU, peak_tops={"float32": 1.0}, bandwidth_gb_s=20.0)) is None
    assert processor_of(replace(CPU, architecture="sparc")) is None
