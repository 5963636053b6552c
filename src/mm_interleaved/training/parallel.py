"""Several processes that train one model: how the model is spread over them.

torchrun starts the processes; PyTorch's DDP keeps a whole model on each, its FSDP2 a share of every weight.
Nothing of this is needed by one process alone.
"""

import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mm_interleaved.errors import UsageError
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.runs.ranks import Ranks, joined_ranks
from mm_interleaved.training.config import ParallelConfig

logger = logging.getLogger(__name__)

_STORAGE_TYPES = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# From torch 2.13 on the first.
_SENDS_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel.__init__).parameters
)


@contextmanager
def training_ranks(config: ParallelConfig, device: str = "auto") -> Generator[Ranks, None, None]:
    """See `joined_ranks`."""
    remark = ", its exit_status file says why"
    with joined_ranks(config.timeout_seconds, device, remark=remark) as ranks:
        yield ranks


def spread(
    model: MMInterleavedForConditionalGeneration,
    ranks: Ranks,
    config: ParallelConfig,
    *,
    communication_type: str = "",
    has_unused: bool = False,
) -> nn.Module:
    """The model as it is to be called: wrapped by DDP, or sharded where it stands, or untouched if alone.

    Args:
        communication_type: FSDP: weights are gathered and multiplied in this type, gradients summed in
            float32; empty = as they are stored.
        has_unused: some of what trains takes no part in the losses (where no
            image is denoised, what only the image decoder reads); DDP has to search for it in every step.

    Raises:
        UsageError: the ranks cannot be divided as asked.
    """
    if config.strategy == "fsdp":
        _shard(model, ranks, config, _STORAGE_TYPES[communication_type])
        return model
    if ranks.size == 1:
        return model
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    # The model has no buffers that training changes; without this they would be sent round before each pass.
    buffers: dict[str, Any] = {_SENDS_BUFFERS: False}
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        gradient_as_bucket_view=True,
        find_unused_parameters=has_unused,
        **buffers,
    )


@contextmanager
def summing_gradients(model: nn.Module, is_last: bool) -> Generator[None, None, None]:
    """Within, ranks exchange gradients only in the last micro-batch of a step."""
    if isinstance(model, DistributedDataParallel):
        if is_last:
            yield
        else:
            with model.no_sync():
                yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(is_last)
    yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the ranks, gathered; all ranks have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_spread(tensors: Mapping[str, Tensor]) -> bool:
    """Some of these tensors are spread over the ranks."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _shard(
    model: MMInterleavedForConditionalGeneration,
    ranks: Ranks,
    config: ParallelConfig,
    communication_type: torch.dtype | None,
) -> None:
    """FSDP2 over the parts of the model that are called as modules; all else is one group with the model.

    A synchronizer is also asked for projections outside its layer's own pass, so what is sharded of a layer
    is its attention and its feed-forward. The frozen VAE stays whole on every rank.
    """
    if not dist.is_initialized():
        raise UsageError("strategy=fsdp needs processes to spread over; start the run with torchrun")
    vae: set[nn.Parameter] = set()
    if model.image_decoder is not None:
        vae = set(model.image_decoder.vae.to(ranks.device).parameters())
    if any(parameter.requires_grad for parameter in vae):
        raise UsageError("strategy=fsdp keeps the VAE whole on every rank, found parts.vae.train=true")
    shard_ranks = config.shard_ranks or ranks.size
    if ranks.size % shard_ranks:
        raise UsageError(f"shard_ranks {shard_ranks} must divide the number of ranks, found {ranks.size}")
    kind = ranks.device.type
    if shard_ranks == ranks.size:
        mesh = init_device_mesh(kind, (ranks.size,), mesh_dim_names=("shard",))
    else:
        shape = (ranks.size // shard_ranks, shard_ranks)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(
        param_dtype=communication_type,
        reduce_dtype=torch.float32 if communication_type else None,
        # Ours are dataclasses and dictionaries that the cast would not enter; autocast sees to types.
        cast_forward_inputs=False,
    )
    for unit in _units(model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=False,
        ignored_params=vae,
    )


def _units(model: MMInterleavedForConditionalGeneration) -> Iterator[nn.Module]:
    for layer in model.language_model.layers:
        yield from (layer.self_attn, layer.mlp)
    yield from model.vision.clip.layers
    if model.image_decoder is not None:
        unet = model.image_decoder.unet
        yield from (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
