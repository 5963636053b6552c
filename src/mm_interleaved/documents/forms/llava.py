"""LLaVA and ShareGPT: turns, in which `<image>` stands for an image if there are as many as images."""

from __future__ import annotations

from mm_interleaved.documents.document import Text
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.placeholders import PartOrSlot
from mm_interleaved.documents.record_parts import Body, joined
from mm_interleaved.documents.strict_json import Field

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_llava(record: Field, folder: ImageStore) -> Body:
    """`conversations`: turns of `from` and `value`, images beside them."""
    texts: list[PartOrSlot] = []
    for turn in record["conversations"].list():
        speaker = turn["from"].text()
        if speaker not in _ROLES:
            turn["from"].wrong(" or ".join(_ROLES))
        texts.append(Text(turn["value"].text(), role=_ROLES[speaker]))
    return Body(joined(record, texts, folder))
