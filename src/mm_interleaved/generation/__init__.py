"""The interleaved loop: a document in, events out, a longer document at the end.

Importing this package loads no torch: `InterleavedGenerator` is resolved on first use.
"""

from importlib import import_module

__all__ = ["InterleavedGenerator"]


def __getattr__(name: str):
    if name in __all__:
        return getattr(import_module("mm_interleaved.generation.engine"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
