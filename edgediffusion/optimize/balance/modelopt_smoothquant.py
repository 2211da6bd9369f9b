"""nvidia-modelopt's SmoothQuant: the formula of ``smoothquant``, of linear layers with int8 weights and inputs alone.

a = 0.8 as in NVIDIA's examples for diffusion; ModelOpt's own default, 1, is for language models.
"""

from __future__ import annotations

from edgediffusion.optimize.balance import Balance, Network
from edgediffusion.optimize.balance.smoothquant import ALPHA


def of_network(network: Network) -> dict[str, Balance]:
    from edgediffusion.optimize.modelopt import smoothed

    return smoothed(network, {"method": "smoothquant", "alpha": ALPHA})
