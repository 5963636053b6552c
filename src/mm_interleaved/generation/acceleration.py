"""What is done to a loaded model so that it paints faster: another memory layout, compiled blocks, adapters.

The first two are exact but for rounding; an adapter (low-rank additions, such as an LCM-LoRA that was
distilled to a few steps) is another model, and what it costs is measured by `report_error`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_interleaved.errors import ModelFileError, UsageError, escape
from mm_interleaved.models.compilation import compile_each
from mm_interleaved.models.image_decoder import ImageDecoder
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.unet import unet_blocks

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


class Adapter:
    """Low-rank additions that stand in a model's layers."""

    def __init__(self, layers: list[Any]):
        self.layers = layers

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """The model computes without them."""
        for layer in self.layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)


def use_channels_last(decoder: ImageDecoder) -> None:
    """Keep kernels of U-Net and autoencoder, and with them all maps, with channels last: convolutions need
    not reorder them.
    """
    layout: Any = torch.channels_last
    decoder.unet.to(memory_format=layout)
    decoder.vae.to(memory_format=layout)


def compile_painter(decoder: ImageDecoder, backend: str = "inductor") -> None:
    """Compile the U-Net; the first picture pays for it (about a minute on a CPU).

    Raises:
        UsageError: there is no such back end.
    """
    compile_each(unet_blocks(decoder.unet), backend)


def load_adapter(model: MMInterleavedForConditionalGeneration, folder: Path) -> Adapter:
    """Add low-rank matrices to a model, in place.

    Args:
        folder: what PEFT's `save_pretrained` wrote (of this model, see `training.adaptation.add_low_rank`),
            or a LoRA of Stable Diffusion as diffusers keeps it, which goes into the U-Net.

    Raises:
        UsageError: PEFT is not installed, or the model does not paint.
        ModelFileError: the folder holds neither, or one of another model.
    """
    if find_spec("peft") is None:
        raise UsageError("an adapter needs PEFT, which is not installed; install mm-interleaved[train]")
    if model.image_decoder is None:
        raise UsageError("adapter: this model does not paint", field="adapter")
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        if all((folder / name).is_file() for name in PEFT_FILES):
            _add_peft(model, folder)
        elif (folder / DIFFUSERS_FILE).is_file():
            _add_diffusers(model.image_decoder.unet, folder)
        else:
            expected = f"{' with '.join(PEFT_FILES)}, or {DIFFUSERS_FILE}"
            raise ModelFileError(f"adapter {escape(str(folder))!r}: expected {expected}, found neither")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        sentence = escape(" ".join(str(error).split()), limit=400)
        raise ModelFileError(
            f"adapter {escape(str(folder))!r}: does not fit this model ({sentence})"
        ) from error
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ModelFileError(f"adapter {escape(str(folder))!r}: adds to no layer of this model")
    model.eval()
    return Adapter(layers)


def _add_peft(model: nn.Module, folder: Path) -> None:
    from peft import PeftModel

    stock: Any = model
    PeftModel.from_pretrained(stock, str(folder))


def _add_diffusers(unet: Any, folder: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    read: Any = Loader.lora_state_dict(str(folder / DIFFUSERS_FILE), unet_config=unet.config)
    weights, alphas = read
    Loader.load_lora_into_unet(weights, alphas, unet)
