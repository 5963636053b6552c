"""The interleaved loop: a document in, events out, a longer document at the end.

    words until an image start -> paint -> the picture is looked at like any other -> words -> ...

Nothing is read twice: one session keeps what the model remembers over all rounds.
"""

import copy
import hashlib
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import PreTrainedModel

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.layout import IMAGE, parse_layout
from mm_interleaved.errors import (
    MMInterleavedError,
    NumericalError,
    SomeFailedError,
    TooLongError,
    UsageError,
)
from mm_interleaved.generation import diffusion
from mm_interleaved.generation.events import (
    Event,
    Failed,
    Finished,
    ImageDone,
    ImageStarted,
    TextDelta,
)
from mm_interleaved.generation.image_batch import ImageRequest, Pictures
from mm_interleaved.generation.notices import Notices
from mm_interleaved.generation.session import (
    EncodeRequest,
    InterleavedSession,
    SeenImage,
    max_images,
    see_images,
)
from mm_interleaved.generation.settings import GenerationSettings, settings_for
from mm_interleaved.generation.text import (
    TextRequest,
    TextRules,
    TextRun,
    is_released,
    score_options,
)
from mm_interleaved.generation.batched import Request, Steps, failing_alone, stream_together
from mm_interleaved.generation.token_budget import text_share
from mm_interleaved.models.acceleration import Adapter
from mm_interleaved.models.evaluation_mode import evaluation_mode, steps_in_evaluation_mode
from mm_interleaved.models.image_decoder import EarlierImages
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.prefix_cache import static_room
from mm_interleaved.tokens.batch import check_fits
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.tokens.prompts import ANSWERING_ROLE

logger = logging.getLogger(__name__)


