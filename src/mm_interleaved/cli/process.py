"""What the command changes for its whole process, and no library call does: memory, threads, bars."""

from __future__ import annotations

import gc
import warnings
from typing import TYPE_CHECKING, Any

from mm_interleaved.devices import limit_threads
from mm_interleaved.generation.loading import load_generator

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator

OBJECTS_BETWEEN_SEARCHES = 100_000
"""Libraries and a model are a million objects that all stay. Looking for garbage after every 700 new ones, as
Python does by itself, took a fifth of the start (5.9 to 4.7 s of one core, 2026-11).
"""


def set_up() -> None:
    """Called once, where a process begins."""
    limit_threads()
    gc.set_threshold(OBJECTS_BETWEEN_SEARCHES, 50, 100)
    # Damaged metadata is no reason to refuse pixels; what is too large is refused in a sentence of ours.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def load_quietly(*arguments: Any, **named: Any) -> InterleavedGenerator:
    """`load_generator` without the bars of transformers, which would stand beside our own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return load_generator(*arguments, **named)
