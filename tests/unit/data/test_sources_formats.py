"""Formats that StoryWorld is not exported to, and what the others leave open: small files made here."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_interleaved.data.pickled_annotations import unpickled_records
from mm_interleaved.data.registry import make_source, source_name_of
from mm_interleaved.data.source import BrokenItem, FilteredItem, in_epoch
from mm_interleaved.data.storage import records
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, UsageError
from mm_interleaved.tokens.task_prompts import CAPTION_RELEASED, GROUND_RELEASED, QUESTION_RELEASED


def png(colour: int = 0, size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", size, (colour, 40, 200 - colour)).save(buffer, format="PNG")
    return buffer.getvalue()


def put(path: Path, content) -> str:
    """A file of bytes, text, or JSON; an image where the content is a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, int):
        content = png(content)
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(name: str, paths, **settings) -> list:
    source = make_source(name, {"paths": paths, **settings})
    return [item for shard in source.shards() for _, item in source.read(shard)]


def words(parts) -> list[str]:
    """Texts as they are, images by name."""
    return [part.text if isinstance(part, Text) else f"<{part.name}>" for part in parts]


def broken(found: list) -> list[str]:
    return [str(item) for item in found if isinstance(item, BrokenItem)]


# ---- Captions ----

COCO = {
    "images": [{"id": 9, "file_name": "a.jpg"}, {"id": 4, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 4, "id": 0, "caption": "A b."},
        {"image_id": 9, "id": 1, "caption": " First a."},
        {"image_id": 9, "id": 2, "caption": "Second a."},
        {"image_id": 7, "id": 3, "caption": "Of nothing."},
    ],
}


def test_coco_captions_one_by_one_or_together(tmp_path):
    put(tmp_path / "val" / "a.jpg", 1), put(tmp_path / "val" / "b.jpg", 2)
    path = put(tmp_path / "annotations" / "nocaps.json", COCO)
    assert source_name_of(path) == "captions"
    found = read("captions", path, images=str(tmp_path / "val"))
    [why] = broken(found)
    assert "annotations[3]" in why and "no image" in why
    said = [words((*one.parts, *one.target)) for one in found if isinstance(one, Document)]
    ask = "Describe the picture."
    assert said == [["<a.jpg>", ask, "First a."], ["<a.jpg>", ask, "Second a."], ["<b.jpg>", ask, "A b."]]
    together = read("captions", path, images=str(tmp_path / "val"), one_per_image=True)[:2]
    assert [one.meta["captions"] for one in together] == [["First a.", "Second a."], ["A b."]]


@pytest.mark.parametrize("one_per_image", [False, True])
def test_a_test_split_without_captions_gives_documents_without_target(tmp_path, one_per_image):
    for name in ("a.jpg", "b.jpg"):
        put(tmp_path / name, 1)
    entries = [
        {"id": n, "file_name": name, "coco_url": "http://x"} for n, name in enumerate(("a.jpg", "b.jpg"))
    ]
    nocaps = put(tmp_path / "nocaps_test.json", {"images": entries, "info": {}, "licenses": []})
    assert source_name_of(nocaps) == "captions"
    listed = put(tmp_path / "nocaps_list.json", [{"image": name, "img_id": 3} for name in ("a.jpg", "b.jpg")])
    for path in (nocaps, listed):
        found = read("captions", path, one_per_image=one_per_image)
        assert [words(one.parts) for one in found] == [
            [f"<{name}>", "Describe the picture."] for name in ("a.jpg", "b.jpg")
        ]
        assert {(one.target, one.layout) for one in found} == {((), "T")}


def test_an_image_without_caption_among_others_is_counted(tmp_path):
    put(tmp_path / "a.jpg", 1)
    table = {**COCO, "images": [{"id": 9, "file_name": "a.jpg"}, {"id": 3, "file_name": "a.jpg"}]}
    found = read("captions", put(tmp_path / "c.json", table))
    assert [item.rule for item in found if isinstance(item, FilteredItem)] == ["no_caption"]
    table["annotations"] = [{"image_id": 9, "caption": 3}]
    [broken_one] = [
        item for item in read("captions", put(tmp_path / "d.json", table)) if isinstance(item, BrokenItem)
    ]
    assert str(broken_one).endswith("d.json: annotations[0].caption: found the number 3, expected a string")


