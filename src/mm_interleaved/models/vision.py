"""The image tokenizer: pixels to slots for the language model and a pyramid for all who look.

    pixels -> CLIP <-> ViT-Adapter -> tokens -> resampler -> slots
                                   -> four maps -> pyramid

Letters: I images, G cells along one side of the patch grid, T patches (G * G), C channels, N slots an image,
D channels of the language model.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

from mm_interleaved.models.adapter import VisionAdapter
from mm_interleaved.models.offloading import value_of
from mm_interleaved.models.positions import resize_grid_table, sincos_2d_table
from mm_interleaved.models.resampler import Resampler

TOKEN_NORM_EPS = 1e-6
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageFeatures(NamedTuple):
    """What the model keeps of images. `slots`: (I, N, D). `pyramid`: four maps (I, C, s, s), s = 4G, 2G, G,
    G/2.
    """

    slots: Tensor
    pyramid: tuple[Tensor, ...]


class ClipBackbone(nn.Module):
    """CLIP's vision transformer out of transformers' own parts: embeddings, pre-norm, layers.

    The stock class ends with a norm of the class token that this model has no use for (and that would get no
    gradient), so the parts are composed here instead.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        # Annotated in the library as possibly pairs; `build.py` refuses anything but square ones.
        self.patch_size: Any = config.patch_size
        self.image_size: Any = config.image_size
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        width = self.embeddings.embed_dim
        init.normal_(self.embeddings.class_embedding, std=width**-0.5)
        init.normal_(self.embeddings.patch_embedding.weight, std=0.02)
        init.normal_(self.embeddings.position_embedding.weight, std=0.02)
        # A buffer that no checkpoint holds: transformers leaves its memory unset when it loads a model.
        init.copy_(self.embeddings.position_ids, torch.arange(self.embeddings.num_positions)[None])

    def calls(self) -> list[Callable[..., Tensor]]:
        """The layers to be called by others. Their calls, not they: accelerate would move modules that are
        arguments from one device to another.
        """
        return [layer.__call__ for layer in self.layers]

    def embed(self, pixels_I3yx: Tensor) -> Tensor:
        """Tokens before the first layer, class token first: (I, 1 + T, C)."""
        resized = pixels_I3yx.shape[-1] != self.image_size
        return self.pre_norm(self.embeddings(pixels_I3yx, interpolate_pos_encoding=resized))


class VisionTower(nn.Module):
    """Image tokenizer of the paper (section 3.1), with the pyramid that the synchronizers look into.

    Args:
        clip: the transformer.
        adapter: the pyramid beside it.
        resampler: reads all tokens into the slots.
        slot_dim: width of the language model.
    """

    mean: Tensor
    std: Tensor
    position_table: Tensor

    def __init__(
        self, clip: ClipBackbone, adapter: VisionAdapter, resampler: Resampler, *, dim: int, slot_dim: int
    ):
        super().__init__()
        self.clip, self.adapter, self.resampler = clip, adapter, resampler
        grid_size = clip.image_size // clip.patch_size
        self.token_projection = nn.Linear(dim, dim)
        self.token_norm = nn.LayerNorm(dim, eps=TOKEN_NORM_EPS)
        self.position_norm = nn.LayerNorm(dim, eps=TOKEN_NORM_EPS)
        self.slot_projection = nn.Linear(resampler.queries.shape[-1], slot_dim)
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.ones(1, 3, 1, 1))
        # Class token first; a buffer, and saved, since the released checkpoint holds it too.
        self.register_buffer("position_table", torch.zeros(1 + grid_size**2, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.copy_(self.mean, torch.tensor(CLIP_MEAN, dtype=torch.float32).view(1, 3, 1, 1))
        init.copy_(self.std, torch.tensor(CLIP_STD, dtype=torch.float32).view(1, 3, 1, 1))
        grid_size = round((self.position_table.shape[0] - 1) ** 0.5)
        table = sincos_2d_table(grid_size, self.position_table.shape[1])
        init.copy_(self.position_table, torch.cat([table.new_zeros(1, table.shape[1]), table]))
        # Small, so that untrained slots do not disturb a pretrained language model.
        init.normal_(self.slot_projection.weight, std=1e-3)
        init.zeros_(self.slot_projection.bias)

    def forward(self, pixels_I3yx: Tensor) -> ImageFeatures:
        """Slots and pyramid of images.

        Args:
            pixels_I3yx: RGB in [0, 1], square, a multiple of the patch size; other sizes than the transformer
                was made for get resized position tables.

        Raises:
            ValueError: the images do not fit the patch grid.
        """
        token_I1TC, maps = self.adapter(*self._embed(pixels_I3yx), self.clip.calls())
        grid_size = maps[2].shape[-1]
        table = torch.cat(
            [self.position_table[:1], resize_grid_table(self.position_table[1:], (grid_size, grid_size))]
        )
        slots = self.slot_projection(self.resampler(self.read_tokens(token_I1TC, table)))
        pyramid = tuple(level + self._level_table(table, level.shape[-1]) for level in maps)
        return ImageFeatures(slots, pyramid)

    def read_tokens(self, token_I1TC: Tensor, table: Tensor) -> Tensor:
        """Tokens as the resampler reads them: projected, normalised, with their places."""
        return self.position_norm(self.token_norm(self.token_projection(token_I1TC)) + table)

    def empty_pyramid(self) -> tuple[Tensor, ...]:
        """The pyramid of no image at all: four maps (0, C, s, s)."""
        grid_size = self.clip.image_size // self.clip.patch_size
        sizes = (4 * grid_size, 2 * grid_size, grid_size, grid_size // 2)
        mean = value_of(self, "mean")
        return tuple(mean.new_empty(0, self.position_table.shape[1], size, size) for size in sizes)

    def _embed(self, pixels_I3yx: Tensor) -> tuple[Tensor, Tensor]:
        height, width = pixels_I3yx.shape[-2:]
        patch_size = self.clip.patch_size
        if height != width or height % (2 * patch_size):
            raise ValueError(
                f"images must be square with sides a multiple of {2 * patch_size} (two patches), "
                f"found {width} x {height}"
            )
        normalised = (pixels_I3yx - self.mean) / self.std
        return self.clip.embed(normalised), normalised

    def _level_table(self, table: Tensor, size: int) -> Tensor:
        """The patch positions, resized to a level: (C, size, size)."""
        return resize_grid_table(table[1:], (size, size)).T.unflatten(1, (size, size))


def select_levels(pyramid: Sequence[Tensor], levels: Sequence[int]) -> tuple[Tensor, ...]:
    """The levels of a pyramid that one of the synchronizers looks into, by index, finest = 0."""
    return tuple(pyramid[level] for level in levels)
