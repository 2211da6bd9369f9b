"""Every solver against diffusers' scheduler of the same name: each call of the network, and the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from edgediffusion.bundle import NoiseSchedule

from .peers import BUT_LAST, FLOW, PEERS, UNLIKE, Peer, assert_same_trajectory, but_last, ours, theirs, unlike
from .tiny import STABLE_DIFFUSION

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# diffusers hands torch tensors to numpy.array, of which NumPy 2 complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning", "ignore::FutureWarning")

STEPS = (1, 2, 4, 10, 20, 50)
SCHEDULES = {
    "linear": NoiseSchedule("linear", 1000, 0.0001, 0.02, set_alpha_to_one=False),
    "cosine": NoiseSchedule("squaredcos_cap_v2", 1000, 0.0001, 0.02, set_alpha_to_one=False),
}
# Both are float32 loops that round in different places, 6e-8 each; a division by alpha magnifies that up to 15 times for
# Stable Diffusion, and more where v or x_0 is turned into noise (a flow starts at alpha = 0.001). The more steps there are,
# the less of the first one is left.
TOLERANCE, FEW_STEPS, FEW_STEPS_OF_A_FLOW = 1e-5, 2.5e-5, 1e-4


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors of a hundred numbers are not worth a thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def title(value: object) -> str | None:
    return value.sampler if isinstance(value, Peer) else None


def cases() -> Iterator[tuple[Peer, str, str]]:
    for peer in PEERS:
        for spacing in peer.spacings:
            for prediction in ("flow",) if spacing in FLOW else peer.predictions:
                if not unlike(peer, prediction, spacing, 0):
                    yield peer, spacing, prediction


@pytest.mark.parametrize(("peer", "spacing", "prediction"), list(cases()), ids=title)
def test_calls_the_network_where_diffusers_does(peer: Peer, spacing: str, prediction: str) -> None:
    """With few steps for each prediction; with many for the first, since they say the same about those."""
    flow = spacing in FLOW or prediction == "flow"
    schedule = NoiseSchedule("flow", 1000, shift=3.0) if flow else STABLE_DIFFUSION
    schedule = schedule if spacing in FLOW else replace(schedule, spacing=spacing)
    for steps in STEPS:
        few = steps <= 10 or prediction in (peer.predictions[0], "flow")
        if few and steps >= peer.fewest and not unlike(peer, prediction, spacing, steps):
            coarse = FEW_STEPS_OF_A_FLOW if flow else FEW_STEPS
            assert_same_trajectory(peer, schedule, prediction, steps, coarse if steps <= (4 if flow else 2) else TOLERANCE, spacing=spacing)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.predictions[0] == "epsilon"], ids=title)
def test_other_training_schedules(peer: Peer, kind: str) -> None:
    """The cosine schedule ends at a noise level of 20,000 where others have 150 and 15: its last digits are worth 1e-3."""
    spacing = "leading" if "leading" in peer.spacings else peer.spacings[0]
    schedule = replace(SCHEDULES[kind], spacing=spacing)
    tolerance = 2e-3 if spacing == "linspace" and kind == "cosine" else 5e-5
    assert_same_trajectory(peer, schedule, "epsilon", 10, tolerance)


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.zero_snr], ids=title)
def test_zero_terminal_snr(peer: Peer) -> None:
    schedule = replace(STABLE_DIFFUSION, spacing="trailing", zero_terminal_snr=True, set_alpha_to_one=False)
    # diffusers' state is up to 4096 times larger there and float32, so its last digits are worth 4096 * 6e-8.
    assert_same_trajectory(peer, schedule, "v", 10, 3e-4)


@pytest.mark.parametrize(("name", "what"), list(UNLIKE))
def test_where_diffusers_goes_another_way(name: str, what: str) -> None:
    """The table of differences is true: what it says to differ, does."""
    peer = next(peer for peer in PEERS if peer.sampler == name)
    prediction = what if what in peer.predictions else "epsilon"
    spacing = what if what in peer.spacings else "leading" if what != "2 steps" else "linspace"
    schedule, steps = replace(STABLE_DIFFUSION, spacing=spacing), 2 if what == "2 steps" else 10
    found, expected = ours(name, schedule, prediction, steps), theirs(peer, schedule, prediction, steps)
    pairs = zip([*found.inputs, found.last], [*expected.inputs, expected.last], strict=True)
    assert max(np.abs(mine - diffusers_own).max() / np.abs(diffusers_own).max() for mine, diffusers_own in pairs) > 3e-4


@pytest.mark.parametrize(("name", "spacing"), list(BUT_LAST))
def test_where_diffusers_ends_elsewhere(name: str, spacing: str) -> None:
    peer = next(peer for peer in PEERS if peer.sampler == name)
    flow = spacing in FLOW
    schedule = NoiseSchedule("flow", 1000, shift=3.0) if flow else replace(STABLE_DIFFUSION, spacing=spacing)
    prediction = "flow" if flow else "epsilon"
    found, expected = ours(name, schedule, prediction, 10).last, theirs(peer, schedule, prediction, 10).last
    assert but_last(peer, spacing)
    assert np.isfinite(found).all()
    assert not np.abs(found - expected).max() < 1e-3 * np.abs(found).max()  # or not a number
