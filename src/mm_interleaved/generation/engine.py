"""The public interface of generation: a document in, events out, a longer document at the end.

InterleavedGenerator -> Continuation (one document) -> batched (answers what documents ask for)
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import (
    MMInterleavedError,
    NumericalError,
    SomeFailedError,
    TooLongError,
    UsageError,
)
from mm_interleaved.generation.batched import Steps, stream_batched, with_own_failure
from mm_interleaved.generation.continuation import Continuation, ImageRanker
from mm_interleaved.generation.defaults import defaults_of
from mm_interleaved.generation.events import Event, Failed, Finished
from mm_interleaved.generation.explanation import Explanation, explain
from mm_interleaved.generation.notices import Notices
from mm_interleaved.generation.prefix_store import PrefixStore
from mm_interleaved.generation.redo import KEEP, stream_again
from mm_interleaved.generation.scoring import likelihoods
from mm_interleaved.generation.session import encode_each
from mm_interleaved.generation.settings import GenerationSettings, settings_for
from mm_interleaved.models.acceleration import Adapter
from mm_interleaved.models.evaluation_mode import evaluation_mode, steps_in_evaluation_mode
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.tokens.processor import MMInterleavedProcessor


class InterleavedGenerator:
    """Continues documents with text and images.

        generator = InterleavedGenerator(model, processor)
        document = Document(id="s1", parts=[Text("Pip finds a lamp.")])
        for event in generator.stream(document, layout="I T I"):
            ...

    Args:
        model: put into eval mode.
        processor: its tokenizer and its image rule.
        assistant_model: a smaller language model with the same vocabulary, which guesses tokens that the
            model then checks several at once; the text is the same. It is used where text is greedy.
        adapter: what `acceleration.load_adapter` added to the model; left out where errors are measured.
        image_ranker: chooses among the candidates of an image, in place of the model's own ranking: gets the
            text before the image and the candidates, returns a number for each, the best one the largest.

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
        image_ranker: ImageRanker | None = None,
    ):
        self.image_ranker = image_ranker
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
        """Continue a document; yields what happens, `Finished` at the end.

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
        steps = self.begin(document, settings, preview_every=preview_every, **overrides).steps()
        events = stream_batched([steps], self.assistant_model)
        return (event for _, event in steps_in_evaluation_mode(self.model, events))

    def begin(
        self,
        document: Document,
        settings: GenerationSettings | None = None,
        *,
        preview_every: int = 0,
        prefixes: PrefixStore | None = None,
        **overrides: Any,
    ) -> Continuation:
        """A document that is ready to be continued, for who batches those of many (`ContinuousBatch`).
        Arguments and errors as `stream`; no image has been read yet.

        Args:
            prefixes: what was read of other documents of this model; see `PrefixStore`.
        """
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
            settings = settings_for(document, defaults_of(self.model), given)
        return self._begin(document, settings, preview_every, prefixes)

    def _begin(
        self,
        document: Document,
        settings: GenerationSettings,
        preview_every: int = 0,
        prefixes: PrefixStore | None = None,
    ) -> Continuation:
        return Continuation(
            self.model,
            self.processor,
            document,
            settings,
            notices=self.notices,
            adapter=self.adapter,
            image_ranker=self.image_ranker,
            preview_every=preview_every,
            prefixes=prefixes,
        )

    def generate(
        self, document: Document, settings: GenerationSettings | None = None, **overrides: Any
    ) -> Document:
        """The completed document, its new parts marked as generated. Arguments and errors as `stream`."""
        for event in self.stream(document, settings, **overrides):
            if isinstance(event, Finished):
                return event.document
        raise AssertionError("a stream ends with Finished")

    def stream_redo(
        self,
        document: Document,
        part: int,
        settings: GenerationSettings | None = None,
        *,
        rest: str = KEEP,
        preview_every: int = 0,
        **overrides: Any,
    ) -> Iterator[Event]:
        """Make part `part` (from 0) of a document again; events as `stream`, `Finished` with the whole
        document at the end.

        The new part is what `stream` generates as the next part of `document.branched(part)`, with its
        earlier images as its context: the same seed makes the same part, another one an alternative.

        Args:
            settings: as for `stream`; their `layout` does not count, the part keeps its kind.
            rest: what becomes of the later parts: "keep"; "again": those that were generated are generated
                again, those that were given stay; "auto": all go, and the model decides how to go on.

        Raises:
            UsageError: there is no such part, or it is not the model's in a conversation.
            InputError, NumericalError: as `stream`.
        """
        given = overrides if settings is None else settings.given()
        if settings is not None and overrides:
            raise UsageError("give either settings or single ones by name, found both")
        if settings is None or not settings.is_complete:
            settings = settings_for(document, defaults_of(self.model), given)
        length = self.model.config.text_config.max_position_embeddings

        def stream(before: Document, chosen: GenerationSettings) -> Iterator[Event]:
            return self.stream(before, chosen, preview_every=preview_every)

        return stream_again(stream, self.processor, length, document, part, settings, rest)

    def redo(
        self, document: Document, part: int, settings: GenerationSettings | None = None, **overrides: Any
    ) -> Document:
        """The document with one part made again. Arguments and errors as `stream_redo`."""
        for event in self.stream_redo(document, part, settings, **overrides):
            if isinstance(event, Finished):
                return event.document
        raise AssertionError("a stream ends with Finished")

    def stream_batch(
        self,
        documents: Sequence[Document],
        settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
        **overrides: Any,
    ) -> Iterator[tuple[int, Event]]:
        """Continue several documents at once: (place among `documents`, event), each as `stream` yields it.

        Text parts wanted at the same time are written in one pass, whatever the documents' lengths and
        images; images of one size and sampler are denoised in one batch, and encoded in one. Text and images
        are those of each document alone, but for the last bits of the numbers behind them. A document with an
        error of its own (it cannot be read, does not fit the model, asks for what the model cannot do, or
        leads to numbers that are not finite) ends with `Failed`, and the others go on. Other errors as
        `stream`.

        Args:
            settings: of all, or those of each; default as in `stream`.
        """
        each_settings = [settings] * len(documents) if isinstance(settings, GenerationSettings) else settings

        def steps(place: int) -> Steps:
            own = None if each_settings is None else each_settings[place]
            yield from self.begin(documents[place], own, **overrides).steps()

        together = [with_own_failure(document, steps(place)) for place, document in enumerate(documents)]
        return steps_in_evaluation_mode(self.model, stream_batched(together, self.assistant_model))

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

    def warn_of_unknown_words(self, documents: Iterable[Document]) -> None:
        """Warns of the words that the model was not trained on, of each of them once."""
        parts = (part for document in documents for part in document.parts)
        self.notices.warn_of_words(part.text for part in parts if isinstance(part, Text))

    def explain(
        self,
        document: Document,
        settings: GenerationSettings | None = None,
        *,
        regions: int = 8,
        grid: int = 16,
        on_part: Callable[[int], None] | None = None,
        **overrides: Any,
    ) -> Explanation:
        """Where the model sampled earlier images for each text token and each region of each generated image
        of a complete document, by layer, head and level: tensors, see `explanation.Explanation`.

        The document is read once more, and its generated images are denoised once more from their seeds, with
        these settings; generation itself records nothing.

        Args:
            settings: as for `stream`: those that the document was generated with.
            regions: along a side of a generated image.
            grid: cells along a side of its heat maps over earlier images.
            on_part: called with the index of each image before it is denoised again.

        Raises:
            UsageError: the model has no synchronizers.
            InputError, NumericalError: as `stream`.
        """
        if settings is None or not settings.is_complete:
            given = overrides if settings is None else settings.given()
            settings = settings_for(document, defaults_of(self.model), given)
        with evaluation_mode(self.model):
            return explain(
                self.model,
                self.processor,
                self._begin,
                document,
                settings,
                regions=regions,
                grid=grid,
                on_part=on_part,
            )

    def score_options(self, document: Document, options: Sequence[str]) -> list[float]:
        """How likely each text is as the document's end: its log-probability, the end of text included.

        Args:
            options: may be of any number; the document is read once.

        Raises:
            InputError: the document or an option cannot be encoded or does not fit into the context.
            NumericalError: a log-probability is not finite.
        """
        return [score for score, _ in self._likelihoods(document, options, [self.processor.vocabulary.eos])]

    def likelihoods(self, document: Document, texts: Sequence[str]) -> list[tuple[float, bool]]:
        """How likely the document goes on with each text, whatever follows: its log-probability, and whether
        each of its tokens is the likeliest at its place. Arguments and errors as `score_options`.
        """
        return self._likelihoods(document, texts, [])

    @torch.no_grad()
    def _likelihoods(
        self, document: Document, texts: Sequence[str], end: list[int]
    ) -> list[tuple[float, bool]]:
        continuation = self._begin(document, GenerationSettings(layout="T"))
        ids = [[*self.processor.vocabulary.encode_text(text), *end] for text in texts]
        with evaluation_mode(self.model):
            session = continuation.open_session(encode_each(self.model, continuation.given_pixels()))
            longest = max(map(len, ids), default=0)
            if longest > session.room:
                raise TooLongError(
                    f"an option has {longest} tokens, expected at most {session.room} after the document"
                )
            scores, is_greedy = likelihoods(session, ids)
        return list(zip(scores.tolist(), is_greedy.tolist(), strict=True))


def raise_numerical(errors: Iterable[MMInterleavedError]) -> None:
    """Raise the first `NumericalError`: it is the model's, whichever document met it."""
    for error in errors:
        if isinstance(error, NumericalError):
            raise error


def _own_assistant(assistant_model: PreTrainedModel) -> PreTrainedModel:
    """The same model, guessing the same number of tokens at once whatever other requests made of its guesses:
    transformers' "heuristic" writes the number that came out best into the model.
    """
    own = copy.copy(assistant_model)
    own.generation_config = copy.deepcopy(assistant_model.generation_config)
    if own.generation_config.num_assistant_tokens_schedule == "heuristic":
        own.generation_config.num_assistant_tokens_schedule = "heuristic_transient"
    return own
