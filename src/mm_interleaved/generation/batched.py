"""Documents continued side by side: what several of them ask for at the same time is computed in one batch.

Two generators talk to each other. `Continuation.steps` is one document: it yields events, and it yields
requests, whose answers are sent back as the values of those `yield`s. `stream_batched` holds one such
generator a document; it passes events on and answers requests, all that share a `batch_key` in one batch.

    Continuation.steps                      stream_batched                        computed by
    ──────────────────                      ──────────────                        ───────────
    yield TextDelta, ImageStarted,     ──▶  passed on: (document number, event)
          ImageDone, Finished
    encoded = yield EncodeRequest      ──▶  EncodeRequests of one image size  ──▶ session.encode_batch
                                       ◀──  list[EncodedImage]
    run = yield TextRequest            ──▶  TextRequests of one search        ──▶ text_batch.write_text_batch
      (the same request again until    ◀──  TextRun: some more ids
       run.is_last)
    images = yield ImageRequest        ──▶  ImageRequests of one sampler      ──▶ image_batch.denoise_batch
                                            and size
                                            ImagePreview: passed on as an event
                                       ◀──  list of PIL images
    any of the three yields            ◀──  NumericalError, thrown into it

A document that wants more of its text yields its request again while `write_text_batch` still runs: the batch
that computes its text goes on, and the next `TextRun` is its answer. One document alone goes the same way, in
batches of one.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from mm_interleaved.documents.document import Document
from mm_interleaved.errors import InputError, NumericalError, UsageError
from mm_interleaved.generation.events import Event, Failed, ImagePreview
from mm_interleaved.generation.image_batch import GeneratedImages, ImageRequest, denoise_batch
from mm_interleaved.generation.session import EncodedImage, EncodeRequest, encode_batch
from mm_interleaved.generation.settings import fails_alone
from mm_interleaved.generation.text import TextRequest, TextRun
from mm_interleaved.generation.text_batch import write_text_batch

Request: TypeAlias = EncodeRequest | TextRequest | ImageRequest
Answer: TypeAlias = list[EncodedImage] | TextRun | GeneratedImages
Steps: TypeAlias = Generator[Event | Request, Any, None]
"""One document while it is continued: events, and requests whose answers are sent in."""

_IN_TURN = (EncodeRequest, TextRequest, ImageRequest)
"""Requests of the first kind are answered first, so that as many documents as possible wait for the last at
once: an image costs most.
"""


def stream_batched(
    documents: Sequence[Steps], assistant_model: PreTrainedModel | None = None
) -> Generator[tuple[int, Event], None, None]:
    """The events of all documents, each with its document's number, in the order in which they happen.

    Args:
        assistant_model: see `text.write_text`.
    """
    asking: dict[int, Request] = {}

    def go_on(number: int, answer: Answer | NumericalError | None = None) -> Iterator[tuple[int, Event]]:
        document = documents[number]
        while True:
            try:
                item = document.throw(answer) if isinstance(answer, NumericalError) else document.send(answer)
            except StopIteration:
                return
            answer = None
            if isinstance(item, _IN_TURN):
                asking[number] = item
                return
            yield number, item

    try:
        # 1. Each until it asks for something or ends.
        for number in range(len(documents)):
            yield from go_on(number)
        # 2. Requests alike are answered together; then their documents go on to the next request.
        while asking:
            for number, answer in _answers(_next(asking), assistant_model):
                if isinstance(answer, ImagePreview):
                    yield number, answer
                    continue
                del asking[number]
                yield from go_on(number, answer)
    finally:
        for document in documents:
            document.close()


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


def _next(asking: Mapping[int, Request]) -> dict[int, Any]:
    """Requests to be answered together, in the order of the documents."""
    for kind in _IN_TURN:
        numbers = sorted(number for number, request in asking.items() if isinstance(request, kind))
        if numbers:
            wanted = asking[numbers[0]].batch_key
            return {number: asking[number] for number in numbers if asking[number].batch_key == wanted}
    raise AssertionError("called only while a document waits for an answer")


def _answers(
    requests: dict[int, Any], assistant_model: PreTrainedModel | None
) -> Iterator[tuple[int, Answer | NumericalError | ImagePreview]]:
    match next(iter(requests.values())):
        case EncodeRequest():
            return encode_batch(requests)
        case TextRequest():
            return write_text_batch(requests, assistant_model)
        case _:
            return denoise_batch(requests)
