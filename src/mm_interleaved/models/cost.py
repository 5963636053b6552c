"""What a model needs: memory by shapes, and time by operations (see `operations.py`). No weight is read.

Estimates, not measurements: time assumes the sustained rates of `DEVICES` and a fixed cost of starting each
operation, so it is right within a factor of a few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FEW_BITS_BYTES: Mapping[str | None, float] = {"int8": 1.01, "nf4": 0.5625}
"""Of a weight by `models.quantization`, its share of the scales included: one a row, one each 64 weights."""
DEFAULT_STEPS = 30
START_SECONDS = 5e-5
"""Python and PyTorch around each weight that is used; most of a tiny model's time."""
HALF = 2
"""Bytes of an activation in training, which is kept in bfloat16."""
UNET_MAPS_A_RESOLUTION = 14
"""Maps that checkpointed blocks of a U-Net leave, and one block at work, in maps of its width."""
DECODER_MAPS = 6
"""Maps of the first width and full size that an autoencoder holds at once while it decodes."""
ADAPTER_TENSORS = 140
"""Tensors of all pyramid cells that the adapter keeps an image, which is not computed again: chosen such that
the sum is what the shipped model keeps of a row of 512 tokens and 8 images (109 MB, 2026-11)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    """Sustained rates of a kind of device, about a third of what its maker promises."""

    name: str
    flops: Mapping[str, float]
    """Operations a second by number format; formats that it has no use for are left out."""
    bandwidth: float
    """Bytes a second from its memory."""


DEVICES = (
    DeviceClass(name="CPU, 2 cores", flops={"float32": 5e10}, bandwidth=1e10),
    DeviceClass(name="CPU, 16 cores", flops={"float32": 5e11, "bfloat16": 5e11}, bandwidth=5e10),
    DeviceClass(name="GPU, consumer", flops={"float32": 1e13, "bfloat16": 3e13}, bandwidth=4e11),
    DeviceClass(name="GPU, data centre", flops={"float32": 2e13, "bfloat16": 2.5e14}, bandwidth=1.5e12),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one document takes that fills the model's context; all but memory by number format."""

    parameters: int
    tokens: int
    """Of a full context."""
    images: int
    """As many as fit into it."""
    cached_values: int
    """Keys, values and hidden states of all tokens, pyramids and projections of all images."""
    working_values: int
    """What is at work at once while an image is denoised or decoded."""
    few_bits_parameters: int
    """Of those, the weights that quantization keeps in few bits, see `models.quantization`."""
    token_parameters: int
    """Read for each token."""
    token_flops: float
    """Of a token behind a full context."""
    token_tensors: int
    """In which they stand."""
    step_tensors: int
    """Used in each denoising step."""
    generation_flops: float | None
    """Of all denoising steps, guided, and the decoding of one image; None for text-only models."""
    image_flops: float
    """Of encoding one image, and of projecting it for all synchronizers."""
    steps: int

    def memory(self, dtype: str) -> int:
        """Bytes to generate: weights and everything that is remembered."""
        return (self.parameters + self.cached_values) * BYTES[dtype]

    def weight_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Bytes of the weights, those of the language model's layers in few bits."""
        few = 0 if quantization is None else self.few_bits_parameters
        return round((self.parameters - few) * BYTES[dtype] + few * FEW_BITS_BYTES.get(quantization, 0))

    def document_bytes(self, dtype: str) -> int:
        """Bytes of each document at once: what is remembered of a full context, and what is at work."""
        return (self.cached_values + self.working_values) * BYTES[dtype]

    def training_memory(self, dtype: str) -> int:
        """Bytes to train all: in float32 weights, average, gradients, two moments; the copy computed in."""
        return self.parameters * (4 * 5 + (BYTES[dtype] if BYTES[dtype] < 4 else 0))

    def seconds_an_image(self, device: DeviceClass, dtype: str) -> float | None:
        """Generating one image and encoding it."""
        if self.generation_flops is None:
            return None
        starting = self.steps * self.step_tensors * START_SECONDS
        return (self.generation_flops + self.image_flops) / device.flops[dtype] + starting

    def tokens_a_second(self, device: DeviceClass, dtype: str) -> float:
        """Tokens one after another: each reads all weights, which takes longer than multiplying them."""
        multiplying = self.token_flops / device.flops[dtype]
        reading = self.token_parameters * BYTES[dtype] / device.bandwidth
        return 1 / (max(multiplying, reading) + self.token_tensors * START_SECONDS)


