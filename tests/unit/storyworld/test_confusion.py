"""What is lost is counted where it is lost, by tables that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD
from mm_interleaved.storyworld.confusion import MISSING, NOBODY, NOTHING, OTHER
from mm_interleaved.storyworld.renderer import render_scene
from mm_interleaved.storyworld.tasks import TASKS, document
from mm_interleaved.storyworld.world import Character, Figure, Prop, Scene, scene_to_record

confusions = STORYWORLD.confusions

PIP = Character(
    name="Pip", species="cat", body_colour="red", pattern="plain", hat="cap", hat_colour="blue", badge="7"
)
SCENE = Scene(
    place="beach",
    time="night",
    weather="rainy",
    figures=(Figure(character=PIP, position="left", action="wave"),),
    props=(Prop(kind="lamp", colour="green", position="right"),),
)


def shown(scene):
    return Image(PILImage.fromarray(render_scene(scene)))


def counts_of(task, answer, *, given=(), scenes=(SCENE,), **meta):
    """What is counted for one answer, by attribute."""
    meta = {"task": task, "scenes": [scene_to_record(scene) for scene in scenes], **meta}
    gold = Document(id="d", parts=given, target=meta.pop("target", ()), meta=meta)
    tables = confusions([] if answer is None else [Document(id="d", parts=answer)], [gold])
    return {table.attribute: dict(table.counts) for table in tables}


def with_figure(**changes):
    look = {key: changes.pop(key) for key in list(changes) if key not in ("position", "action")}
    figure = replace(SCENE.figures[0], character=replace(PIP, **look), **changes)
    return replace(SCENE, figures=(figure,))


def test_an_image_that_is_the_truth_has_lost_nothing():
    counts = counts_of("draw", (shown(SCENE),))
    assert all(truth == read for table in counts.values() for truth, read in table)
    assert {name: sum(table.values()) for name, table in counts.items()} == dict.fromkeys(
        ("place", "time", "weather", "position", "species", "body_colour", "hat", "hat_colour", "action",
         "prop_position", "prop", "prop_colour"), 1
    )  # fmt: skip


def test_what_no_word_states_is_no_case_of_a_drawing_but_of_an_edit():
    other = with_figure(badge="A", pattern="striped")
    assert not {"badge", "pattern"} & counts_of("draw", (shown(other),)).keys()
    counts = counts_of("edit", (shown(other),))
    assert counts["badge"] == {("7", "A"): 1} and counts["pattern"] == {("plain", "striped"): 1}
    assert counts["species"] == {("cat", "cat"): 1}


@pytest.mark.parametrize(
    ("changes", "attribute", "expected"),
    [
        ({"body_colour": "green"}, "body_colour", ("red", "green")),
        ({"species": "dog"}, "species", ("cat", "dog")),
        ({"hat": "none", "hat_colour": "none"}, "hat", ("cap", "none")),
        ({"action": "sleep"}, "action", ("wave", "sleep")),
        ({"position": "right"}, "position", ("left", "right")),
    ],
)
def test_each_change_is_counted_as_what_it_is(changes, attribute, expected):
    counts = counts_of("draw", (shown(with_figure(**changes)),))
    assert counts[attribute] == {expected: 1}
    lost = {name for name, table in counts.items() for truth, read in table if truth != read}
    assert lost == ({"hat", "hat_colour"} if attribute == "hat" else {attribute})


def test_who_is_missing_has_lost_everything_and_who_is_too_much_is_counted_apart():
    nobody = counts_of("draw", (shown(replace(SCENE, figures=())),))
    assert nobody["position"] == {("left", MISSING): 1} and nobody["hat"] == {("cap", MISSING): 1}
    second = Figure(
        character=replace(PIP, name="Mia", species="dog", body_colour="blue"), position="right", action="sit"
    )
    two = replace(
        SCENE,
        figures=(*SCENE.figures, second),
        props=(*SCENE.props, Prop(kind="cup", colour="red", position="left")),
    )
    counts = counts_of("draw", (shown(two),))
    assert counts["position"] == {("left", "left"): 1, (NOBODY, "right"): 1}
    assert counts["prop_position"] == {("right", "right"): 1, (NOTHING, "left"): 1}
    assert all(truth == read for truth, read in counts["species"])


def test_without_an_answer_everything_is_missing():
    counts = counts_of("draw", None)
    assert all(read == MISSING for table in counts.values() for _, read in table)
    assert counts["place"] == {("beach", MISSING): 1} and counts["prop"] == {("lamp", MISSING): 1}


def test_captions_are_read_by_their_words():
    text = "A green cat with a blue cap waves on the left. A lamp is on the right. It is a rainy night."
    counts = counts_of("caption", (Text(text),))
    assert counts["body_colour"] == {("red", "green"): 1}
    assert counts["place"] == {("beach", MISSING): 1} and counts["time"] == {("night", "night"): 1}
    assert counts["prop_colour"] == {("green", MISSING): 1} and counts["prop"] == {("lamp", "lamp"): 1}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("7.", ("7", "7")), ("a", ("7", "A")), ("seven things", ("7", OTHER)), ("", ("7", MISSING))],
)
def test_answers_are_counted_by_the_kind_of_question(answer, expected):
    counts = counts_of("vqa", (Text(answer),), target=(Text("7"),), question_kind="badge")
    assert counts == {"badge": {expected: 1}}


def test_a_story_is_held_to_its_first_panel_and_to_its_texts():
    later = replace(with_figure(badge="A", position="middle", action="sit"), props=(), time="day")
    given = (
        Text(
            "Here is Pip, a red cat with a blue cap. It is a rainy night at the beach. Pip waves on the left."
        ),
        shown(SCENE),
        Text("Pip sits on the right."),
    )
    counts = counts_of("story_last", (shown(later),), given=given, scenes=(SCENE, later))
    assert counts["badge"] == {("7", "A"): 1} and counts["species"] == {("cat", "cat"): 1}
    assert counts["position"] == {("right", "middle"): 1} and counts["action"] == {("sit", "sit"): 1}
    assert counts["time"] == {("night", "day"): 1} and counts["place"] == {("beach", "beach"): 1}


def test_shares_are_counted_over_several_documents():
    gold = [document("test", 0, index, "draw") for index in range(12)]
    answers = [replace(each, parts=each.target, target=(), meta={}) for each in gold]
    swapped = [*answers[:9], replace(answers[9], parts=answers[0].parts), *answers[10:]]
    whole = {table.attribute: table for table in confusions(answers, gold)}
    assert all(table.lost == 0 for table in whole.values()) and whole["place"].cases == 12
    spoilt = {table.attribute: table for table in confusions(swapped, gold)}
    is_other = gold[0].meta["scenes"][0]["place"] != gold[9].meta["scenes"][0]["place"]
    assert spoilt["place"].lost == pytest.approx(is_other / 12)
    missing = {table.attribute: table for table in confusions(answers[3:], gold)}
    assert missing["weather"].lost == pytest.approx(3 / 12) and missing["weather"].reads[-1] == MISSING


def test_gold_answers_of_every_task_have_lost_nothing():
    gold = [document("test", 5, 20 * place + n, task) for place, task in enumerate(TASKS) for n in range(3)]
    answers = [replace(each, parts=each.target, target=(), meta={}) for each in gold]
    tables = confusions(answers, gold)
    assert {table.task for table in tables} == TASKS.keys() - {"ground"}
    assert [
        (table.task, table.attribute)
        for table in tables
        if table.lost or table.counts.keys() - {(value, value) for value in table.truths}
    ] == []
