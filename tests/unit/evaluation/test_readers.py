"""Who looks at images of interleaved answers: in the run, kept with the answer; scores are pure."""

import json

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, TooLongError
from mm_interleaved.evaluation.interleaved.registry import BENCHMARKS
from mm_interleaved.evaluation.judge_free import Reading, judge_free_scores, pairs_of, reading_of
from mm_interleaved.evaluation.metrics.interleaved import phrase_overlap, word_recall
from mm_interleaved.evaluation.readers import ClipReader, Readers, answers_read, read_answer, readers_of
from mm_interleaved.evaluation.registry import make_task
from mm_interleaved.evaluation.runner import evaluate_model, evaluate_predictions
from mm_interleaved.evaluation.task import TaskOptions
from mm_interleaved.files import make_folder
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.events import Finished
from mm_interleaved.runs.engine import ModelChoice
from mm_interleaved.runs.generate import RunRequest
from tiny import tiny_config, tiny_model, tiny_processor

RED, BLUE = (PILImage.new("RGB", (16, 16), colour) for colour in ("red", "blue"))


class ColourReader:
    """Says which of two colours an image has."""

    def captions(self, images):
        return ["a red box" if image.load().getpixel((0, 0))[0] > 128 else "a blue box" for image in images]

    def agreements(self, texts, images, captions):
        return [float(caption.split()[1] in text) for text, caption in zip(texts, captions, strict=True)]

    def likeness(self, images, captions):
        return float(len(set(captions)) == 1)


QUESTION = Document(id="q", parts=(Text("Draw a red box."), Image(RED)), layout="I T I")
ANSWER = Document(
    id="q",
    parts=(
        Image(RED, generated=True), Text("a red box", generated=True), Image(BLUE, generated=True),
    ),
)  # fmt: skip


def test_what_a_reader_finds_becomes_scores():
    reading = read_answer(QUESTION, ANSWER, ColourReader())
    assert reading == Reading(captions=["a red box", "a blue box"], agreements=[1.0, 0.0], likeness=0.0)
    scores = judge_free_scores(QUESTION, ANSWER, reading)
    assert scores["text_image_agreement"] == 0.5 and scores["image_consistency"] == 0.0
    # "Draw a red box." and "a red box" share three of seven words, the second pair two of six.
    assert scores["caption_round_trip"] == pytest.approx((6 / 7 + 4 / 6) / 2)
    without = judge_free_scores(QUESTION, ANSWER)
    assert scores.keys() - without.keys() == {
        "text_image_agreement", "caption_round_trip", "image_consistency",
    }  # fmt: skip


def test_an_image_before_any_text_has_no_pair():
    asked = Document(id="q", parts=(Image(RED),))
    assert [pair.text for pair in pairs_of(asked, ANSWER)] == ["a red box"]
    scores = judge_free_scores(asked, ANSWER, read_answer(asked, ANSWER, ColourReader()))
    assert scores["text_image_agreement"] == 0.0
    texts = Document(id="q", parts=(Text("nothing drawn", generated=True),))
    assert read_answer(asked, texts, ColourReader()) == Reading(captions=[], agreements=[], likeness=None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("captions", ["one"], r"meta\.reading\.captions: found .*, expected 2 strings"),
        ("captions", [1, 2], r"meta\.reading\.captions"),
        ("agreements", [0.5, True], r"meta\.reading\.agreements: found .*, expected 2 numbers"),
        ("agreements", [0.5, float("nan")], r"meta\.reading\.agreements"),
        ("likeness", "much", r"meta\.reading\.likeness: found 'much', expected a number or null"),
        ("more", 1, r"meta\.reading: found .*, expected captions, agreements and likeness"),
    ],
)
def test_a_reading_that_does_not_fit_its_answer_is_named(field, value, message):
    record = read_answer(QUESTION, ANSWER, ColourReader()).record()
    kept = Document(id="q", parts=ANSWER.parts, meta={"reading": record})
    assert reading_of(QUESTION, kept) is not None and reading_of(QUESTION, ANSWER) is None
    changed = Document(id="q", parts=ANSWER.parts, meta={"reading": {**record, field: value}})
    with pytest.raises(InputError, match=f"document 'q': {message}"):
        reading_of(QUESTION, changed)


