"""The paper's tasks on StoryWorld's exports: perfect and spoilt answers, and what is refused."""

import json
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, UsageError
from mm_interleaved.evaluation.task import TaskOptions
from mm_interleaved.evaluation.tasks import captioning as captioning_module
from mm_interleaved.evaluation.tasks.captioning import captioning
from mm_interleaved.evaluation.tasks.choices import pope, seed_bench
from mm_interleaved.evaluation.tasks.dialogue import visual_dialogue
from mm_interleaved.evaluation.tasks.generated_images import maps_to_images, stories
from mm_interleaved.evaluation.tasks.grounding import grounding
from mm_interleaved.evaluation.tasks.questions import questions
from mm_interleaved.files import make_folder
from mm_interleaved.storyworld.exports import write_storyworld

COUNT = 8


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    for form in ("coco", "vqav2", "visdial", "refcoco", "ade20k", "vist"):
        write_storyworld(folder / form, COUNT, 3, "test", form)
    return folder


def perfect(gold):
    """The gold answers, as a model would give them."""
    return [
        Document(
            id=document.id,
            parts=tuple(replace(part, generated=True) for part in document.target),
            meta={"ranking": ranking_of(document)} if "candidates" in document.meta else {},
        )
        for document in gold
    ]


def ranking_of(document):
    right = document.meta["gold_index"]
    return [right, *(index for index in range(len(document.meta["candidates"])) if index != right)]


def spoilt(gold, text):
    """Every second answer replaced by this text."""
    answers = perfect(gold)
    wrong = (Text(text, generated=True),)
    return [replace(answer, parts=wrong, meta={}) if i % 2 else answer for i, answer in enumerate(answers)]


def test_questions(exports):
    task = questions("vqav2", TaskOptions())
    gold = task.read_gold(exports / "vqav2")
    assert len(gold) == COUNT and task.settings["num_beams"] == 3
    assert gold[0].parts[0].text == "Based on the image, please answer the question."
    assert task.score(perfect(gold), gold) == {"vqav2.accuracy": 1.0}
    assert task.score(spoilt(gold, "nothing of the kind"), gold) == {"vqav2.accuracy": 0.5}
    assert task.score([], gold) == {"vqav2.accuracy": 0.0}


def test_the_released_way_of_cutting_answers_is_noted(exports):
    task = questions("vqav2", TaskOptions(compat="released"))
    assert task.notes and not questions("vqav2", TaskOptions()).notes
    gold = task.read_gold(exports / "vqav2")
    answers = [replace(a, parts=(Text(f"it is {a.parts[0].text}", generated=True),)) for a in perfect(gold)]
    assert task.score(answers, gold)["vqav2.accuracy"] == 1.0
    assert questions("vqav2", TaskOptions()).score(answers, gold)["vqav2.accuracy"] == 0.0


def test_boxes(exports):
    task = grounding("refcoco", TaskOptions())
    gold = task.read_gold(exports / "refcoco")
    assert task.score(perfect(gold), gold) == {"refcoco.accuracy": 1.0}
    assert task.score(spoilt(gold, "(000,000)(001,001)"), gold) == {"refcoco.accuracy": 0.5}
    assert task.score(spoilt(gold, "no box"), gold) == {"refcoco.accuracy": 0.5}
    released = grounding("refcoco", TaskOptions(compat="released"))
    assert released.score(perfect(gold), gold) == {"refcoco.accuracy": 1.0} and released.notes


def test_dialogues(exports):
    task = visual_dialogue(TaskOptions())
    gold = task.read_gold(exports / "visdial")
    scores = task.score(perfect(gold), gold)
    assert scores["visdial.mrr"] == scores["visdial.recall_at_1"] == scores["visdial.mean_rank"] == 1.0
    assert "visdial.ndcg" not in scores
    last = max(len(document.meta["candidates"]) for document in gold)
    unranked = [replace(one, meta={"ranking": []}) if i % 2 else one for i, one in enumerate(perfect(gold))]
    assert task.score(unranked, gold)["visdial.mrr"] == pytest.approx((1 + 1 / last) / 2)
    # An answer without a ranking would count as the worst of all.
    with pytest.raises(InputError, match=rf"answer to '{gold[1].id}' has no meta\.ranking \(4 without\)"):
        task.score(spoilt(gold, "a fox"), gold)