def needs_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Needs:
    """What a model needs.

    Args:
        config: its `config.json`.
        shapes: of all its tensors, by name.

    Raises:
        ValueError: no model can be built by the configuration.
    """
    # Loaded here: whoever asks for the help of a command waits for neither torch nor transformers.
    from mm_interleaved.models import operations

    text = config["text_config"]
    tokens = text["max_position_embeddings"]
    slots = config["slot_resampler"]["num_queries"]
    synchronizer = config.get("text_synchronizer")
    images = tokens // (slots + 1)
    if synchronizer is not None:
        images = min(images, synchronizer["max_images"] - 1)
    steps = (config.get("generation_settings") or {}).get("num_inference_steps", DEFAULT_STEPS)
    model = operations.meta_model(config)
    language, decoder = model.language_model, model.image_decoder
    for_tokens = _tensors_of(language.layers, language.norm, model.text_head)
    for_steps = [] if decoder is None else _tensors_of(decoder.unet, decoder.synchronizers)
    generation_flops = None
    if decoder is not None:
        step = operations.step_operations(model, min(images, _num_seen(config)))
        generation_flops = (step * steps + operations.decoding_operations(model)).total
    return Needs(
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        tokens=tokens,
        images=images,
        cached_values=tokens * _values_a_token(text) + _values_of_images(config, model, images),
        working_values=0 if decoder is None else _working_values(config),
        few_bits_parameters=_few_bits_parameters(language),
        token_parameters=sum(tensor.numel() for tensor in for_tokens),
        token_flops=operations.token_operations(model, tokens - 1, images).total,
        token_tensors=len(for_tokens),
        step_tensors=len(for_steps),
        generation_flops=generation_flops,
        image_flops=operations.image_operations(model).total,
        steps=steps,
    )


def _tensors_of(*modules: nn.Module | None) -> list[Tensor]:
    """Their weights, and the tables that are saved with them, which are read as well."""
    return [tensor for module in modules if module is not None for tensor in module.state_dict().values()]


def _few_bits_parameters(language: nn.Module) -> int:
    """Weights of the language model's own linear layers, see `models.quantization.AS_THEY_ARE`."""
    from torch.nn import Linear

    return sum(
        module.weight.numel()
        for name, module in language.named_modules()
        if isinstance(module, Linear) and ".synchronizer." not in f".{name}."
    )


