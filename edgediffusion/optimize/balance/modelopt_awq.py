"""nvidia-modelopt's AWQ (``awq_lite``; Lin et al. 2023, 2306.00978): f = x^a / w^(1 - a).

x is the mean of |x|, w that of |w| over its output's or group's largest. Of a = 0, 0.1, ..., 1 each linear layer has the one with the least
error of its output, its weight being quantized and its input not: that is measured by running it. Convolutions have no factors.
"""

from __future__ import annotations

from edgediffusion.optimize.balance import Balance, Network

ALPHA_STEP = 0.1


def of_network(network: Network) -> dict[str, Balance]:
    from edgediffusion.optimize.modelopt import smoothed

    return smoothed(network, {"method": "awq_lite", "alpha_step": ALPHA_STEP})