def test_dense_annotations_give_the_gain(exports, tmp_path):
    table = json.loads((exports / "visdial" / "visdial.json").read_text())
    dialogs = table["data"]["dialogs"]
    dense = [
        {
            "image_id": dialog["image_id"],
            "round_id": len(dialog["dialog"]),
            "gt_relevance": [float(i == dialog["dialog"][-1]["gt_index"]) for i in range(
                len(dialog["dialog"][-1]["answer_options"]))],
        }
        for dialog in dialogs
    ]  # fmt: skip
    (tmp_path / "visdial_1.0_val.json").write_text(json.dumps(table))
    (tmp_path / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(dense))
    task = visual_dialogue(TaskOptions(source={"images": str(exports / "visdial")}))
    gold = task.read_gold(tmp_path)
    assert task.score(perfect(gold), gold)["visdial.ndcg"] == 1.0
    assert task.score([], gold)["visdial.ndcg"] == 0.0
    rounds = [len(document.parts) for document in gold]
    released = visual_dialogue(TaskOptions(compat="released", source={"images": str(exports / "visdial")}))
    texts = [document.parts[1].text.count("question:") for document in released.read_gold(tmp_path)]
    full = [document.parts[1].text.count("question:") for document in gold]
    assert rounds and [one + 1 for one in texts] == full
    assert not released.ranking.counts_end and task.ranking.counts_end and len(released.notes) == 3
    stranger = dense[0] | {"image_id": 999}
    for added, found in ((dense[0], "occurs twice"), (stranger, "no dialogue about the image 999")):
        (tmp_path / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps([*dense, added]))
        with pytest.raises(InputError, match=rf"dense_annotations\.json: \[8\]\.image_id: .*{found}"):
            task.read_gold(tmp_path)
    dense[0]["gt_relevance"] = [0.0] * len(dense[0]["gt_relevance"])
    (tmp_path / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(dense))
    with pytest.raises(InputError, match=r"gt_relevance: found 10 numbers, 0 above 0, expected one for"):
        task.read_gold(tmp_path)


def test_every_round_of_a_dialogue_is_asked_and_the_gain_is_of_the_annotated_one(exports, tmp_path):
    """Two dialogues of three rounds, three candidates each; the second round of the first is annotated."""
    image = next((exports / "visdial" / "images").glob("*.png")).name
    turn = {"question": 0, "answer": 1, "answer_options": [0, 1, 2], "gt_index": 1}
    dialogs = [{"image_id": n, "image": image, "caption": "a fox", "dialog": [turn] * 3} for n in (5, 6)]
    data = {"dialogs": dialogs, "questions": ["who is it"], "answers": ["nobody", "a fox", "a cat"]}
    (tmp_path / "visdial_1.0_val.json").write_text(json.dumps({"data": data}))
    dense = [{"image_id": 5, "round_id": 2, "gt_relevance": [0.0, 1.0, 0.5]}]
    (tmp_path / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(dense))
    source = {"images": str(exports / "visdial" / "images")}
    task = visual_dialogue(TaskOptions(source=source))
    gold = task.read_gold(tmp_path)
    assert [document.id.split(":", 1)[1] for document in gold] == ["0:1", "0:2", "0:3", "1:1", "1:2", "1:3"]
    assert ["relevance" in document.meta for document in gold] == [False, True, False, False, False, False]
    assert gold[1].parts[1].text == (
        "caption: a fox. question: who is it? answer: a fox. question: who is it? answer:"
    )
    rankings = [[1, 0, 2], [2, 1, 0], [0, 2, 1], [1, 2, 0], [1, 0, 2], [1, 0, 2]]
    answers = [Document(id=d.id, parts=(Text("x", generated=True),), meta={"ranking": ranking})
               for d, ranking in zip(gold, rankings, strict=True)]  # fmt: skip
    scores = task.score(answers, gold)
    assert scores["visdial.mrr"] == pytest.approx((4 + 1 / 2 + 1 / 3) / 6)
    assert scores["visdial.mean_rank"] == pytest.approx((4 + 2 + 3) / 6)
    best, found = 1 + 0.5 / np.log2(3), 0.5 + 1 / np.log2(3)
    assert scores["visdial.ndcg"] == pytest.approx(found / best)
    released = visual_dialogue(TaskOptions(compat="released", source=source)).read_gold(tmp_path)
    assert len(released) == 2 and released[0].meta["relevance"] == [0.0, 1.0, 0.5]