def test_captions_can_be_drawn_or_asked_as_published(tmp_path):
    put(tmp_path / "images" / "a.jpg", 1)
    path = put(tmp_path / "karpathy.json", [{"image": "a.jpg", "caption": ["one", "two"]}])
    assert source_name_of(path) == "captions"
    drawn = read("captions", path, is_drawn=True)
    assert [words(one.parts) for one in drawn] == [["one"], ["two"]]
    assert all(isinstance(one.target[0], Image) and one.target[0].role is None for one in drawn)
    asked = read("captions", path, prompt="caption-released")[1]
    assert words(asked.parts) == ["<images/a.jpg>", "a photo of"] and words(asked.target) == ["two"]
    assert {part.role for part in (*asked.parts, *asked.target)} == {None}
    assert make_source("captions", {"paths": path, "prompt": "caption-released"}).prompt == CAPTION_RELEASED


def test_karpathys_data_sets_have_splits(tmp_path):
    put(tmp_path / "val2014" / "x.jpg", 1)
    images = [
        {"filepath": "val2014", "filename": "x.jpg", "split": split, "sentences": [{"raw": split}]}
        for split in ("train", "restval", "test")
    ]
    path = put(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    assert [words(one.target) for one in read("captions", path, split="train")] == [["train"], ["restval"]]
    assert [words(one.target) for one in read("captions", path, split="test")] == [["test"]]


def test_paragraphs_find_their_image_by_its_address(tmp_path):
    put(tmp_path / "VG_100K" / "2.jpg", 1)
    record = {"image_id": 2, "url": "https://x.org/rak248/VG_100K/2.jpg"}
    path = put(tmp_path / "paragraphs_v1.json", [record | {"paragraph": "Long. "}, record | {"image_id": 3}])
    assert source_name_of(path) == "paragraphs"
    found = read("paragraphs", path, split_path=put(tmp_path / "train_split.json", [2]))
    assert words((*found[0].parts, *found[0].target)) == [
        "<VG_100K/2.jpg>", "Describe the picture in a paragraph.", "Long.",
    ]  # fmt: skip
    assert found[1] == FilteredItem(f"{path}: [1]", "other_split")
    official = put(
        tmp_path / "annotations" / "paragraphs_coco.json", {"annotations": [record | {"caption": "C"}]}
    )
    assert source_name_of(official) == "paragraphs"
    assert words(read("paragraphs", official)[0].target) == ["C"]


# ---- Questions ----


def test_vqa_knows_cocos_names_and_the_most_common_answer(tmp_path):
    put(tmp_path / "COCO_val2014_000000000042.jpg", 1)
    questions = [{"image_id": 42, "question_id": n, "question": "How many?"} for n in (420, 421)]
    answers = [{"answer": answer} for answer in ("two", "2", "2")]
    path = put(tmp_path / "q.json", {"data_subtype": "val2014", "questions": questions})
    annotations = put(tmp_path / "a.json", {"annotations": [{"question_id": 420, "answers": answers}]})
    assert source_name_of(path) == "vqa"
    first, second = read("vqa", path, annotations=annotations)
    assert words(first.parts) == ["<COCO_val2014_000000000042.jpg>", "How many?"] and words(first.target) == [
        "2"
    ]
    assert first.meta["answers"] == ["two", "2", "2"] and first.meta["question_id"] == 420
    assert "no annotation" in str(second) and "questions[1].question_id" in str(second)
    named = read("vqa", path, image_name="COCO_val2014_{image_id:012}.jpg")
    assert [one.target for one in named] == [(), ()]


def test_tables_of_a_mixture_are_parsed_once_however_reading_alternates(tmp_path):
    put(tmp_path / "a.jpg", 1)
    sources = []
    for number in range(6):
        question = {"image_id": number, "image": "a.jpg", "question": "What?", "question_id": 1}
        answer = {"question_id": 1, "answers": [{"answer": "it"}]}
        path = put(tmp_path / f"q{number}.json", {"questions": [question]})
        annotations = put(tmp_path / f"a{number}.json", {"annotations": [answer]})
        sources.append(make_source("vqa", {"paths": path, "annotations": annotations}))
    before = records._read_table.cache_info().misses
    shards = [source.shards()[0] for source in sources]
    assert records._read_table.cache_info().misses == before + 12, "answers too: workers inherit them"
    for _ in range(2):
        for source, shard in zip(sources, shards, strict=True):
            [(_, document)] = source.read(shard)
            assert words(document.target) == ["it"]
    assert records._read_table.cache_info().misses == before + 12


def test_textvqa_and_vizwiz_files_are_read(tmp_path):
    put(tmp_path / "0f.jpg", 1), put(tmp_path / "VizWiz_val_00000000.jpg", 2)
    textvqa = {"question_id": 5, "question": "What?", "image_id": "0f", "answers": ["x", "y", "y"]}
    path = put(tmp_path / "TextVQA_0.5.1_val.json", {"data": [textvqa], "dataset_type": "val"})
    assert source_name_of(path) == "vqa" and words(read("vqa", path)[0].target) == ["y"]
    vizwiz = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "What is this?",
        "answers": [{"answer": "unanswerable", "answer_confidence": "no"}],
        "answer_type": "unanswerable",
    }
    path = put(tmp_path / "val.json", [vizwiz])
    assert source_name_of(path) == "vqa"
    [one] = read("vqa", path, prompt="question-released-vizwiz")
    assert one.parts[0].text.endswith("the question.") and one.parts[2].text.startswith("What is this? When")
    assert words(one.target) == ["unanswerable"] and one.meta["answer_type"] == "unanswerable"


