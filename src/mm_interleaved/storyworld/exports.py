"""StoryWorld on disk: our own documents, and the same world in the formats of the official corpora.

Every file is whole or absent: images first, the files that name them last, each written beside its place
and renamed.
"""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.document_files import write_documents
from mm_interleaved.documents.images import to_png
from mm_interleaved.errors import UsageError
from mm_interleaved.files import make_folder, new_folder, write_file
from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE
from mm_interleaved.storyworld.catalogue import document_of
from mm_interleaved.storyworld.segmentation import CLASSES, class_map
from mm_interleaved.storyworld.world import scene_from_record

_SHARD_SIZE = 1000


def write_storyworld(
    out: str | Path,
    documents: int,
    seed: int,
    split: str,
    format: str = "jsonl",
    tasks: Sequence[str] = (),
    image_size: int = IMAGE_SIZE,
) -> Path:
    """Fresh documents of this world in one of the formats of EXPORTS.

    Args:
        out: a new or an empty folder. It is there when all is written, or not at all.
        documents: how many, from index 0 on. Formats that hold one task only take all of them from that task.
        seed: integer from 0. The same split and seed make the same documents, with any number of them.
        split: "train", "validation" or "test".
        tasks: names out of `catalogue.ALL_TASKS`, in turn, where a format takes all tasks; none: the round of
            `tasks.document`, which has none about boards.
        image_size: see `catalogue.document_of`.

    Returns:
        The file to read (for formats of several files the one that names the others).

    Raises:
        ValueError: an unknown format, split or task, no documents, or a size that a task does not have.
        UsageError: `out` holds something already.
        StorageError: the disk refuses.
    """
    if format not in EXPORTS:
        raise ValueError(f"format must be one of {', '.join(EXPORTS)}, found {format!r}")
    if documents < 1:
        raise ValueError(f"expected at least 1 document, found {documents}")

    def turn(index: int) -> str | None:
        return tasks[index % len(tasks)] if tasks else None

    out = Path(out)
    with new_folder(out) as folder:
        make_folder(folder / "images")
        path = EXPORTS[format](
            folder,
            lambda task: (
                document_of(split, seed, index, task or turn(index), image_size) for index in range(documents)
            ),
        )
    return out / path.relative_to(folder)


Source = Callable[[str | None], Iterator[Document]]
"""The documents of one task, or of all."""


def _write_image(out: Path, image: Image, name: str) -> str:
    """Writes `images/<name>.png` and returns that path."""
    write_file(out / "images" / f"{name}.png", to_png(image.load()))
    return f"images/{name}.png"


def _write_json(path: Path, value: Any) -> Path:
    make_folder(path.parent)
    write_file(path, json.dumps(value, ensure_ascii=False, indent=1).encode())
    return path


def _write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    make_folder(path.parent)
    write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    return path


def _only_image(made: Document) -> Image:
    return next(part for part in (*made.parts, *made.target) if isinstance(part, Image))


def _answer(made: Document) -> str:
    return " ".join(part.text for part in made.target if isinstance(part, Text))


def _panels(made: Document) -> list[tuple[str, Image]]:
    """Text and image of each panel of a story."""
    parts = (*made.parts, *made.target)
    return [
        (text.text, image)
        for text, image in zip(parts[::2], parts[1::2], strict=True)
        if isinstance(text, Text) and isinstance(image, Image)
    ]


def _write_jsonl(out: Path, source: Source) -> Path:
    """`documents.jsonl`: the canonical form, gold answers in `target`, the truth in `meta`."""
    made = list(source(None))
    names = iter(
        f"{one.id}_{number}"
        for one in made
        for number in range(sum(isinstance(part, Image) for part in (*one.parts, *one.target)))
    )
    path = out / "documents.jsonl"
    write_documents(path, made, lambda image, number: _write_image(out, image, next(names)))
    return path


def _write_mmc4(out: Path, source: Source) -> Path:
    """`docs_shard_0_v2.jsonl`: stories; each image is matched with its panel's text."""
    records = []
    for made in source("story"):
        panels = _panels(made)
        infos = []
        for number, (_, image) in enumerate(panels):
            path = _write_image(out, image, f"{made.id}_{number}")
            infos.append(
                {"image_name": path, "raw_url": "", "matched_text_index": number, "matched_sim": 1.0}
            )
        similarity = np.eye(len(panels)).tolist()
        records.append(
            {
                "id": made.id,
                "url": "",
                "text_list": [text for text, _ in panels],
                "image_info": infos,
                "similarity_matrix": similarity,
            }
        )
    return _write_lines(out / "docs_shard_0_v2.jsonl", records)


