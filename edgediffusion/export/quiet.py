"""Silence for libraries that talk on stderr about things a user cannot act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

import diffusers
import transformers

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
    """Within the block the libraries above log nothing but errors and draw no progress bars; afterwards all is as it was."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")
            for library in (diffusers, transformers):
                stack.enter_context(_no_bars(library))
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_bars(library: ModuleType) -> Iterator[None]:
    logging = library.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