def test_text_of_a_question_is_never_markup():
    image = Image(png())
    parts = QUESTION_RELEASED.parts(image, "Is {image} or {text} here?")
    assert sum(part is image for part in parts) == 1
    assert parts[-1].text.startswith("Is {image} or {text} here? Please")


def visdial(tmp_path) -> str:
    put(tmp_path / "VisualDialog_val2018_000000000007.jpg", 1)
    rounds = [{"question": n, "answer": n, "answer_options": [0, 1, 2], "gt_index": n} for n in range(3)]
    dialog = {"image_id": 7, "caption": "a dog", "dialog": rounds}
    bad = {"image_id": 7, "caption": "", "dialog": [{"question": 5, "answer": 0}]}
    pools = {"questions": ["is it big", "is it red", "is it old"], "answers": ["yes", "no", "maybe"]}
    return put(tmp_path / "visdial.json", {"data": {"dialogs": [dialog, bad], **pools}})


def test_visdial_keeps_the_dialogue_and_its_candidates(tmp_path):
    path = visdial(tmp_path)
    one, wrong = read("visdial", path)
    image = "<VisualDialog_val2018_000000000007.jpg>"
    assert words(one.parts) == [image, "a dog", "is it big", "yes", "is it red", "no", "is it old"]
    assert [part.role for part in one.parts][3:] == ["assistant", "user", "assistant", "user"]
    assert words(one.target) == ["maybe"] and one.meta == {
        "candidates": ["yes", "no", "maybe"],
        "gold_index": 2,
    }
    assert "data.dialogs[1].dialog[0].question" in str(wrong) and "from 0 to 2" in str(wrong)
    dense = put(tmp_path / "dense.json", [{"image_id": 7, "round_id": 2, "gt_relevance": [0, 1, 0.5]}])
    train = put(tmp_path / "train.json", [{"image_id": 7, "round_id": 2, "relevance": [0, 1, 0.5]}])
    other = read("visdial", path, dense_annotations=train, is_conversation=False)[0]
    one = read("visdial", path, dense_annotations=dense, is_conversation=False)[0]
    assert other == one
    assert words(one.parts) == [
        image, "caption: a dog. question: is it big? answer: yes. question: is it red? answer:",
    ]  # fmt: skip
    assert words(one.target) == ["no"] and one.meta["relevance"] == [0, 1, 0.5]


def test_visdial_can_leave_out_the_round_that_the_published_history_lacks(tmp_path):
    one = read("visdial", visdial(tmp_path), skips_previous_round=True)[0]
    assert words(one.parts)[1:] == ["a dog", "is it big", "yes", "is it old"] and words(one.target) == [
        "maybe"
    ]


