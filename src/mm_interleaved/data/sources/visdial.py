"""VisDial 1.0: dialogues about an image, and the hundred candidates of each answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from mm_interleaved.data.source import Item, Shard, attempt
from mm_interleaved.data.storage.files import fingerprint, found_files, stem_of
from mm_interleaved.data.storage.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.storage.records import REMEMBERED_TABLES, read_table
from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.strict_json import Field, FieldError

_COCO_NAMES = (
    "VisualDialog_val2018_{:012d}.jpg",
    "VisualDialog_test2018_{:012d}.jpg",
    "COCO_train2014_{:012d}.jpg",
    "COCO_val2014_{:012d}.jpg",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualDialogues:
    """A dialogue up to its last question; the target is the answer.

    `meta` has the `candidates` and `gold_index` of the last round, and its `relevance` where dense
    annotations are given.
    """

    paths: str | tuple[str, ...]
    dense_annotations: str | None = None
    """`visdial_1.0_val_dense_annotations.json` or `visdial_1.0_train_dense_sample.json`: the dialogues end
    with the round that is annotated there."""
    images: str | None = None
    """Folder, address or tars of the images (COCO's and VisualDialog's names are known)."""
    is_conversation: bool = True
    """User and assistant; False writes one text, `caption: ... question: ...? answer: ...`, as published."""
    skips_previous_round: bool = False
    """Leave out the round before the last question, as the published evaluation does by mistake."""
    every_round: bool = False
    """A document for each round of a dialogue, as its benchmark asks them all, not for one."""

    def shards(self) -> list[Shard]:
        self._dense()
        return [
            Shard(path, len(self._entries(_data(path))))
            for path in found_with_images(self.paths, self.images)
        ]

    def _entries(self, data: Field) -> list[tuple[Field, str, int | None]]:
        """What makes a document each: a dialogue, the end of the document's name, and how many of its rounds;
        None is those up to the annotated one, or all.
        """
        dialogs = data["dialogs"].list()
        if not self.every_round:
            return [(dialog, str(number), None) for number, dialog in enumerate(dialogs)]
        return [
            (dialog, f"{number}:{count}", count)
            for number, dialog in enumerate(dialogs)
            for count in _round_numbers(dialog)
        ]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        path = shard.name
        store = image_store(self.images, path, skip_missing=True)
        data = _data(path)
        dense = self._dense()
        for position, (dialog, number, count) in enumerate(self._entries(data)[start:], start):
            build = partial(self._document, data, f"{stem_of(path)}:{number}", store, count)
            annotation = dense.get(_id(dialog))
            records = (dialog,) if annotation is None else (dialog, annotation)
            known = ("answer_options", "gt_index", "round_id", "image_id", "gt_relevance", "relevance")
            yield position, attempt(f"{path}: {dialog.path}", build, *records, known=known)

    def _dense(self) -> Mapping[str, Field]:
        """Dense annotations by image; none where none are given."""
        if self.dense_annotations is None:
            return {}
        return _dense_annotations(fingerprint(found_files(self.dense_annotations)[0]))

    def _document(
        self,
        data: Field,
        name: str,
        store: ImageStore,
        count: int | None,
        dialog: Field,
        annotation: Field | None = None,
    ) -> Document:
        image_id = dialog["image_id"]
        rounds = dialog["dialog"].list()
        meta = {}
        if annotation is not None:
            annotated = annotation["round_id"].integer(1, len(rounds))
            count = annotated if count is None else count
            if count == annotated:
                # Named one way in the annotations of `val`, the other way in those of `train`.
                meta["relevance"] = _relevance(
                    annotation["gt_relevance" if "gt_relevance" in annotation else "relevance"]
                )
        rounds = rounds if count is None else rounds[:count]
        if not rounds:
            dialog["dialog"].wrong("at least one round")
        last = rounds[-1]
        if "answer_options" in last:
            meta["candidates"] = [
                _pooled(data, "answers", option) for option in last["answer_options"].list()
            ]
        if "gt_index" in last:
            meta["gold_index"] = last["gt_index"].integer(0, max(len(meta.get("candidates", ())) - 1, 0))
        role = "user" if self.is_conversation else None
        image = first_image(store, _image_names(dialog), image_id.path, role)
        caption = dialog["caption"].text().strip() if "caption" in dialog else ""
        turns = [
            (
                _pooled(data, "questions", entry["question"]),
                _pooled(data, "answers", entry["answer"]) if "answer" in entry else None,
            )
            for entry in rounds
        ]
        if self.skips_previous_round:
            turns[-2:-1] = []
        parts = _conversation(image, caption, turns) if self.is_conversation else _text(image, caption, turns)
        answer = turns[-1][1]
        said_by = "assistant" if self.is_conversation else None
        target = () if answer is None else (Text(answer, role=said_by),)
        return Document(id=name, parts=parts, target=target, layout="T", meta=meta)


def _round_numbers(dialog: Field) -> Iterable[int | None]:
    """1 to the number of rounds; None, once, where there is no list of them, which making it reports."""
    rounds = dialog.get("dialog")
    is_list = rounds is not None and isinstance(rounds.value, list) and rounds.value
    return range(1, len(rounds.value) + 1) if rounds is not None and is_list else (None,)


def _relevance(field: Field) -> list[float]:
    """How many people find each candidate right, 0 to 1."""
    return [
        float(one.value) if type(one.value) in (int, float) and 0 <= one.value <= 1 else one.wrong("0 to 1")
        for one in field.list()
    ]


def _id(dialog: Field) -> str:
    """The dialogue's image; empty where it is missing, which is reported when the document is made."""
    given = dialog.get("image_id")
    return "" if given is None else str(given.value)


