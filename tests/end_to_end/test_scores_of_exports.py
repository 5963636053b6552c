"""StoryWorld in every format that an evaluation reads: perfect answers score all, spoilt ones what is known.

From the command line: exported, answered by a file of predictions, scored. Two of eight documents (or so) are
spoilt, whose answers are nothing.
"""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_interleaved.cli.main import run
from mm_interleaved.documents.document import Image, Text
from mm_interleaved.evaluation.metrics.captions import tokenized
from mm_interleaved.evaluation.registry import make_task
from mm_interleaved.evaluation.task import TaskOptions
from mm_interleaved.evaluation.tasks import generated_images
from mm_interleaved.storyworld.exports import write_storyworld
from mm_interleaved.storyworld.tasks import document

COUNT, NUM_SPOILT = 8, 2
needs_java = pytest.mark.skipif(
    shutil.which("java") is None or not importlib.util.find_spec("pycocoevalcap"),
    reason="caption metrics are Java programs",
)


class PixelEmbedder:
    """A CLIP that knows images by their pixels: black ones are like no other."""

    def __init__(self, name):
        self.name = name

    def images(self, images):
        found = np.stack([np.asarray(image.resize((8, 8)), np.float64).reshape(-1) for image in images])
        found = np.concatenate([(found.sum(1, keepdims=True) == 0), found], axis=1)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def texts(self, texts):
        return np.full((len(texts), 193), 193**-0.5)


@pytest.fixture(autouse=True)
def _features_of_this_world(monkeypatch):
    monkeypatch.setattr(generated_images, "ClipEmbedder", PixelEmbedder)


def spoilt(part):
    """A part of an answer that is worth nothing, of the same kind."""
    return Text("nothing") if isinstance(part, Text) else Image(PILImage.new("RGB", (64, 64)))


def write_answers(path, gold, places):
    """Gold answers as a file of predictions, those at some places spoilt."""
    lines, number = [], 0
    path.mkdir()
    for place, one in enumerate(gold):
        is_spoilt = place in places
        content = []
        for part in map(spoilt, one.target) if is_spoilt else one.target:
            if isinstance(part, Text):
                content.append({"type": "text", "text": part.text})
                continue
            name, number = f"{number}.png", number + 1
            part.load().convert("RGB").save(path / name)
            content.append({"type": "image", "image": name})
        line = {"id": one.id, "content": content}
        if "candidates" in one.meta:
            right = one.meta["gold_index"]
            others = [index for index in range(len(one.meta["candidates"])) if index != right]
            line["meta"] = {"ranking": [*others, right] if is_spoilt else [right, *others]}
        lines.append(json.dumps(line) + "\n")
    (path / "predictions.jsonl").write_text("".join(lines))
    return path / "predictions.jsonl"


def scored(tmp_path, task, data, places, *flags):
    """scores.json of the command, and the gold documents."""
    options = TaskOptions(clip="pixels" if flags else None)
    gold = make_task(task, options).read_gold(data)
    answers = write_answers(tmp_path / f"answers-{len(places)}", gold, places)
    out = tmp_path / f"out-{len(places)}"
    command = ["evaluate", task, "--data", data, "--predictions", answers, "-o", out, *flags]
    assert run([str(word) for word in command]) == 0
    return json.loads((out / "scores.json").read_text()), gold


@pytest.fixture
def exported(tmp_path):
    def export(form):
        write_storyworld(tmp_path / form, COUNT, 3, "test", form)
        return tmp_path / form

    return export


SHARE = 1 - NUM_SPOILT / COUNT


@pytest.mark.parametrize(
    ("form", "task", "metric", "flags"),
    [
        ("vqav2", "vqav2", "vqav2.accuracy", ()),
        ("refcoco", "refcoco", "refcoco.accuracy", ()),
        ("ade20k", "ade20k", "ade20k.image_similarity", ("--clip", "pixels")),
        ("visdial", "visdial", "visdial.recall_at_1", ()),
    ],
)
def test_a_score_is_the_share_that_is_not_spoilt(tmp_path, exported, form, task, metric, flags):
    data = exported(form)
    perfect, gold = scored(tmp_path, task, data, (), *flags)
    assert len(gold) == COUNT and perfect[metric] == pytest.approx(1)
    assert scored(tmp_path, task, data, range(NUM_SPOILT), *flags)[0][metric] == pytest.approx(SHARE)


