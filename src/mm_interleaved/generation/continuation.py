"""One document while it is continued: text until an image start, the image, text again.

    given document -> encode its images -> session -> [text part | image part]* -> Finished

A continuation is a generator. It yields events for whoever watches, and requests for what a model must
compute; `batched` answers those, see its docstring for the protocol. Nothing is read twice: one session keeps
keys, values and images over all parts.
"""

import hashlib
import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.layout import IMAGE, TEXT, parse_layout
from mm_interleaved.generation import diffusion
from mm_interleaved.generation.batched import Request, Steps
from mm_interleaved.generation.events import Event, Finished, ImageDone, ImageStarted, TextDelta
from mm_interleaved.generation.image_batch import GeneratedImages, ImageRequest
from mm_interleaved.generation.image_settings import check_sampler, exact_settings, image_size
from mm_interleaved.generation.logits import TextRules, is_released
from mm_interleaved.generation.notices import Notices
from mm_interleaved.generation.prefix_store import PrefixKey, PrefixStore
from mm_interleaved.generation.scoring import score_options
from mm_interleaved.generation.session import EncodedImage, EncodeRequest, InterleavedSession, max_images
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.generation.text import TextRequest, TextRun
from mm_interleaved.models.acceleration import Adapter
from mm_interleaved.models.image_decoder import EarlierImages
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.prefix_cache import static_room
from mm_interleaved.tokens.batch import check_fits
from mm_interleaved.tokens.conversation_format import ANSWERING_ROLE
from mm_interleaved.tokens.processor import MMInterleavedProcessor

logger = logging.getLogger(__name__)