def test_llava_turns_and_texts_without_image_are_kept(tmp_path):
    put(tmp_path / "a.png", 1)
    turns = [
        {"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A."},
        {"from": "human", "value": "And?"}, {"from": "gpt", "value": "B."},
    ]  # fmt: skip
    path = put(
        tmp_path / "mix.json",
        [{"id": "1", "image": "a.png", "conversations": turns}, {"id": "2", "conversations": turns[2:]}],
    )
    first, second = read("llava", path)
    assert words(first.parts) == ["What?", "<a.png>", "A.", "And?", "B."] and not first.target
    assert words(second.parts) == ["And?", "B."]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("captions", COCO),
        ("paragraphs", {"annotations": []}),
        ("vqa", {"questions": []}),
        ("visdial", {"data": {"dialogs": []}}),
        ("refcoco", {"images": [], "annotations": []}),
        ("vist", {"annotations": []}),
    ],
)
def test_content_beside_the_records_of_a_table_is_not_lost(tmp_path, name, table):
    path = put(tmp_path / "table.json", {**table, "videos": ["v.mp4"]})
    with pytest.raises(InputError, match=r"table\.json: videos: found a list, which has no place"):
        read(name, path)


# ---- Boxes ----


def test_refcoco_tables_have_boxes_of_coco(tmp_path):
    put(tmp_path / "a.png", png(1, (200, 100)))
    images = [{"id": 1, "file_name": "a.png", "caption": "the left man", "width": 200, "height": 100}]
    boxes = [[20, 10, 100, 50], [20, 10, 0, 50], [20, 10, "x", 50]]
    annotations = [{"image_id": 1, "bbox": box} for box in boxes]
    path = put(tmp_path / "finetune_refcoco_val.json", {"images": images, "annotations": annotations})
    assert source_name_of(path) == "refcoco"
    one, empty, text = read("refcoco", path)
    assert words(one.parts) == ["<a.png>", "Where is the left man?"]
    assert words(one.target) == ["(100,100)(600,600)"] and one.meta["box"] == [20, 10, 120, 60]
    assert "annotations[1].bbox" in str(empty) and "four numbers" in str(text)
    published = read("refcoco", path, prompt="ground-released")[0]
    assert published.parts[1].text.endswith("describes. the left man<box>")
    assert GROUND_RELEASED.role is None


def test_boxes_without_a_size_ask_the_image(tmp_path):
    put(tmp_path / "a.png", png(1, (50, 20)))
    path = put(tmp_path / "refs.jsonl", {"image": "a.png", "sent": "man", "bbox": [0, 0, 25, 20]})
    [one] = read("refcoco", path)
    assert words(one.target) == ["(000,000)(500,999)"] and words(one.parts)[1] == "Where is the man?"


def test_flickr30k_entities_have_one_document_a_phrase(tmp_path):
    put(tmp_path / "flickr30k-images" / "12.jpg", png(1, (100, 100)))
    put(
        tmp_path / "Sentences" / "12.txt",
        "[/EN#1/people Two men] in [/EN#0/notvisual it] near [/EN#2/scene a lake] .\n",
    )
    box = "<bndbox><xmin>{}</xmin><ymin>0</ymin><xmax>{}</xmax><ymax>50</ymax></bndbox>"
    objects = "".join(f"<object><name>1</name>{box.format(x, x + 20)}</object>" for x in (0, 40))
    scene = "<object><name>2</name><scene>1</scene></object>"
    xml = f"<annotation><size><width>100</width><height>100</height></size>{objects}{scene}</annotation>"
    put(tmp_path / "Annotations" / "12.xml", xml)
    put(tmp_path / "Annotations" / "13.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]>" + xml)
    put(tmp_path / "Sentences" / "13.txt", "[/EN#1/people Men]\n")
    found = read("flickr30k-entities", put(tmp_path / "train.txt", "12\n13\n14\n"))
    assert words(found[0].parts) == ["<flickr30k-images/12.jpg>", "Where is the two men?"]
    assert words(found[0].target) == ["(000,000)(200,500) (400,000)(600,500)"]
    assert found[0].meta["sentence"] == "Two men in it near a lake ."
    assert found[1].rule == "no_box"
    assert "declaration" in str(found[2]) and "14.txt: there is no such file" in str(found[3])


# ---- Pictures after maps, stories ----


