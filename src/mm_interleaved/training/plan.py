"""What training a model takes on many GPUs: memory of each, and tokens a second.

By the operations and activations of a row (`models.operations`, `models.cost`), the shapes of the weights and
the rules of the recipe `pretrain`: language model, CLIP and VAE frozen, the rest trained with AdamW under
bfloat16 autocast, activations computed again. Time assumes a share of what the maker promises, and that the
exchange of weights hides behind computation; docs/training.md says what of this was checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm_interleaved.errors import UsageError
from mm_interleaved.models.cost import activation_bytes

if TYPE_CHECKING:
    from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration

BYTES_FROZEN = 2
BYTES_TRAINED = 4 + 4 + 8
"""Weight, gradient and AdamW's two moments in float32."""


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
        config, shapes: as `models.cost.needs_of`.
        tokens, images: of a row; every image is encoded and generated.
    """
    # Loaded here: whoever asks for the help of a command waits for neither torch nor transformers.
    from mm_interleaved.models.operations import meta_model

    stays = frozen_names(meta_model(config))
    frozen = trained = unsharded = 0
    groups: dict[str, int] = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        if name in stays:
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
        row=_row_cost(config, stays, tokens=tokens, images=images),
    )


def frozen_names(model: MMInterleavedForConditionalGeneration) -> frozenset[str]:
    """Names of the parameters that the recipe `pretrain` leaves as they are: it trains the default parts."""
    from mm_interleaved.training.parameter_groups import PartsConfig, parameters_by_part

    parts = PartsConfig()
    return frozenset(
        name
        for part, parameters in parameters_by_part(model).items()
        if not getattr(parts, part).train
        for name in parameters
    )


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


def _row_cost(config: Mapping[str, Any], frozen: frozenset[str], *, tokens: int, images: int) -> RowCost:
    from mm_interleaved.models.operations import row_operations

    counted = row_operations(config, tokens=tokens, images=images, frozen=frozen)
    return RowCost(
        forward_flops=counted.forward.total,
        training_flops=counted.training.total,
        activation_bytes=activation_bytes(config, tokens, images),
        tokens=tokens,
        images=images,
    )