def part_seed(seed: int, index: int) -> int:
    """The seed of a part by its place in the document, so that each part can be made again by itself."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def text_share(parts_left: Sequence[str], budget: int, room: int, image_tokens: int) -> int:
    """How many tokens the text at the head of `parts_left` may take, so that the others get theirs.

    What there is, is divided evenly over the texts left; at least one token, as long as one fits.

    Args:
        budget: text tokens that may still be generated.
        room: tokens that still fit into the context.
        image_tokens: tokens of one image.
    """
    num_texts = parts_left.count(TEXT)
    room_for_text = room - parts_left.count(IMAGE) * image_tokens
    fair = min(budget, room_for_text) // num_texts
    return min(max(1, fair), budget, room)


ImageRanker = Callable[[str, Sequence[PILImage.Image]], Sequence[float]]
"""How good each candidate of an image is for the text before it; see `engine.InterleavedGenerator`."""


@dataclass(slots=True)
class Usage:
    """What a document has taken so far."""

    prompt_tokens: int = 0
    """Of the given document, images included."""
    reused_tokens: int = 0
    """Of those, the ones that were remembered."""
    text_tokens: int = 0
    """Written."""
    images: int = 0
    """Generated."""


class Continuation:
    """One document while it is continued.

    Args:
        settings: complete, see `settings.settings_for`.
        preview_every: denoising steps between two previews of an image; 0 is none.
        prefixes: what was read of other documents that may begin alike; this one is added at its end.

    Raises:
        UsageError: settings that this model cannot follow.
        InputError: the document's text cannot be encoded, or it does not fit into the context.
    """

    def __init__(
        self,
        model: MMInterleavedForConditionalGeneration,
        processor: MMInterleavedProcessor,
        document: Document,
        settings: GenerationSettings,
        *,
        notices: Notices,
        adapter: Adapter | None = None,
        image_ranker: ImageRanker | None = None,
        preview_every: int = 0,
        prefixes: PrefixStore | None = None,
    ):
        self.image_ranker = image_ranker
        self.model, self.processor, self.vocabulary = model, processor, processor.vocabulary
        self.adapter, self.prefixes = adapter, prefixes
        self.document, self.settings, self.preview_every = document, settings, preview_every
        self.layout = parse_layout(settings.layout)
        self.role = ANSWERING_ROLE if any(part.role is not None for part in document.parts) else None
        self.tokens_left = settings.max_new_tokens
        self.num_generated = 0
        self.height, self.width = image_size(model, settings, self.layout)
        if model.image_decoder is not None:
            notices.warn_of_size((self.height, self.width), diffusion.default_size(model.image_decoder))
        notices.warn_of_words(part.text for part in document.parts if isinstance(part, Text))
        notices.warn_of_words([settings.negative_prompt or ""])
        check_sampler(model, settings, self.layout, adapter)
        self.sequence = processor.encode(document)
        self.usage = Usage(prompt_tokens=len(self.sequence))
        check_fits(self.sequence, model.config.text_config.max_position_embeddings, max_images(model))

    @torch.no_grad()
    def steps(self) -> Steps:
        """Events and requests, in order; an answer is sent in with the next step."""
        self.session = yield from self._read_given()
        if self.layout is None:
            reason = yield from self._as_the_model_likes()
        else:
            reason = yield from self._as_laid_out(self.layout)
        self._warn_of_unused_indices()
        if self.prefixes is not None:
            self.prefixes.keep(self.session)
        yield Finished(reason, self.document)

    # ---- Which part comes next -------------------------------------------------------------------

    def _as_the_model_likes(self) -> Generator[Event | Request, Any, str]:
        """Text until the model starts an image, the image, text again; returns why it ended."""
        makes_images = self.model.image_decoder is not None and self.settings.max_images > 0
        # Where no image is wanted, the model may not ask for one, but goes on with text.
        asks = makes_images or is_released(self.model, self.settings)
        while True:
            limit = min(self.tokens_left, self.session.room)
            stop = None
            if limit:
                stop = yield from self._write(limit, self.settings.min_new_tokens, may_ask_for_image=asks)
            if stop is None:
                return "length"
            if stop == self.vocabulary.eos:
                return "stop"
            if not makes_images or self.num_generated == self.settings.max_images:
                return "max_images"
            if not self.session.has_room_for_image:
                return "length"
            yield from self._generate_image()

    def _as_laid_out(self, layout: Sequence[str]) -> Generator[Event | Request, Any, str]:
        """Exactly these parts, as far as the context goes; returns why it ended."""
        image_tokens = 1 + self.vocabulary.num_slots
        for position, letter in enumerate(layout):
            if letter == IMAGE:
                if not self.session.has_room_for_image:
                    return self._cut_short(layout, position)
                yield from self._generate_image()
                continue
            limit = text_share(layout[position:], self.tokens_left, self.session.room, image_tokens)
            if limit < 1:
                return self._cut_short(layout, position)
            at_least = max(1, self.settings.min_new_tokens)
            yield from self._write(limit, at_least, may_ask_for_image=True)
        return "layout"

    def _cut_short(self, layout: Sequence[str], position: int) -> str:
        """Warns that a layout ends before its end; the reason."""
        logger.warning(
            "document %r: layout: the first %d of its %d parts were made, then the context was full",
            self.document.id,
            position,
            len(layout),
        )
        return "length"

    # ---- A text part -----------------------------------------------------------------------------

    def _write(
        self, limit: int, at_least: int, *, may_ask_for_image: bool
    ) -> Generator[Event | Request, Any, int | None]:
        """One text part; returns the id that ended it, None at the limit."""
        vocabulary, seed = self.vocabulary, part_seed(self.settings.seed, len(self.document.parts))
        stop_ids = (vocabulary.eos, vocabulary.image_start) if may_ask_for_image else (vocabulary.eos,)
        rules = TextRules(
            stop_ids=stop_ids,
            max_new_tokens=limit,
            min_new_tokens=min(at_least, limit),
            forbidden_ids=tuple(i for i in self._ids_that_are_no_text if i not in stop_ids),
        )
        ids: list[int] = []
        shown, stop = "", None
        request = TextRequest(self.session, self.settings, rules, torch.Generator().manual_seed(seed))
        is_last = False
        while not is_last:
            run: TextRun = yield request
            ids += run.ids
            self.usage.text_tokens += len(run.ids)
            stop, is_last = run.stop, run.is_last
            # Decoded from the part's beginning: its text must not depend on the runs in which its ids came.
            text = vocabulary.decode(ids) if is_last else vocabulary.decode_settled(ids)
            if text[len(shown) :]:
                yield TextDelta(text[len(shown) :])
                shown = text
        self.tokens_left -= len(ids)
        if ids:
            part = Text(vocabulary.decode(ids), role=self.role, generated=True, seed=seed)
            self.document = self.document.extended(part)
        return stop

    @cached_property
    def _ids_that_are_no_text(self) -> tuple[int, ...]:
        """Special ids, and rows of the embedding table that the tokenizer has no token for."""
        special = self.vocabulary.reserved_ids
        unused = range(len(self.vocabulary.tokenizer), self.model.config.text_config.vocab_size)
        return tuple(sorted({*special, *unused}))

    # ---- An image part ---------------------------------------------------------------------------

    def _generate_image(self) -> Generator[Event | Request, Any, None]:
        """One image part: denoised, encoded, appended to the session."""
        # 1. Its seed, and the text that it is to show.
        session, seed = self.session, part_seed(self.settings.seed, len(self.document.parts))
        yield ImageStarted(len(session.image_starts))
        text_before = self._text_since_last_image()
        # 2. One image, or several candidates; the first is the one that would be generated alone.
        seeds = [seed] + [part_seed(seed, k) for k in range(1, self.settings.num_candidates)]
        request, _ = self.next_image(seeds)
        images: GeneratedImages = yield request
        chosen, encoded = yield from self._best_for(images, text_before)
        error = None
        if self.settings.report_error:
            error = yield from self._pixel_error(images[chosen], replace(request, seeds=[seeds[chosen]]))

        # 3. From here on it is an image like any other, encoded from the same 8 bits and the same resizing.
        session.finish_encoded_image(encoded)
        self.num_generated += 1
        self.usage.images += 1
        part = Image(images[chosen], role=self.role, generated=True, seed=seeds[chosen], pixel_error=error)
        self.document = self.document.extended(part)
        yield ImageDone(images[chosen], seeds[chosen], error)

    def next_image(self, seeds: list[int]) -> tuple[ImageRequest, list[int]]:
        """What the next image is generated from, its conditioning and the earlier images that the U-Net
        attends to, once the session is open; and the numbers of those images in the document.

        Args:
            seeds: of the noise, one for each candidate.
        """
        session = self.session
        session.start_image()
        rule = self._context_rule()
        conditioning, earlier = session.conditioning(), session.earlier_images(rule)
        return self._image_request(seeds, conditioning, earlier), session.context(rule)

    def _image_request(
        self, seeds: list[int], conditioning: Tensor, earlier: EarlierImages | None
    ) -> ImageRequest:
        return ImageRequest(
            decoder=self.model.image_decoder,
            scheduler_config=self.model.config.scheduler_config,
            settings=self.settings,
            seeds=seeds,
            size=(self.height, self.width),
            conditioning=conditioning,
            negative_conditioning=self._negative_conditioning,
            earlier=earlier,
            is_published=is_released(self.model, self.settings),
            preview_every=self.preview_every,
        )

    def _pixel_error(
        self, image: PILImage.Image, request: ImageRequest
    ) -> Generator[Event | Request, Any, float]:
        """Mean difference from the image that is generated from the same noise with nothing left out."""
        decoder = request.decoder if self.adapter is None else self.adapter.without
        settings = exact_settings(self.model, self.settings, self.adapter)
        [expected] = yield replace(request, decoder=decoder, settings=settings, preview_every=0)
        return diffusion.pixel_error(image, expected)

    def _best_for(
        self, images: GeneratedImages, text_ids: list[int]
    ) -> Generator[Event | Request, Any, tuple[int, EncodedImage]]:
        """The image that the ranker puts first, else the one after which the model would likeliest write the
        text before it, the first of equals: its place, and its features.
        """
        if self.image_ranker is not None and len(images) > 1:
            scores = self.image_ranker(self._last_text(), images)
            chosen = max(range(len(images)), key=scores.__getitem__)
            [encoded] = yield from self._encode(self._pixels(images[chosen]))
            return chosen, encoded
        candidates = images if text_ids else images[:1]
        encoded = yield from self._encode(torch.cat([self._pixels(image) for image in candidates]))
        if len(encoded) == 1:
            return 0, encoded[0]
        scores = []
        for image in encoded:
            session = InterleavedSession(self.model)
            session.append_text([self.vocabulary.bos])
            session.start_image()
            session.finish_encoded_image(image)
            scores.append(score_options(session, [text_ids[: session.room]]).item())
        chosen = max(range(len(scores)), key=scores.__getitem__)
        return chosen, encoded[chosen]

    def _last_text(self) -> str:
        """What stands between the last image and the one to be generated."""
        texts: list[str] = []
        for part in reversed(self.document.parts):
            if not isinstance(part, Text):
                break
            texts.insert(0, part.text)
        return " ".join(texts)

    def _text_since_last_image(self) -> list[int]:
        starts = self.session.image_starts
        first = starts[-1] + 1 + self.vocabulary.num_slots if starts else 1
        return self.session.ids[first:]

    def _context_rule(self) -> str | tuple[int, ...]:
        indices = self.settings.context_image_indices()
        rule = indices or self.settings.context_images or self.model.config.context_images
        num_earlier, limit = len(self.session.image_starts) - 1, self.model.max_context_images
        if rule == "all" and num_earlier > limit > 0:
            # Whoever asked for all of them gets fewer; by the model's own rule it is what to expect.
            logger.log(
                logging.INFO if self.settings.context_images is None else logging.WARNING,
                "document %r: image %d is generated from the newest %d of the %d images before it",
                self.document.id,
                num_earlier,
                limit,
                num_earlier,
            )
        return rule

    def _warn_of_unused_indices(self) -> None:
        """Indices that named no image before any of those generated had no effect: a slip, it may be."""
        indices = self.settings.context_image_indices()
        if not indices or not self.num_generated:
            return
        num_earlier = len(self.session.image_starts) - 1
        unused = [str(index) for index in indices if index >= num_earlier]
        if unused:
            logger.warning(
                "document %r: context_images: nothing has the index %s; %d images stood before the last",
                self.document.id,
                ", ".join(unused),
                num_earlier,
            )

    @cached_property
    def _negative_conditioning(self) -> Tensor | None:
        """What guidance pushes away from: the prompt's, or None for the learned one."""
        if self.settings.negative_prompt is None:
            return None
        session = InterleavedSession(self.model)
        session.append_text(
            [self.vocabulary.bos, *self.vocabulary.encode_text(self.settings.negative_prompt)]
        )
        session.start_image()
        return session.conditioning()

    # ---- Reading the given document --------------------------------------------------------------

    def given_pixels(self) -> Tensor:
        """The given document's images as the vision tower takes them: (I, 3, H, W), RGB in [0, 1]."""
        pixels = [self._pixels(image.load()) for image in self.sequence.images]
        return torch.cat(pixels) if pixels else torch.empty(0, dtype=torch.float32)

    def open_session(self, encoded: Sequence[EncodedImage]) -> InterleavedSession:
        """The given document, ready to be continued.

        Args:
            encoded: its images.
        """
        return self._append_given(InterleavedSession(self.model, self._room_to_reserve()), encoded)

    def _append_given(
        self, session: InterleavedSession, encoded: Sequence[EncodedImage]
    ) -> InterleavedSession:
        """What the session lacks of the given document; `encoded` are the images of that."""
        sequence, position = self.sequence, len(session.ids)
        starts = sequence.image_starts.tolist()[len(session.images) :]
        for start, image in zip(starts, encoded, strict=True):
            session.append_text(sequence.input_ids[position:start].tolist())
            session.start_image()
            session.finish_encoded_image(image)
            position = start + 1 + self.vocabulary.num_slots
        session.append_text(sequence.input_ids[position:].tolist())
        return session

    def _read_given(self) -> Generator[Event | Request, Any, InterleavedSession]:
        """The given document; what is known of it is not read again, and known images are not encoded."""
        pixels = self.given_pixels()
        if self.prefixes is None:
            return self.open_session((yield from self._encode(pixels)))
        sequence, slots = self.sequence, self.vocabulary.num_slots
        key = PrefixKey.of(sequence.input_ids, sequence.image_starts.tolist(), list(pixels), slots)
        session = InterleavedSession(self.model, self._room_to_reserve())
        self.usage.reused_tokens = self.prefixes.resume(session, key)
        wanted = key.images[len(session.images) :]
        known = self.prefixes.known_images(wanted)
        places = [key.images.index(digest) for digest in dict.fromkeys(wanted) if digest not in known]
        encoded = yield from self._encode(pixels[places])
        known |= {key.images[place]: image for place, image in zip(places, encoded, strict=True)}
        return self._append_given(session, [known[digest] for digest in wanted])

    def _encode(self, pixels: Tensor) -> Generator[Event | Request, Any, list[EncodedImage]]:
        """Features of images: RGB in [0, 1], (I, 3, H, W)."""
        if not len(pixels):
            return []
        encoded: list[EncodedImage] = yield EncodeRequest(self.model, pixels)
        return encoded

    def _room_to_reserve(self) -> int | None:
        """Tokens that a static cache must hold."""
        settings = self.settings
        if settings.cache_implementation != "static":
            return None
        images = settings.max_images if self.layout is None else self.layout.count(IMAGE)
        needed = len(self.sequence.input_ids) + settings.max_new_tokens
        needed += images * (1 + self.vocabulary.num_slots)
        return min(static_room(needed), self.model.config.text_config.max_position_embeddings)

    def _pixels(self, image: PILImage.Image) -> Tensor:
        return torch.from_numpy(self.processor.encoder_pixels(image))[None]
