"""What was read of finished documents, for those that begin alike: a conversation that is sent once more with
another turn costs the new turn alone.

    key of the given document -> PrefixStore.resume -> session that has read the longest prefix known
    finished session          -> PrefixStore.keep   -> read-only copy, the least recently used go

Tokens are compared by their ids, images by the content of their pixels as the vision tower takes them, so
that neither names nor file formats matter. All of it holds for one model with the weights of the moment;
other weights (training, LoRA) empty the store. Letters: T tokens, N images.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from mm_interleaved.errors import memory_wanted
from mm_interleaved.generation.session import EncodedImage, InterleavedSession
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.vision import ImageFeatures
from mm_interleaved.models.weights_at_hand import weights_version

logger = logging.getLogger(__name__)

LEAST_TOKENS = 8
"""A shorter prefix is read anew: that every document begins with the same token is no reuse."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefixKey:
    """What a document is compared by."""

    ids: np.ndarray
    """(T,) int64, negative numbers in the place of slots: made of the content of their image."""
    image_starts: tuple[int, ...]
    images: tuple[bytes, ...]
    """SHA-256 of each image's pixels."""
    num_slots: int

    @classmethod
    def of(
        cls,
        ids: Sequence[int] | np.ndarray,
        image_starts: Sequence[int],
        pixels: Sequence[Tensor],
        slots: int,
    ) -> "PrefixKey":
        """The key of a document with these token ids (T) and images (N of RGB in [0, 1], (3, H, W))."""
        images = tuple(_content(one) for one in pixels)
        own = np.array(ids, dtype=np.int64)
        for start, digest in zip(image_starts, images, strict=True):
            own[start + 1 : start + 1 + slots] = -1 - int.from_bytes(digest[:7], "big")
        return cls(own, tuple(image_starts), images, slots)

    def whole(self, num_tokens: int) -> int:
        """So many tokens, or fewer where that would cut an image in two."""
        for start in self.image_starts:
            if start < num_tokens < start + 1 + self.num_slots:
                return start
        return num_tokens

    def num_images(self, num_tokens: int) -> int:
        """How many images stand in the first tokens."""
        return sum(start < num_tokens for start in self.image_starts)

    def cut(self, num_tokens: int) -> "PrefixKey":
        count = self.num_images(num_tokens)
        return PrefixKey(
            self.ids[:num_tokens].copy(), self.image_starts[:count], self.images[:count], self.num_slots
        )

    def num_shared(self, other: "PrefixKey") -> int:
        """How many tokens both begin with."""
        length = min(len(self.ids), len(other.ids))
        differing = np.flatnonzero(self.ids[:length] != other.ids[:length])
        shared = self.whole(int(differing[0]) if len(differing) else length)
        # Numbers of 56 bits may agree by chance, whole digests do not.
        for start, one, another in zip(self.image_starts, self.images, other.images, strict=False):
            if start < shared and one != another:
                return start
        return shared


@dataclass(slots=True)
class PrefixStatistics:
    """What the store was good for."""

    hits: int = 0
    """Documents that began with a prefix that was known."""
    misses: int = 0
    tokens: int = 0
    """Not read once more, images included."""
    images: int = 0
    """Not encoded once more."""
    bytes: int = 0
    """Kept now."""
    entries: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    key: PrefixKey
    """Of what was read."""
    ids: list[int]
    images: list[EncodedImage]
    """Of the whole document: the last one may not have been read yet."""
    digests: tuple[bytes, ...]
    cache: PrefixCache
    num_bytes: int


