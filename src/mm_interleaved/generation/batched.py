"""Documents continued side by side: what several of them ask for at the same time is computed in one batch.

    documents -> each goes on by itself until it asks -> one batch answers all that ask alike -> ...

A document asks for words (`TextRequest`), for pictures (`ImageRequest`), or for images to be seen
(`EncodeRequest`). One document alone goes the same way, in batches of one.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from mm_interleaved.documents.document import Document
from mm_interleaved.errors import InputError, NumericalError, UsageError
from mm_interleaved.generation.text_batch import write_together
from mm_interleaved.generation.events import Event, Failed, ImagePreview
from mm_interleaved.generation.image_batch import ImageRequest, Pictures, denoise_together
from mm_interleaved.generation.session import EncodeRequest, SeenImage, encode_together
from mm_interleaved.generation.settings import fails_alone
from mm_interleaved.generation.text import TextRequest, TextRun

Request: TypeAlias = EncodeRequest | TextRequest | ImageRequest
Answer: TypeAlias = list[SeenImage] | TextRun | Pictures
Steps: TypeAlias = Generator[Event | Request, Any, None]
"""A document while it is continued: events, and requests that are answered."""

_IN_TURN = (EncodeRequest, TextRequest, ImageRequest)
"""Who asks for the first kind is answered first, so that as many as possible ask for the last at once: a
picture costs most.
"""


def stream_together(
    documents: Sequence[Steps], assistant_model: PreTrainedModel | None = None
) -> Generator[tuple[int, Event], None, None]:
    """What happens in each document, by its number, in the order in which it happens.

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
        # 2. Those who ask alike are answered together; then they ask again.
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


def failing_alone(document: Document, steps: Steps) -> Steps:
    """A document as one of several: an error of its own is its last event instead of the end of all."""
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
            wanted = asking[numbers[0]].kind
            return {number: asking[number] for number in numbers if asking[number].kind == wanted}
    raise AssertionError("somebody asks")


def _answers(
    requests: dict[int, Any], assistant_model: PreTrainedModel | None
) -> Iterator[tuple[int, Answer | NumericalError | ImagePreview]]:
    match next(iter(requests.values())):
        case EncodeRequest():
            return encode_together(requests)
        case TextRequest():
            return write_together(requests, assistant_model)
        case _:
            return denoise_together(requests)
