"""The items of a response as they grow, and the events that say so."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from PIL import Image as PILImage

from mm_interleaved.generation.events import Event, ImageDone, ImagePreview, ImageStarted, TextDelta
from mm_interleaved.serving.work import encoded

_CALL = "response.image_generation_call"


class ResponseItems:
    """The output of one response.

    Args:
        id: of the request.
        kind: png, jpeg or webp.
        most_partial: images shown before each is done; None: as many as there are.
    """

    def __init__(self, id: str, kind: str, most_partial: int | None):
        self._id, self._kind, self._most_partial = id, kind, most_partial
        self.items: list[dict[str, Any]] = []
        self._is_text_open = False
        self._num_partial = 0

    async def take(self, event: Event) -> AsyncGenerator[dict[str, Any], None]:
        """What an event of generation means for the output: events of the stream, without their numbers."""
        match event:
            case TextDelta(text=text):
                for record in self._text(text):
                    yield record
            case ImageStarted():
                for record in (*self.close_text(), *self._begin_image()):
                    yield record
            case ImagePreview(image=image):
                if self._most_partial is None or self._num_partial < self._most_partial:
                    yield await self._partial(image)
            case ImageDone(image=image, seed=seed):
                content = base64.b64encode(await encoded(image, self._kind)).decode()
                for record in self._finish_image(content, image, seed):
                    yield record
            case _:
                pass

    @property
    def _at(self) -> dict[str, Any]:
        """Where the newest item stands."""
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _text(self, delta: str) -> Iterator[dict[str, Any]]:
        if not self._is_text_open:
            self._is_text_open = True
            self.items.append(
                {
                    "id": f"msg_{self._id}_{len(self.items)}",
                    "type": "message",
                    "role": "assistant",
                    "status": "in_progress",
                    "content": [],
                }
            )
            yield self._added()
            self.items[-1]["content"] = [_text_part("")]
            yield {
                "type": "response.content_part.added",
                **self._at,
                "content_index": 0,
                "part": _text_part(""),
            }
        part = self.items[-1]["content"][0]
        part["text"] += delta
        yield {
            "type": "response.output_text.delta",
            **self._at,
            "content_index": 0,
            "delta": delta,
            "logprobs": [],
        }

    def close_text(self) -> Iterator[dict[str, Any]]:
        """Ends the text that is open, if one is."""
        if not self._is_text_open:
            return
        self._is_text_open = False
        item = self.items[-1]
        item["status"] = "completed"
        at, part = {**self._at, "content_index": 0}, item["content"][0]
        yield {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": []}
        yield {"type": "response.content_part.done", **at, "part": part}
        yield self._done()

    def _begin_image(self) -> Iterator[dict[str, Any]]:
        self._num_partial = 0
        self.items.append(
            {
                "id": f"ig_{self._id}_{len(self.items)}",
                "type": "image_generation_call",
                "status": "in_progress",
                "result": None,
            }
        )
        yield self._added()
        yield {"type": f"{_CALL}.in_progress", **self._at}
        yield {"type": f"{_CALL}.generating", **self._at}

    async def _partial(self, image: PILImage.Image) -> dict[str, Any]:
        content = base64.b64encode(await encoded(image, self._kind)).decode()
        self._num_partial += 1
        return {
            "type": f"{_CALL}.partial_image",
            **self._at,
            "partial_image_b64": content,
            "partial_image_index": self._num_partial - 1,
            "output_format": self._kind,
        }

    def _finish_image(self, content: str, image: PILImage.Image, seed: int) -> Iterator[dict[str, Any]]:
        size = f"{image.width}x{image.height}"
        self.items[-1] |= {
            "status": "completed",
            "result": content,
            "output_format": self._kind,
            "size": size,
            "seed": seed,
        }
        yield {"type": f"{_CALL}.completed", **self._at}
        yield self._done()

    def _added(self) -> dict[str, Any]:
        item = dict(self.items[-1])
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}

    def _done(self) -> dict[str, Any]:
        item = self.items[-1]
        return {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
