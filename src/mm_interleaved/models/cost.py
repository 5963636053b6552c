"""What a model needs: memory for a full context, and time by counting multiplications. No weight is read.

Estimates, not measurements: time assumes the sustained rates of `DEVICES` and a fixed cost of starting each
operation, so it is right within a factor of a few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEFAULT_STEPS = 30
START_SECONDS = 5e-5
"""Python and PyTorch around each weight that is used; most of a tiny model's time."""


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
    word_parameters: int
    """Read and multiplied for each token."""
    word_tensors: int
    """In which they stand."""
    step_tensors: int
    """Used in each denoising step."""
    picture_flops: float | None
    """Of all denoising steps, guided, and the decoding of one picture; None for a model that only writes."""
    image_flops: float
    """To look at one picture."""
    steps: int

    def memory(self, dtype: str) -> int:
        """Bytes to generate: weights and everything that is remembered."""
        return (self.parameters + self.cached_values) * BYTES[dtype]

    def training_memory(self, dtype: str) -> int:
        """Bytes to train all: in float32 weights, average, gradients, two moments; the copy computed in."""
        return self.parameters * (4 * 5 + (BYTES[dtype] if BYTES[dtype] < 4 else 0))

    def seconds_a_picture(self, device: DeviceClass, dtype: str) -> float | None:
        """Painting one picture and looking at it."""
        if self.picture_flops is None:
            return None
        starting = self.steps * self.step_tensors * START_SECONDS
        return (self.picture_flops + self.image_flops) / device.flops[dtype] + starting

    def words_a_second(self, device: DeviceClass, dtype: str) -> float:
        """Tokens one after another: each reads all weights, which takes longer than multiplying them."""
        multiplying = 2 * self.word_parameters / device.flops[dtype]
        reading = self.word_parameters * BYTES[dtype] / device.bandwidth
        return 1 / (max(multiplying, reading) + self.word_tensors * START_SECONDS)


_USED_FOR_WORDS = ("language_model.layers", "language_model.norm", "text_head")
_USED_FOR_STEPS = ("image_decoder.unet", "image_decoder.synchronizers")


def needs_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Needs:
    """What a model needs.

    Args:
        config: its `config.json`.
        shapes: of all its tensors, by name.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    text, vision = config["text_config"], config["vision_config"]
    tokens = text["max_position_embeddings"]
    slots = config["slot_resampler"]["num_queries"]
    synchronizer = config.get("text_synchronizer")
    images = tokens // (slots + 1)
    if synchronizer is not None:
        images = min(images, synchronizer["max_images"] - 1)
    grid = vision["image_size"] // vision["patch_size"]
    steps = (config.get("generation_settings") or {}).get("num_inference_steps", DEFAULT_STEPS)
    word_sizes = [size for name, size in sizes.items() if name.startswith(_USED_FOR_WORDS)]
    paints = bool(config.get("unet_config"))
    return Needs(
        parameters=sum(sizes.values()),
        tokens=tokens,
        images=images,
        cached_values=tokens * _values_a_token(text) + _values_of_images(config, shapes, images),
        word_parameters=sum(word_sizes),
        word_tensors=len(word_sizes),
        step_tensors=sum(name.startswith(_USED_FOR_STEPS) for name in sizes),
        picture_flops=_picture_flops(config, sizes, steps) if paints else None,
        image_flops=2.0 * grid**2 * sum(size for name, size in sizes.items() if name.startswith("vision.")),
        steps=steps,
    )


def _values_a_token(text: Mapping[str, Any]) -> int:
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    key_heads = text.get("num_key_value_heads") or heads
    return 2 * text["num_hidden_layers"] * key_heads * head_dim + text["hidden_size"]


def _cells(vision: Mapping[str, Any]) -> list[int]:
    """Of each level of the pyramid, finest first."""
    grid = vision["image_size"] // vision["patch_size"]
    return [(4 * grid) ** 2, (2 * grid) ** 2, grid**2, (grid // 2) ** 2]


def _projected(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], side: str, modules: str
) -> int:
    """What the synchronizers of one side keep of an image, see `models.synchronizer.KEEP`."""
    settings = config.get(side)
    widths = [
        shape[0]
        for name, shape in shapes.items()
        if name.startswith(modules) and name.endswith("synchronizer.value_projection.weight")
    ]
    if settings is None or not widths:
        return 0
    cells = sum(_cells(config["vision_config"])[level] for level in settings["levels"])
    if settings.get("keep") == "features":
        # One copy for all, and the two channels of `features_to_sample`.
        return cells * (config["vision_config"]["hidden_size"] + 2)
    return cells * sum(widths)


def _values_of_images(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], num_images: int
) -> int:
    """Of all images the pyramid and what the language model projects of it; of those that one picture looks
    at, what the painter projects.
    """
    vision = config["vision_config"]
    an_image = sum(_cells(vision)) * vision["hidden_size"]
    an_image += _projected(config, shapes, "text_synchronizer", "language_model.")
    painter = config.get("image_synchronizer")
    num_seen = 0
    if painter is not None:
        num_seen = 1 if config.get("context_images") == "previous" else painter["max_images"] - 1
    seen = min(num_images, num_seen) * _projected(config, shapes, "image_synchronizer", "image_decoder.")
    return num_images * an_image + seen


def _picture_flops(config: Mapping[str, Any], sizes: Mapping[str, int], steps: int) -> float:
    """Every weight is multiplied once for each cell of the map that its block works on."""
    side = config["unet_config"].get("sample_size") or 64
    num_halvings = len(config["unet_config"]["block_out_channels"]) - 1
    num_doublings = len(config["vae_config"]["block_out_channels"]) - 1
    step = decoding = 0.0
    for name, size in sizes.items():
        match name.removeprefix("image_decoder.").split("."):
            case "unet", "time_embedding", *_:
                step += 2 * size
            case "unet", block, *rest:
                level = {"down_blocks": 0, "mid_block": num_halvings, "up_blocks": num_halvings}.get(block, 0)
                if block in ("down_blocks", "up_blocks"):
                    level = abs(level - int(rest[0]))
                step += 2 * size * (side / 2**level) ** 2
            case "vae", "decoder", "up_blocks", number, *_:
                decoding += 2 * size * (side * 2 ** int(number)) ** 2
            case "vae", "decoder", block, *_:
                decoding += 2 * size * (side * 2 ** (num_doublings if block == "conv_out" else 0)) ** 2
            case _:
                pass
    # Guidance predicts twice, with the context and without.
    return 2 * steps * step + decoding
