"""Files of documents: every form of record that is read, and the canonical one, which is written.

A record is recognised by its fields (`FORMATS`); each reader returns the parts in reading order. The whole
file is read and checked before anything is returned: a wrong field is an InputError with file, line and
field, never a document that means something else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, Image, ImagePath, Part, Text, document_to_record
from mm_interleaved.documents.image_references import ImageFolder, ImageStore
from mm_interleaved.documents.images import to_png
from mm_interleaved.documents.layout import EXPECTED, canonical_layout
from mm_interleaved.documents.placeholders import Piece, Slot, filled, images_first, with_slots
from mm_interleaved.documents.record_rules import finished
from mm_interleaved.documents.strict_json import Field, FieldError, Record, read_records
from mm_interleaved.errors import InputError, UsageError, escape
from mm_interleaved.files import make_folder, write_file

logger = logging.getLogger(__name__)

MAX_ID = 200
MAX_IMAGES = 100_000
"""Of one record."""
_COMMON = ("id", "layout", "generation", "meta", "target")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Body:
    """What a reader finds in a record."""

    parts: list[Part]
    target: list[Part] = field(default_factory=list)
    layout: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Format:
    """A form of record: the fields it is known by, and its reader, which asks for all that it uses."""

    known_by: tuple[str, ...]
    read: Callable[[Field, ImageStore], Body]
    known: tuple[str, ...] = ()
    """Further fields, of no use here."""
    is_plain_text: bool = False
    """Texts hold no markup, whatever they spell."""


def read_documents(
    path: str | Path, *, image_root: str | Path | None = None, skip_missing_images: bool = False
) -> list[Document]:
    """All documents of a `.json` or `.jsonl` file, in order. Images are located, not opened.

    Args:
        image_root: folder that bounds all image paths; the file's own folder by default.
        skip_missing_images: leave out images whose files are absent instead of refusing the file.

    Raises:
        InputError: anything wrong, anywhere in the file.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    if image_root is not None and not os.path.isdir(root):
        raise InputError(f"{root}: there is no such folder, expected the one that holds the images")
    folder = ImageFolder(path.parent, root, skip_missing_images)
    documents: list[Document] = []
    places: dict[str, str] = {}
    for record in read_records(path):
        document = read_record(record, folder)
        place = document.place if document.place != str(path) else f"{path}: [{record.number - 1}]"
        if document.id in places:
            raise InputError(
                f"{place}: id: found {escape(document.id)!r}, which {places[document.id]} already has",
                field="id",
            )
        places[document.id] = place
        documents.append(document)
    if not documents:
        raise InputError(f"{path}: found no document, expected at least one")
    _tell_remarks(documents)
    return documents


def _tell_remarks(documents: Sequence[Document]):
    """Says once for each remark how many documents carry it, and where the first one stands."""
    found: dict[str, list[Document]] = {}
    for document in documents:
        for remark in document.remarks:
            found.setdefault(remark, []).append(document)
    for remark, with_it in found.items():
        first = with_it[0]
        logger.warning(
            "%s: document %r: %s (%d of %d documents)",
            first.place,
            first.id,
            escape(remark),
            len(with_it),
            len(documents),
        )


def read_record(record: Record, folder: ImageStore) -> Document:
    """The document of one record, whichever of the known forms it has.

    Raises InputError: a wrong field, or one that carries content and is not used.
    """
    try:
        return _read(replace(record, field=record.field.tracked()), folder)
    except FieldError as error:
        raise error.at(record.place) from error


def document_from_record(
    record: Mapping[str, Any], folder: str | Path = ".", *, image_root: str | Path | None = None
) -> Document:
    """The document of one record that is already parsed; its image paths are relative to `folder`."""
    images = ImageFolder(Path(folder), Path(folder if image_root is None else image_root))
    return read_record(Record("record", 1, Field(dict(record))), images)