def _write_obelics(out: Path, source: Source) -> Path:
    """`obelics.jsonl`: stories as two lists, a text or an image at each index."""
    records = []
    for made in source("story"):
        texts: list[str | None] = []
        images: list[str | None] = []
        for number, (text, image) in enumerate(_panels(made)):
            texts += [text, None]
            images += [None, _write_image(out, image, f"{made.id}_{number}")]
        records.append({"id": made.id, "images": images, "texts": texts, "metadata": None})
    return _write_lines(out / "obelics.jsonl", records)


def _write_obelics_parquet(out: Path, source: Source) -> Path:
    """`obelics.parquet`: the columns of `obelics.jsonl`. Needs pyarrow (extra `train`)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("obelics-parquet needs pyarrow: pip install 'mm-interleaved[train]'") from error

    lines = _write_obelics(out, source).read_text(encoding="utf-8").splitlines()
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    write_file(out / "obelics.parquet", buffer.getvalue())
    return out / "obelics.parquet"


def _write_llava(out: Path, source: Source) -> Path:
    """`llava.json`: every conversation with one image, `<image>` before the first question."""
    records = []
    for task in ("caption", "vqa", "dialogue"):
        for made in source(task):
            texts = [part.text for part in (*made.parts, *made.target) if isinstance(part, Text)]
            turns = [
                {"from": "human" if number % 2 == 0 else "gpt", "value": text}
                for number, text in enumerate(texts)
            ]
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            name = f"{made.id}_{task}"
            records.append(
                {"id": name, "image": _write_image(out, _only_image(made), name), "conversations": turns}
            )
    return _write_json(out / "llava.json", records)


def _image_entry(number: int, path: str) -> dict[str, Any]:
    return {"id": number, "file_name": path, "width": IMAGE_SIZE, "height": IMAGE_SIZE}


def _write_coco(out: Path, source: Source) -> Path:
    """`annotations/captions.json`: images and captions."""
    images, annotations = [], []
    for number, made in enumerate(source("caption")):
        images.append(_image_entry(number, _write_image(out, _only_image(made), f"{made.id}_caption")))
        annotations.append({"id": number, "image_id": number, "caption": _answer(made)})
    return _write_json(
        out / "annotations" / "captions.json",
        {"info": {"description": "StoryWorld"}, "images": images, "annotations": annotations},
    )


def _write_vqav2(out: Path, source: Source) -> Path:
    """`questions.json` and `annotations.json`, ten times the same answer as ten people would give."""
    questions, annotations = [], []
    for number, made in enumerate(source("vqa")):
        path = _write_image(out, _only_image(made), f"{made.id}_vqa")
        answer = _answer(made)
        questions.append(
            {"image_id": number, "question_id": number, "question": made.meta["question"], "image": path}
        )
        annotations.append(
            {
                "image_id": number,
                "question_id": number,
                "question_type": made.meta["question_kind"],
                "answer_type": _answer_type(answer),
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": answer, "answer_id": person, "answer_confidence": "yes"}
                    for person in range(1, 11)
                ],
            }
        )
    _write_json(out / "annotations.json", {"annotations": annotations})
    return _write_json(out / "questions.json", {"questions": questions})


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer in ("none", "one", "two", "three") else "other"


def _write_visdial(out: Path, source: Source) -> Path:
    """`visdial.json`: dialogues with their pools; the last round's options are the candidates."""
    questions: dict[str, int] = {}
    answers: dict[str, int] = {}
    dialogs = []
    for number, made in enumerate(source("dialogue")):
        _write_image(out, _only_image(made), f"{made.id}_dialogue")
        texts = [part.text for part in (*made.parts, *made.target) if isinstance(part, Text)]
        rounds = []
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            is_last = len(rounds) == len(texts) // 2 - 1
            options = made.meta["candidates"] if is_last else [answer]
            rounds.append(
                {
                    "question": questions.setdefault(question, len(questions)),
                    "answer": answers.setdefault(answer, len(answers)),
                    "answer_options": [answers.setdefault(option, len(answers)) for option in options],
                    "gt_index": options.index(answer),
                }
            )
        dialogs.append(
            {"image_id": number, "image": f"images/{made.id}_dialogue.png", "caption": "", "dialog": rounds}
        )
    data = {"dialogs": dialogs, "questions": list(questions), "answers": list(answers)}
    return _write_json(out / "visdial.json", {"version": "1.0", "split": "storyworld", "data": data})


