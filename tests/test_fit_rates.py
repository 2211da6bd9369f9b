"""The arithmetic of estimates: rates of targets, times of pieces, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgediffusion import targets
from edgediffusion.errors import ArgumentError
from edgediffusion.targets import fit
from edgediffusion.targets.fit import Piece, Processor, Rates

RATES = Rates({"float32": 1e12, "float16": 4e12, "int8": 8e12}, bandwidth=1e11, cached_bandwidth=4e11, node_s=1e-6)
PROCESSOR = Processor(2e11, 1e11, 2e10, 16 << 30, ("avx2", "avx512_vnni"))


def test_a_node_takes_its_operations_its_bytes_and_a_constant() -> None:
    found = fit.estimate([Piece(4e9, "float16", 2e6, 1e6)], RATES)
    assert found.compute_s == pytest.approx(1e-3)
    assert found.memory_s == pytest.approx(2e6 / 1e11 + 1e6 / 4e11)
    assert found.seconds == pytest.approx(found.compute_s + found.memory_s + 1e-6)
    assert found.bound == "compute"


def test_what_caches_do_not_hold_comes_from_memory() -> None:
    (small, large) = (fit.estimate([Piece(0, "", 0, size)], RATES).memory_s for size in (16e6, 32e6))
    assert small == pytest.approx(16e6 / 4e11)
    assert large == pytest.approx(32e6 / 1e11)
    assert fit.estimate([Piece(0, "", 0, 1)], RATES).bound == "memory"


def test_the_roofline_is_never_beaten_and_never_doubled() -> None:
    pieces = [Piece(10.0**exponent, "int8", 1e6, 1e5) for exponent in range(6, 13)]
    for piece in pieces:
        found = fit.estimate([piece], replace(RATES, node_s=0.0))
        roofline = max(found.compute_s, found.memory_s)
        assert roofline <= found.seconds <= 2 * roofline


@pytest.mark.parametrize(("format", "rate"), [("int8", 8e12), ("fp8", 4e12), ("int4", 8e12), ("fp4", 4e12), ("bfloat16", 4e12)])
def test_a_format_without_kernels_runs_as_the_next_wider_one(format: str, rate: float) -> None:
    assert RATES.of(format) == rate


@pytest.mark.parametrize("name", targets.names())
def test_every_target_has_rates_or_says_what_it_lacks(name: str) -> None:
    target = targets.load(name)
    known = target.device == "cpu" or (target.engines[0].startswith("tensorrt") and target.peak_tops and target.bandwidth_gb_s)
    if not known:
        with pytest.raises(ArgumentError, match="lacks facts|is not known"):
            fit.rates(target)
        return
    found = fit.rates(target, PROCESSOR if target.device == "cpu" else None)
    assert found.bandwidth > 0
    assert all(rate > 0 for rate in found.operations.values())
    assert set(target.formats) & set(found.operations)


def test_a_share_of_the_peak_is_never_more_than_the_peak() -> None:
    """But for float16 on GeForce, whose stated rate is that of sums in float32."""
    for target in map(targets.load, targets.names()):
        if target.device != "gpu" or not target.peak_tops or not target.bandwidth_gb_s:
            continue
        found = fit.rates(target)
        assert found.bandwidth <= target.bandwidth_gb_s * 1e9
        for format, tops in target.peak_tops.items():
            if format in found.operations and format != "float32":
                assert found.operations[format] <= (2 if format == "float16" else 1) * tops * 1e12


def test_geforce_adds_up_in_float16_at_twice_its_stated_rate() -> None:
    geforce, server = targets.load("rtx-4090"), targets.load("l40s")
    share = fit.rates(server).operations["float16"] / (server.peak_tops["float16"] * 1e12)
    assert fit.rates(geforce).operations["float16"] == pytest.approx(2 * share * geforce.peak_tops["float16"] * 1e12)


def test_codes_are_no_faster_than_floats_without_the_instructions() -> None:
    target = targets.load("cpu-x86-64")
    fast, slow = (fit.rates(target, replace(PROCESSOR, instructions=names)) for names in (("avx2", "avx512_vnni"), ("avx2",)))
    assert fast.operations["int8"] > 2 * fast.operations["float32"]
    assert slow.operations["int8"] == slow.operations["float32"]


def test_an_older_gpu_of_a_line_lends_its_share_to_one_that_was_not_fitted() -> None:
    table = {"peak": {"8.0": 0.4, "8.9": 0.5}}
    assert [fit._share(table, capability) for capability in ("7.5", "8.0", "8.7", "8.9", "12.0")] == [0.4, 0.4, 0.4, 0.5, 0.5]


def test_figures_of_a_processor_may_come_from_its_own_file() -> None:
    """Shares are taken of them too, so that a file and a measurement of the same processor agree."""
    target = replace(targets.load("cpu-arm64"), peak_tops={"float32": 0.2, "int8": 0.8}, bandwidth_gb_s=20.0)
    found = fit.rates(target)
    assert found.bandwidth == 2e10
    assert set(found.operations) == {"float32", "int8"}


def test_says_which_facts_are_missing() -> None:
    gpu = replace(targets.load("rtx-4090"), bandwidth_gb_s=0.0)
    with pytest.raises(ArgumentError, match=r"'rtx-4090' lacks facts.*bandwidth_gb_s.*docs/targets.md"):
        fit.rates(gpu)
    with pytest.raises(ArgumentError, match=r"'cpu-arm64' lacks facts.*peak_tops, bandwidth_gb_s.*--target auto"):
        fit.rates(targets.load("cpu-arm64"))
    with pytest.raises(ArgumentError, match="memory_gb"):
        fit.memory_bytes(targets.load("cpu-arm64"))


def test_an_engine_without_any_figure_is_refused() -> None:
    with pytest.raises(ArgumentError, match="How fast 'openvino' is on 'intel-npu' is not known"):
        fit.rates(targets.load("intel-npu"))


def test_the_smallest_target_that_would_do() -> None:
    found = fit.smallest_with(30 << 30, device="gpu")
    assert found is not None
    assert found.memory_gb >= 30
    assert all(t.memory_gb >= found.memory_gb or t.memory_gb < 30 for t in map(targets.load, targets.names()) if t.device == "gpu")
    assert fit.smallest_with(1 << 50, device="gpu") is None


def test_says_how_far_it_was_off_and_where_that_is_not_known() -> None:
    assert "median" in "".join(fit.known_error(targets.load("a100")).values())
    assert not any("compute capability" in what for what in fit.known_error(targets.load("a100")))
    assert "not known" in fit.known_error(targets.load("jetson-orin-nano"))["compute capability 8.7"]


def test_every_share_of_the_file_is_a_share() -> None:
    table = fit.known_rates()
    assert set(table) == {"onnxruntime", "openvino", "tensorrt"}
    assert all(0 < share <= 1 for share in table["tensorrt"]["peak"].values())
    assert 0 < table["tensorrt"]["bandwidth"] <= 1
    assert (Path(fit.__file__).parent / "_rates.toml").is_file()
    assert "_rates" not in targets.names()