def write_documents(path: str | Path, documents: Iterable[Document], image_path: ImagePath | None = None):
    """Writes documents in the canonical form, one a line, the file whole or not at all.

    Args:
        image_path: as for `document_to_record`. By default a file under the new file's folder is named by its
            relative path; any other image is written to `images/<name of the file>_<n>.png` beside it, over
            no other image that stands there. What fails leaves no image behind.
    """
    path = Path(path)
    choose = image_path or _ImageWriter(path)
    try:
        records = [document_to_record(document, choose) for document in documents]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        write_file(path, "".join(lines).encode("utf-8"))
    except BaseException:
        if isinstance(choose, _ImageWriter):
            choose.take_back()
        raise


def _read(line: Record, folder: ImageStore) -> Document:
    record = line.field
    fields = record.object()
    found = next((form for form in FORMATS if all(name in fields for name in form.known_by)), None)
    if found is None:
        expected = ", ".join("+".join(form.known_by) for form in FORMATS)
        names = ", ".join(escape(name, 40) for name in fields) or "none"
        raise FieldError(record.path, f"found the fields {names}, expected those of a document ({expected})")
    _check_spelling(record, found.known_by)
    body = found.read(record, folder)
    given_target = record.get("target")
    document = Document(
        id=_id(record, line.number),
        parts=tuple(body.parts),
        target=tuple(body.target if given_target is None else _content(given_target, folder)),
        layout=_layout(record) or body.layout,
        generation=_mapping(record, "generation"),
        meta={**_other_fields(record), **body.meta, **_mapping(record, "meta")},
    )
    if not any(isinstance(part, Image) or part.text.strip() for part in document.parts):
        raise FieldError(record.path, "found an empty document, expected at least one text or image")
    is_plain_text = found.is_plain_text and not any(name in record for name in _IMAGES_BESIDE)
    return finished(document, line.place, [record], known=found.known, is_plain_text=is_plain_text)


def _id(record: Field, number: int) -> str:
    given = record.get("id")
    if given is None:
        content = json.dumps(record.value, sort_keys=True).encode()
        return f"line{number}-{hashlib.sha256(content).hexdigest()[:8]}"
    if isinstance(given.value, int) and not isinstance(given.value, bool):
        return str(given.value)
    text = given.text()
    if not 0 < len(text) <= MAX_ID or not text.isprintable():
        given.wrong(f"1 to {MAX_ID} printable characters")
    return text


def _layout(record: Field) -> str | None:
    given = record.get("layout")
    if given is None:
        return None
    try:
        return canonical_layout(given.text())
    except UsageError:
        given.wrong(EXPECTED.removeprefix("expected "))


def _mapping(record: Field, name: str) -> dict[str, Any]:
    given = record.get(name)
    if given is None:
        return {}
    given.object()
    return dict(given.whole())


def _other_fields(record: Field) -> dict[str, Any]:
    """Fields that mean nothing here and are carried along."""
    used = record.used or {}
    return {name: value for name, value in record.value.items() if name not in (*_COMMON, *used)}


def _check_spelling(record: Field, known: Sequence[str]):
    """Refuses a field that looks like a misspelt one of all documents."""
    for name in record.object():
        close = get_close_matches(name, [k for k in _COMMON if k not in record], n=1, cutoff=0.8)
        if close and name not in (*_COMMON, *known):
            raise FieldError(record[name].path, f"there is no such field, did you mean {close[0]!r}?")


# The canonical form, and what other programs write in its place


def _read_content(record: Field, folder: ImageStore) -> Body:
    return Body(_joined(record, _content_pieces(record["content"], folder), folder))


def _read_messages(record: Field, folder: ImageStore) -> Body:
    return Body(_joined(record, _message_pieces(record["messages"], folder), folder))


