"""Our models for VLMEvalKit, whose `BaseModel` this is written to (main of 2026-05; as `ms-vlmeval` 0.0.20).

a message of texts and images in their order -> document -> answer -> the string that its data sets read

VLMEvalKit finds models in a table of its own and knows no plug-ins: `register()` enters ours. Imported where
VLMEvalKit is installed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlmeval.vlm.base import BaseModel

from mm_interleaved.documents.document import Document
from mm_interleaved.evaluation.harnesses.answers import Asked
from mm_interleaved.evaluation.harnesses.documents import document_of_items, document_of_messages
from mm_interleaved.evaluation.harnesses.harness_model import HarnessModel

NAME = "mm-interleaved"


class MMInterleaved(BaseModel):  # pyright: ignore[reportUntypedBaseClass]
    """Asked by interleaved messages.

    Args:
        model_path, device, dtype, conversation: see `HarnessModel`.
        output_image_dir: folder for generated images.
        layout: "T" answers with text; one with images gives `{"text", "images": [paths]}` as JSON.
        settings: generation settings by name, such as `max_new_tokens`; text is greedy unless they say
            otherwise.
    """

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self,
        model_path: str | Path = "storyworld",
        *,
        device: str | None = None,
        dtype: str = "auto",
        output_image_dir: str | Path = "outputs/mm_interleaved_images",
        conversation: bool | None = None,
        layout: str = "T",
        **settings: Any,
    ):
        super().__init__()
        self.layout = layout
        self.ours = HarnessModel(
            model_path,
            device=device,
            dtype=dtype,
            images=output_image_dir,
            conversation=conversation,
            settings={"do_sample": False, **settings, "layout": layout},
        )

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to items of `type` ("text", "image") and `value` (a text, a path).

        Raises:
            MMInterleavedError: an image that cannot be read, a message that does not fit into the context.
        """
        key = _key(dataset, [message])
        is_conversation = self.ours.is_conversation(self.layout)
        document = document_of_items(message, key, is_conversation=is_conversation)
        return self._answer(document, dataset)

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to turns of `role` and `content`, which is a list of such items."""
        key = _key(dataset, [turn["content"] for turn in message])
        document = document_of_messages(message, key, is_conversation=True)
        return self._answer(document, dataset)

    def _answer(self, document: Document, dataset: str | None) -> str:
        asked = Asked(document=document, settings=self.ours.settings)
        [parts] = self.ours.answer([asked], quiet=True)
        return self.ours.written(parts, self.layout, dataset or "messages", document.id)


def register(name: str = NAME, **options: Any) -> None:
    """Enters our model into VLMEvalKit's table of models, from which its `--model` chooses.

    Args:
        options: arguments of `MMInterleaved`; it is loaded when it is chosen.
    """
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(MMInterleaved, **options)


def _key(dataset: str | None, contents: Sequence[Any]) -> str:
    """A document's id: the same for the same question, wherever its images lie."""
    digest = hashlib.sha256((dataset or "").encode())
    for items in contents:
        for item in items:
            value = Path(item["value"]).name if item["type"] == "image" else item["value"]
            digest.update(f"\0{item['type']}\0{value}".encode("utf-8", "backslashreplace"))
    return f"{dataset or 'message'}-{digest.hexdigest()[:16]}"
