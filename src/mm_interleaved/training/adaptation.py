"""What is done to a model before it trains: low-rank additions, number types, memory, compilation."""

import logging
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mm_interleaved.errors import UsageError
from mm_interleaved.models.compilation import compile_each
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.quantization import AS_THEY_ARE, check_installed
from mm_interleaved.models.transformers_versions import checkpointing_enable
from mm_interleaved.models.unet import unet_blocks
from mm_interleaved.training.config import LoraConfig

logger = logging.getLogger(__name__)


def add_low_rank(model: MMInterleavedForConditionalGeneration, config: LoraConfig) -> Any:
    """Adds low-rank matrices to the linear layers of the chosen parts, in place.

    Returns:
        PEFT's handle of the model: `merge_and_unload()` gives a stock model with the additions in its
        weights, `save_pretrained(folder)` writes the additions alone.

    Raises:
        UsageError: PEFT is not installed, or the model has none of the parts.
    """
    if find_spec("peft") is None:
        raise UsageError("lora.rank needs PEFT, which is not installed; install mm-interleaved[train]")
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    names = {module: name for name, module in model.named_modules()}
    targets = [names[layer] for part in config.parts for layer in _linear_layers(model, part)]
    if not targets:
        raise UsageError(f"lora.parts: this model has no {' or '.join(config.parts)} to add to")
    alpha: Any = config.alpha  # PEFT says int and takes any number
    settings: Any = PeftConfig(
        r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=targets
    )
    return get_peft_model(model, settings)


def quantization_settings(config: LoraConfig, number_type: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that keep the language model's own layers in few bits.

    Args:
        number_type: products with them are computed in it.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    if not config.quantize:
        return {}
    check_installed("bitsandbytes", f"lora.quantize={config.quantize}", "lora.quantize")
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=config.quantize == "nf4",
            load_in_8bit=config.quantize == "int8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=number_type,
            llm_int8_skip_modules=AS_THEY_ARE,
        )
    }


def keep_frozen_as(model: MMInterleavedForConditionalGeneration, number_type: torch.dtype) -> None:
    """Keeps frozen matrices and kernels of language model, CLIP and U-Net in a smaller number type.

    These are nearly all there is to freeze. Norms, biases, the VAE, and what is ours stay as they are.
    Call it when it is known what trains. Autocast has to be on: layers then see weights of two types.
    """
    stock = [model.language_model.embed_tokens, model.text_head.base, model.vision.clip]
    stock += [block for layer in model.language_model.layers for block in (layer.self_attn, layer.mlp)]
    stock += [] if model.image_decoder is None else [model.image_decoder.unet]
    for parameter in (parameter for module in stock for parameter in module.parameters()):
        if parameter.ndim >= 2 and parameter.is_floating_point() and not parameter.requires_grad:
            parameter.data = parameter.data.to(number_type)


def checkpoint_activations(model: MMInterleavedForConditionalGeneration) -> None:
    """Lets the language model, CLIP and the U-Net compute activations again in the backward pass."""
    # The other kind of checkpoint (reentrant) breaks where a layer reads image features that need gradients.
    checkpointing_enable(model)({"use_reentrant": False})
    if model.image_decoder is not None:
        model.image_decoder.unet.enable_gradient_checkpointing(
            partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        )


def compile_layers(model: MMInterleavedForConditionalGeneration, backend: str) -> None:
    """Compiles the layers that are called many times, see `compile_each`."""
    blocks = [] if model.image_decoder is None else unet_blocks(model.image_decoder.unet)
    compile_each((*model.language_model.layers, *blocks), backend)


def _linear_layers(model: MMInterleavedForConditionalGeneration, part: str) -> Iterator[nn.Module]:
    """Of the language model, attention and feed-forward; of the U-Net, its transformer blocks."""
    if part == "language":
        blocks = [block for layer in model.language_model.layers for block in (layer.self_attn, layer.mlp)]
    elif model.image_decoder is not None:
        modules = model.image_decoder.unet.modules()
        blocks = [module for module in modules if type(module).__name__ == "BasicTransformerBlock"]
    else:
        blocks = []
    for block in blocks:
        yield from (module for module in block.modules() if isinstance(module, nn.Linear))