def _working_values(config: Mapping[str, Any]) -> int:
    """A guided step of the U-Net, or the autoencoder's largest maps; the two are not at work together."""
    unet, vae = config["unet_config"], config["vae_config"]
    side, widths = unet.get("sample_size") or 64, unet["block_out_channels"]
    step = sum(width * (side // 2**level) ** 2 for level, width in enumerate(widths))
    pixels = (side * 2 ** (len(vae["block_out_channels"]) - 1)) ** 2
    return max(2 * UNET_MAPS_A_RESOLUTION * step, DECODER_MAPS * vae["block_out_channels"][0] * pixels)


def _values_a_token(text: Mapping[str, Any]) -> int:
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    key_heads = text.get("num_key_value_heads") or heads
    return 2 * text["num_hidden_layers"] * key_heads * head_dim + text["hidden_size"]


def _cells(vision: Mapping[str, Any]) -> list[int]:
    """Of each level of the pyramid, finest first."""
    grid = vision["image_size"] // vision["patch_size"]
    return [(4 * grid) ** 2, (2 * grid) ** 2, grid**2, (grid // 2) ** 2]


def _projected(config: Mapping[str, Any], part: str, module: nn.Module | None) -> int:
    """What the synchronizers of a module keep of an image, see `models.synchronizer.KEEP`."""
    from mm_interleaved.models.synchronizer import FeatureSynchronizer

    settings = config.get(part)
    widths = [
        layer.value_projection.out_features
        for layer in (() if module is None else module.modules())
        if isinstance(layer, FeatureSynchronizer)
    ]
    if settings is None or not widths:
        return 0
    cells = sum(_cells(config["vision_config"])[level] for level in settings["levels"])
    if settings.get("keep") == "features":
        # One copy for all, and the two channels of `features_to_sample`.
        return cells * (config["vision_config"]["hidden_size"] + 2)
    return cells * sum(widths)


def _values_of_images(
    config: Mapping[str, Any], model: MMInterleavedForConditionalGeneration, num_images: int
) -> int:
    """Of all images the pyramid and what the language model projects of it; of those that one image attends
    to, what the image decoder projects.
    """
    vision = config["vision_config"]
    an_image = sum(_cells(vision)) * vision["hidden_size"]
    an_image += _projected(config, "text_synchronizer", model.language_model)
    seen = min(num_images, _num_seen(config))
    return num_images * an_image + seen * _projected(config, "image_synchronizer", model.image_decoder)


def _num_seen(config: Mapping[str, Any]) -> int:
    """Earlier images that a generated one attends to, at most."""
    synchronizer = config.get("image_synchronizer")
    if synchronizer is None:
        return 0
    return 1 if config.get("context_images") == "previous" else synchronizer["max_images"] - 1


def activation_bytes(config: Mapping[str, Any], tokens: int, images: int) -> float:
    """What a row keeps for its backward pass under checkpointing, and the largest thing at work.

    Args:
        config: as `needs_of`.
        tokens, images: of the row; every image is encoded and generated.
    """
    text, vision = config["text_config"], config["vision_config"]
    cells = _cells(vision)
    # 1. The language model: its input of each layer, one layer at work.
    kept = float(HALF) * tokens * text["hidden_size"] * text["num_hidden_layers"]
    layer = float(HALF) * tokens * (8 * text["hidden_size"] + 3 * text["intermediate_size"])
    # Logits in bfloat16, in float32 for the loss, and their gradient.
    logits = tokens * text["vocab_size"] * (2.0 + 4 + 4)
    # 2. Features and values of its synchronizers.
    synchronizer = config.get("text_synchronizer")
    if synchronizer is not None:
        num_layers = math.ceil(text["num_hidden_layers"] / synchronizer["every"])
        channels = synchronizer["value_dim"] + vision["hidden_size"]
        kept += HALF * images * num_layers * sum(cells[level] for level in synchronizer["levels"]) * channels
    # 3. Each image: adapter, CLIP, U-Net with its synchronizers.
    an_image = float(HALF) * sum(cells[1:]) * vision["hidden_size"] * ADAPTER_TENSORS
    an_image += HALF * (cells[2] + 1) * vision["hidden_size"] * vision["num_hidden_layers"]
    if config.get("unet_config"):
        an_image += _denoising_activation_bytes(config)
    return kept + max(layer, logits) + logits + images * an_image


def _denoising_activation_bytes(config: Mapping[str, Any]) -> float:
    unet, vision = config["unet_config"], config["vision_config"]
    side, widths = unet.get("sample_size") or 64, unet["block_out_channels"]
    maps = sum(width * (side / 2**level) ** 2 for level, width in enumerate(widths))
    kept = HALF * maps * UNET_MAPS_A_RESOLUTION
    synchronizer = config.get("image_synchronizer")
    if synchronizer is not None:
        cells = sum(_cells(vision)[level] for level in synchronizer["levels"])
        places = 3 * len(widths) + 1
        kept += HALF * places * cells * (synchronizer["value_dim"] + vision["hidden_size"])
    return kept