def test_ade20k_finds_pictures_in_the_folder_of_the_split(tmp_path):
    put(tmp_path / "images" / "training" / "ADE_1.jpg", 1)
    put(tmp_path / "annotations_with_color" / "training" / "ADE_1.png", 2)
    records = [{"image_id": "ADE_1", "caption": "a room"}, {"image_id": "ADE_2", "caption": "x"}]
    path = put(tmp_path / "training.json", records)
    assert source_name_of(path) == "ade20k"
    one, lost = read("ade20k", path, caption_end=".", is_text_first=True)
    assert words(one.parts) == ["a room.", "<annotations_with_color/training/ADE_1.png>"]
    assert words(one.target) == ["<images/training/ADE_1.jpg>"]
    assert "ADE_2" in str(lost) and "no image file" in str(lost)


PANELS = [("0", "One."), ("2", "Three."), ("1", "Two.")]


@pytest.mark.parametrize("form", ["formatted", "original"])
def test_vist_stories_are_put_in_order(tmp_path, form):
    for name in "abc":
        put(tmp_path / "images" / f"{name}.jpg", 1)
    if form == "formatted":
        story = [{"sequence_index": int(n), "image_id": "abc"[int(n)], "caption": text} for n, text in PANELS]
        annotations = {"s1": story}
    else:
        annotations = [
            [
                {
                    "worker_arranged_photo_order": n,
                    "photo_flickr_id": "abc"[int(n)],
                    "text": t,
                    "story_id": "s1",
                }
            ]
            for n, t in PANELS
        ]
    path = put(tmp_path / "annotations" / "train.json", {"annotations": annotations})
    assert source_name_of(path) == "vist"
    [one] = read("vist", path, images=str(tmp_path))
    assert words(one.parts) == ["One.", "<images/a.jpg>", "Two.", "<images/b.jpg>", "Three."]
    assert words(one.target) == ["<images/c.jpg>"] and one.id == "train:s1"
    [one] = read("vist", path, num_given=0)
    assert len(one.parts) == 6 and not one.target
    assert "7 cannot be given" in str(read("vist", path, num_given=7)[0])
    if isinstance(annotations, dict):
        annotations["s1"][2]["sequence_index"] = 0
        path = put(tmp_path / "annotations" / "val.json", {"annotations": annotations})
        assert "found the places [0, 2, 0], expected each once" in str(read("vist", path)[0])