class InterleavedGenerator:
    """Continues documents with text and images.

        generator = InterleavedGenerator(model, processor)
        document = Document(id="s1", parts=[Text("Pip finds a lamp.")])
        for event in generator.stream(document, layout="I T I"):
            ...

    Args:
        model: put into eval mode.
        processor: its tokenizer and its image rule.
        assistant_model: a smaller language model with the same vocabulary, which guesses words that the model
            then checks several at once; the text is the same. It is used where text is greedy.
        adapter: what `acceleration.load_adapter` added to the model; left out where errors are measured.

    Raises:
        ValueError: model and processor do not belong together, or the assistant has another vocabulary.
    """

    def __init__(
        self,
        model: MMInterleavedForConditionalGeneration,
        processor: MMInterleavedProcessor,
        *,
        assistant_model: PreTrainedModel | None = None,
        adapter: Adapter | None = None,
    ):
        self.model, self.processor, self.adapter = model.eval(), processor, adapter
        self.assistant_model = None if assistant_model is None else _own_assistant(assistant_model)
        self.notices = Notices(processor.known_words)
        config = model.config
        processor.check_model(config.to_dict(), "the processor is another model's")
        if assistant_model is not None:
            own = config.text_config.vocab_size
            others = assistant_model.config.get_text_config().vocab_size
            if own != others:
                raise ValueError(
                    f"the assistant has a vocabulary of {others} ids, expected the model's {own}"
                )

    def stream(
        self,
        document: Document,
        settings: GenerationSettings | None = None,
        *,
        preview_every: int = 0,
        **overrides: Any,
    ) -> Iterator[Event]:
        """Continue a document, telling what happens; the last event is `Finished`.

        Args:
            document: at most as long as the model's context; text alone, images alone, or nothing will do.
            settings: what is not given in them is the document's own (`layout`, `generation`), then the
                model's. Complete ones, which `settings_for` makes, are taken as they are.
            preview_every: show an image after so many denoising steps each; 0 is never.
            overrides: the same by name, in place of `settings`; see `GenerationSettings`.

        Raises:
            UsageError: settings that cannot be, or that this model cannot follow.
            InputError: the document's own settings are wrong, its text cannot be encoded, an image cannot be
                read, or it does not fit into the context.
            NumericalError: the model computed something that is not finite.
        """
        steps = self._continuation(document, settings, overrides, preview_every).steps()
        events = stream_together([steps], self.assistant_model)
        return (event for _, event in steps_in_evaluation_mode(self.model, events))

    def _continuation(
        self,
        document: Document,
        settings: GenerationSettings | None,
        overrides: dict[str, Any],
        preview_every: int = 0,
    ) -> "_Continuation":
        if not isinstance(document, Document):
            raise TypeError(
                f"document: expected a Document, found {type(document).__name__}; "
                "write Document(id=…, parts=[Text(…), Image(…)])"
            )
        if settings is not None and overrides:
            raise UsageError(
                f"give either settings or single ones by name, found both ({', '.join(overrides)})"
            )
        if settings is None or not settings.is_complete:
            given = overrides if settings is None else settings.given()
            settings = settings_for(document, own_settings(self.model), given)
        return _Continuation(self, document, settings, preview_every)

    def generate(
        self, document: Document, settings: GenerationSettings | None = None, **overrides: Any
    ) -> Document:
        """The completed document, its new parts marked as generated. Arguments and errors as `stream`."""
        for event in self.stream(document, settings, **overrides):
            if isinstance(event, Finished):
                return event.document
        raise AssertionError("a stream ends with Finished")

    def stream_batch(
        self,
        documents: Sequence[Document],
        settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
        **overrides: Any,
    ) -> Iterator[tuple[int, Event]]:
        """Continue several documents at once: (place among `documents`, event), each as `stream` tells it.

        Those that want words at the same time write them in one pass, whatever their lengths and pictures;
        pictures of one size and sampler are denoised in one batch, and images encoded in one. Words and
        pictures are those of each document alone, but for the last bits of the numbers behind them. A
        document with an error of its own (that cannot be read, does not fit the model, asks for what the
        model cannot do, or leads to numbers that are not finite) ends with `Failed`, and the others go on.
        Other errors as `stream`.

        Args:
            settings: of all, or those of each; default as in `stream`.
        """
        each_settings = [settings] * len(documents) if isinstance(settings, GenerationSettings) else settings

        def steps(place: int) -> Steps:
            own = None if each_settings is None else each_settings[place]
            yield from self._continuation(documents[place], own, overrides).steps()

        together = [failing_alone(document, steps(place)) for place, document in enumerate(documents)]
        return steps_in_evaluation_mode(self.model, stream_together(together, self.assistant_model))

    def generate_batch(
        self,
        documents: Sequence[Document],
        settings: GenerationSettings | None = None,
        *,
        batch_size: int = 8,
        **overrides: Any,
    ) -> list[Document]:
        """The completed documents, in their order; `batch_size` at once. See `stream_batch`.

        Raises:
            SomeFailedError: when all are done, if some failed by themselves; it has those that are completed.
            NumericalError: when those of the same batch are done, if what the model computed for one was not
                finite.
        """
        completed: dict[int, Document] = {}
        errors: dict[int, MMInterleavedError] = {}
        for first in range(0, len(documents), batch_size):
            group = documents[first : first + batch_size]
            for place, event in self.stream_batch(group, settings, **overrides):
                if isinstance(event, Finished):
                    completed[first + place] = event.document
                elif isinstance(event, Failed):
                    errors[first + place] = event.error
            raise_numerical(errors.values())
        if errors:
            raise SomeFailedError(completed, errors)
        return [completed[place] for place in range(len(documents))]

    def tell_of_unknown_words(self, documents: Iterable[Document]) -> None:
        """Warns of the words that the model was not trained on, of each of them once."""
        parts = (part for document in documents for part in document.parts)
        self.notices.tell_of_words(part.text for part in parts if isinstance(part, Text))

    @torch.no_grad()
    def score_options(self, document: Document, options: Sequence[str]) -> list[float]:
        """How likely each text is as the document's end: its log-probability, the end of text included.

        Args:
            options: may be of any number; the document is read once.

        Raises:
            InputError: the document or an option cannot be encoded or does not fit into the context.
            NumericalError: a log-probability is not finite.
        """
        with evaluation_mode(self.model):
            return self._scores_of(document, options)

    def _scores_of(self, document: Document, options: Sequence[str]) -> list[float]:
        continuation = _Continuation(self, document, GenerationSettings(layout="T"))
        vocabulary = self.processor.vocabulary
        ids = [[*vocabulary.encode_text(option), vocabulary.eos] for option in options]
        session = continuation.open_session(see_images(self.model, continuation.given_pixels()))
        longest = max(map(len, ids), default=0)
        if longest > session.room:
            raise TooLongError(
                f"an option has {longest} tokens, expected at most {session.room} after the document"
            )
        return score_options(session, ids).tolist()


