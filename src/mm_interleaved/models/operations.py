"""Operations of a model, counted by PyTorch while the model's own parts run on the meta device.

There tensors have shapes and no numbers, so that the largest model is counted in seconds, without weights.
PyTorch counts matrix products, attention and convolutions, a multiplication and its addition as two; norms
and element-wise arithmetic count nothing. What it cannot count is bilinear sampling, the synchronizers' and
the adapter's: a sample of one channel is four cells, each multiplied and added, so eight operations; its
gradients (of value, place and weight) are taken for twice that. Hidden pairs of query and image count too.
Letters: I images, K earlier images that a generated one attends to, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from mm_interleaved.models.context import add_distances
from mm_interleaved.models.language import ImageView
from mm_interleaved.models.transformers_versions import CACHE
from mm_interleaved.models.unet import unet_forward

if TYPE_CHECKING:
    from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration

OPERATIONS_A_SAMPLE = 8
META = torch.device("meta")
GUIDED = 2
"""Predictions of a guided step: with the context and without."""
DEFAULT_LATENTS = 64
"""Cells along a side of the latents of a U-Net that names no `sample_size`."""


@dataclass(frozen=True, slots=True)
class Operations:
    """Of a call: what PyTorch counts, and what is counted for bilinear sampling where it is not fused."""

    products: float
    sampling: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.products + self.sampling

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.products + other.products, self.sampling + other.sampling)

    def __mul__(self, times: float) -> Operations:
        return Operations(times * self.products, times * self.sampling)


def _of_samples(*_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return OPERATIONS_A_SAMPLE * torch.Size(out_shape).numel()


def _of_sample_gradients(gradient_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * OPERATIONS_A_SAMPLE * torch.Size(gradient_shape).numel()


_SAMPLING = {
    torch.ops.aten.grid_sampler_2d: _of_samples,
    torch.ops.aten.grid_sampler_2d_backward: _of_sample_gradients,
}


class _SampledShapes(TorchDispatchMode):
    """Bilinear sampling on the meta device, where PyTorch takes it apart into a hundred operations of Python:
    `plan released` took 30 s of CPU time with them, 2026-11.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.grid_sampler_2d.default and args[0].device == META:
            maps, grid = args[:2]
            return maps.new_empty(*maps.shape[:2], *grid.shape[1:3])
        if func is torch.ops.aten.grid_sampler_2d_backward.default and args[0].device == META:
            maps, grid = args[1:3]
            return torch.empty_like(maps), torch.empty_like(grid)
        return func(*args, **(kwargs or {}))


def count_operations(work: Callable[[], object]) -> Operations:
    """Operations of a call, on whatever device it computes."""
    with _SampledShapes(), FlopCounterMode(display=False, custom_mapping=_SAMPLING) as counter:
        work()
    counts = counter.get_flop_counts().get("Global", {})
    sampling = sum(count for operation, count in counts.items() if operation in _SAMPLING)
    return Operations(float(sum(counts.values()) - sampling), float(sampling))


def meta_model(config: Mapping[str, Any]) -> MMInterleavedForConditionalGeneration:
    """The model of a `config.json`, without weights.

    Raises:
        ValueError: no model can be built so.
    """
    return _meta_model(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=1)
def _meta_model(config: str) -> MMInterleavedForConditionalGeneration:
    from mm_interleaved.models.config import MMInterleavedConfig
    from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration

    with META:
        model = MMInterleavedForConditionalGeneration(MMInterleavedConfig.from_dict(json.loads(config)))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def token_operations(
    model: MMInterleavedForConditionalGeneration, context: int, num_images: int
) -> Operations:
    """Of one token behind `context` others and so many images, whose values are kept."""
    text = model.eval().config.text_config
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    shape = (1, getattr(text, "num_key_value_heads", None) or heads, context, head_dim)
    view = _view(model, 1, _pyramid(model, num_images))

    def read() -> None:
        cache: Any = DynamicCache(config=text)
        for layer in range(text.num_hidden_layers):
            cache.update(torch.empty(shape, device=META), torch.empty(shape, device=META), layer)
        embedding = torch.empty(1, 1, text.hidden_size, device=META)
        read = model.language_model(
            inputs_embeds=embedding, image_view=view, use_cache=True, **{CACHE: cache}
        )
        model.predict_text(read.last_hidden_state)

    # The first token after new images multiplies the weights that are folded; it is not counted.
    count_operations(read)
    return count_operations(read)


@torch.no_grad()
def image_operations(model: MMInterleavedForConditionalGeneration) -> Operations:
    """Of encoding one image, and of projecting it for all that attend to it."""
    model.eval()

    def encode() -> None:
        pyramid = model.vision(_pixels(model, 1)).pyramid
        model.project_images(pyramid)
        if model.image_decoder is not None:
            model.project_earlier_images(pyramid, torch.zeros(1, 1, dtype=torch.int64, device=META))

    return count_operations(encode)


@torch.no_grad()
def step_operations(model: MMInterleavedForConditionalGeneration, num_earlier: int) -> Operations:
    """Of one denoising step with guidance, of one image that attends to so many earlier ones."""
    decoder = model.eval().image_decoder
    index = torch.zeros(1, num_earlier, dtype=torch.int64, device=META)
    earlier = model.project_earlier_images(_pyramid(model, num_earlier), index)
    guided = None if earlier is None else earlier.repeat(GUIDED)
    latents, conditioning = _latents(model, GUIDED), decoder.negative_conditioning.expand(GUIDED, -1, -1)

    def step() -> None:
        decoder.predict(latents, _timesteps(GUIDED), conditioning, guided)

    # The first step folds weights.
    count_operations(step)
    return count_operations(step)


