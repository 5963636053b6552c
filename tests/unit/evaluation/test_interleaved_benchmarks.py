"""Importers and exporters of the interleaved benchmarks on records in their published shapes."""

import json

import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError
from mm_interleaved.evaluation.interleaved.registry import BENCHMARKS


def picture(path, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (8, 8), colour).save(path)
    return path


def answer(key):
    """A text, an image, a text, an image: what a model gives."""
    image = Image(PILImage.new("RGB", (16, 16), (0, 90, 200)))
    parts = (Text("First this."), image, Text("Then that."), image)
    return Document(id=key, parts=parts)


def kinds(parts):
    return "".join("T" if isinstance(part, Text) else "I" for part in parts)


RECORDS = {
    "opening": {
        "total_uid": "7",
        "meta_task_name": "x",
        "conversations": [
            {"input": [{"text": "Draw two steps.", "image": None}, {"text": None, "image": "images/in.png"}]},
            {"output": [{"text": "One", "image": "images/in.png"}, {"text": "Two", "image": None}]},
        ],
    },
    "isg-bench": {
        "id": "7",
        "Category": "How-To",
        "Query": [{"type": "text", "content": "Draw."}, {"type": "image", "content": "images/in.png"}],
        "Golden": [
            {"type": "text", "content": "One"},
            {"type": "image", "content": "images/in.png"},
            {"type": "text", "content": "Two"},
        ],
        "predict": {"structural": ["text", "image"]},
    },
    "mmie": {
        "id": "7",
        "question": [{"text": "Draw.", "image": "images/in.png"}],
        "answer": [],
        "model": "",
        "gt_answer": [{"text": "One", "image": "images/in.png"}, {"text": "Two", "image": None}],
    },
    "comm": {
        "id": "7",
        "model_input": "Draw. <IMAGE>",
        "input_image_list": ["images/in.png"],
        "model_output": "(1) One <IMAGE> (2) Two",
        "output_gt_image_list": ["images/in.png"],
    },
    "intersyn": {"id": "7", "question": "Draw.", "answer": "One", "image": "images/in.png"},
    "ueval": {"id": "7", "prompt": "Draw.", "image": ["images/in.png"]},
    "interleavedbench": {"id": "7", "task_name": "story", "prompt": "Draw.", "images": ["images/in.png"]},
    "weave": {"id": "7", "domain": "edit", "images": ["images/in.png"], "chats": ["Make Image #1 red."]},
}
GIVEN = {
    "opening": "TI", "isg-bench": "TI", "mmie": "TI", "comm": "TI", "intersyn": "T", "ueval": "IT",
    "interleavedbench": "IT", "weave": "TIT",
}  # fmt: skip
GOLD = {"opening": "TIT", "isg-bench": "TIT", "mmie": "TIT", "comm": "TIT", "intersyn": "TI"}


@pytest.fixture(params=RECORDS)
def name(request):
    return request.param


def put(folder, *records):
    picture(folder / "images" / "in.png")
    path = folder / "bench.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_question_is_a_document_with_a_hole(tmp_path, name):
    [document] = BENCHMARKS[name].read(put(tmp_path, RECORDS[name]))
    assert document.id == "7"
    assert kinds(document.parts) == GIVEN[name] and kinds(document.target) == GOLD.get(name, "")
    assert all(image.load().size == (8, 8) for image in document.images)


def test_a_list_is_read_as_well_as_lines(tmp_path, name):
    put(tmp_path, RECORDS[name])
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([RECORDS[name]]))
    [document] = BENCHMARKS[name].read(path)
    assert kinds(document.parts) == GIVEN[name]


def test_what_is_written_names_images_that_are_there(tmp_path, name):
    if name == "weave":  # a file an answer, see below
        return
    questions = BENCHMARKS[name].read(put(tmp_path, RECORDS[name]))
    out = tmp_path / "out"
    BENCHMARKS[name].write([answer("7")], questions, out)
    written = [path for path in out.rglob("*") if path.suffix in (".png", ".jpg")]
    assert len(written) == 2 and all(PILImage.open(path).size == (16, 16) for path in written)
    [file] = [path for path in out.rglob("*") if path.suffix in (".json", ".jsonl")]
    text = file.read_text()
    assert sum(path.name in text for path in written) >= (1 if name == "intersyn" else 2)
    assert "First this." in text and "Then that." in text