def _read_completion(record: Field, folder: ImageStore) -> Body:
    """TRL's `prompt` and `completion`: texts, or messages. The completion is the target."""
    prompt, completion = (_said(record[name], folder) for name in ("prompt", "completion"))
    return Body(_joined(record, prompt, folder), target=_without_slots(completion))


def _said(given: Field, folder: ImageStore) -> list[Piece]:
    """A text, or messages."""
    return [Text(given.text())] if isinstance(given.value, str) else _message_pieces(given, folder)


def _message_pieces(messages: Field, folder: ImageStore) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages.list():
        role = message["role"].text()
        if not role or not role.isprintable():
            message["role"].wrong("a name such as user or assistant")
        pieces += _content_pieces(message["content"], folder, role)
    return pieces


def _content(content: Field, folder: ImageStore) -> list[Part]:
    return _without_slots(_content_pieces(content, folder))


def _content_pieces(content: Field, folder: ImageStore, role: str | None = None) -> list[Piece]:
    if isinstance(content.value, str):
        return [Text(content.text(), role=role)]
    return [piece for item in content.list() for piece in _part(item, folder, role)]


_IMAGES_BESIDE = ("images", "image")


def _joined(record: Field, pieces: list[Piece], folder: ImageStore) -> list[Part]:
    """The pieces with the images that the record names beside them.

    They stand at the parts `{"type": "image"}` that name none, or at the placeholders in the texts if these
    are as many; before the first text that is no system sentence if there is neither.
    """
    given = next((found for name in _IMAGES_BESIDE if (found := record.get(name)) is not None), None)
    images = _images(given, folder)
    slots = [piece for piece in pieces if isinstance(piece, Slot)]
    if given is None:
        return _without_slots(pieces)
    if _are_named_in(pieces, images):
        return _without_slots(pieces)
    _check_indices(slots, len(images))
    placed = with_slots(pieces, len(images))
    if placed is not None:
        return filled(placed, images)
    if not slots and not any(isinstance(piece, Image) for piece in pieces):
        return images_first(pieces, images)
    if not slots:
        raise FieldError(
            given.path, f"found {len(images)} images beside others in the texts, expected a place of each"
        )
    path = slots[-1].path
    raise FieldError(path, f"found {len(slots)} parts for images, expected {len(images)} as in {given.path}")


def _are_named_in(pieces: Sequence[Piece], images: Sequence[Image | None]) -> bool:
    """Whether the images beside the texts are those that the texts name themselves, told again."""
    named = [piece.source for piece in pieces if isinstance(piece, Image)]
    return bool(named) and named == [image.source for image in images if image is not None]


def _without_slots(pieces: Sequence[Piece]) -> list[Part]:
    for piece in pieces:
        if isinstance(piece, Slot):
            raise FieldError(f"{piece.path}.image", f"{piece.found}; no image is named beside the texts")
    return [piece for piece in pieces if not isinstance(piece, Slot)]


def _check_indices(slots: Sequence[Slot], num_images: int):
    """Refuses numbers of images that leave one out, or mean none."""
    numbers = sorted(slot.index for slot in slots if slot.index is not None)
    if numbers and numbers != list(range(num_images)):
        raise FieldError(
            slots[-1].path, f"found the indices {numbers}, expected each below {num_images} once"
        )


_IMAGE_KINDS = ("image", "image_url", "input_image")


