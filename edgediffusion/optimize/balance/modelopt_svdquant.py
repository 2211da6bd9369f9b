"""nvidia-modelopt's SVDQuant (``svdquant``, after 2411.05007): the factors of its AWQ, and a branch of the recipe's ``rank``."""

from __future__ import annotations

from edgediffusion.optimize.balance import Balance, Network
from edgediffusion.optimize.balance.modelopt_awq import ALPHA_STEP


def of_network(network: Network) -> dict[str, Balance]:
    from edgediffusion.optimize.modelopt import smoothed, with_branches

    return with_branches(network, smoothed(network, {"method": "awq_lite", "alpha_step": ALPHA_STEP}))
