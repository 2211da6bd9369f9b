"""TaylorSeer for transformers: Liu et al. 2025 (2503.06923). Calls in between get a forecast of the residual, not an old one.

With F the residual at the calls that compute, the order-m forecast i calls later is

    taylor   sum over j <= m of D^j F i^j / j!, where D^j F = (D^(j-1) F - D^(j-1) F') / (calls between both), F' the one before
    newton   the polynomial through the last m + 1 of them, ours

D^j are backward differences, which stand for derivatives: exact for features that change linearly, but an order-2 forecast is not
exact for quadratic ones. Newton's form is, for any order. The authors forecast every module; here it is the residual of
all blocks behind the cut together.

The first ``disable_before`` calls compute, then those with (call - disable_before - 1) mod ``interval`` = 0, as in diffusers'
``TaylorSeerCacheConfig``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.runtimes.caching._cuts import Blocks, blocks
from edgediffusion.runtimes.network import Call, Joined, Network
from edgediffusion.runtimes.options import check_choice, check_range

FORMS = ("taylor", "newton")
Anchors = list[tuple[int, np.ndarray]]  # number of the call and feature, float32, the last one first


@dataclass(frozen=True)
class Policy:
    interval: int = 5
    order: int = 1
    disable_before: int = 3
    form: str = "taylor"
    cut: str = ""

    def __post_init__(self) -> None:
        check_range("interval", self.interval, 1, 1000)
        check_range("order", self.order, 0, 4)
        check_range("disable_before", self.disable_before, 1, 1000)
        check_choice("form", self.form, FORMS)

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        return blocks(bundle, self.cut)

    def start(self, graphs: Joined, calls: int) -> Network:
        transformer = Blocks(graphs)
        forecast = Forecast(self.order, _newton if self.form == "newton" else _taylor)

        def ask(call: Call) -> np.ndarray:
            transformer.head(call)
            if not forecast.empty and not self.computes(call.number):
                transformer.residual[...] = forecast.at(call.number)
                return transformer.shallow()
            answer = transformer.tail(call)
            forecast.add(call.number, transformer.residual)
            return answer

        return ask

    def computes(self, number: int) -> bool:
        return number < self.disable_before or (number - self.disable_before - 1) % self.interval == 0


class Forecast:
    """What was seen of a feature, and what follows from it."""

    def __init__(self, order: int, form: Callable[[Anchors], Anchors]):
        self._order, self._form = order, form
        self._anchors: Anchors = []
        self._terms: Anchors = []

    @property
    def empty(self) -> bool:
        return not self._anchors

    def add(self, number: int, feature: np.ndarray) -> None:
        self._anchors = [(number, feature.astype(np.float32)), *self._anchors[: self._order]]
        self._terms = self._form(self._anchors)

    def at(self, number: int) -> np.ndarray:
        """The forecast for a call: terms come in the order of their powers, each with the call that its factor counts from."""
        value, factor = np.zeros_like(self._terms[0][1]), 1.0
        for origin, term in self._terms:
            value += np.float32(factor) * term
            factor *= number - origin
        return value


def _newton(anchors: Anchors) -> Anchors:
    """Divided differences: f[s0] + f[s0, s1] (s - s0) + f[s0, s1, s2] (s - s0)(s - s1) + ..."""
    column, terms = [feature for _, feature in anchors], []
    for order in range(len(anchors)):
        terms.append((anchors[order][0], column[0]))
        apart = [anchors[j][0] - anchors[j + order + 1][0] for j in range(len(column) - 1)]
        column = [(column[j] - column[j + 1]) / np.float32(apart[j]) for j in range(len(column) - 1)]
    return terms


def _taylor(anchors: Anchors) -> Anchors:
    """Backward differences over the last gap each, divided by j!: F + D F i + D^2 F i^2 / 2 + ..., i counted from the last anchor."""
    column, last, terms = [feature for _, feature in anchors], anchors[0][0], []
    for order in range(len(anchors)):
        terms.append((last, column[0] / np.float32(math.factorial(order))))
        gaps = [anchors[j][0] - anchors[j + 1][0] for j in range(len(column) - 1)]
        column = [(column[j] - column[j + 1]) / np.float32(gaps[j]) for j in range(len(column) - 1)]
    return terms