_Turns = list[tuple[str, str | None]]


def _conversation(image: Image, caption: str, turns: _Turns) -> tuple[Part, ...]:
    """The image, its caption and the rounds, up to the last question."""
    parts: list[Part] = [image]
    parts += [Text(caption, role="user")] if caption else []
    for question, answer in turns:
        parts.append(Text(question, role="user"))
        parts += [] if answer is None else [Text(answer, role="assistant")]
    return tuple(parts if turns[-1][1] is None else parts[:-1])


def _text(image: Image, caption: str, turns: _Turns) -> tuple[Part, ...]:
    """The published prompt."""
    texts = [f"caption: {caption}."] if caption else []
    texts += [f"question: {_asked(question)} answer: {answer}." for question, answer in turns[:-1]]
    texts.append(f"question: {_asked(turns[-1][0])} answer:")
    return image, Text(" ".join(texts))


def _asked(question: str) -> str:
    return question if question.endswith("?") else f"{question}?"


def _image_names(dialog: Field) -> list[str]:
    given = dialog.get("image")
    if given is not None:
        return [given.text()]
    number = dialog["image_id"].integer(0, 10**12)
    return [name.format(number) for name in _COCO_NAMES]


def _pooled(data: Field, pool: str, index: Field) -> str:
    """A question or an answer by its number."""
    texts = data[pool]
    if not isinstance(texts.value, list):
        texts.wrong("a list")
    number = index.integer(0, len(texts.value) - 1)
    return Field(texts.value[number], f"{texts.path}[{number}]").text()


def _data(path: str) -> Field:
    try:
        data = read_table(path)["data"]
        data["dialogs"].list()
        return data
    except FieldError as error:
        raise error.at(path) from error


@lru_cache(maxsize=REMEMBERED_TABLES)
def _dense_annotations(key: tuple[str, int, int]) -> Mapping[str, Field]:
    """Dense annotations by image."""
    try:
        return {str(item["image_id"].value): item for item in read_table(key[0]).list()}
    except FieldError as error:
        raise error.at(key[0]) from error