def _part(item: Field, folder: ImageStore, role: str | None) -> Sequence[Piece]:
    if isinstance(item.value, str):
        return [Text(item.text(), role=role)]
    own_role = item.get("role")
    role = role if own_role is None else own_role.text()
    kind = None if "type" not in item else item["type"].text()
    found: list[Part]
    if kind is None:
        found = _pair(item, folder, role)
    elif kind in _IMAGE_KINDS and _reference(item) is None and item.get("base64") is None:
        index = item.get("index")
        number = None if index is None else index.integer(0, MAX_IMAGES)
        instead = "found null, expected a string" if "image" in item else "missing"
        return [Slot(role, number, item.path, instead)]
    elif kind in ("text", "input_text", "output_text"):
        found = [Text(item["text"].text(), role=role)]
    elif kind in _IMAGE_KINDS:
        image = _image(item, folder, role)
        found = [] if image is None else [image]
    else:
        item["type"].wrong('"text" or "image"')
    generated, seed = item.get("generated"), item.get("seed")
    if generated is None and seed is None:
        return found
    found = [
        replace(
            part,
            generated=generated is not None and generated.boolean(),
            seed=None if seed is None else seed.integer(0, 2**63 - 1),
        )
        for part in found
    ]
    error = item.get("pixel_error")
    if error is None:
        return found
    levels = error.value
    if isinstance(levels, bool) or not isinstance(levels, int | float) or not 0 <= levels <= 255:
        error.wrong("a number from 0 to 255")
    return [replace(part, pixel_error=levels) if isinstance(part, Image) else part for part in found]


def _image(item: Field, folder: ImageStore, role: str | None) -> Image | None:
    """The image of a part: by `image`, `url`, `path`, `base64`, or OpenAI's `image_url`."""
    if (encoded := item.get("base64")) is not None:
        return folder.encoded(encoded, role)
    return _named_image(_reference(item) or item["image"], folder, role)


def _reference(item: Field) -> Field | None:
    """The name of a part's image; None where it has none."""
    names = ("image", "path", "url", "image_url")
    return next((found for name in names if (found := item.get(name)) is not None), None)


def _named_image(reference: Field, folder: ImageStore, role: str | None = None) -> Image | None:
    """The image that a string names, or an object with `path`, `url`, `image` or `base64`."""
    if not isinstance(reference.value, dict):
        return folder.image(reference, role)
    return _image(reference, folder, role)


_PAIRED = ("text", "caption", "image", "file_name")


def _pair(item: Field, folder: ImageStore, role: str | None = None) -> list[Part]:
    """A text and an image, in the order in which the fields stand; either may be missing or null."""
    parts: list[Part] = []
    for name in item.object():
        value = item.get(name) if name in _PAIRED else None
        if value is None:
            continue
        if name in ("text", "caption"):
            is_list = isinstance(value.value, list)
            text = " ".join(line.text() for line in value.list()) if is_list else value.text()
            parts.append(Text(text, role=role))
        else:
            image = _named_image(value, folder, role)
            parts += [] if image is None else [image]
    if not parts and not folder.skip_missing:
        item.wrong("a part with a type, or a pair of text and image")
    return parts


def _read_pair(record: Field, folder: ImageStore) -> Body:
    return Body(_pair(record, folder))


def _read_captions(record: Field, folder: ImageStore) -> Body:
    """`images` and `captions` of equal length, each image beside its caption, in the order of the two
    fields.
    """
    captions = [caption.text() for caption in record["captions"].list()]
    references = record["images"].list()
    _same_length(record, "captions", "images")
    names = [name for name in record.object() if name in ("images", "captions")]
    parts: list[Part] = []
    for caption, reference in zip(captions, references, strict=True):
        image = folder.image(reference)
        pair: dict[str, Part | None] = {"images": image, "captions": Text(caption)}
        parts += [part for name in names if (part := pair[name]) is not None]
    return Body(parts)


# LLaVA, ShareGPT and CoMM: `<image>` in the text stands for an image, if there are as many as images


def _read_llava(record: Field, folder: ImageStore) -> Body:
    texts: list[Piece] = []
    for turn in record["conversations"].list():
        speaker = turn["from"].text()
        if speaker not in _ROLES:
            turn["from"].wrong(" or ".join(_ROLES))
        texts.append(Text(turn["value"].text(), role=_ROLES[speaker]))
    return Body(_joined(record, texts, folder))


