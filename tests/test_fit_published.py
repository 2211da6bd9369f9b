"""The shares that ship, on published times: the bound that they were held to, on rows that they were not fitted on."""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path
from types import ModuleType

import pytest

from edgediffusion import targets

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("fit")


def test_half_of_the_pairs_of_network_and_target_are_held_out(benchmark: ModuleType) -> None:
    sides: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    for row in benchmark.published():
        sides[row["held_out"]].add((next(iter(row["calls"])), row["target"]))
    assert not sides[True] & sides[False]
    assert abs(len(sides[True]) - len(sides[False])) <= 1
    assert sum(map(len, sides.values())) >= 8


def test_the_median_error_on_rows_held_out_is_below_30_percent(benchmark: ModuleType) -> None:
    rows = [row for row in benchmark.published() if row["held_out"]]
    assert len(rows) >= 4
    assert statistics.median(abs(row["off"]) for row in rows) <= 0.3


def test_every_row_has_a_page_and_a_target_that_is_known(benchmark: ModuleType) -> None:
    for row in (*benchmark.published(), *benchmark.published_memory()):
        assert row["source"].startswith("https://")
        assert row["target"] in targets.names()
        assert row["about"]
        assert row["engine"]


def test_memory_is_within_a_fifth_of_what_was_published(benchmark: ModuleType) -> None:
    for row in benchmark.published_memory():
        assert abs(row["off"]) <= 0.2
