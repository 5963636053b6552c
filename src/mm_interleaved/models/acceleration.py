"""What is done to a loaded model to generate images faster: another memory layout, compiled blocks, adapters.

The first two are exact but for rounding; an adapter (low-rank additions, such as an LCM-LoRA that was
distilled to a few steps) is another model, and what it costs is measured by `report_error`.
"""

import copy
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
    """Low-rank additions that stand in a model's layers.

    Attributes:
        without: the image decoder on the same weights that lacks them. It stands beside the model, which
            stays as it is: who generates with it changes nothing for others who generate at the same time.
    """

    def __init__(self, model: MMInterleavedForConditionalGeneration):
        self.without: ImageDecoder = without_additions(model.image_decoder)


def without_additions(module: Any) -> Any:
    """A module on the same weights, without what PEFT has put in the place of its parts or around them.

    Modules are copied, tensors are not, and neither is what is compiled.
    """
    return _without_additions(module, {})


def _without_additions(module: Any, known: dict[int, Any]) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if id(module) not in known:
        stock = module
        while isinstance(stock, BaseTunerLayer | AuxiliaryTrainingWrapper):
            is_layer = isinstance(stock, BaseTunerLayer)
            stock = stock.base_layer if is_layer else stock.original_module
        # Parameters and buffers stand in tables that both share, so a move to another device moves both.
        known[id(module)] = bare = copy.copy(stock)
        parts = stock._modules.items()  # pyright: ignore[reportPrivateUsage]
        bare._modules = {name: _without_additions(part, known) for name, part in parts}  # pyright: ignore[reportPrivateUsage]
    return known[id(module)]


def use_channels_last(decoder: ImageDecoder) -> None:
    """Keep kernels of U-Net and autoencoder, and with them all maps, with channels last: convolutions need
    not reorder them.
    """
    layout: Any = torch.channels_last
    decoder.unet.to(memory_format=layout)
    decoder.vae.to(memory_format=layout)


def compile_image_decoder(decoder: ImageDecoder, backend: str = "inductor") -> None:
    """Compile the U-Net; the first image pays for it (about a minute on a CPU).

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
        UsageError: PEFT is not installed, or the model generates no images.
        ModelFileError: the folder holds neither, or one of another model.
    """
    if find_spec("peft") is None:
        raise UsageError("an adapter needs PEFT, which is not installed; install mm-interleaved[train]")
    if model.image_decoder is None:
        raise UsageError("adapter: this model generates no images", field="adapter")
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
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelFileError(f"adapter {escape(str(folder))!r}: adds to no layer of this model")
    model.eval()
    return Adapter(model)


def _add_peft(model: nn.Module, folder: Path) -> None:
    from peft import PeftModel

    stock: Any = model
    PeftModel.from_pretrained(stock, str(folder))


def _add_diffusers(unet: Any, folder: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    read: Any = Loader.lora_state_dict(str(folder / DIFFUSERS_FILE), unet_config=unet.config)
    weights, alphas = read
    Loader.load_lora_into_unet(weights, alphas, unet)