def test_the_other_scores_of_dialogues(tmp_path, exported):
    data = exported("visdial")
    perfect, gold = scored(tmp_path, "visdial", data, ())
    assert perfect["visdial.mrr"] == perfect["visdial.mean_rank"] == 1
    lasts = [len(one.meta["candidates"]) for one in gold[:NUM_SPOILT]]
    found, _ = scored(tmp_path, "visdial", data, range(NUM_SPOILT))
    assert found["visdial.mrr"] == pytest.approx((COUNT - NUM_SPOILT + sum(1 / n for n in lasts)) / COUNT)
    assert found["visdial.mean_rank"] == pytest.approx((COUNT - NUM_SPOILT + sum(lasts)) / COUNT)


def test_stories_count_by_their_images(tmp_path, exported):
    data = exported("vist")
    perfect, gold = scored(tmp_path, "vist", data, (), "--clip", "pixels")
    assert perfect["vist.complete"] == 1 and perfect["vist.image_similarity"] == pytest.approx(1)
    counts = [sum(isinstance(part, Image) for part in one.target) for one in gold]
    found, _ = scored(tmp_path, "vist", data, range(NUM_SPOILT), "--clip", "pixels")
    share = sum(counts[NUM_SPOILT:]) / sum(counts)
    assert found["vist.complete"] == 1 and found["vist.image_similarity"] == pytest.approx(share)


@needs_java
def test_captions(tmp_path, exported):
    data = exported("coco")
    perfect, gold = scored(tmp_path, "coco", data, ())
    assert perfect == pytest.approx({
        **{f"coco.BLEU-{n}": 1 for n in range(1, 5)},
        "coco.METEOR": 1, "coco.ROUGE-L": 1, "coco.CIDEr": 10,
    })  # fmt: skip
    found, _ = scored(tmp_path, "coco", data, range(NUM_SPOILT))
    assert found["coco.CIDEr"] == pytest.approx(10 * SHARE)
    assert found["coco.ROUGE-L"] == pytest.approx(SHARE)
    # One wrong word each: of all words of the answers the others are right, and there are too few.
    words = tokenized({one.id: one.meta["captions"] for one in gold})
    lengths = [len(words[one.id][0].split()) for one in gold]
    right, asked = sum(lengths[NUM_SPOILT:]), sum(lengths)
    said = right + NUM_SPOILT
    assert found["coco.BLEU-1"] == pytest.approx(right / said * np.exp(1 - asked / said), rel=1e-6)


def test_the_worlds_own_documents(tmp_path):
    data = tmp_path / "jsonl"
    write_storyworld(data, 40, 3, "test", "jsonl")
    perfect, gold = scored(tmp_path, "storyworld", data, ())
    assert {"caption.attributes", "vqa.accuracy", "ground.accuracy", "segmentation.miou"} < perfect.keys()
    assert all(value == pytest.approx(1) for value in perfect.values()), perfect
    places = [place for place, one in enumerate(gold) if one.meta["task"] == "vqa"]
    found, _ = scored(tmp_path, "storyworld", data, places[:1])
    assert found["vqa.accuracy"] == pytest.approx(1 - 1 / len(places)) and len(places) > 1
    others = [name for name in perfect if "vqa." not in name]
    assert others and all(found[name] == perfect[name] for name in others)


def opening_of_stories(folder):
    """Stories as OpenING asks for them: the first panel is given, the others are the golden answer."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for index in range(COUNT):
        story = document("test", 3, index, "story")
        entries = []
        for number, part in enumerate((*story.parts, *story.target)):
            if isinstance(part, Text):
                entries.append({"text": part.text, "image": None})
            else:
                name = f"images/{index}_{number}.png"
                part.load().save(folder / name)
                entries[-1]["image"] = name
        talk = [{"input": entries[:1]}, {"output": entries[1:]}]
        lines.append(json.dumps({"total_uid": str(index), "conversations": talk}) + "\n")
    (folder / "opening.jsonl").write_text("".join(lines))
    return folder / "opening.jsonl"


def test_interleaved_answers(tmp_path):
    data = opening_of_stories(tmp_path / "opening")
    perfect, _ = scored(tmp_path, "opening", data, ())
    assert perfect["opening.structure"] == perfect["opening.image_count"] == perfect["opening.answered"] == 1
    answers = tmp_path / "answers-0" / "predictions.jsonl"
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    for line in lines[:NUM_SPOILT]:
        line["content"] = []
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["evaluate", "opening", "--data", data, "--predictions", answers, "-o", tmp_path / "spoilt"]
    assert run([str(word) for word in command]) == 0
    found = json.loads((tmp_path / "spoilt" / "scores.json").read_text())
    for metric in ("structure", "image_count", "answered"):
        assert found[f"opening.{metric}"] == pytest.approx(SHARE)
