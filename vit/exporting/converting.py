"""What is around every conversion: turns, silence, and one clear error."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

from vit.attend import Attend
from vit.model import ViT

LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")
_TURN = Lock()


@contextmanager
def in_turns() -> Iterator[None]:
    """One thread at a time: in PyTorch's tracer, exports of several threads get into each other's graphs."""
    with _TURN:
        yield


@contextmanager
def converting(model: ViT, what: str) -> Iterator[None]:
    """Without gradients, nor notes and warnings that concern the converters' own authors.

    Raises:
        ValueError: whatever went wrong; the message is `what` ("PyTorch cannot export"), "this model", and the cause.
    """
    with warnings.catch_warnings(), _quiet(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:  # the converters' errors have no common base
            raise ValueError(f"{what} this model: {reason(model, error)}") from error


def reason(model: ViT, error: BaseException) -> str:
    """The innermost cause, on one line, and the attention that is set, if it is not the usual one."""
    while error.__cause__ is not None:
        error = error.__cause__
    names = list(dict.fromkeys(attend.choice.called for attend in model.attends if isinstance(attend, Attend)))
    ours = "" if names in ([], ["sdpa"]) else f" (it attends by {', '.join(map(repr, names))}; 'sdpa' can be exported)"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{ours}"


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