class PrefixStore:
    """Prefixes of documents of one model; used by one thread at a time.

    Args:
        max_bytes: of all that it keeps: keys, values, hidden states, images.
    """

    def __init__(self, model: MMInterleavedForConditionalGeneration, max_bytes: int):
        self.model, self.max_bytes = model, max_bytes
        self.statistics = PrefixStatistics()
        self._weights = weights_version(model)
        # The least recently used first.
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._serial = count()

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.statistics.bytes = self.statistics.entries = 0

    @torch.no_grad()
    def resume(self, session: InterleavedSession, key: PrefixKey) -> int:
        """Let a session that is empty have read the longest prefix of a document that is known; the number of
        its tokens, fewer than the document has, so that one is left to go on with.
        """
        self._check_weights()
        best, shared = None, 0
        for serial, entry in self._entries.items():
            found = key.whole(min(key.num_shared(entry.key), len(key.ids) - 1))
            if found > shared:
                best, shared = serial, found
        if best is None or shared < LEAST_TOKENS:
            self.statistics.misses += 1
            return 0
        self._entries.move_to_end(best)
        entry, num_images = self._entries[best], key.num_images(shared)
        copy_prefix(entry.cache, shared, session.cache)
        session.resume(entry.ids[:shared], key.image_starts[:num_images], entry.images[:num_images])
        self.statistics.hits += 1
        self.statistics.tokens += shared
        self.statistics.images += num_images
        return shared

    def known_images(self, wanted: Sequence[bytes]) -> dict[bytes, EncodedImage]:
        """Those of these images that were encoded for another document, wherever they stood in it."""
        self._check_weights()
        known = {
            digest: image
            for entry in self._entries.values()
            for digest, image in zip(entry.digests, entry.images, strict=True)
            if digest in wanted
        }
        self.statistics.images += sum(digest in known for digest in wanted)
        return known

    def keep(self, session: InterleavedSession) -> None:
        """Remember what a session has read; where there is no memory for it, forget everything instead."""
        try:
            self._keep(session)
        except Exception as error:
            wanted = memory_wanted(error)
            if wanted is None:
                raise
            # The document is whole: it must not fail for want of room to remember it.
            logger.warning("%s; what was read of documents is forgotten", wanted)
            self.clear()

    @torch.no_grad()
    def _keep(self, session: InterleavedSession) -> None:
        self._check_weights()
        if not session.has_weights_of_now:
            return
        pixels = [image.pixel_values[0] for image in session.images]
        starts = session.image_starts[: len(pixels)]
        whole = PrefixKey.of(session.ids, starts, pixels, self.model.config.num_slots)
        num_tokens = whole.whole(session.cache.num_tokens)
        key = whole.cut(num_tokens)
        if num_tokens < LEAST_TOKENS or self._is_known(key):
            return
        cache = PrefixCache(self.model.config.text_config, device=self.model.device)
        copy_prefix(session.cache, num_tokens, cache)
        images = [_owned(image) for image in session.images]
        size = _num_bytes(cache, images)
        entry = _Entry(key, session.ids[:num_tokens], images, whole.images, cache, size)
        if entry.num_bytes <= self.max_bytes:
            self._add(entry)

    def _is_known(self, key: PrefixKey) -> bool:
        for serial, entry in self._entries.items():
            if key.num_shared(entry.key) == len(key.ids):
                self._entries.move_to_end(serial)
                return True
        return False

    def _add(self, entry: _Entry) -> None:
        # What is longer serves for all that it begins with.
        for serial, other in list(self._entries.items()):
            if entry.key.num_shared(other.key) == len(other.key.ids):
                del self._entries[serial]
        self._entries[next(self._serial)] = entry
        total = sum(other.num_bytes for other in self._entries.values())
        while total > self.max_bytes:
            total -= self._entries.popitem(last=False)[1].num_bytes
        self.statistics.bytes, self.statistics.entries = total, len(self._entries)

    def _check_weights(self) -> None:
        version = weights_version(self.model)
        if version != self._weights:
            self._weights = version
            self.clear()


def copy_prefix(source: PrefixCache, num_tokens: int, to: PrefixCache) -> None:
    """Append the first tokens of a cache of one row, and the images among them, to an empty one."""
    for index, layer in enumerate(source.layers):
        assert layer.keys is not None and layer.values is not None
        to.update(layer.keys[:, :, :num_tokens], layer.values[:, :, :num_tokens], index)
    assert source.hidden is not None
    to.append_hidden(source.hidden[:, :num_tokens])
    is_there_N = source.image_start[0] < num_tokens
    if not is_there_N.any():
        return
    has_values = source.image_index.shape[1] > 0
    index_N = source.image_index[0, is_there_N] if has_values else source.image_index[0]
    # Layers that share one tensor shall go on sharing it.
    copied: dict[int, Tensor] = {}
    values = {}
    for layer, kind in source.image_values.items():
        value = copied.setdefault(kind.value.data_ptr(), kind.value[index_N])
        values[layer] = kind._replace(
            value=value, image_BN=torch.arange(len(value), device=value.device)[None]
        )
    to.append_images(source.image_start[:, is_there_N], values)


def _content(pixels: Tensor) -> bytes:
    data = pixels.detach().cpu().contiguous()
    shape = f"{data.dtype} {tuple(data.shape)} ".encode()
    return hashlib.sha256(shape + data.numpy().tobytes()).digest()


def _owned(image: EncodedImage) -> EncodedImage:
    """The same in tensors of its own: those of images that were encoded together share their memory."""
    features = ImageFeatures(_compact(image.features.slots), tuple(map(_compact, image.features.pyramid)))
    return EncodedImage(_compact(image.pixel_values), features)


def _compact(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _num_bytes(cache: PrefixCache, images: Sequence[EncodedImage]) -> int:
    tensors = [part for layer in cache.layers for part in (layer.keys, layer.values)] + [cache.hidden]
    tensors += [kind.value for kind in cache.image_values.values()]
    for image in images:
        tensors += [image.pixel_values, image.features.slots, *image.features.pyramid]
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors if each is not None
    }
    return sum(storage.nbytes() for storage in storages.values())
