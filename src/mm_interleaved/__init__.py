"""A document of text and images goes in, a longer document of text and images comes out.

Importing this package loads neither torch nor transformers: public names are resolved on first use (PEP 562).
"""

from importlib import import_module

from mm_interleaved.former_names import keep_former_names
from mm_interleaved.versions import __version__

_PUBLIC = {
    "Document": "mm_interleaved.documents.document",
    "Text": "mm_interleaved.documents.document",
    "Image": "mm_interleaved.documents.document",
    "Session": "mm_interleaved.documents.session",
    "MMInterleavedConfig": "mm_interleaved.models.config",
    "MMInterleavedForConditionalGeneration": "mm_interleaved.models.interleaved",
    "MMInterleavedProcessor": "mm_interleaved.tokens.processor",
    "FeatureSynchronizer": "mm_interleaved.models.synchronizer",
    "multi_image_deformable_attention": "mm_interleaved.ops",
    "InterleavedGenerator": "mm_interleaved.generation",
    "register": "mm_interleaved.models.registration",
}

_REGISTERED_BY = {
    "MMInterleavedConfig": "register",
    "MMInterleavedForConditionalGeneration": "register",
    "InterleavedGenerator": "register",
    "MMInterleavedProcessor": "register_processor",
}

__all__ = [*_PUBLIC, "__version__"]


keep_former_names()


def __getattr__(name: str):
    if name in _PUBLIC:
        if name in _REGISTERED_BY:
            # Who has one of these at hand may load the others through transformers' Auto classes.
            getattr(import_module("mm_interleaved.models.registration"), _REGISTERED_BY[name])()
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
