"""A document of text and images goes in, a longer document of text and images comes out.

Importing this package loads neither torch nor transformers: public names are resolved on first use (PEP 562).
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "Document": "mm_interleaved.document",
    "Text": "mm_interleaved.document",
    "Image": "mm_interleaved.document",
    "MMInterleavedConfig": "mm_interleaved.config",
    "MMInterleavedForConditionalGeneration": "mm_interleaved.models.interleaved",
    "MMInterleavedProcessor": "mm_interleaved.processing",
    "FeatureSynchronizer": "mm_interleaved.models.synchronizer",
    "multi_image_deformable_attention": "mm_interleaved.ops",
    "InterleavedGenerator": "mm_interleaved.generation",
    "register": "mm_interleaved.registration",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        if name == "MMInterleavedForConditionalGeneration":
            # Who has the model at hand may load any part of it through transformers' Auto classes.
            import_module("mm_interleaved.registration").register()
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
