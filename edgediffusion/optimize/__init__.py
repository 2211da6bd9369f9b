"""Optimize: calibration items, ranges, explicit Q/DQ, corrections, and what can be computed beforehand.

The verbs are ``calibrate``, ``quantize``, ``correct`` and ``fold``.
"""

from edgediffusion.optimize.calibrate import calibrate
from edgediffusion.optimize.correct import correct
from edgediffusion.optimize.fold import fold
from edgediffusion.optimize.quantize import quantize
from edgediffusion.optimize.state import QuantizationState

__all__ = ["QuantizationState", "calibrate", "correct", "fold", "quantize"]
