"""Makes transformers' Auto classes know this package's configuration, model and processor.

Importing the model registers the first two by itself; `register()` is for who starts from an Auto class.
"""


def register() -> None:
    """Register `mm_interleaved` with AutoConfig, AutoModel and AutoProcessor; any number of times."""
    from transformers import AutoProcessor

    # The import registers configuration and model.
    from mm_interleaved.models.interleaved import MMInterleavedConfig
    from mm_interleaved.processing import MMInterleavedProcessor

    AutoProcessor.register(MMInterleavedConfig, MMInterleavedProcessor, exist_ok=True)
