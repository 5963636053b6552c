"""An answer in one of three formats, delta by delta; the whole one is what a client joins the deltas to.

images    `content` is a string; `images` holds each image with its place in that string (`text_offset`)
parts     `content` is a list of texts and images in order
markdown  `content` is a string in which images stand as short addresses of the server's own files
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image as PILImage

from mm_interleaved.generation.events import Event, ImageDone, ImagePreview, TextDelta
from mm_interleaved.serving.files_store import FilesStore
from mm_interleaved.serving.work import encoded

BETWEEN = "\n\n"
"""Between a text and the text behind the next image, where both are one string."""


def data_url(content: bytes, kind: str) -> str:
    """An image inside its own address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


class Answer:
    """One answer as it grows.

    Args:
        kind: png, jpeg or webp; images of Markdown are always PNG.
        files_url: where the server's own files stand, such as `http://127.0.0.1:8000/files`.
        most_partial: previews of each image; None: as many as there are.
    """

    def __init__(
        self,
        answer_format: str,
        kind: str,
        files: FilesStore,
        files_url: str,
        most_partial: int | None = None,
    ):
        self._format, self._kind = answer_format, kind
        self._files, self._files_url = files, files_url
        self._length = self._num_images = self._part = self._num_partial = 0
        self._most_partial = most_partial
        self._last: str | None = None

    async def delta(self, event: Event) -> dict[str, Any] | None:
        """What an event adds to the message; None where it adds nothing."""
        match event:
            case TextDelta(text=text):
                return self._text(text)
            case ImagePreview(image=image, step=step) if self._shows_preview:
                self._num_partial += 1
                extra = {"preview": True, "step": step}
                return self._image(data_url(await encoded(image, self._kind), self._kind), extra)
            case ImageDone(image=image, seed=seed):
                return await self._done(image, seed)
            case _:
                return None

    @property
    def _shows_preview(self) -> bool:
        is_enough = self._most_partial is not None and self._num_partial >= self._most_partial
        return self._format != "markdown" and not is_enough

    def _text(self, text: str) -> dict[str, Any]:
        if self._format == "parts":
            self._begin("text")
            return {"content": [{"type": "text", "text": text, "index": self._part}]}
        shown = BETWEEN + text if self._last == "image" and self._length else text
        self._begin("text")
        self._length += len(shown)
        return {"content": shown}

    async def _done(self, image: PILImage.Image, seed: int) -> dict[str, Any]:
        if self._format == "markdown":
            name = self._files.add(await encoded(image, "png"))
            number = self._num_images + 1
            shown = f"{BETWEEN if self._length else ''}![image {number}]({self._files_url}/{name}.png)"
            self._length += len(shown)
            found: dict[str, Any] = {"content": shown}
        else:
            found = self._image(data_url(await encoded(image, self._kind), self._kind), {"seed": seed})
        self._begin("image", is_new=True)
        self._num_images += 1
        self._num_partial = 0
        return found

    def _image(self, url: str, extra: dict[str, Any]) -> dict[str, Any]:
        shown: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
        if self._format == "parts":
            place = self._part if self._last is None else self._part + 1
            return {"content": [shown | {"index": place} | extra]}
        return {"images": [shown | {"index": self._num_images, "text_offset": self._length} | extra]}

    def _begin(self, kind: str, *, is_new: bool = False) -> None:
        """Counts a part where a new one begins."""
        if self._last is not None and (is_new or kind != self._last):
            self._part += 1
        self._last = kind


def joined(deltas: Iterable[dict[str, Any]], answer_format: str) -> dict[str, Any]:
    """The message that deltas make together."""
    found = list(deltas)
    images = [image for delta in found for image in delta.get("images", ())]
    if answer_format == "parts":
        return {"content": _joined_parts([part for delta in found for part in delta.get("content", ())])}
    content = "".join(delta.get("content", "") for delta in found)
    return {"content": content, **({"images": images} if answer_format == "images" else {})}


def _joined_parts(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_index: dict[int, dict[str, Any]] = {}
    for part in parts:
        before = by_index.get(part["index"], {})
        text = {"text": before["text"] + part["text"]} if "text" in before else {}
        by_index[part["index"]] = part | text
    return [by_index[index] for index in sorted(by_index)]
