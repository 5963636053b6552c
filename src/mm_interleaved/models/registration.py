"""Makes transformers' Auto classes know this package's configuration, model and processor.

Importing the model registers the first two by itself; `register()` is for who starts from an Auto class.
"""


def register() -> None:
    """Register `mm_interleaved` with AutoConfig, AutoModel, AutoModelForMultimodalLM,
    AutoModelForImageTextToText and AutoProcessor; any number of times.
    """
    # The import registers configuration and model.
    import mm_interleaved.models.interleaved  # noqa: F401 # pyright: ignore[reportUnusedImport]

    register_processor()


def register_processor() -> None:
    """The same for AutoConfig and AutoProcessor alone; loads no model code."""
    from transformers import AutoConfig, AutoProcessor

    from mm_interleaved.models.config import MMInterleavedConfig
    from mm_interleaved.tokens.processor import MMInterleavedProcessor

    AutoConfig.register(MMInterleavedConfig.model_type, MMInterleavedConfig, exist_ok=True)
    AutoProcessor.register(MMInterleavedConfig, MMInterleavedProcessor, exist_ok=True)