def _read_comm(record: Field, folder: ImageStore) -> Body:
    asked = _with_images(record["model_input"], record.get("input_image_list"), folder)
    answer, images = record.get("model_output"), record.get("output_gt_image_list")
    return Body(asked, target=[] if answer is None else _with_images(answer, images, folder))


def _with_images(text: Field, references: Field | None, folder: ImageStore) -> list[Part]:
    """A text with images at its placeholders, or before it where they do not match."""
    images, pieces = _images(references, folder), [Text(text.text())]
    placed = with_slots(pieces, len(images))
    return images_first(pieces, images) if placed is None else filled(placed, images)


def _images(references: Field | None, folder: ImageStore) -> list[Image | None]:
    if references is None:
        return []
    if isinstance(references.value, str | dict):
        return [_named_image(references, folder)]
    return [_named_image(reference, folder) for reference in references.list()]


# MMC4, OBELICS and the official annotations: sentences with images between them


def _read_mmc4(record: Field, folder: ImageStore) -> Body:
    """Each image before the sentence it is matched with."""
    sentences = [sentence.text() for sentence in record["text_list"].list()]
    infos = record["image_info"].list()
    matrix = record.get("similarity_matrix")
    if matrix is not None:
        widths = {len(row.list()) for row in matrix.list()}
        if len(matrix.list()) != len(infos) or widths - {len(sentences)}:
            shape = f"{len(matrix.list())} x {sorted(widths)}"
            raise FieldError(
                matrix.path, f"found {shape}, expected {len(infos)} images x {len(sentences)} texts"
            )
    placed = []
    for info in infos:
        place = info["matched_text_index"].integer(0, len(sentences) - 1)
        image = folder.image(info["image_name"])
        if image is not None:
            placed.append(_Placed(place, True, image))
    return Body(_between(sentences, placed))


def _read_obelics(record: Field, folder: ImageStore) -> Body:
    """Two lists of equal length; at each index either a text or an image."""
    parts: list[Part] = []
    for text, image in obelics_pairs(record):
        if text.value is not None:
            parts.append(Text(text.text()))
        else:
            reference = folder.image(image)
            parts += [] if reference is None else [reference]
    return Body(parts)


def obelics_pairs(record: Field) -> Iterator[tuple[Field, Field]]:
    """Text and image of each index, one of which is null. Raises FieldError."""
    _same_length(record, "texts", "images")
    for text, image in zip(record["texts"].list(), record["images"].list(), strict=True):
        if (text.value is None) == (image.value is None):
            found = "neither" if text.value is None else "both"
            raise FieldError(
                text.path, f"found {found} a text and an image at one index, expected one of them"
            )
        yield text, image


def _read_annotation(record: Field, folder: ImageStore) -> Body:
    """The official input of interactive generation.

    `generate_images` asks for the last image: the file named there is a dummy, never looked at.
    `generate_texts` asks for a text after everything. From there on texts and images take turns, `num_iter`
    in all.
    """
    sentences = [sentence.text() for sentence in record["sentences"].list()]
    places, sides = record["sentence_ixs"].list(), record["image_first"].list()
    references = record["images"].list()
    _same_length(record, "sentence_ixs", "images")
    _same_length(record, "image_first", "images")
    mode, rounds = record.get("generate_mode"), record.get("num_iter")
    if mode is not None and mode.text() not in ("generate_images", "generate_texts"):
        mode.wrong('"generate_images" or "generate_texts"')
    paints_first = mode is not None and mode.text() == "generate_images"
    if paints_first and not references:
        record["images"].wrong("a dummy at the end, in the place of the image to generate")
    placed = []
    for index, (reference, place, side) in enumerate(zip(references, places, sides, strict=True)):
        is_dummy = paints_first and index == len(references) - 1
        image = None if is_dummy else folder.image(reference)
        if image is not None or is_dummy:
            placed.append(_Placed(place.integer(0, len(sentences) - 1), side.boolean(), image))
    parts = _between(sentences, placed)
    if mode is None:
        return Body(parts)
    number = 1 if rounds is None else rounds.integer(1, 1000)
    letters = "IT" if paints_first else "TI"
    layout = " ".join(letters[index % 2] for index in range(number))
    return Body(_before_dummy(parts, record) if paints_first else parts, layout=layout)