def own_settings(model: MMInterleavedForConditionalGeneration) -> dict[str, Any]:
    """The generation settings that a model prefers over the general defaults."""
    return getattr(model.config, "generation_settings", None) or {}


def raise_numerical(errors: Iterable[MMInterleavedError]) -> None:
    """Raise the first error that tells of numbers: it is the model's, whichever document met it."""
    for error in errors:
        if isinstance(error, NumericalError):
            raise error


def _own_assistant(assistant_model: PreTrainedModel) -> PreTrainedModel:
    """The same model, which guesses as many words at once whatever other requests made of its guesses:
    transformers' "heuristic" writes the number that came out best into the model.
    """
    own = copy.copy(assistant_model)
    own.generation_config = copy.deepcopy(assistant_model.generation_config)
    if own.generation_config.num_assistant_tokens_schedule == "heuristic":
        own.generation_config.num_assistant_tokens_schedule = "heuristic_transient"
    return own


def part_seed(seed: int, index: int) -> int:
    """The seed of a part by its place in the document, so that each part can be drawn again by itself."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


class _Continuation:
    """One document while it is continued."""

    def __init__(
        self,
        generator: InterleavedGenerator,
        document: Document,
        settings: GenerationSettings,
        preview_every: int = 0,
    ):
        model, processor = generator.model, generator.processor
        self.model, self.processor, self.vocabulary = model, processor, processor.vocabulary
        self.adapter = generator.adapter
        self.document, self.settings, self.preview_every = document, settings, preview_every
        self.layout = parse_layout(settings.layout)
        self.role = ANSWERING_ROLE if any(part.role is not None for part in document.parts) else None
        self.tokens_left = settings.max_new_tokens
        self.num_painted = 0
        self.height, self.width = self._picture_size(generator.notices)
        generator.tell_of_unknown_words([document])
        generator.notices.tell_of_words([settings.negative_prompt or ""])
        self._check_sampler()
        self.sequence = processor.encode(document)
        check_fits(self.sequence, model.config.text_config.max_position_embeddings, max_images(model))

    @torch.no_grad()
    def steps(self) -> Steps:
        """What happens; where something is asked for, whoever asks for the next step answers."""
        seen = yield from self._look_at(self.given_pixels())
        self.session = self.open_session(seen)
        if self.layout is None:
            reason = yield from self._as_the_model_likes()
        else:
            reason = yield from self._as_laid_out(self.layout)
        self._tell_of_unused_indices()
        yield Finished(reason, self.document)

    # ---- Which part comes next -------------------------------------------------------------------

    def _as_the_model_likes(self) -> Generator[Event | Request, Any, str]:
        """Text until the model starts an image, the image, text again; returns why it ended."""
        paints = self.model.image_decoder is not None and self.settings.max_images > 0
        # Where no image is wanted, the model may not ask for one, but goes on in words.
        asks = paints or is_released(self.model, self.settings)
        while True:
            limit = min(self.tokens_left, self.session.room)
            stop = None
            if limit:
                stop = yield from self._write(limit, self.settings.min_new_tokens, may_ask_for_image=asks)
            if stop is None:
                return "length"
            if stop == self.vocabulary.eos:
                return "stop"
            if not paints or self.num_painted == self.settings.max_images:
                return "max_images"
            if not self.session.has_room_for_image:
                return "length"
            yield from self._paint()

    def _as_laid_out(self, layout: Sequence[str]) -> Generator[Event | Request, Any, str]:
        """Exactly these parts, as far as the context goes; returns why it ended."""
        image_tokens = 1 + self.vocabulary.num_slots
        for position, letter in enumerate(layout):
            if letter == IMAGE:
                if not self.session.has_room_for_image:
                    return self._cut_short(layout, position)
                yield from self._paint()
                continue
            limit = text_share(layout[position:], self.tokens_left, self.session.room, image_tokens)
            if limit < 1:
                return self._cut_short(layout, position)
            at_least = max(1, self.settings.min_new_tokens)
            yield from self._write(limit, at_least, may_ask_for_image=True)
        return "layout"

    def _cut_short(self, layout: Sequence[str], position: int) -> str:
        """Says that a layout ends before its end; the reason."""
        logger.warning(
            "document %r: layout: the first %d of its %d parts were made, then the context was full",
            self.document.id,
            position,
            len(layout),
        )
        return "length"

    # ---- Words -----------------------------------------------------------------------------------

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
            stop, is_last = run.stop, run.is_last
            # Of the whole part each time: what it says must not depend on how its ids came in runs.
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

    # ---- Pictures --------------------------------------------------------------------------------

    def _paint(self) -> Generator[Event | Request, Any, None]:
        """One image part: painted, looked at, remembered."""
        # 1. What it is painted from.
        session, seed = self.session, part_seed(self.settings.seed, len(self.document.parts))
        yield ImageStarted(len(session.image_starts))
        text_before = self._text_since_last_image()
        session.start_image()
        conditioning, earlier = session.conditioning(), session.earlier_images(self._context_rule())

        # 2. One picture, or several to choose from; the first is the one that would be painted alone.
        seeds = [seed] + [part_seed(seed, k) for k in range(1, self.settings.num_candidates)]
        request = self._request(seeds, conditioning, earlier)
        pictures: Pictures = yield request
        chosen, seen = yield from self._best_for(pictures, text_before)
        error = None
        if self.settings.report_error:
            error = yield from self._pixel_error(pictures[chosen], replace(request, seeds=[seeds[chosen]]))

        # 3. From here on it is an image like any other, seen through the same 8 bits and the same resizing.
        session.finish_seen_image(seen)
        self.num_painted += 1
        part = Image(pictures[chosen], role=self.role, generated=True, seed=seeds[chosen], pixel_error=error)
        self.document = self.document.extended(part)
        yield ImageDone(pictures[chosen], seeds[chosen], error)

    def _request(self, seeds: list[int], conditioning: Tensor, earlier: EarlierImages | None) -> ImageRequest:
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
        self, picture: PILImage.Image, request: ImageRequest
    ) -> Generator[Event | Request, Any, float]:
        """Mean difference from the picture that is drawn from the same noise with nothing left out."""
        decoder = request.decoder if self.adapter is None else self.adapter.without
        exact = replace(request, decoder=decoder, settings=self._exact_settings(), preview_every=0)
        [expected] = yield exact
        return diffusion.pixel_error(picture, expected)

    def _exact_settings(self) -> GenerationSettings:
        """Nothing left out. Where it is the weights that are others, or only the sampler, it is the model's
        own sampler in its own number of steps.
        """
        exact = replace(self.settings, step_cache=1, guidance_cache=1)
        own = GenerationSettings.combine(own_settings(self.model))
        if self.adapter is not None or not self.settings.is_lossy:
            exact = replace(exact, scheduler=own.scheduler, num_inference_steps=own.num_inference_steps)
        return exact if self.adapter is None else replace(exact, guidance_scale=own.guidance_scale)

    def _best_for(
        self, pictures: Pictures, text_ids: list[int]
    ) -> Generator[Event | Request, Any, tuple[int, SeenImage]]:
        """The picture for which the model would likeliest write the text before it, the first of equals: its
        place, and what the model sees of it.
        """
        candidates = pictures if text_ids else pictures[:1]
        seen = yield from self._look_at(torch.cat([self._pixels(picture) for picture in candidates]))
        if len(seen) == 1:
            return 0, seen[0]
        scores = []
        for image in seen:
            session = InterleavedSession(self.model)
            session.append_text([self.vocabulary.bos])
            session.start_image()
            session.finish_seen_image(image)
            scores.append(score_options(session, [text_ids[: session.room]]).item())
        chosen = max(range(len(scores)), key=scores.__getitem__)
        return chosen, seen[chosen]

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
                "document %r: image %d is painted from the newest %d of the %d images before it",
                self.document.id,
                num_earlier,
                limit,
                num_earlier,
            )
        return rule

    def _tell_of_unused_indices(self) -> None:
        """Indices that named no image before any of those painted had no effect: a slip, it may be."""
        indices = self.settings.context_image_indices()
        if not indices or not self.num_painted:
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

    def _picture_size(self, notices: Notices) -> tuple[int, int]:
        """Height and width of generated images; refuses settings that this model cannot follow."""
        settings, decoder = self.settings, self.model.image_decoder
        if decoder is None:
            if self.layout is not None and IMAGE in self.layout:
                raise UsageError(
                    f"layout: found {settings.layout!r}, but this model does not paint", field="layout"
                )
            return 0, 0
        trained = diffusion.default_size(decoder)
        height, width = settings.height or trained[0], settings.width or trained[1]
        try:
            diffusion.latent_shape(decoder, height, width)
        except ValueError as error:
            raise UsageError(str(error), field="height" if settings.height else "width") from error
        notices.tell_of_size((height, width), trained)
        return height, width

    def _check_sampler(self) -> None:
        """Refuses a number of steps before the first of them, that of the exact picture too."""
        settings, model = self.settings, self.model
        wants_none = settings.max_images == 0 if self.layout is None else IMAGE not in self.layout
        if model.image_decoder is None or wants_none:
            return
        asked = {"num_inference_steps": settings}
        if settings.report_error:
            asked["report_error"] = self._exact_settings()
        for field, chosen in asked.items():
            try:
                diffusion.scheduler_for(
                    chosen.scheduler,
                    model.config.scheduler_config,
                    chosen.num_inference_steps,
                    is_published=is_released(model, settings),
                )
            except ValueError as error:
                raise UsageError(f"{field}: {error}", field=field) from error

    # ---- Reading ---------------------------------------------------------------------------------

    def given_pixels(self) -> Tensor:
        """The given document's images as the vision tower takes them: (I, 3, H, W)."""
        pixels = [self._pixels(image.load()) for image in self.sequence.images]
        return torch.cat(pixels) if pixels else torch.empty(0, dtype=torch.float32)

    def open_session(self, seen: Sequence[SeenImage]) -> InterleavedSession:
        """The given document, ready to be continued.

        Args:
            seen: its images.
        """
        session, sequence = InterleavedSession(self.model, self._room_to_reserve()), self.sequence
        position = 0
        for start, image in zip(sequence.image_starts.tolist(), seen, strict=True):
            session.append_text(sequence.input_ids[position:start].tolist())
            session.start_image()
            session.finish_seen_image(image)
            position = start + 1 + self.vocabulary.num_slots
        session.append_text(sequence.input_ids[position:].tolist())
        return session

    def _look_at(self, pixels: Tensor) -> Generator[Event | Request, Any, list[SeenImage]]:
        """What the model sees of images: RGB in [0, 1], (I, 3, H, W)."""
        if not len(pixels):
            return []
        seen: list[SeenImage] = yield EncodeRequest(self.model, pixels)
        return seen

    def _room_to_reserve(self) -> int | None:
        """Tokens that a static cache must hold."""
        settings = self.settings
        if settings.cache_implementation != "static":
            return None
        images = settings.max_images if self.layout is None else self.layout.count(IMAGE)
        needed = len(self.sequence.input_ids) + settings.max_new_tokens
        needed += images * (1 + self.vocabulary.num_slots)
        return min(static_room(needed), self.model.config.text_config.max_position_embeddings)

    def _pixels(self, picture: PILImage.Image) -> Tensor:
        return torch.from_numpy(self.processor.encoder_pixels(picture))[None]