def test_captions_and_the_full_stop(exports, monkeypatch):
    """What reaches the scorer; its scores are compared with the package's in tests/equivalence."""
    seen = {}

    def scores(captions, references, metrics):
        seen.update(captions=captions, references=references)
        return {"CIDEr": 1.0}

    monkeypatch.setattr(captioning_module, "caption_scores", scores)
    task = captioning("coco", TaskOptions())
    gold = task.read_gold(exports / "coco")
    assert task.score(perfect(gold), gold) == {"coco.CIDEr": 1.0}
    assert all(seen["captions"][key] in texts for key, texts in seen["references"].items())
    answers = [Document(id=d.id, parts=(Text("One. Two.", generated=True),)) for d in gold[1:]]
    captioning("coco", TaskOptions(compat="released")).score(answers, gold)
    assert set(seen["captions"].values()) == {"", "One"}


def test_images_need_an_extractor(exports):
    for make in (maps_to_images, lambda options: stories("vist", options)):
        with pytest.raises(UsageError, match="expected --inception"):
            make(TaskOptions())


@pytest.mark.parametrize("form", ["ade20k", "vist"])
def test_images_that_are_missing_are_counted(exports, form):
    options = TaskOptions(clip="nowhere")
    task = maps_to_images(options) if form == "ade20k" else stories("vist", options)
    gold = task.read_gold(exports / form)
    assert all(isinstance(document.target[-1], Image) for document in gold)
    assert task.score([], gold) == {f"{form}.complete": 0.0}


def test_yes_or_no(tmp_path, exports):
    image = next((exports / "coco" / "images").glob("*.png"))
    lines = [
        {"question_id": number, "image": image.name, "text": "Is there a dog?", "label": label}
        for number, label in enumerate(["yes", "no", "yes", "no"])
    ]
    (tmp_path / "coco_pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = TaskOptions(source={"images": str(image.parent)})
    gold = pope(options).read_gold(tmp_path)
    assert pope(options).score(perfect(gold), gold)["pope.f1"] == 1.0
    always = [Document(id=document.id, parts=(Text("Yes.", generated=True),)) for document in gold]
    assert pope(options).score(always, gold) == pytest.approx(
        {
            "pope.accuracy": 0.5,
            "pope.precision": 0.5,
            "pope.recall": 1.0,
            "pope.f1": 2 / 3,
            "pope.yes_ratio": 1.0,
        }
    )
    # Who says nothing does not deny, but has not said yes.
    silent = pope(options).score([], gold)
    assert silent["pope.accuracy"] == silent["pope.yes_ratio"] == silent["pope.f1"] == 0.0
    for damage, found in (
        ({"question_id": 0}, r"coco_pope_random\.json: id 'pope:0' occurs twice"),
        ({"question_id": [1]}, r":3: question_id: found a list, expected a number or a string"),
    ):
        damaged = [*lines[:2], lines[2] | damage]
        (tmp_path / "coco_pope_random.json").write_text("".join(json.dumps(one) + "\n" for one in damaged))
        with pytest.raises(InputError, match=found):
            pope(options).read_gold(tmp_path)
    (tmp_path / "coco_pope_random.json").write_text("")
    with pytest.raises(InputError, match="found nothing to evaluate"):
        pope(options).read_gold(tmp_path)
    lines[2]["label"] = "perhaps"
    (tmp_path / "coco_pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r":3: label: found the string 'perhaps', expected yes or no"):
        pope(options).read_gold(tmp_path)


def test_four_options(tmp_path, exports):
    image = next((exports / "coco" / "images").glob("*.png"))
    record = {
        "question_id": "7", "question_type_id": 1, "data_id": image.name, "question": "Who is it?",
        "choice_a": "a dog", "choice_b": "a cat", "choice_c": "a duck", "choice_d": "a fox", "answer": "C",
    }  # fmt: skip
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"questions": [record]}))
    options = TaskOptions(source={"images": str(image.parent)})
    gold = seed_bench(options).read_gold(tmp_path)
    assert gold[0].target == (Text("a duck"),)
    assert seed_bench(options).score(perfect(gold), gold) == {
        "seed-bench.accuracy": 1.0, "seed-bench.accuracy.type_1": 1.0,
    }  # fmt: skip
    assert seed_bench(options).score([], gold)["seed-bench.accuracy"] == 0.0
    for text, accuracy in (
        ("C", 1.0),
        ("(c) a duck", 1.0),
        ("A duck.", 1.0),
        ("A", 0.0),
        ("Carl", 0.0),
        ("E", 0.0),
    ):
        said = [Document(id=gold[0].id, parts=(Text(text, generated=True),))]
        assert seed_bench(options).score(said, gold)["seed-bench.accuracy"] == accuracy
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"questions": [record, record]}))
    with pytest.raises(InputError, match="id 'seed:7' occurs twice"):
        seed_bench(options).read_gold(tmp_path)


