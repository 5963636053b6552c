"""Documents continued side by side: what several of them ask for at the same time is computed in one pass.

Two sides talk to each other. `Continuation.steps` is one document, a generator: it yields events, and it
yields requests, whose answers are sent back as the values of those `yield`s. `ContinuousBatch` holds one such
generator a document; it passes events on, and answers requests in passes that documents share. Documents join
it and leave it between any two of its steps.

    Continuation.steps                      ContinuousBatch                       computed by
    ──────────────────                      ───────────────                       ───────────
    yield TextDelta, ImageStarted,     ──▶  passed on: (document number, event)
          ImageDone, Finished
    encoded = yield EncodeRequest      ──▶  EncodeRequests of one image size  ──▶ session.encode_batch
                                       ◀──  list[EncodedImage]
    run = yield TextRequest            ──▶  all TextRequests                  ──▶ text_batch.TextBatch
      (the same request again until    ◀──  TextRun: some more ids
       run.is_last)
    images = yield ImageRequest        ──▶  ImageRequests of one image size   ──▶ image_batch.ImageBatch
                                            ImagePreview: passed on as an event
                                       ◀──  list of PIL images
    any of the three yields            ◀──  NumericalError, thrown into it

A step of the batch is one pass of the vision tower, one run of a few tokens, or one denoising step. A
document that wants more of its text yields its request again while `TextBatch` goes on with it, and the next
`TextRun` is its answer. One document alone goes the same way, in batches of one.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from mm_interleaved.documents.document import Document
from mm_interleaved.errors import InputError, NumericalError, UsageError
from mm_interleaved.generation.events import Event, Failed, ImagePreview
from mm_interleaved.generation.image_batch import GeneratedImages, ImageBatch, ImageRequest
from mm_interleaved.generation.session import EncodedImage, EncodeRequest, encode_batch
from mm_interleaved.generation.settings import fails_alone
from mm_interleaved.generation.text import TextRequest, TextRun
from mm_interleaved.generation.text_batch import TextBatch
from mm_interleaved.models.weights_at_hand import steady_weights

Request: TypeAlias = EncodeRequest | TextRequest | ImageRequest
Answer: TypeAlias = list[EncodedImage] | TextRun | GeneratedImages
Steps: TypeAlias = Generator[Event | Request, Any, None]
"""One document while it is continued: events, and requests whose answers are sent in."""

_KINDS = (EncodeRequest, TextRequest, ImageRequest)


class ContinuousBatch:
    """Documents that are being continued; used by one thread at a time.

    Args:
        assistant_model: see `text.write_run`.
        images_wait: denoise only while nobody wants anything else: of documents that are all there from the
            beginning, most images are then denoised side by side. Otherwise text and denoising take turns, so
            that neither waits for long, whoever joins.
    """

    def __init__(self, assistant_model: PreTrainedModel | None = None, *, images_wait: bool = False):
        self.images_wait = images_wait
        self.texts, self.images = TextBatch(assistant_model), ImageBatch()
        self.encoded_sizes: Counter[int] = Counter()
        """How many passes of the vision tower had so many images."""
        self.num_tokens = 0
        """Written so far, in all documents."""
        self._steps: dict[int, Steps] = {}
        self._new: list[int] = []
        self._encoding: dict[int, EncodeRequest] = {}
        self._writing: set[int] = set()
        self._turns: list[type] = list(_KINDS)
        self._next_number = 0

    def __len__(self) -> int:
        """Documents that are not at their end."""
        return len(self._steps)

    def add(self, steps: Steps) -> int:
        """Continue one more document, from the next step on; its number, which no other gets."""
        number = self._next_number
        self._next_number += 1
        self._steps[number] = steps
        self._new.append(number)
        return number

    def cancel(self, number: int) -> None:
        """Leave a document where it is: nothing more is computed for it. One that has ended has left."""
        steps = self._steps.pop(number, None)
        if steps is None:
            return
        if number in self._new:
            self._new.remove(number)
        self._forget_request(number)
        steps.close()

    def close(self) -> None:
        """Leave all documents where they are."""
        for number in list(self._steps):
            self.cancel(number)

    def step(self) -> Iterator[tuple[int, Event]]:
        """Compute a little: (document number, event) of what comes of it, in order.

        What a document raises is raised here; it has left then, and the others may go on.
        """
        if self._new:
            # Each until it asks for something or ends.
            yield from self._go_on(self._new.pop(0))
            return
        with steady_weights():
            answers = self._answers()
        for number, answer in answers:
            if isinstance(answer, ImagePreview):
                yield number, answer
            # Who takes an event may cancel another document.
            elif number in self._steps:
                yield from self._go_on(number, answer)

    def _go_on(
        self, number: int, answer: Answer | NumericalError | None = None
    ) -> Iterator[tuple[int, Event]]:
        """A document's events until it asks for something or ends."""
        steps = self._steps[number]
        while True:
            try:
                # Whoever takes the events may train between them.
                with steady_weights():
                    item = steps.throw(answer) if isinstance(answer, NumericalError) else steps.send(answer)
            except StopIteration:
                self.cancel(number)
                return
            except BaseException:
                self.cancel(number)
                raise
            answer = None
            if isinstance(item, _KINDS):
                self._ask(number, item)
                return
            yield number, item
            if number not in self._steps:
                return

    def _ask(self, number: int, request: Request) -> None:
        match request:
            case EncodeRequest():
                self._encoding[number] = request
            case TextRequest():
                # Its text part goes on where it is, if it is not a new one.
                if number not in self._writing:
                    self._writing.add(number)
                    self.texts.add(number, request)
            case ImageRequest():
                self.images.add(number, request)

    def _forget_request(self, number: int) -> None:
        self._encoding.pop(number, None)
        self._writing.discard(number)
        self.texts.drop(number)
        self.images.drop(number)

    # ---- Whose turn it is ------------------------------------------------------------------------

    def _answers(self) -> Sequence[tuple[int, Answer | NumericalError | ImagePreview]]:
        waiting = {EncodeRequest: self._encoding, TextRequest: self.texts, ImageRequest: self.images}
        kind = next((kind for kind in self._turns if len(waiting[kind])), None)
        if not self.images_wait and kind is not None:
            self._turns.remove(kind)
            self._turns.append(kind)
        if kind is EncodeRequest:
            return self._encode()
        if kind is TextRequest:
            return self._write()
        return self.images.step() if kind is ImageRequest else []

    def _encode(self) -> list[tuple[int, Answer | NumericalError | ImagePreview]]:
        """Images of one size, of all documents that want some encoded."""
        wanted = next(iter(self._encoding.values())).batch_key
        requests = {n: request for n, request in self._encoding.items() if request.batch_key == wanted}
        for number in requests:
            del self._encoding[number]
        self.encoded_sizes[sum(len(request.pixel_values) for request in requests.values())] += 1
        return list(encode_batch(requests))

    def _write(self) -> list[tuple[int, Answer | NumericalError | ImagePreview]]:
        answers: list[tuple[int, Answer | NumericalError | ImagePreview]] = []
        for number, run in self.texts.step():
            if isinstance(run, TextRun):
                self.num_tokens += len(run.ids)
            if not isinstance(run, TextRun) or run.is_last:
                self._writing.discard(number)
            answers.append((number, run))
        return answers


def stream_batched(
    documents: Iterable[Steps], assistant_model: PreTrainedModel | None = None
) -> Generator[tuple[int, Event], None, None]:
    """The events of all documents, each with its document's number, in the order in which they happen.

    Args:
        assistant_model: see `text.write_run`.
    """
    batch = ContinuousBatch(assistant_model, images_wait=True)
    for document in documents:
        batch.add(document)
    try:
        while len(batch):
            yield from batch.step()
    finally:
        batch.close()


def with_own_failure(document: Document, steps: Steps) -> Steps:
    """One document of several: an error of its own becomes its last event instead of ending all."""
    try:
        yield from steps
    except NumericalError as error:
        yield Failed(error)
    except (InputError, UsageError) as error:
        if not fails_alone(document, error):
            raise
        yield Failed(error)
