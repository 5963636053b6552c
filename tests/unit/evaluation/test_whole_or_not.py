"""What is evaluated is whole: nothing blank is dropped, nothing counts twice, nothing is unpickled."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import InputError
from mm_interleaved.evaluation.registry import make_task
from mm_interleaved.evaluation.task import TaskOptions
from mm_interleaved.evaluation.tasks import drawn_captions
from mm_interleaved.evaluation.tasks.drawn_captions import over_sampled


@pytest.fixture
def data(tmp_path):
    for number in range(3):
        PILImage.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        PILImage.new("RGB", (8, 8), (0, number, 0)).save(tmp_path / f"{number:012}.jpg")
    return tmp_path


def read(task, data, **options):
    return make_task(task, TaskOptions(**options)).read_gold(data)


def put(data, name, value):
    text = value if isinstance(value, str) else json.dumps(value)
    (data / name).write_text(text)
    return data


def coco(captions, image_ids=(0, 1), annotation_ids=None):
    """A table of two images and these captions, pairs of image and text."""
    images = [{"id": number, "file_name": f"{place}.png"} for place, number in enumerate(image_ids)]
    ids = annotation_ids or range(len(captions))
    annotations = [
        {"id": number, "image_id": image, "caption": text}
        for number, (image, text) in zip(ids, captions, strict=True)
    ]
    return {"images": images, "annotations": annotations}


def test_a_blank_caption_among_others_costs_no_image(data):
    """The official evaluator counts the image, whatever one of its captions is."""
    gold = read("coco", put(data, "captions.json", coco([(0, " "), (0, "a fox"), (1, "a dog")])))
    assert [document.meta["captions"] for document in gold] == [["", "a fox"], ["a dog"]]
    assert gold[0].target[0].text == "a fox"


@pytest.mark.parametrize("captions", [[(0, " "), (1, "a dog")], [(1, "a dog")]])
def test_an_image_without_any_caption_is_named(data, captions):
    put(data, "captions.json", coco(captions))
    with pytest.raises(InputError, match=r"captions\.json: .*(images\[0\]|no caption)"):
        read("coco", data)


@pytest.mark.parametrize(
    ("table", "place"),
    [
        (coco([(0, "a fox"), (1, "a dog")], annotation_ids=[4, 4]), r"annotations\[1\]\.id: '4'"),
        (coco([(0, "a fox"), (1, "a dog")], image_ids=(0, 0)), r"images\[1\]\.id: '0'"),
    ],
)
def test_what_would_count_twice_in_a_table_of_captions_is_named(data, table, place):
    with pytest.raises(InputError, match=rf"captions\.json: {place} occurs twice, first at .*\[0\]"):
        read("coco", put(data, "captions.json", table))


def questions(data, *answers, ids=(0, 1)):
    asked = [{"question_id": n, "image_id": n, "image": "0.png", "question": "who?"} for n in ids]
    annotations = [
        {"question_id": n, "image_id": n, "answers": [{"answer": text} for text in given]}
        for n, given in enumerate(answers)
    ]
    put(data, "questions.json", {"questions": asked})
    return put(data, "annotations.json", {"annotations": annotations})


def test_blank_answers_of_people_count_and_a_question_with_no_other_is_named(data):
    gold = read("vqav2", questions(data, ["", "", "a fox"], ["a dog"] * 3))
    assert gold[0].target[0].text == "a fox" and gold[0].meta["answers"] == ["", "", "a fox"]
    with pytest.raises(InputError, match=r"questions\[1\]: cannot be evaluated \(empty target\)"):
        read("vqav2", questions(data, ["a fox"], ["", " "]))


def test_doubled_questions_are_named(data):
    with pytest.raises(InputError, match=r"question_id '?1'? occurs twice"):
        read("vqav2", questions(data, ["a"], ["b"], ids=(1, 1)))
    line = json.dumps({"question_id": 1, "image": "0.png", "text": "Is it?", "label": "yes"}) + "\n"
    with pytest.raises(InputError, match=r"coco_pope_random\.json: id 'pope:1' occurs twice"):
        read("pope", put(data, "coco_pope_random.json", line * 2))
    record = {
        "question_id": "7", "data_id": "0.png", "question": "Who?", "answer": "C",
        **{f"choice_{letter}": letter for letter in "abcd"},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"SEED-Bench\.json: id 'seed:7' occurs twice"):
        read("seed-bench", put(data, "SEED-Bench.json", {"questions": [record] * 2}))


def test_a_blank_answer_of_gqa_is_named(data):
    table = {"1": {"imageId": "0.png", "question": "Who?", "answer": " "}}
    with pytest.raises(InputError, match=r"answer: found .*expected an answer to score against"):
        read("gqa", put(data, "testdev_balanced_questions.json", table))


def test_a_doubled_line_of_boxes_is_named_and_may_be_kept(data):
    line = {"image": "0.png", "sent": "the fox", "bbox": [0, 0, 4, 4], "width": 8, "height": 8}
    other = {**line, "sent": "left"}
    lines = "".join(json.dumps(one) + "\n" for one in (line, other, line))
    put(data, "refcoco_val.jsonl", lines)
    with pytest.raises(InputError, match=r"refcoco_val\.jsonl:3: says the same as line 1") as refused:
        read("refcoco", data)
    assert refused.value.exit_code == 3
    assert len(read("refcoco", data, source={"keep_doubled": True})) == 3


def test_captions_to_be_drawn_are_in_lower_case_and_the_first_ones(data, monkeypatch):
    put(data, "captions_val2014.json", coco([(0, "A Fox."), (0, "Another"), (1, "A Dog.")]))
    monkeypatch.setattr(drawn_captions, "NUM_DRAWN", 1)
    task = make_task("coco-images", TaskOptions(clip="x"))
    [document] = task.read_gold(data)
    assert document.parts == (Text("a fox."),) and document.layout == "I"
    assert any("lower case" in note for note in task.notes)


def narratives(data):
    records = [(0, "In this image."), (1, "There IS a dog."), (1, "A dog.")]
    lines = (json.dumps({"image_id": image, "caption": text}) + "\n" for image, text in records)
    return put(data, "coco_val_captions.jsonl", "".join(lines))


def test_localised_narratives_are_read_and_drawn_again_as_released(data, monkeypatch):
    gold = read("lncoco-images", narratives(data), clip="x")
    assert [document.text for document in gold] == ["In this image.", "There IS a dog.", "A dog."]
    assert [document.target[0].load().getpixel((0, 0))[1] for document in gold] == [0, 1, 1]
    monkeypatch.setattr(drawn_captions, "NUM_DRAWN", 10)
    drawn = read("lncoco-images", data, clip="x", compat="released")
    assert drawn[:3] == gold and len({document.id for document in drawn}) == 10
    assert drawn == over_sampled(gold, 10) and {one.text for one in drawn[3:]} <= {one.text for one in gold}
    assert any("drawn once more" in note for note in make_task(
        "lncoco-images", TaskOptions(clip="x", compat="released")).notes)  # fmt: skip


@pytest.mark.parametrize("record", [{"image_id": "x", "caption": "a"}, {"image_id": 7, "caption": "a"},
                                    {"image_id": 0, "caption": " "}, {"caption": "a"}])  # fmt: skip
def test_broken_narratives_are_named(data, record):
    put(data, "coco_val_captions.jsonl", json.dumps(record) + "\n")
    with pytest.raises(InputError, match=r"coco_val_captions\.jsonl:1: (image_id|caption): "):
        read("lncoco-images", data, clip="x")


ODD = {
    "empty": "", "blank": " \n\t", "unicode": "\U0001f98a \u0627\u0644\u062b \u72d0\u72f8 e\u0301",
    "very long": "fox " * 20_000, "one long word": "x" * 100_000, "markup": "<image></s><box>(0,0)",
    "control": "a\u0000b\u202e\ufffd",
}  # fmt: skip


@pytest.mark.parametrize("said", ODD)
def test_odd_answers_are_scored_as_wrong_and_break_nothing(data, said):
    """Empty, in any script, and very long ones, in each task that scores words."""
    text = ODD[said]
    line = {"image": "0.png", "sent": "the fox", "bbox": [0, 0, 4, 4], "width": 8, "height": 8}
    put(data, "refcoco_val.jsonl", json.dumps(line) + "\n")
    # Its evaluator takes whatever denies nothing for yes; no answer is wrong in any case.
    pope = {"question_id": 1, "image": "0.png", "text": "Is it?", "label": "no"}
    pope["label"] = "no" if text.strip() else "yes"
    put(data, "coco_pope_random.json", json.dumps(pope) + "\n")
    gqa = {"1": {"imageId": "0.png", "question": "Who?", "answer": "a fox"}}
    put(data, "testdev_balanced_questions.json", gqa)
    questions(data, ["a fox"] * 10, ["a dog"] * 10)
    for name in ("refcoco", "pope", "gqa", "vqav2"):
        for compat in (None, "released"):
            task = make_task(name, TaskOptions(compat=compat))
            gold = task.read_gold(data)
            answers = [Document(id=one.id, parts=(Text(text, generated=True),)) for one in gold]
            assert task.score(answers, gold)[f"{name}.accuracy"] == 0


def test_the_right_answer_in_another_script_is_right(data):
    gold = read("vqav2", questions(data, ["\u72d0\u72f8"] * 10, ["Fu\u00dfg\u00e4nger"] * 10))
    task = make_task("vqav2")
    answers = [Document(id=one.id, parts=(Text(one.target[0].text, generated=True),)) for one in gold]
    assert task.score(answers, gold) == {"vqav2.accuracy": 1.0}


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pororosv.jsonl", "captions.json", "refcoco_val.jsonl", "vist.json"])
def test_pickled_annotations_are_not_executed(data, tmp_path, name):
    """Published pickles are converted once (`data convert`); an evaluation opens none."""
    canary, task = tmp_path / "canary", {"captions.json": "coco", "vist.json": "vist"}.get(name)
    task = task or name.partition(".")[0].removesuffix("_val")
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Canary(canary))),
        lambda path: np.save(path.open("wb"), np.array([Canary(canary)], dtype=object), allow_pickle=True),
    ):
        path = data / name
        write(path)
        with pytest.raises(InputError) as refused:
            read(task, path, clip="x")
        assert name in str(refused.value) and "\n" not in str(refused.value) and not canary.exists()