def answered(document):
    yield 0, Finished("layout", document)


def test_an_answer_without_parts_is_not_read_and_one_that_cannot_be_counts_as_wrong(caplog):
    class Full(ColourReader):
        def captions(self, images):
            raise TooLongError("9000 tokens, expected at most 2048")

    def read(document, reader):
        readers = Readers(name="colours", make=lambda generator: reader)
        answer = answers_read(lambda *arguments: answered(document), readers, [QUESTION])
        [(_, event)] = answer(None, [QUESTION], [], 1)
        return event.document.meta

    assert "reading" not in read(QUESTION, ColourReader())
    whole = QUESTION.extended(*ANSWER.parts)
    assert read(whole, ColourReader())["reading"]["agreements"] == [1.0, 0.0]
    assert read(whole, Full())["reading"] == {
        "captions": ["", ""], "agreements": [0.0, 0.0], "likeness": None,
    }  # fmt: skip
    assert "'q'" in caplog.text and "9000 tokens" in caplog.text


def test_a_clip_weighs_by_cosines_and_the_model_writes_captions():
    class Embedder:
        def texts(self, texts):
            return np.array([[1.0, 0.0]] * len(texts))

        def images(self, images):
            return np.array([[1.0, 0.0], [0.6, 0.8]][: len(images)])

    reader = ClipReader(Embedder(), ColourReader())
    images = [Image(RED), Image(BLUE)]
    assert reader.captions(images) == ["a red box", "a blue box"]
    assert reader.agreements(["x", "y"], images, []) == pytest.approx([1.0, 0.6])
    assert reader.likeness(images, []) == pytest.approx(0.6)
    assert readers_of("folder").name == "clip folder"


def test_a_run_keeps_what_was_read_and_scores_are_the_same_from_its_file(tmp_path):
    """The tiny model reads its own images; a rerun asks nobody, and scoring the file gives the same."""
    data = tmp_path / "data"
    make_folder(data)
    RED.save(data / "in.png")
    talk = [
        {"input": [{"text": "Draw a fox.", "image": "in.png"}]},
        {"output": [{"text": "x", "image": None}]},
    ]
    lines = [json.dumps({"total_uid": str(n), "conversations": talk}) + "\n" for n in range(2)]
    (data / "opening.jsonl").write_text("".join(lines))
    model = tmp_path / "model"
    make_folder(model)
    (model / "config.json").write_text(tiny_config().to_json_string(use_diff=False))
    loaded = []

    def load(folder, **settings):
        loaded.append(folder)
        return InterleavedGenerator(tiny_model(), tiny_processor())

    request = RunRequest(
        documents=(), output=tmp_path / "out", model=ModelChoice(name=str(model), device="cpu"),
        flags={"layout": "T I I", "num_inference_steps": 1, "max_new_tokens": 3},
    )  # fmt: skip
    task = make_task("opening", TaskOptions())
    assert BENCHMARKS["opening"].read(data / "opening.jsonl")
    evaluate = [task, data / "opening.jsonl", request, lambda document, event: None]
    scores, failed = evaluate_model(*evaluate, load=load)
    assert failed == 0 and len(loaded) == 1
    assert {"opening.caption_round_trip", "opening.text_image_agreement"} < scores.keys()
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["meta"]["reading"]["captions"]) == 2 for line in lines)
    assert evaluate_model(*evaluate, load=load)[0] == scores and len(loaded) == 1
    file = tmp_path / "out" / "predictions.jsonl"
    assert evaluate_predictions(task, data / "opening.jsonl", file, tmp_path / "again") == scores
    manifest = json.loads((tmp_path / "out" / "run" / "manifest.json").read_text())
    assert manifest["answering"]["reader"] == "the model itself"


def test_how_alike_what_is_said_is():
    """Pairs of words that stand together, within a sentence."""
    assert phrase_overlap("A green fox. It sits.", "A green fox. It sits.") == 1
    assert phrase_overlap("A green fox. It sits.", "A green cat. It runs.") == pytest.approx(2 / 6)
    assert phrase_overlap("a fox. it sits", "fox it") == phrase_overlap("", "a fox") == 0
    assert word_recall("a red box", "There is a red thing") == pytest.approx(2 / 3)
    assert word_recall("", "a box") == 0