def strip(path: Path, colours) -> None:
    """Frames of one colour each, one below the other."""
    picture = PILImage.new("RGB", (4, 4 * len(colours)))
    for number, colour in enumerate(colours):
        picture.paste((colour, 0, 0), (0, 4 * number, 4, 4 * number + 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def pororo(folder: Path) -> None:
    """The published files, tiny: object arrays of NumPy, paths as bytes."""
    names = [f"ep1/{n}.png" for n in range(6)]
    for number, name in enumerate(names):
        strip(folder / name, range(10 * number, 10 * number + 3))
    captions = {f"ep1/{n}": [f"pororo and loopy see {n}."] for n in range(6)}
    np.save(folder / "descriptions.npy", np.array(captions, dtype=object))
    np.save(folder / "img_cache4.npy", np.array([name.encode() for name in names[:2]]))
    following = [[str(name.encode()) for name in names[n + 1 : n + 5]] for n in range(2)]
    np.save(folder / "following_cache4.npy", np.array(following, dtype=object))
    splits = np.empty(3, dtype=object)
    splits[:] = [np.array([0]), np.array([1]), np.array([], dtype=int)]
    np.save(folder / "train_seen_unseen_ids.npy", splits)


def test_pororosv_is_unpickled_once_and_read_as_stories(tmp_path):
    pororo(tmp_path)
    lines = list(unpickled_records("pororosv-pickles", tmp_path))
    assert [line["split"] for line in lines] == ["train", "val"]
    path = put(tmp_path / "pororosv.jsonl", "\n".join(map(json.dumps, lines)))
    assert source_name_of(path) == "pororosv"
    one, other = read("pororosv", path, split="train", frame=1)
    assert other.rule == "other_split" and one.id == "pororosv-train-0"
    assert words(one.parts) == ["Pororo and Loopy see 0.", "<ep1/0.png#1>", "Pororo and Loopy see 1."]
    assert len(one.target) == 7
    assert [part.load().getpixel((0, 0))[0] for part in (*one.parts, *one.target)[1::2]] == [
        1,
        11,
        21,
        31,
        41,
    ]


def test_frames_are_chosen_anew_in_each_epoch_but_the_same_in_each_run(tmp_path):
    pororo(tmp_path)
    path = put(
        tmp_path / "p.jsonl", "\n".join(map(json.dumps, unpickled_records("pororosv-pickles", tmp_path)))
    )
    source = make_source("pororosv", {"paths": path})

    def frames(epoch):
        [shard] = source.shards()
        found = [item for _, item in in_epoch(source, epoch).read(shard)]
        return [part.name for one in found for part in (*one.parts, *one.target) if isinstance(part, Image)]

    assert frames(0) == frames(0) and len({tuple(frames(epoch)) for epoch in range(5)}) > 1


def test_flintstonessv_is_unpickled_once_and_read_as_stories(tmp_path):
    ids = [f"s_{n}" for n in range(5)]
    for name in ids:
        strip(tmp_path / "video_frames" / f"{name}.png", [5, 6])
    put(tmp_path / "following_cache4.pkl", pickle.dumps({"s_0": ids[1:], "s_3": ids[4:]}))
    put(tmp_path / "train-val-test_split.json", {"train": ["s_0", "s_3"], "val": [], "test": []})
    annotations = [{"globalID": name, "description": f"Fred at\n{name}.", "x": 1} for name in ids]
    put(tmp_path / "flintstones_annotations_v1-0.json", annotations)
    lines = list(unpickled_records("flintstonessv-pickles", tmp_path))
    path = put(tmp_path / "flintstonessv.jsonl", "\n".join(map(json.dumps, lines)))
    [one] = read("flintstonessv", path, images=str(tmp_path / "video_frames"), num_given=0, frame=9)
    assert words(one.parts)[::2] == [f"Fred at {name}." for name in ids]
    assert one.parts[1].name == "s_0.png#1" and one.parts[1].load().size == (4, 4)


def test_refcoco_as_published_is_unpickled_once(tmp_path):
    put(tmp_path / "COCO_train2014_1.jpg", png(1, (100, 100)))
    refs = [{"image_id": 1, "ann_id": 2, "split": "testA", "sentences": [{"sent": "man"}, {"sent": "him"}]}]
    put(tmp_path / "refs(unc).p", pickle.dumps(refs, protocol=2))
    image = {"id": 1, "file_name": "COCO_train2014_1.jpg", "width": 100, "height": 100}
    put(
        tmp_path / "instances.json", {"images": [image], "annotations": [{"id": 2, "bbox": [10, 10, 40, 40]}]}
    )
    lines = list(unpickled_records("refcoco-pickles", tmp_path))
    put(tmp_path / "refs(google).p", pickle.dumps([{**refs[0], "split": "train"}], protocol=2))
    with pytest.raises(UsageError, match=r"split by google, unc; choose one, such as --set split_by=unc"):
        list(unpickled_records("refcoco-pickles", tmp_path))
    assert list(unpickled_records("refcoco-pickles", tmp_path, {"split_by": "unc"})) == lines
    google = unpickled_records("refcoco-pickles", tmp_path, {"split_by": "google"})
    assert {line["split"] for line in google} == {"train"}
    with pytest.raises(InputError, match=r"no file refs\(umd\)\.p, found those split by google, unc"):
        list(unpickled_records("refcoco-pickles", tmp_path, {"split_by": "umd"}))
    with pytest.raises(UsageError, match="no setting 'split'"):
        list(unpickled_records("refcoco-pickles", tmp_path, {"split": "val"}))
    path = put(tmp_path / "refcoco.jsonl", "\n".join(map(json.dumps, lines)))
    found = read("refcoco", path, split="testA")
    assert [words(one.target) for one in found] == [["(100,100)(500,500)"]] * 2
    assert [item.rule for item in read("refcoco", path, split="val")] == ["other_split"] * 2


# ---- MMC4 ----


def page(num_images: int, *, similarities=None, names=None) -> dict:
    infos = [
        {
            "image_name": (names or [f"{n}.png" for n in range(num_images)])[n],
            "matched_text_index": n,
            "matched_sim": 0.5 if similarities is None else similarities[n],
        }
        for n in range(num_images)
    ]
    texts = [f"Sentence {n}. " for n in range(num_images + 1)]
    return {"text_list": texts, "image_info": infos}


@pytest.fixture
def pictures(tmp_path):
    for number in range(9):
        put(tmp_path / "images" / f"{number}.png", number)
    return str(tmp_path / "images")


def test_mmc4_keeps_similar_images_at_most_a_few(tmp_path, pictures):
    pages = [page(9), page(3, similarities=[0.23, 0.24, 0.9]), page(2, similarities=[0, 0]), page(0)]
    path = put(tmp_path / "docs_shard_3_v2.jsonl", "\n".join(map(json.dumps, pages)))
    many, some, none, without = read("mmc4", path, images=pictures, max_images=4)
    assert len(many.images) == 4 and many.id == "docs_shard_3_v2:0"
    numbers = [image.name for image in many.images]
    assert numbers == sorted(numbers)
    assert [image.name for image in some.images] == ["1.png", "2.png"]
    assert (none.rule, without.rule) == ("no_similar_image",) * 2
    assert some.text == "Sentence 0. Sentence 1. Sentence 2. Sentence 3."


def test_mmc4_places_images_by_chance_and_drops_half_of_the_single_ones(tmp_path, pictures):
    pages = [page(2) for _ in range(40)] + [page(1) for _ in range(200)]
    path = put(tmp_path / "docs.jsonl", "\n".join(map(json.dumps, pages)))
    found = read("mmc4", path, images=pictures)
    firsts = sum(isinstance(one.parts[0], Image) for one in found[:40])
    assert 8 < firsts < 32
    singles = found[40:]
    assert 70 < sum(isinstance(one, Document) for one in singles) < 130
    assert {one.rule for one in singles if isinstance(one, FilteredItem)} == {"single_image"}
    always = read("mmc4", path, images=pictures, single_image_share=1)
    assert all(isinstance(one, Document) for one in always)
    # What the first forty look like does not depend on the rule for the others.
    assert always[:40] == found[:40] != read("mmc4", path, images=pictures, seed=1)[:40]


def test_mmc4_counts_missing_images_and_moves_no_other(tmp_path, pictures):
    names = ["gone.png", "1.png", "2.png"]
    pages = [page(3, names=names), page(1, names=["gone.png"])]
    path = put(tmp_path / "docs.jsonl", "\n".join(map(json.dumps, pages)))
    one, lost = read("mmc4", path, images=pictures, image_first_share=1)
    assert one.meta == {"missing_images": 1} and lost.rule == "missing_images"
    assert words(one.parts) == ["Sentence 0.", "<1.png>", "Sentence 1.", "<2.png>", "Sentence 2. Sentence 3."]


def test_images_of_one_sentence_keep_their_order(tmp_path, pictures):
    record = page(4)
    for info in record["image_info"]:
        info["matched_text_index"] = 2
    path = put(tmp_path / "docs.jsonl", "\n".join([json.dumps(record)] * 20))
    for share in (0, 0.5, 1):
        for one in read("mmc4", path, images=pictures, image_first_share=share):
            assert words(one.parts)[1:-1] == ["<0.png>", "<1.png>", "<2.png>", "<3.png>"]


def test_mmc4_comes_zipped_with_images_in_tars(tmp_path, pictures):
    text = "\n".join(json.dumps(page(3)) for _ in range(4))
    plain = put(tmp_path / "docs_shard_0_v2.jsonl", text)
    with zipfile.ZipFile(tmp_path / "docs_shard_0_v2.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs_shard_0_v2.jsonl", text)
    for number in range(2):
        with tarfile.open(tmp_path / f"images{number}.tar", "w") as tar:
            for name in range(number, 9, 2):
                tar.add(f"{pictures}/{name}.png", f"shard/{name}.png")
    zipped = read("mmc4", f"{plain}.zip", images=str(tmp_path / "images*.tar"))
    for one, other in zip(zipped, read("mmc4", plain, images=pictures), strict=True):
        assert [a.load().tobytes() for a in one.images] == [b.load().tobytes() for b in other.images]
        assert one.text == other.text and isinstance(one.images[0].source, bytes)


@pytest.mark.parametrize(
    ("index", "name", "value"),
    [
        (1, "matched_text_index", -1),
        (1, "matched_text_index", 4),
        (1, "matched_text_index", 1.0),
        (0, "matched_sim", "0.3"),
        (2, "image_name", "../../secret.png"),
        (2, "image_name", "http://x/y.png"),
        (None, "text_list", None),
        (None, "image_info", {}),
        (None, "similarity_matrix", [[1.0]]),
    ],
)
def test_wrong_fields_of_mmc4_are_named_and_harm_no_other_page(tmp_path, pictures, index, name, value):
    wrong = page(3)
    (wrong if index is None else wrong["image_info"][index])[name] = value
    field = name if index is None else f"image_info[{index}].{name}"
    path = put(tmp_path / "docs.jsonl", "\n".join(map(json.dumps, [page(3), wrong, page(3)])))
    first, second, third = read("mmc4", path, images=pictures)
    assert isinstance(first, Document) and isinstance(third, Document)
    assert second.field == field and str(second).startswith(f"{path}:2: {field}: ")


# ---- Anything ----


def mutated(value, rng: random.Random):
    """A copy with one value deleted or replaced, anywhere."""
    value = json.loads(json.dumps(value))
    places = []

    def collect(node):
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            collect(node[key])

    collect(value)
    node, key = rng.choice(places)
    if rng.random() < 0.25:
        del node[key]
    else:
        others = [None, -1, 3, 10**12, 1.5, True, "x", "", [], {}, [None], {"a": 1}, "../x", "\0"]
        node[key] = rng.choice(others)
    return value


def test_no_change_of_an_annotation_file_is_fatal(tmp_path):
    for name in ("a.jpg", "b.jpg", "0.jpg", "images/c.png", "annotations_with_color/c.png"):
        put(tmp_path / name, 1)
    question = {"image_id": 0, "question_id": 1, "question": "?", "answers": ["x"]}
    dialog = {"image_id": 1, "image": "a.jpg", "dialog": [{"question": 0, "answer": 0}]}
    panel = {"sequence_index": 0, "image_id": "a", "caption": "A."}
    original = {"worker_arranged_photo_order": "0", "photo_flickr_id": "a", "text": "A.", "story_id": "s"}
    box = {"image_id": 1, "bbox": [1, 1, 2, 2]}
    sized = {"id": 1, "file_name": "a.jpg", "caption": "c", "width": 8, "height": 6}
    files = (
        ("captions", COCO),
        ("captions", [{"image": "a.jpg", "caption": ["x", "y"]}]),
        ("captions", {"images": [{"filename": "a.jpg", "split": "val", "sentences": [{"raw": "x"}]}]}),
        ("paragraphs", {"annotations": [{"image_id": 0, "url": "x/y/a.jpg", "caption": "c"}]}),
        ("vqa", {"questions": [question, question | {"question_id": 2}]}),
        ("visdial", {"data": {"dialogs": [dialog], "questions": ["q"], "answers": ["a"]}}),
        ("refcoco", {"images": [sized], "annotations": [box]}),
        ("ade20k", [{"image_id": "c", "caption": "c"}]),
        ("vist", {"annotations": {"s": [panel, panel | {"sequence_index": 1}]}}),
        ("vist", {"annotations": [{"story_id": 1, "story": [panel]}]}),
        ("vist", {"annotations": [[original], [original | {"worker_arranged_photo_order": "1"}]]}),
        ("pororosv", [{"id": "1", "split": "train", "frames": [{"image": "a.jpg", "caption": "c"}] * 2}]),
        ("mmc4", [page(1, names=["a.jpg"])]),
    )
    rng = random.Random(4)
    for number, (name, content) in enumerate(files):
        fine = {"num_given": 1} if name in ("vist", "pororosv") else {}
        fine |= {"single_image_share": 1} if name == "mmc4" else {}
        whole = read(name, put(tmp_path / f"whole{number}.json", content), **fine)
        assert sum(isinstance(item, Document) for item in whole) >= 1
        for change in range(40):
            # Another name each time: a file is remembered by its name, size and time.
            path = put(tmp_path / f"{number}-{change}.json", mutated(content, rng))
            source_name_of(path)
            try:
                found = read(name, path, **fine)
            except InputError as error:
                assert path in str(error)
                continue
            assert all(isinstance(item, Document | BrokenItem | FilteredItem) for item in found)
            assert all(path in item.place for item in found if not isinstance(item, Document))
