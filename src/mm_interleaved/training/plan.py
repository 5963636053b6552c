"""What training a model takes on many GPUs, by counting: memory of each, and tokens a second.

Counted from the shapes of the weights and the rules of the recipe `pretrain`: language model, CLIP and VAE
frozen, the rest trained with AdamW under bfloat16 autocast, activations computed again. Time assumes a
share of what the maker promises, and that exchange of weights hides behind computation; docs/training.md says
what of this was checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mm_interleaved.errors import UsageError

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 1, 1, 1
BACKWARD_AGAIN = 1
"""Activations that are computed again cost one more forward pass."""
BYTES_FROZEN = 2
BYTES_TRAINED = 4 + 4 + 8
"""Weight, gradient and AdamW's two moments in float32."""
_RESIDUALS_A_LAYER = 1
_UNET_MAPS_A_RESOLUTION = 14
"""Maps that checkpointed blocks of a U-Net leave, and one block at work, in maps of its width."""
_ADAPTER_TENSORS = 140
"""Tensors of all pyramid cells that the adapter keeps an image, which is not computed again: chosen such that
the sum is what the shipped model keeps of a row of 512 tokens and 8 images (109 MB, 2026-11)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuClass:
    """One GPU in a node of eight."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Dense bfloat16 operations a second, as its maker says."""
    node_bandwidth: float
    """Bytes a second to the others of its node."""
    network_bandwidth: float
    """Bytes a second to other nodes, a GPU's share."""


GPUS = (
    GpuClass(name="A100 80 GB", memory=80e9, flops=312e12, node_bandwidth=240e9, network_bandwidth=22e9),
    GpuClass(name="H100 80 GB", memory=80e9, flops=989e12, node_bandwidth=360e9, network_bandwidth=45e9),
    GpuClass(name="H200 141 GB", memory=141e9, flops=989e12, node_bandwidth=360e9, network_bandwidth=45e9),
)
NODE_GPUS = 8
SUSTAINED = 0.4
"""Share of its maker's promise that a GPU is assumed to reach in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """What one row takes."""

    forward_flops: float
    training_flops: float
    """Forward and backward, with activations computed again."""
    activation_bytes: float
    tokens: int
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingNeeds:
    """What a model takes whoever trains it."""

    frozen: int
    """Parameters that stay."""
    trained: int
    unsharded: int
    """Parameters that FSDP gathers for the whole pass (all but layers and blocks), and those of one layer."""
    row: RowCost


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLine:
    """One way to train on one number of GPUs."""

    strategy: str
    num_gpus: int
    memory: float
    """Bytes a GPU, with one row at a time."""
    tokens_a_second: float
    """Of all GPUs together."""
    fits: bool


def training_needs(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, tokens: int, images: int
) -> TrainingNeeds:
    """What training takes, one row at a time.

    Args:
        config, shapes: as `estimate.needs_of`.
        tokens, images: of a row; every image is looked at and painted.
    """
    frozen = trained = unsharded = 0
    groups: dict[str, int] = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        if is_frozen(name):
            frozen += size
        else:
            trained += size
        unit = _fsdp_unit(name)
        if unit is None:
            unsharded += size
        elif unit != "vae":
            groups[unit] = groups.get(unit, 0) + size
    largest = max(groups.values(), default=0)
    # The next unit is gathered while one is at work.
    return TrainingNeeds(
        frozen=frozen,
        trained=trained,
        unsharded=unsharded + 2 * largest,
        row=_row_cost(config, shapes, tokens=tokens, images=images),
    )


def is_frozen(name: str) -> bool:
    """Whether the recipe `pretrain` leaves a tensor as it is."""
    if ".synchronizer." in name:
        return False
    return name.startswith(("language_model.", "vision.clip.", "image_decoder.vae.", "text_head.base."))


def plan_lines(needs: TrainingNeeds, gpu: GpuClass, num_gpus: int) -> Iterator[PlanLine]:
    """DDP, FSDP over all GPUs, and FSDP within nodes with copies across them.

    Raises:
        UsageError: there is no GPU to plan for.
    """
    if num_gpus < 1:
        raise UsageError(f"GPUs: found {num_gpus}, expected 1 or more")
    state = needs.frozen * BYTES_FROZEN + needs.trained * BYTES_TRAINED
    work = needs.row.training_flops / (gpu.flops * SUSTAINED)
    # What is gathered is in bfloat16, and once more for the backward pass; gradients are summed in float32.
    gathered = 2 * 2.0 * (needs.frozen + needs.trained)
    gradients = 4.0 * needs.trained
    across = gpu.network_bandwidth if num_gpus > NODE_GPUS else gpu.node_bandwidth
    strategies = {
        "ddp": (state + 2 * needs.trained, 2 * gradients / across),
        "fsdp": (state / num_gpus + 2 * needs.unsharded, max(0.0, (gathered + gradients) / across - work)),
    }
    if num_gpus > NODE_GPUS:
        nodes = gradients / NODE_GPUS / gpu.network_bandwidth * 2
        inside = max(0.0, (gathered + gradients) / gpu.node_bandwidth - work)
        strategies["fsdp, hybrid"] = (state / NODE_GPUS + 2 * needs.unsharded, inside + nodes)
    for strategy, (fixed, waiting) in strategies.items():
        memory = fixed + needs.row.activation_bytes
        yield PlanLine(
            strategy=strategy,
            num_gpus=num_gpus,
            memory=memory,
            tokens_a_second=num_gpus * needs.row.tokens / (work + waiting),
            # A tenth is lost to fragments and buffers.
            fits=memory < 0.9 * gpu.memory,
        )


def _fsdp_unit(name: str) -> str | None:
    """The unit that a tensor is sharded with (see `training.parallel`); None = with the model itself."""
    match name.split("."):
        case "language_model", "layers", number, ("self_attn" | "mlp") as block, *_:
            return f"layer {number} {block}"
        case "vision", "clip", "layers", number, *_:
            return f"clip {number}"
        case "image_decoder", "unet", ("down_blocks" | "up_blocks") as blocks, number, *_:
            return f"{blocks} {number}"
        case "image_decoder", "unet", "mid_block", *_:
            return "mid_block"
        case "image_decoder", "vae", *_:
            return "vae"
        case _:
            return None


def _row_cost(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, tokens: int, images: int
) -> RowCost:
    places = _Places(config, tokens, images)
    forward = training = 0.0
    for name, shape in shapes.items():
        if len(shape) < 2 or "embed" in name:
            continue
        flops = 2.0 * math.prod(shape) * places.of(name)
        forward += flops
        training += flops * _passes(name)
    for name, flops in places.attention():
        forward += flops
        training += flops * _passes(name, has_weights=False)
    return RowCost(
        forward_flops=forward,
        training_flops=training,
        activation_bytes=places.activation_bytes(),
        tokens=tokens,
        images=images,
    )


def _passes(name: str, *, has_weights: bool = True) -> int:
    """How many times the forward pass's operations a training step does."""
    if name.startswith("image_decoder.vae"):
        return FORWARD
    passes = FORWARD + INPUT_GRADIENT
    if not has_weights:
        # Both factors of an attention product have gradients.
        passes += INPUT_GRADIENT
    elif not is_frozen(name):
        passes += WEIGHT_GRADIENT
    is_again = name.startswith(("language_model.layers", "vision.clip.layers", "image_decoder.unet"))
    return passes + (BACKWARD_AGAIN if is_again else 0)