def test_what_is_missing_or_broken_is_named(exports, tmp_path):
    with pytest.raises(InputError, match=r"found none of coco_karpathy_test\.json"):
        captioning("coco", TaskOptions()).read_gold(tmp_path)
    with pytest.raises(InputError, match="there is no such file"):
        captioning("coco", TaskOptions()).read_gold(tmp_path / "nowhere")
    table = json.loads((exports / "vqav2" / "questions.json").read_text())
    table["questions"][2]["question"] = "  "
    (tmp_path / "questions.json").write_text(json.dumps(table))
    shared = {"images": str(exports / "vqav2")}
    (tmp_path / "annotations.json").write_text((exports / "vqav2" / "annotations.json").read_text())
    with pytest.raises(InputError, match=r"questions\[2\].*expected a question"):
        questions("vqav2", TaskOptions(source=shared)).read_gold(tmp_path)
    table["questions"][2]["question"] = table["questions"][3]["question"]
    (tmp_path / "questions.json").write_text(json.dumps(table))
    annotations = json.loads((tmp_path / "annotations.json").read_text())
    for annotation in annotations["annotations"]:
        annotation.pop("answers"), annotation.pop("multiple_choice_answer", None)
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    with pytest.raises(InputError, match=r"needs answers.*8 without"):
        questions("vqav2", TaskOptions(source=shared)).read_gold(tmp_path)


def test_captions_that_cannot_be_compared_and_questions_asked_twice_are_named(exports, tmp_path):
    shared = TaskOptions(source={"images": str(exports / "coco")})
    table = json.loads((exports / "coco" / "annotations" / "captions.json").read_text())

    def read(images, annotations):
        (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        return captioning("coco", shared).read_gold(tmp_path)

    images, captions = table["images"], table["annotations"]
    with pytest.raises(InputError, match=r"found no caption of 'captions:0' \(1 without\)"):
        read(images, captions[1:])
    with pytest.raises(InputError, match=r"the image '.*' occurs twice"):
        read([*images, images[0] | {"id": 99}], [*captions, captions[0] | {"id": 99, "image_id": 99}])
    with pytest.raises(InputError, match=r"cannot be evaluated \(empty target\)"):
        read(images, [captions[0] | {"caption": " "}, *captions[1:]])
    # One blank caption among others takes nothing from the image.
    gold = read(images, [captions[0] | {"id": 99, "caption": " "}, *captions])
    assert len(gold) == COUNT and gold[0].target[0].text == captions[0]["caption"]

    asked = json.loads((exports / "vqav2" / "questions.json").read_text())
    asked["questions"].append(asked["questions"][0])
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    (tmp_path / "annotations.json").write_text((exports / "vqav2" / "annotations.json").read_text())
    options = TaskOptions(source={"images": str(exports / "vqav2")})
    with pytest.raises(InputError, match="question_id '0' occurs twice"):
        questions("vqav2", options).read_gold(tmp_path)
    asked["questions"] = asked["questions"][1:-1]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    with pytest.raises(InputError, match=r"annotations\.json: found 8 annotations, expected 7, one of each"):
        questions("vqav2", options).read_gold(tmp_path)


def test_spice_counts_where_its_models_are_and_nothing_is_fetched(monkeypatch, tmp_path):
    """pycocoevalcap fetches the models by itself when asked; we look first."""
    from mm_interleaved.evaluation.metrics import captions

    package = Path(find_spec("pycocoevalcap.spice.spice").origin).parent
    known = (package / "get_stanford_models.py").read_text()
    assert "stanford-corenlp-3.6.0" in known and "SPICELIB = 'lib'" in known
    make_folder(tmp_path / "spice" / "lib")
    spec = ModuleSpec("pycocoevalcap", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert not captions.spice_is_here()
    assert any("SPICE is not counted" in note for note in captioning("nocaps", TaskOptions()).notes)
    with pytest.raises(UsageError, match="SPICE: pycocoevalcap has not got its models"):
        captions.caption_scores({"a": "a fox"}, {"a": ["a fox"]}, ("SPICE",))
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / "spice" / "lib" / name).touch()
    assert captions.spice_is_here() and not captioning("nocaps", TaskOptions()).notes