@torch.no_grad()
def decoding_operations(model: MMInterleavedForConditionalGeneration) -> Operations:
    """Of the pixels of one image, from its latents."""
    vae = model.eval().image_decoder.vae
    return count_operations(lambda: vae.decode(_latents(model, 1)))


@dataclass(frozen=True, slots=True)
class RowOperations:
    """Of one row of a training batch."""

    forward: Operations
    backward: Operations
    again: Operations
    """Of the forward pass of what is checkpointed: layers of language model and CLIP, and the U-Net."""

    @property
    def training(self) -> Operations:
        """Of all three."""
        return self.forward + self.backward + self.again


def row_operations(
    config: Mapping[str, Any], *, tokens: int, images: int, frozen: Collection[str]
) -> RowOperations:
    """Forward and backward pass of a row.

    Args:
        images: every one is encoded and generated, from half the row (on average) and one earlier image.
        frozen: names of the parameters that are not trained.
    """
    model = meta_model(config).train()
    again = _checkpointed(model, tokens, images)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs: list[Tensor] = []
    try:
        forward = count_operations(lambda: outputs.extend(_row(model, tokens, images)))
        total = torch.stack([output.sum() for output in outputs]).sum()
        backward = count_operations(lambda: torch.autograd.grad(total, learned, allow_unused=True))
    finally:
        # Others count with this model too.
        model.requires_grad_(False).eval()
    return RowOperations(forward, backward, again)


def _row(model: MMInterleavedForConditionalGeneration, tokens: int, images: int) -> list[Tensor]:
    """A pass of training where no number can be read: logits, and what the U-Net predicts."""
    features = model.vision(_pixels(model, images))
    view = _view(model, tokens, features.pyramid)
    # What stands where in a row costs nothing: the slots come first.
    slots = features.slots.flatten(0, 1)[None, :tokens]
    text = torch.empty(1, tokens - slots.shape[1], slots.shape[2], device=META)
    embeddings = torch.cat([slots, text], dim=1)
    hidden = _read(model, embeddings, view)
    logits, decoder = model.predict_text(hidden), model.image_decoder
    if decoder is None:
        return [logits]
    context = hidden[:, : max(1, tokens // 2)].expand(images, -1, -1)
    mask = torch.ones(context.shape[:2], dtype=torch.bool, device=META)
    conditioning = decoder.condition(add_distances(model.context_projection(context)), mask)
    index = torch.zeros(images, 1, dtype=torch.int64, device=META)
    earlier = model.project_earlier_images(features.pyramid, index)
    between = None
    with torch.no_grad():
        if earlier is not None:
            # In training it reads which images see none; here all see one.
            between = decoder.synchronizers.callback(earlier.values, earlier.relative_index_IK)
        side = decoder.latent_factor * _latents(model, 1).shape[-1]
        latents = decoder.encode(torch.empty(images, 3, side, side, device=META))
    return [logits, unet_forward(decoder.unet, latents, _timesteps(images), conditioning, between)]


@torch.no_grad()
def _checkpointed(model: MMInterleavedForConditionalGeneration, tokens: int, images: int) -> Operations:
    """Of the forward pass of what training computes again."""
    view, decoder = _view(model, tokens, _pyramid(model, images)), model.image_decoder
    embeddings = torch.empty(1, tokens, model.config.text_config.hidden_size, device=META)

    def forward() -> None:
        _read(model, embeddings, view)
        token = torch.empty(
            images,
            model.vision.clip.embeddings.num_positions,
            model.vision.clip.embeddings.embed_dim,
            device=META,
        )
        for layer in model.vision.clip.layers:
            token = layer(token, attention_mask=None)
        if decoder is not None:
            conditioning = decoder.negative_conditioning.expand(images, -1, -1)
            unet_forward(decoder.unet, _latents(model, images), _timesteps(images), conditioning)

    return count_operations(forward)


def _read(model: MMInterleavedForConditionalGeneration, embeddings: Tensor, view: ImageView | None) -> Tensor:
    """Final hidden states of a row, (1, T, D)."""
    tokens = embeddings.shape[1]
    # Given, since transformers would read position numbers to make one. Half of it is masked, and is counted.
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=META)
    read = model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, image_view=view, use_cache=False
    )
    return read.last_hidden_state


def _pixels(model: MMInterleavedForConditionalGeneration, images: int) -> Tensor:
    side = model.config.vision_config.image_size
    return torch.empty(images, 3, side, side, device=META)


def _pyramid(model: MMInterleavedForConditionalGeneration, images: int) -> tuple[Tensor, ...]:
    return tuple(level.new_empty(images, *level.shape[1:]) for level in model.vision.empty_pyramid())


def _latents(model: MMInterleavedForConditionalGeneration, images: int) -> Tensor:
    unet = model.image_decoder.unet.config
    side = unet.sample_size or DEFAULT_LATENTS
    return torch.empty(images, unet.in_channels, side, side, device=META)


def _timesteps(images: int) -> Tensor:
    return torch.empty(images, dtype=torch.int64, device=META)


def _view(
    model: MMInterleavedForConditionalGeneration, tokens: int, pyramid: tuple[Tensor, ...]
) -> ImageView | None:
    """All tokens of a row see all images."""
    if not model.language_model.synchronized_layers:
        return None
    image_1N = torch.arange(len(pyramid[0]), device=META)[None]
    values = {
        layer: kept._replace(image_BN=image_1N) for layer, kept in model.project_images(pyramid).items()
    }
    return ImageView(values, image_1N[:, None].expand(1, tokens, -1))