def test_a_question_without_an_answer_is_written_without_parts(tmp_path, name):
    questions = BENCHMARKS[name].read(put(tmp_path, RECORDS[name]))
    BENCHMARKS[name].write([], questions, tmp_path / "out")
    written = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".jsonl")]
    assert bool(written) == (name != "weave")


def test_shapes_of_answers(tmp_path):
    made = {}
    for name, record in RECORDS.items():
        folder = tmp_path / name
        folder.mkdir()
        questions = BENCHMARKS[name].read(put(folder, record))
        BENCHMARKS[name].write([answer("7")], questions, folder / "out")
        made[name] = folder / "out"
    opening = json.loads((made["opening"] / "7.json").read_text())
    assert opening["conversations"][1]["output"] == [
        {"text": "First this.", "image": "./7-o-0.jpg"},
        {"text": "Then that.", "image": "./7-o-1.jpg"},
    ]
    isg = json.loads((made["isg-bench"] / "output.jsonl").read_text())
    assert [part["type"] for part in isg["output"]] == ["text", "image", "text", "image"]
    # Its evaluator reads these of the same line, and images from its own folder.
    assert isg["Query"] == RECORDS["isg-bench"]["Query"] and isg["Golden"] == RECORDS["isg-bench"]["Golden"]
    assert PILImage.open(isg["output"][1]["content"]).size == (16, 16)
    mmie = json.loads((made["mmie"] / "answers.json").read_text())
    assert mmie[0]["model"] == "mm-interleaved" and len(mmie[0]["answer"]) == 2
    assert PILImage.open(mmie[0]["answer"][1]["image"]).size == (16, 16)
    assert [path.name for path in made["weave"].iterdir()] == ["7.png"]
    comm = json.loads((made["comm"] / "7" / "results.json").read_text())
    assert comm["model_output"] == "(1) First this. <IMAGE> (2) Then that. <IMAGE>"
    assert comm["prediction_image_list"] == ["1.png", "2.png"]
    ueval = json.loads((made["ueval"] / "answers.json").read_text())
    assert ueval == [
        {
            "id": "7",
            "text_answer": "First this.\nThen that.",
            "image_answer": ["images/7_1.png", "images/7_2.png"],
        }
    ]


def test_what_is_wrong_is_named(tmp_path, name):
    benchmark = BENCHMARKS[name]
    with pytest.raises(InputError, match="occurs twice"):
        benchmark.read(put(tmp_path, RECORDS[name], RECORDS[name]))
    broken = json.loads(json.dumps(RECORDS[name]).replace("images/in.png", "images/nowhere.png"))
    if broken != RECORDS[name]:
        with pytest.raises(InputError, match=r"bench\.jsonl:1: .*nowhere\.png"):
            benchmark.read(put(tmp_path, broken))
    for key in set(RECORDS[name]) & {"conversations", "Query", "question", "model_input", "prompt", "chats"}:
        less = {other: value for other, value in RECORDS[name].items() if other != key}
        with pytest.raises(InputError, match=r"bench\.jsonl:1: "):
            benchmark.read(put(tmp_path, less))
    with pytest.raises(InputError, match="found no question"):
        benchmark.read(put(tmp_path))


def test_what_holds_no_turn_or_no_single_story_is_named(tmp_path):
    with pytest.raises(InputError, match=r"bench\.jsonl:1: conversations: .*expected at least one turn"):
        BENCHMARKS["opening"].read(put(tmp_path, {"total_uid": "7", "conversations": []}))
    for stories in ([], [{}, {}]):
        (tmp_path / "story.json").write_text(json.dumps(stories))
        with pytest.raises(InputError, match=rf"found a list of {len(stories)} records, expected one story"):
            BENCHMARKS["vistorybench"].read(tmp_path)


def test_markup_in_the_questions_of_opening_is_no_text(tmp_path):
    """As published: `<BEGIN>` at the beginning, `<image>` where the image stands; elsewhere it is text."""
    said = "<BEGIN> Look: <image> Go on with <BEGIN>."
    entries = [{"text": said, "image": "images/in.png"}, {"text": "What does <image> mean?", "image": None}]
    record = {"total_uid": "7", "conversations": [{"input": entries}]}
    [document] = BENCHMARKS["opening"].read(put(tmp_path, record))
    assert kinds(document.parts) == "TITT"
    assert [part.text for part in document.parts if isinstance(part, Text)] == [
        "Look:", "Go on with <BEGIN>.", "What does <image> mean?",
    ]  # fmt: skip