class _Places:
    """At how many places of a row each weight is multiplied."""

    def __init__(self, config: Mapping[str, Any], tokens: int, images: int) -> None:
        self.config, self.tokens, self.images = config, tokens, images
        vision = config["vision_config"]
        self.grid = vision["image_size"] // vision["patch_size"]
        # Levels of the pyramid, finest first; the adapter works on all but the finest.
        self.cells = [(4 * self.grid) ** 2, (2 * self.grid) ** 2, self.grid**2, (self.grid // 2) ** 2]
        self.clip_tokens = self.grid**2 + 1
        self.slots = config["slot_resampler"]["num_queries"]
        unet = config.get("unet_config") or {}
        self.side = unet.get("sample_size") or 64
        self.halvings = len(unet.get("block_out_channels", (0,))) - 1
        self.doublings = len((config.get("vae_config") or {}).get("block_out_channels", (0,))) - 1

    def of(self, name: str) -> float:
        parts = name.split(".")
        if parts[0] in ("language_model", "text_head"):
            return self._of_language(parts)
        if parts[0] == "vision":
            return self.images * self._of_vision(parts)
        if parts[0] == "image_decoder":
            return self.images * self._of_decoder(parts)
        # The context of an image is all that stands before it: half a row on average.
        return self.images * self.tokens / 2

    def _of_language(self, parts: list[str]) -> float:
        if "value_projection" in parts:
            levels = self.config["text_synchronizer"]["levels"]
            return self.images * sum(self.cells[level] for level in levels)
        return self.tokens

    def _of_vision(self, parts: list[str]) -> float:
        match parts:
            case "vision", "clip", *_:
                return self.clip_tokens
            case "vision", "adapter", "upsample", *_:
                return self.cells[1]
            case "vision", "adapter", "interactions", _, "injector", *rest:
                return sum(self.cells[1:]) if "value_projection" in rest else self.clip_tokens - 1
            case "vision", "adapter", "interactions", _, _, _, *rest:
                return self.clip_tokens - 1 if "value_projection" in rest else sum(self.cells[1:])
            case "vision", "adapter", "spatial_prior", "stem", *_:
                return 4 * self.cells[0]
            case "vision", "adapter", "spatial_prior", "projections", number, *_:
                return self.cells[int(number)]
            case "vision", "adapter", "spatial_prior", conv, *_:
                return self.cells[int(conv.removeprefix("conv")) - 1] if conv[-1].isdigit() else 0
            case "vision", "resampler", *rest:
                reads = "cross_attention" in rest and ("key" in rest or "value" in rest)
                return self.clip_tokens if reads else self.slots
            case "vision", "slot_projection", *_:
                return self.slots
            case _:
                return self.clip_tokens

    def _of_decoder(self, parts: list[str]) -> float:
        match parts[1:]:
            case "unet", "time_embedding", *_:
                return 1
            case "unet", block, *rest:
                if "attn2" in rest and ("to_k" in rest or "to_v" in rest):
                    return self.config["conditioning_resampler"]["num_queries"]
                if "time_emb_proj" in rest:
                    return 1
                return (self.side / 2 ** self._level(block, rest)) ** 2
            case "synchronizers", place, *rest:
                if "value_projection" in rest:
                    levels = self.config["image_synchronizer"]["levels"]
                    return sum(self.cells[level] for level in levels)
                number = int(rest[0]) if place == "skips" else 3 * self.halvings + 2
                return (self.side / 2 ** min(number // 3, self.halvings)) ** 2
            case "vae", "encoder", "down_blocks", number, *_:
                return (self.side * 2 ** (self.doublings - int(number))) ** 2
            case "vae", "encoder", "conv_in", *_:
                return (self.side * 2**self.doublings) ** 2
            case "vae", "encoder", *_:
                return self.side**2
            case "resampler", *rest:
                reads = "cross_attention" in rest and ("key" in rest or "value" in rest)
                return self.tokens / 2 if reads else self.config["conditioning_resampler"]["num_queries"]
            case _:
                return 0

    def _level(self, block: str, rest: list[str]) -> int:
        if block == "mid_block":
            return self.halvings
        if block == "down_blocks":
            return int(rest[0])
        return self.halvings - int(rest[0]) if block == "up_blocks" else 0

    def attention(self) -> Iterator[tuple[str, float]]:
        """(a name of the part, operations) of the products of queries, keys and values."""
        text, vision = self.config["text_config"], self.config["vision_config"]
        yield (
            "language_model.layers",
            4.0 * self.tokens**2 * text["hidden_size"] * text["num_hidden_layers"],
        )
        layers = 4.0 * self.clip_tokens**2 * vision["hidden_size"] * vision["num_hidden_layers"]
        yield "vision.clip.layers", self.images * layers
        unet = self.config.get("unet_config")
        if unet is None:
            return
        per_block = unet.get("layers_per_block", 2)
        reads = self.config["conditioning_resampler"]["num_queries"]
        for level, channels in enumerate(unet["block_out_channels"]):
            places = (self.side / 2**level) ** 2
            # Transformers: of each level but the last, down and up; of the middle, one.
            blocks = 2 * per_block + 1 if level < self.halvings else 1
            yield "image_decoder.unet", self.images * blocks * 4.0 * places * (places + reads) * channels

    def activation_bytes(self) -> float:
        """What a row keeps for its backward pass under checkpointing, and the largest thing at work."""
        text, vision = self.config["text_config"], self.config["vision_config"]
        kept = 2.0 * self.tokens * text["hidden_size"] * text["num_hidden_layers"] * _RESIDUALS_A_LAYER
        layer = 2.0 * self.tokens * (8 * text["hidden_size"] + 3 * text["intermediate_size"])
        # Logits in bfloat16, in float32 for the loss, and their gradient.
        logits = self.tokens * text["vocab_size"] * (2.0 + 4 + 4)
        synchronizer = self.config.get("text_synchronizer")
        if synchronizer is not None:
            cells = sum(self.cells[level] for level in synchronizer["levels"])
            num_layers = math.ceil(text["num_hidden_layers"] / synchronizer["every"])
            channels = synchronizer["value_dim"] + vision["hidden_size"]
            kept += 2.0 * self.images * num_layers * cells * channels
        adapter = 2.0 * sum(self.cells[1:]) * vision["hidden_size"] * _ADAPTER_TENSORS
        clip = 2.0 * self.clip_tokens * vision["hidden_size"] * vision["num_hidden_layers"]
        an_image = adapter + clip
        unet = self.config.get("unet_config")
        if unet is not None:
            widths = unet["block_out_channels"]
            maps = sum(width * (self.side / 2**level) ** 2 for level, width in enumerate(widths))
            an_image += 2.0 * maps * _UNET_MAPS_A_RESOLUTION
            image_synchronizer = self.config.get("image_synchronizer")
            if image_synchronizer is not None:
                cells = sum(self.cells[level] for level in image_synchronizer["levels"])
                sites = 3 * (self.halvings + 1) + 1
                an_image += 2.0 * sites * cells * (image_synchronizer["value_dim"] + vision["hidden_size"])
        return kept + max(layer, logits) + logits + self.images * an_image
