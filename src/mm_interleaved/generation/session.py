"""A document while it is being read and written: tokens, images, and what the model keeps of them.

    append_text, append_image -> unread embeddings -> read() -> PrefixCache (keys, values, hidden, images)
                                                   -> earlier_images() -> ProjectedImages

Whatever has been read is never computed again: each token and each image costs only itself. If the model's
weights change meanwhile (a training step, LoRA), all of it is forgotten, and read again when it is needed.
Letters: T tokens so far, D hidden channels, N images so far.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mm_interleaved.models.image_decoder import EarlierImages, ProjectedImages
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.vision import ImageFeatures
from mm_interleaved.models.weights_at_hand import weights_version
from mm_interleaved.tokens.visibility import context_images


class EncodedImage(NamedTuple):
    """`pixel_values`: RGB in [0, 1], (1, 3, H, W), as given. `features`: what the model makes of it."""

    pixel_values: Tensor
    features: ImageFeatures


IMAGES_AT_ONCE = 32
"""Images that the vision tower encodes in one batch at most."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodeRequest:
    """Images that a document wants encoded: RGB in [0, 1], (I, 3, H, W), square."""

    model: MMInterleavedForConditionalGeneration
    pixel_values: Tensor

    @property
    def batch_key(self) -> tuple[object, ...]:
        """What requests must have in common to share a batch."""
        return id(self.model), self.pixel_values.shape[1:]


def encode_batch(requests: Mapping[int, EncodeRequest]) -> Iterator[tuple[int, list[EncodedImage]]]:
    """The encoded images of each request, by its number.

    Args:
        requests: of one `batch_key`.
    """
    model = next(iter(requests.values())).model
    pixels = torch.cat([request.pixel_values for request in requests.values()])
    encoded = [image for group in pixels.split(IMAGES_AT_ONCE) for image in encode_each(model, group)]
    first = 0
    for number, request in requests.items():
        count = len(request.pixel_values)
        yield number, encoded[first : first + count]
        first += count


@torch.no_grad()
def encode_each(model: MMInterleavedForConditionalGeneration, pixel_values: Tensor) -> list[EncodedImage]:
    """Features of each image, in one pass: RGB in [0, 1], (I, 3, H, W), square."""
    if not len(pixel_values):
        return []
    features = model.encode_images(pixel_values.to(model.device))
    pyramids = zip(*(level.split(1) for level in features.pyramid), strict=True)
    return [
        EncodedImage(pixels, ImageFeatures(slots, pyramid))
        for pixels, slots, pyramid in zip(
            pixel_values.split(1), features.slots.split(1), pyramids, strict=True
        )
    ]


