"""The denoiser: a stock U-Net whose twelve skips and middle attend to earlier images.

`unet_forward` composes the public submodules of diffusers' `UNet2DConditionModel`; without a callback it
equals the stock forward to the bit (tests/equivalence).
Letters: I images being denoised, K earlier images each attends to, X skip channels, y and x rows and columns
of a map, Q pixels of a map (y * x), C feature channels, T conditioning vectors, D their channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import initialization as init

from mm_interleaved.models.folding import attend_from_map, project_for_all, with_shortcut
from mm_interleaved.models.image_values import ImageValues
from mm_interleaved.models.offloading import value_of
from mm_interleaved.models.positions import pixel_centres, resize_grid_table, sincos_2d_table
from mm_interleaved.models.synchronizer import FeatureSynchronizer, plan_of
from mm_interleaved.ops import SamplingPlan

NORM_EPS = 1e-6

Between = Callable[[Tensor | None, tuple[Tensor, ...]], tuple[Tensor | None, tuple[Tensor, ...]]]


@dataclass(slots=True)
class DeepFeatures:
    """What one denoising step computed of the U-Net's deep blocks, for later steps to use again.

    Not exact: deep features change slowly from step to step, and this takes them for constant (the idea of
    DeepCache, arXiv 2312.00858).
    """

    hidden: Tensor | None = None
    """What enters the last upward block, (I, X, y, x); None: the next step computes all and keeps it."""

    def keep_for(self, count: int, *, is_fresh: bool) -> None:
        """Make it serve `count` images: the last ones of those it has; none if it is stale or has fewer."""
        if self.hidden is not None:
            self.hidden = self.hidden[-count:] if is_fresh and len(self.hidden) >= count else None


def unet_forward(
    unet: Any,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Tensor,
    between: Between | None = None,
    deep: DeepFeatures | None = None,
) -> Tensor:
    """A stock U-Net's forward with a callback between its middle and its upward path.

    Args:
        unet: a `UNet2DConditionModel`.
        latents: noisy latents (I, channels, y, x), any y and x that survive the U-Net's halvings.
        timesteps: (I,) or scalar.
        conditioning: (I, T, D), what cross-attention reads.
        between: gets the middle's output and all skips, returns them changed. Where deep blocks are left out,
            it gets None and the skips of the first level alone.
        deep: leaves out the deep blocks if it holds what they gave before, and keeps it if it does not.

    Returns:
        the prediction, shaped as the latents.
    """
    # 1. Time.
    time_embedding = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
    # The stock code forces output sizes only if a side does not halve evenly; so do we.
    needs_sizes = any(side % 2**unet.num_upsamplers for side in latents.shape[-2:])

    is_shallow = deep is not None and deep.hidden is not None
    down_blocks, up_blocks = list(unet.down_blocks), list(unet.up_blocks)
    if is_shallow:
        down_blocks, up_blocks = down_blocks[:1], up_blocks[-1:]

    # 2. Down, keeping the skips.
    hidden = unet.conv_in(2 * latents - 1.0 if unet.config.center_input_sample else latents)
    skips: tuple[Tensor, ...] = (hidden,)
    for block in down_blocks:
        hidden, new_skips = block(hidden_states=hidden, temb=time_embedding, **_reading(block, conditioning))
        skips += new_skips

    # 3. Middle, and what others have to say there.
    middle = None
    if is_shallow:
        skips = skips[: len(up_blocks[-1].resnets)]
    else:
        middle = unet.mid_block(hidden, time_embedding, **_reading(unet.mid_block, conditioning))
    if between is not None:
        middle, skips = between(middle, skips)

    # 4. Up.
    hidden = deep.hidden if deep is not None and is_shallow else middle
    for block in up_blocks:
        if deep is not None and block is up_blocks[-1]:
            deep.hidden = hidden
        count = len(block.resnets)
        block_skips, skips = skips[-count:], skips[:-count]
        hidden = block(
            hidden_states=hidden,
            temb=time_embedding,
            res_hidden_states_tuple=block_skips,
            upsample_size=skips[-1].shape[2:] if needs_sizes and skips else None,
            **_reading(block, conditioning),
        )

    # 5. Out.
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    return unet.conv_out(hidden)


def _reading(block: nn.Module, conditioning: Tensor) -> dict[str, Tensor]:
    has_cross_attention = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": conditioning} if has_cross_attention else {}


def unet_blocks(unet: Any) -> list[nn.Module]:
    """The blocks between which `unet_forward` goes its way, from the first to the last."""
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]


def check_unet(unet: UNet2DConditionModel) -> None:
    """Refuse U-Nets of another shape than Stable Diffusion 1.x and 2.x.

    Raises:
        ValueError: naming the setting that does not fit.
    """
    config = unet.config
    unwanted = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim",
                "time_embedding_act_fn", "num_class_embeds")  # fmt: skip
    for name in unwanted:
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"U-Net does not have the shape of SD 1.x/2.x: expected no {name}, got {config[name]!r}"
            )
    if config.mid_block_type != "UNetMidBlock2DCrossAttn":
        raise ValueError(
            "U-Net does not have the shape of SD 1.x/2.x: expected mid_block_type 'UNetMidBlock2DCrossAttn', "
            f"got {config.mid_block_type!r}"
        )


def skip_channels(unet: Any) -> list[tuple[int, int]]:
    """Channels of each skip and how often its map was halved, in the order of the downward path."""
    channels = [(unet.conv_in.out_channels, 0)]
    for depth, block in enumerate(unet.down_blocks):
        channels += [(resnet.out_channels, depth) for resnet in block.resnets]
        if block.downsamplers is not None:
            channels.append((block.downsamplers[0].out_channels, depth + 1))
    return channels


class MapSynchronizer(nn.Module):
    """The synchronizer of one U-Net map: each pixel attends to its own place in earlier images.

    Its 1 x 1 convolution starts at zero, so a pretrained U-Net starts unchanged (paper, section 3.2).

    Args:
        grid_size: cells along one side of the position table, the U-Net's training latents.
    """

    position_table: Tensor

    def __init__(self, synchronizer: FeatureSynchronizer, channels: int, feature_dim: int, *, grid_size: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.feature_norm = nn.LayerNorm(feature_dim, eps=NORM_EPS)
        self.synchronizer = synchronizer
        self.conv = nn.Conv2d(channels, channels, 1)
        self.register_buffer("position_table", torch.zeros(grid_size**2, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.conv.parameters():
            init.zeros_(parameter)
        cells, channels = self.position_table.shape
        init.copy_(self.position_table, sincos_2d_table(round(cells**0.5), channels))

    def project_cells(self, cells_IKSC: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
        return project_for_all([self], cells_IKSC, level_sizes)[0]

    @with_shortcut(attend_from_map)
    def forward(self, map_IXyx: Tensor, values: ImageValues, relative_index_IK: Tensor) -> Tensor:
        """What is added to the map: (I, X, y, x)."""
        query_IQX, relative_index_IQK, centres_1Q2 = self.queries(map_IXyx, relative_index_IK)
        seen_IQX = self.synchronizer(query_IQX, values, relative_index_IQK, centres_1Q2)
        return self.conv(seen_IQX.transpose(1, 2).unflatten(2, map_IXyx.shape[-2:]))

    def queries(self, map_IXyx: Tensor, relative_index_IK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels as queries (I, Q, X), each with its position; the relative indices of each (I, Q, K); where
        the pixels stand (1, Q, 2).
        """
        height, width = map_IXyx.shape[-2:]
        query_IQX = self.query_norm(map_IXyx.flatten(2).transpose(1, 2))
        query_IQX = query_IQX + resize_grid_table(value_of(self, "position_table"), (height, width))
        relative_index_IQK = relative_index_IK[:, None].expand(-1, height * width, -1)
        return query_IQX, relative_index_IQK, pixel_centres(height, width, map_IXyx)

    def plan(self, map_IXyx: Tensor, relative_index_IK: Tensor) -> SamplingPlan:
        """Where pixels look, row by row; arguments as `forward`."""
        return plan_of(self.synchronizer, *self.queries(map_IXyx, relative_index_IK))


