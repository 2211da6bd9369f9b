"""Silence for libraries that talk on stderr about things a user cannot act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = (
    "diffusers",
    "transformers",
    "torch.onnx._internal.exporter._registration",
    "torch.onnx",
    "torch.export",
    "onnxscript",
    "onnx_ir",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block the libraries below warn and log nothing but errors; afterwards all is as it was."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
