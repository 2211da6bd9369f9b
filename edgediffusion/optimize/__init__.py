"""Optimize: calibration items, ranges, and explicit Q/DQ. The verbs are ``calibrate`` and ``quantize``."""

from edgediffusion.optimize.calibrate import calibrate
from edgediffusion.optimize.quantize import quantize
from edgediffusion.optimize.state import QuantizationState

__all__ = ["QuantizationState", "calibrate", "quantize"]
