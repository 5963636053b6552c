"""Damaged annotation files: one sentence that names the file, and 3, before a model is asked."""

import json
import shutil

import pytest

from mm_interleaved.errors import InputError
from mm_interleaved.evaluation.registry import make_task
from mm_interleaved.storyworld.exports import write_storyworld

FILES = {
    "coco": "captions.json", "vqav2": "annotations.json", "visdial": "visdial.json",
    "refcoco": "refcoco.jsonl",
}  # fmt: skip
KEYS = {"coco": "caption", "vqav2": "question_id", "visdial": "dialog", "refcoco": "bbox"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for form in FILES:
        write_storyworld(folder / form, 4, 3, "test", form)
    return folder


def items(form, table):
    if form == "refcoco":
        return table
    return table["data"]["dialogs"] if form == "visdial" else table["annotations"]


def edited(change):
    def damage(form, path):
        is_lines = form == "refcoco"
        text = path.read_text()
        table = [json.loads(line) for line in text.splitlines()] if is_lines else json.loads(text)
        change(form, items(form, table))
        lines = (json.dumps(record) + "\n" for record in table)
        path.write_text("".join(lines) if is_lines else json.dumps(table))

    return damage


DAMAGES = {
    "truncated": lambda form, path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "another type on top": lambda form, path: path.write_text("7\n" if form == "refcoco" else '"nothing"'),
    "no UTF-8": lambda form, path: path.write_bytes(path.read_bytes().replace(b'"', b'"\xff', 1)),
    "an empty file": lambda form, path: path.write_bytes(b""),
    "an empty list": edited(lambda form, found: found.clear()),
    "a missing key": edited(lambda form, found: found[1].pop(KEYS[form])),
    "a value of another type": edited(lambda form, found: found[1].update({KEYS[form]: {"a": 1}})),
    "NaN": edited(lambda form, found: found[1].update({KEYS[form]: float("nan")})),
    "an answer without its question": edited(lambda form, found: found[1].pop(KEYS[form])),
    "an unknown image": edited(
        lambda form, found: found[1].update(
            {"image": "nowhere.png"}
            if form in ("refcoco", "visdial")
            else {"image_id": 99, "question_id": 99}
        )
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", FILES)
def test_damage_is_refused_in_one_sentence(exports, tmp_path, form, damage):
    folder = tmp_path / "data"
    shutil.copytree(exports / form, folder)
    path = next(folder.rglob(FILES[form]))
    DAMAGES[damage](form, path)
    with pytest.raises(InputError) as refused:
        make_task(form).read_gold(folder)
    message = str(refused.value)
    assert refused.value.exit_code == 3 and "\n" not in message and str(folder) in message
    assert len(make_task(form).read_gold(exports / form)) == 4


@pytest.mark.parametrize("form", ["vqav2", "visdial"])
def test_an_id_that_occurs_twice_is_refused(exports, tmp_path, form):
    folder = tmp_path / "data"
    shutil.copytree(exports / form, folder)
    edited(lambda form, found: found.append(dict(found[0])))(form, next(folder.rglob(FILES[form])))
    with pytest.raises(InputError, match=r"or two|occurs twice"):
        make_task(form).read_gold(folder)