def _before_dummy(parts: list[Any], record: Field) -> list[Part]:
    """The parts before the one image that is None, with its place checked."""
    end = parts.index(None)
    if any(isinstance(part, Image) for part in parts[end:]):
        record["sentence_ixs"].wrong("the image to generate, the last one named, to come last")
    if len(parts) > end + 1:
        logger.warning(
            "%s: text after the image to generate cannot influence it: left out", record.path or "record"
        )
    return parts[:end]


@dataclass(frozen=True, slots=True)
class _Placed:
    """An image (None: one to be generated) beside a sentence."""

    sentence: int
    is_first: bool
    image: Image | None


def _between(sentences: Sequence[str], images: Sequence[_Placed]) -> list[Any]:
    """Parts: sentences joined by a space, none beside an image; each image (or None) at its sentence."""
    parts: list[Part | None] = []
    run: list[str] = []

    def end_run():
        text = " ".join(sentence for sentence in run if sentence).strip()
        if text:
            parts.append(Text(text))
        run.clear()

    def add_images(sentence: int, is_first: bool):
        for placed in images:
            if placed.sentence == sentence and placed.is_first == is_first:
                end_run()
                parts.append(placed.image)

    for index, sentence in enumerate(sentences):
        add_images(index, is_first=True)
        run.append(sentence)
        add_images(index, is_first=False)
    end_run()
    return parts


def _same_length(record: Field, first: str, second: str):
    lengths = len(record[first].list()), len(record[second].list())
    if lengths[0] != lengths[1]:
        raise FieldError(
            record[first].path, f"found {lengths[0]} items, expected {lengths[1]} as in {second}"
        )


_SIMILARITY = ("matched_sim", "raw_url", "image_url", "url", "face_detections")
FORMATS = (
    Format(("messages",), _read_messages, is_plain_text=True),
    Format(("content",), _read_content, is_plain_text=True),
    Format(("prompt", "completion"), _read_completion, is_plain_text=True),
    Format(("sentences", "images", "sentence_ixs", "image_first"), _read_annotation),
    Format(("text_list", "image_info"), _read_mmc4, known=_SIMILARITY),
    Format(("conversations",), _read_llava),
    Format(("model_input",), _read_comm, known=("prediction_image_list", "prediction_text")),
    Format(("images", "texts"), _read_obelics, known=("metadata", "general_metadata")),
    Format(("images", "captions"), _read_captions),
    Format(("file_name",), _read_pair),
    Format(("text",), _read_pair, known=("image_url", "url")),
    Format(("image",), _read_pair, known=("image_url", "url")),
)
"""The first whose fields are all there is taken."""


class _ImageWriter:
    """Says where images stand relative to a file, and writes those that stand nowhere yet."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        self.written: list[Path] = []

    def __call__(self, image: Image, index: int) -> str:
        folder = Path(os.path.realpath(self.path.parent))
        if isinstance(image.source, Path):
            source = Path(os.path.realpath(image.source))
            if source.is_relative_to(folder):
                return source.relative_to(folder).as_posix()
        data = to_png(image.load())
        while True:
            name = f"images/{self.path.stem}_{self.count}.png"
            self.count += 1
            if not (folder / name).exists():
                break
            # Written by an earlier conversion: the same command gives the same names again.
            if (folder / name).is_file() and (folder / name).read_bytes() == data:
                return name
        make_folder(folder / "images")
        write_file(folder / name, data)
        self.written.append(folder / name)
        return name

    def take_back(self):
        """Removes what this writer wrote."""
        for path in self.written:
            path.unlink(missing_ok=True)