class UNetSynchronizers(nn.Module):
    """The synchronizers of all skips and of the middle."""

    def __init__(self, skips: Sequence[MapSynchronizer], middle: MapSynchronizer):
        super().__init__()
        self.skips = nn.ModuleList(skips)
        self.middle = middle

    def project_cells(self, cells_IKSC: Tensor, level_sizes: tuple[int, ...]) -> list[ImageValues]:
        """Each map's projection of earlier images, the middle last; the same at every denoising step, so keep
        it.
        """
        blocks: list[Any] = [*self.skips, self.middle]
        return project_for_all(blocks, cells_IKSC, level_sizes)

    def callback(
        self, values: Sequence[ImageValues], relative_index_IK: Tensor, strength: float = 1.0
    ) -> Between:
        """What `unet_forward` calls between its middle and its upward path.

        Args:
            values: result of `project_cells`.
            relative_index_IK: int64, 1 = newest earlier image, 0 = hidden.
            strength: 1 adds what was seen, 0 nothing.
        """

        seeing_I = relative_index_IK.any(1)
        # In training, images without earlier ones share a batch with others: they get their constant.
        are_mixed = torch.is_grad_enabled() and not bool(seeing_I.all())

        def added(block: Any, values: ImageValues, to: Tensor) -> Tensor:
            if not are_mixed or values.image_BN is None:
                return block(to, values, relative_index_IK)
            image_BN = values.image_BN[seeing_I]
            seen = block(to[seeing_I], values._replace(image_BN=image_BN), relative_index_IK[seeing_I])
            # Seen through a call too, so that weights which are only there during a call are there.
            nothing = block(to, values, relative_index_IK[:, :0])
            return nothing.to(seen.dtype).index_put((seeing_I,), seen)

        def between(
            middle: Tensor | None, skips: tuple[Tensor, ...]
        ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
            # A step that leaves out the deep blocks has the first skips only, and no middle.
            blocks = zip(self.skips, skips, values[:-1], strict=middle is not None)
            seen = [added(block, block_values, skip) for block, skip, block_values in blocks]
            if middle is not None:
                middle = middle + strength * added(self.middle, values[-1], middle).to(middle.device)
            pairs = zip(skips, seen, strict=True)
            return middle, tuple(skip + strength * delta.to(skip.device) for skip, delta in pairs)

        return between