def test_an_image_without_text_has_an_empty_text_in_opening(tmp_path):
    questions = BENCHMARKS["opening"].read(put(tmp_path, RECORDS["opening"]))
    alone = Document(id="7", parts=(Image(PILImage.new("RGB", (16, 16))),))
    BENCHMARKS["opening"].write([alone], questions, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "7.json").read_text())
    assert written["conversations"][1]["output"] == [{"text": "", "image": "./7-o-0.jpg"}]


def turn(role, kind, content):
    return {"role": role, "type": kind, "content": content}


WEAVE = {
    "domain": "edit",
    "images": ["images/in.png", "images/red.jpg"],
    "chats": [
        turn("user", "text", "Make Image #1 red."),
        turn("assistant", "image", "Image #2"),
        turn("user", "text", "What changed from Image #1 to Image #2?"),
        turn("assistant", "text", "The colour."),
    ],
}
"""As published (its loader reads `role`, `type` and `content`)."""


def test_each_turn_of_a_weave_dialogue_is_a_question_that_does_not_show_its_answer(tmp_path):
    picture(tmp_path / "images" / "red.jpg")
    first, second = BENCHMARKS["weave"].read(put(tmp_path, WEAVE))
    assert (kinds(first.parts), kinds(first.target), first.layout) == ("TIT", "I", "I")
    assert (kinds(second.parts), kinds(second.target), second.layout) == ("TITITITIT", "T", "T")
    assert [part.role for part in second.parts[:4]] == ["user"] * 3 + ["assistant"]
    answers = [answer(first.id), answer(second.id)]
    BENCHMARKS["weave"].write(answers, [first, second], tmp_path / "out")
    # Where its evaluator looks: the path of the image that was wanted; the first image's and the turn.
    assert PILImage.open(tmp_path / "out" / "images" / "red.jpg").size == (16, 16)
    assert (tmp_path / "out" / "images" / "in_1.txt").read_text() == "First this.\nThen that."
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 2


def test_an_answer_is_never_written_over_a_benchmarks_own_image(tmp_path):
    picture(tmp_path / "images" / "red.jpg")
    outside = json.loads(json.dumps(WEAVE).replace("images/red.jpg", str(tmp_path / "images" / "red.jpg")))
    questions = BENCHMARKS["weave"].read(put(tmp_path, outside))
    before = (tmp_path / "images" / "red.jpg").read_bytes()
    BENCHMARKS["weave"].write([answer(question.id) for question in questions], questions, tmp_path / "out")
    assert (tmp_path / "images" / "red.jpg").read_bytes() == before
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 2


def test_speakers_out_of_turn_are_named(tmp_path):
    wrong = {**WEAVE, "images": ["images/in.png"] * 2, "chats": WEAVE["chats"][1:]}
    with pytest.raises(InputError, match=r"chats\[0\].*role: .*user and assistant speak in turn"):
        BENCHMARKS["weave"].read(put(tmp_path, wrong))


def test_stories_in_shots(tmp_path):
    folder = tmp_path / "ViStory" / "01"
    picture(folder / "image" / "Pip" / "00.png")
    shot = {
        "index": 1,
        "Plot Correspondence": {"en": "Pip waves."},
        "Setting Description": {"en": "A garden."},
        "Shot Perspective Design": "Close.",
        "Characters Appearing": {"en": ["Pip"]},
        "Static Shot Description": {"en": "Pip stands."},
    }
    story = {"Shots": [shot, {**shot, "index": 2}], "Characters": {}}
    (folder / "story.json").write_text(json.dumps(story))
    benchmark = BENCHMARKS["vistorybench"]
    for path in (tmp_path / "ViStory", folder):
        [document] = benchmark.read(path)
        assert kinds(document.parts) == "TIT" and document.layout == "I I"
        assert document.parts[-1].text.splitlines()[0] == "A garden. Pip waves. Pip stands. Close."
    benchmark.write([answer("01")], [document], tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").rglob("*.png"))
    assert names == ["shot_01.png", "shot_02.png"]
    place = tmp_path / "out" / "mm-interleaved" / "full" / "en" / "20260101-000000" / "01" / "shots"
    assert (place / "shot_01.png").is_file()
    with pytest.raises(InputError, match=r"found no story\.json"):
        benchmark.read(tmp_path / "out")
    del story["Shots"][0]["Characters Appearing"]
    (folder / "story.json").write_text(json.dumps(story))
    with pytest.raises(InputError, match=r"story\.json: Shots\[0\]\.Characters Appearing: missing"):
        benchmark.read(folder)