class InterleavedSession:
    """One growing document.

    Args:
        max_cache_len: tokens that it may hold at most, for a cache that never moves (see `PrefixCache`);
            None: as many as the model's context.

    Attributes:
        model: who reads and writes.
        ids: all token ids so far, image starts and slots included.
        image_starts: index of each image's start token.
        cache: what has been read; its length may lag behind `ids`.
        images: all images so far.
    """

    def __init__(self, model: MMInterleavedForConditionalGeneration, max_cache_len: int | None = None):
        self.model, self._max_cache_len = model, max_cache_len
        self._begin()

    def _begin(self) -> None:
        model, text = self.model, self.model.config.text_config
        self.ids: list[int] = []
        self.image_starts: list[int] = []
        self.images: list[EncodedImage] = []
        self.cache = PrefixCache(text, device=model.device, max_cache_len=self._max_cache_len)
        self._projected = ProjectedImages(self._project)
        self._weights = weights_version(model)
        # Embeddings of the tokens that the cache lacks, and of the last token. They are kept because the
        # embedding of a slot stands in no table.
        self._unread_1UD = torch.empty(1, 0, text.hidden_size, dtype=model.dtype, device=model.device)
        self._last_11D = self._unread_1UD

    def _begin_anew_if_weights_changed(self) -> None:
        """Nothing that was computed with other weights is used: all is embedded and encoded once more."""
        if self.has_weights_of_now:
            return
        ids, starts, images = self.ids, self.image_starts, self.images
        self._begin()
        end = 0
        for start, image in zip(starts, images, strict=False):
            self.append_text(ids[end:start])
            self.append_image(image.pixel_values)
            end = start + 1 + self.model.config.num_slots
        # The last image may only have been started.
        self.append_text(ids[end:])
        self.image_starts = starts

    # ---- How much fits ---------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Tokens that still fit into the model's context."""
        return self.model.config.text_config.max_position_embeddings - len(self.ids)

    @property
    def has_room_for_image(self) -> bool:
        """Whether one more image fits: its start token and slots, and a row of the relative-index table."""
        limit = max_images(self.model)
        return self.room > self.model.config.num_slots and (limit is None or len(self.image_starts) < limit)

    @property
    def num_unread(self) -> int:
        """Tokens that stand in the document and that the model has not read yet."""
        return self._unread_1UD.shape[1]

    @property
    def has_weights_of_now(self) -> bool:
        """Whether all it has read was read with the weights that the model has now."""
        return weights_version(self.model) == self._weights

    # ---- Growing ---------------------------------------------------------------------------------

    def resume(self, ids: Sequence[int], image_starts: Sequence[int], images: Sequence[EncodedImage]) -> None:
        """Begin with tokens and images that its cache already holds; more must follow before it is read."""
        assert not self.ids and self.cache.num_tokens == len(ids), "a session begins once"
        self.ids, self.image_starts, self.images = list(ids), list(image_starts), list(images)

    @torch.no_grad()
    def append_text(self, ids: Sequence[int]) -> None:
        """Tokens that are no images. They are embedded now and read when somebody needs them."""
        if len(ids):
            table = torch.tensor([list(ids)], dtype=torch.int64, device=self.model.device)
            self._append(ids, self.model.embed(table))

    def start_image(self) -> None:
        """The token that announces an image. Its content is given to `finish_image`."""
        self.image_starts.append(len(self.ids))
        self.append_text([self.model.config.image_start_token_id])

    def finish_image(self, pixel_values: Tensor) -> None:
        """The slots of the image just started: RGB in [0, 1], (1, 3, H, W), square. Encoded once."""
        [image] = encode_each(self.model, pixel_values)
        self.finish_encoded_image(image)

    @torch.no_grad()
    def finish_encoded_image(self, image: EncodedImage) -> None:
        """The same for an image that has been encoded already, see `encode_each`."""
        start = torch.tensor([[self.image_starts[-1]]], device=self.model.device)
        features = image.features
        # The synchronizers must know the image before its slots are read: slots attend to their own image.
        self.cache.append_images(start, self.model.values_by_row(features.pyramid, start))
        self.images.append(image)
        self._append([self.model.config.image_token_id] * features.slots.shape[1], features.slots)

    def append_image(self, pixel_values: Tensor) -> None:
        """An image that is given: RGB in [0, 1], (1, 3, H, W), square."""
        self.start_image()
        self.finish_image(pixel_values)

    def accept(self, ids: Sequence[int]) -> None:
        """Tokens that `generate` has chosen, and mostly read already: it reads each but the last."""
        self.append_text(ids)
        first_unread = len(self.ids) - self._unread_1UD.shape[1]
        self._unread_1UD = self._unread_1UD[:, self.cache.num_tokens - first_unread :]

    def _append(self, ids: Sequence[int], embeddings_1UD: Tensor) -> None:
        self.ids.extend(ids)
        self._unread_1UD = torch.cat([self._unread_1UD, embeddings_1UD.to(self._unread_1UD.dtype)], dim=1)
        self._last_11D = embeddings_1UD[:, -1:]

    # ---- Reading ---------------------------------------------------------------------------------

    def read(self) -> Tensor:
        """Final hidden states of the whole document, (1, T, D)."""
        self._begin_anew_if_weights_changed()
        self._read(self._unread_1UD.shape[1])
        assert self.cache.hidden is not None, "a document holds at least its first token"
        return self.cache.hidden

    def read_but_last(self) -> None:
        """Leave exactly the last token unread: `generate` reads it to find the next one."""
        self._begin_anew_if_weights_changed()
        if self._unread_1UD.shape[1] == 0:
            self.cache.crop(-1)
            self._unread_1UD = self._last_11D.to(self._unread_1UD.dtype)
        self._read(self._unread_1UD.shape[1] - 1)

    def prompt(self) -> Tensor:
        """What `generate` continues where ids alone are not enough: (1, T, D), all read but the last token.

        transformers cuts off as many of these as the cache holds, so only the last one is real.
        """
        self.read_but_last()
        read = self._unread_1UD.new_zeros(1, self.cache.num_tokens, self._unread_1UD.shape[2])
        return torch.cat([read, self._unread_1UD], dim=1)

    @property
    def ends_in_table(self) -> bool:
        """Whether the last token's embedding stands in the table, as that of all tokens but slots."""
        return self.ids[-1] != self.model.config.image_token_id

    @torch.no_grad()
    def _read(self, count: int) -> None:
        if count:
            self.model(inputs_embeds=self._unread_1UD[:, :count], cache=self.cache, logits_to_keep=1)
            self._unread_1UD = self._unread_1UD[:, count:]

    # ---- What an image is generated from ---------------------------------------------------------

    @torch.no_grad()
    def conditioning(self) -> Tensor:
        """The document up to the image just started, as the U-Net's cross-attention reads it: (1, R, D)."""
        hidden = self.read()
        row = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        return self.model.condition(hidden, row, start=row, end=row + self.image_starts[-1])[0]

    @torch.no_grad()
    def earlier_images(self, rule: str | Sequence[int]) -> EarlierImages | None:
        """The images that the one just started may attend to, see `tokens.visibility.context_images`.
        Projected once.
        """
        self._begin_anew_if_weights_changed()
        return self._projected.of(self.context(rule))

    def context(self, rule: str | Sequence[int]) -> list[int]:
        """Which images those are, by their number in the document."""
        start = torch.tensor([self.image_starts])
        chosen = context_images(
            torch.zeros(1, len(self.ids), dtype=torch.int64), start, rule, self.model.max_context_images
        )[-1]
        return chosen[chosen >= 0].tolist()

    def _project(self, numbers: list[int]) -> EarlierImages | None:
        """These images as the U-Net attends to them, and no other."""
        pyramids = [self.images[number].features.pyramid for number in numbers]
        levels = [torch.cat(maps) for maps in zip(*pyramids, strict=True)]
        index = torch.arange(len(numbers), device=self.model.device)[None]
        return self.model.project_earlier_images(tuple(levels) or self.model.vision.empty_pyramid(), index)


def max_images(model: MMInterleavedForConditionalGeneration) -> int | None:
    """How many images of a document the language model can tell apart; None: any number."""
    synchronizer = model.config.part("text_synchronizer")
    return None if synchronizer is None else synchronizer.max_images - 1