def _write_refcoco(out: Path, source: Source) -> Path:
    """`refcoco.jsonl`: image, sentence, box in pixels (x1, y1, x2, y2; the right and lower ends outside)."""
    records = []
    for made in source("ground"):
        question = next(part.text for part in made.parts if isinstance(part, Text))
        left, top, right, bottom = made.meta["box"]
        records.append(
            {
                "image": _write_image(out, _only_image(made), f"{made.id}_ground"),
                "sent": question.removeprefix("Where is ").rstrip("?"),
                "bbox": [left, top, right + 1, bottom + 1],
                "width": IMAGE_SIZE,
                "height": IMAGE_SIZE,
            }
        )
    return _write_lines(out / "refcoco.jsonl", records)


def _write_ade20k(out: Path, source: Source) -> Path:
    """`captions.json`, images, `annotations/` (class indices from 1) and `annotations_with_color/`."""
    for name in ("annotations", "annotations_with_color"):
        make_folder(out / name)
    records = []
    for made in source("segmentation"):
        name = f"{made.id}_segmentation"
        target = next(part for part in made.target if isinstance(part, Image))
        _write_image(out, target, name)
        classes = class_map(scene_from_record(made.meta["scenes"][-1])) + 1
        write_file(out / "annotations" / f"{name}.png", to_png(PILImage.fromarray(classes)))
        write_file(out / "annotations_with_color" / f"{name}.png", to_png(_only_image(made).load()))
        caption = next(part.text for part in made.parts if isinstance(part, Text))
        records.append({"image_id": name, "caption": caption})
    _write_json(out / "classes.json", list(CLASSES))
    return _write_json(out / "captions.json", records)


def _write_vist(out: Path, source: Source) -> Path:
    """`annotations/formatted.json`: for each story, caption and image in order."""
    stories = []
    for made in source("story"):
        panels = []
        for number, (text, image) in enumerate(_panels(made)):
            name = f"{made.id}_{number}"
            _write_image(out, image, name)
            panels.append({"sequence_index": number, "image_id": name, "caption": text})
        stories.append({"story_id": made.id, "story": panels})
    return _write_json(out / "annotations" / "formatted.json", {"annotations": stories})


def _write_annotation(out: Path, source: Source) -> Path:
    """`annt.json`: the official input of interactive generation; a story to go on with, image first."""
    records = []
    for made in source("story"):
        (text, image), *rest = _panels(made)
        first = _write_image(out, image, f"{made.id}_0")
        records.append(
            {
                "sentences": [text, rest[0][0]],
                # The last image is a dummy that stands for the one to generate.
                "images": [first, first],
                "sentence_ixs": [0, 1],
                "image_first": [False, False],
                "generate_mode": "generate_images",
                "num_iter": 2 * len(rest) - 1,
            }
        )
    return _write_json(out / "annt.json", records)


def _pairs(source: Source) -> Iterator[tuple[str, Image, str]]:
    """Name, image and caption."""
    for made in source("caption"):
        yield f"{made.id}_caption", _only_image(made), _answer(made)


def _write_laion(out: Path, source: Source) -> Path:
    """`0000000.txt`: JSON lines of image and caption."""
    records = [
        {"image": _write_image(out, image, name), "caption": text} for name, image, text in _pairs(source)
    ]
    return _write_lines(out / "0000000.txt", records)


def _write_webdataset(out: Path, source: Source) -> Path:
    """`00000.tar` and on: a `.png`, a `.txt` and a `.json` for each pair; `shards.csv` names the shards."""
    shards: list[tuple[str, int]] = []
    members: list[tuple[str, bytes]] = []

    def end_shard() -> None:
        name = f"{len(shards):05d}.tar"
        write_file(out / name, _tar(members))
        shards.append((name, len(members) // 3))
        members.clear()

    for name, image, text in _pairs(source):
        about = json.dumps({"key": name, "caption": text}).encode()
        members += [
            (f"{name}.png", to_png(image.load())),
            (f"{name}.txt", text.encode()),
            (f"{name}.json", about),
        ]
        if len(members) == 3 * _SHARD_SIZE:
            end_shard()
    if members:
        end_shard()
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("shard", "samples"), *shards])
    write_file(out / "shards.csv", table.getvalue().encode())
    return out / shards[0][0]


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    """A tar archive of the members; no times and no owners, so that the same members give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


EXPORTS: Mapping[str, Callable[[Path, Source], Path]] = {
    "jsonl": _write_jsonl,
    "mmc4": _write_mmc4,
    "obelics": _write_obelics,
    "obelics-parquet": _write_obelics_parquet,
    "llava": _write_llava,
    "coco": _write_coco,
    "vqav2": _write_vqav2,
    "visdial": _write_visdial,
    "refcoco": _write_refcoco,
    "ade20k": _write_ade20k,
    "vist": _write_vist,
    "annt": _write_annotation,
    "laion": _write_laion,
    "webdataset": _write_webdataset,
}
