"""Documents with a hole, their scores, and their way to the disk and back."""

import inspect
from dataclasses import replace

import numpy as np
import pytest

from mm_interleaved.cli import shortcuts
from mm_interleaved.documents.document import Image, Text
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.errors import UsageError
from mm_interleaved.storyworld.exports import EXPORTS, write_storyworld
from mm_interleaved.storyworld.oracle import attribute_matches, read_scene
from mm_interleaved.storyworld.scores import score
from mm_interleaved.storyworld.tasks import TASKS, document, part_pixels, scene_image
from mm_interleaved.storyworld.world import NAMES, scene_from_record
from mm_interleaved.tokens.boxes import box_iou, read_box, write_box

REQUIRED = {
    "caption.attributes", "vqa.accuracy", "vqa.fine_detail", "ground.accuracy", "draw.attributes",
    "segmentation.miou",
    "story.character_kept", "story.badge_kept", "layout.correct", "dialogue.mrr",
}  # fmt: skip


def _answered(gold, parts=None, **meta):
    """A prediction that says `parts`, by default the gold answer."""
    return replace(gold, parts=gold.target if parts is None else parts, meta=meta)


def _same_parts(one, other):
    assert len(one) == len(other)
    for mine, yours in zip(one, other, strict=True):
        assert (type(mine), mine.role) == (type(yours), yours.role)
        if isinstance(mine, Text):
            assert mine.text == yours.text
        else:
            assert np.array_equal(part_pixels(mine), part_pixels(yours))


@pytest.mark.parametrize("task", TASKS)
def test_a_document_is_a_function_of_its_arguments(task):
    one, other = document("train", 1, 2, task), document("train", 1, 2, task)
    assert (one.id, one.layout, one.meta) == (other.id, other.layout, other.meta)
    _same_parts((*one.parts, *one.target), (*other.parts, *other.target))
    assert one.layout == " ".join("I" if isinstance(part, Image) else "T" for part in one.target)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "segmentation"])
def test_meta_holds_the_truth_of_every_image(task):
    for index in range(3):
        made = document("test", 2, index, task)
        images = [part for part in (*made.parts, *made.target) if isinstance(part, Image)]
        assert len(images) == len(made.meta["scenes"])
        for image, record in zip(images, made.meta["scenes"], strict=True):
            assert all(
                attribute_matches(read_scene(part_pixels(image)), scene_from_record(record), badges=True)
            )


def test_a_hundred_documents_in_a_row_hold_every_task():
    assert {document("train", 0, 37 + index).meta["task"] for index in range(100)} == set(TASKS)


def test_only_the_test_split_holds_held_out_combinations():
    shares = {
        split: np.mean([document(split, 3, index).meta["is_held_out"] for index in range(150)])
        for split in ("train", "validation", "test")
    }
    assert shares["train"] == shares["validation"] == 0
    assert 0.15 < shares["test"] < 0.5


def test_the_right_candidate_of_a_dialogue_is_the_answer():
    for index in range(30):
        made = document("train", 4, index, "dialogue")
        assert len(set(made.meta["candidates"])) == 10
        assert made.meta["candidates"][made.meta["gold_index"]] == made.target[0].text


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'dance'"):
        document("train", 0, 0, "dance")
    with pytest.raises(ValueError, match="'dev'"):
        document("dev", 0, 0)


@pytest.fixture(scope="module")
def gold():
    return [document("test", 5, index) for index in range(100)]


def test_gold_answers_score_one_in_everything(gold):
    scores = score([_answered(one) for one in gold], gold)
    assert scores.keys() >= REQUIRED
    assert set(scores.values()) == {1.0}, scores


def test_missing_answers_score_zero_in_everything(gold):
    scores = score([], gold)
    assert scores.keys() >= REQUIRED
    assert set(scores.values()) == {0.0}, scores


def test_only_generated_parts_are_judged():
    one = document("test", 6, 0, "caption")
    whole = replace(
        one, parts=(*one.parts, *(replace(part, generated=True) for part in one.target)), target=()
    )
    assert score([whole], [one]) == {"caption.attributes": 1.0, "layout.correct": 1.0}


def test_a_wrong_word_costs_its_attribute():
    one = document("test", 6, 1, "caption")
    scene = scene_from_record(one.meta["scenes"][0])
    wrong = "snowy" if scene.weather != "snowy" else "rainy"
    prediction = _answered(one, (Text(one.target[0].text.replace(scene.weather, wrong)),))
    num_attributes = 3 + 5 * len(scene.figures) + 2 * len(scene.props)
    assert score([prediction], [one])["caption.attributes"] == pytest.approx(1 - 1 / num_attributes)


@pytest.fixture
def lonely_panel():
    """A story whose last panel, which is to be painted, has one figure; and the scene of that panel."""
    for index in range(100):
        made = document("test", 7, index, "story_last")
        scene = scene_from_record(made.meta["scenes"][-1])
        if len(scene.figures) == 1:
            return made, scene
    raise AssertionError("no story ends with a lonely panel")


def _wearing(scene, **look):
    figure = scene.figures[0]
    return replace(scene, figures=(replace(figure, character=replace(figure.character, **look)),))


def test_a_strangers_badge_is_not_kept_but_a_familiar_body_is(lonely_panel):
    one, truth = lonely_panel
    badge = "7" if truth.figures[0].character.badge != "7" else "A"
    scores = score([_answered(one, (scene_image(_wearing(truth, badge=badge)),))], [one])
    assert (scores["story.character_kept"], scores["story.badge_kept"]) == (1.0, 0.0)
    assert scores["story.name_known"] == scores["story.species_kept"] == scores["story.pattern_kept"] == 1.0


def test_each_attribute_of_a_look_has_its_own_score(lonely_panel):
    one, truth = lonely_panel
    pattern = "plain" if truth.figures[0].character.pattern != "plain" else "striped"
    scores = score([_answered(one, (scene_image(_wearing(truth, pattern=pattern)),))], [one])
    assert scores["story.pattern_kept"] == scores["story.character_kept"] == 0.0
    assert scores["story.species_kept"] == scores["story.body_colour_kept"] == scores["story.hat_kept"] == 1.0


def test_last_images_have_scores_of_their_own(lonely_panel):
    one, truth = lonely_panel
    scores = score([_answered(one, (scene_image(truth),))], [one])
    assert scores["story_last.badge_kept"] == scores["story.badge_kept"] == 1.0
    assert scores["story_last.action"] == 1.0
    whole = document("test", 7, 0, "story")
    assert not any(name.startswith("story_last") for name in score([_answered(whole, ())], [whole]))


def test_a_story_that_stands_still_keeps_nobody():
    one = document("test", 7, 0, "story")
    panel = one.parts[-2:]
    assert [type(part) for part in panel] == [Text, Image]
    scores = score([_answered(one, panel * (len(one.target) // 2))], [one])
    assert scores["story.character_kept"] == scores["story.badge_kept"] == 0.0


def test_nobody_is_kept_who_was_never_introduced(lonely_panel):
    one, truth = lonely_panel
    stranger = next(name for name in NAMES if name not in str(one.parts))
    told = replace(one, parts=(*one.parts[:-1], Text(f"{stranger} waves on the left.")))
    scores = score([_answered(told, (scene_image(truth),))], [told])
    assert scores["story.badge_kept"] == scores["story.character_kept"] == scores["story.name_known"] == 0.0


def test_a_dialogue_is_scored_by_the_rank_of_its_answer():
    one = document("test", 8, 0, "dialogue")
    gold_index = one.meta["gold_index"]
    others = [index for index in range(10) if index != gold_index]
    ranking = [*others[:3], gold_index, *others[3:]]
    assert score([_answered(one, ranking=ranking)], [one])["dialogue.mrr"] == 0.25


def test_layout_counts_the_order_of_parts():
    one = document("test", 8, 0, "story")
    swapped = (one.target[1], one.target[0], *one.target[2:])
    assert score([_answered(one, swapped)], [one])["layout.correct"] == 0.0


def test_boxes_overlap_by_their_areas():
    assert box_iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert box_iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 10, 10), (20, 20, 30, 30)) == 0.0


def test_an_unknown_task_in_the_gold_is_refused(gold):
    with pytest.raises(ValueError, match="expected a task"):
        score([], [replace(gold[0], meta={})])


def test_our_own_files_come_back_the_same(tmp_path):
    made = [document("test", 9, index) for index in range(12)]
    read = read_documents(write_storyworld(tmp_path, 12, 9, "test"))
    for one, other in zip(made, read, strict=True):
        assert (one.id, one.layout, dict(one.meta)) == (other.id, other.layout, dict(other.meta))
        _same_parts(one.parts, other.parts)
        _same_parts(one.target, other.target)
    assert set(score([_answered(one) for one in read], read).values()) == {1.0}


@pytest.mark.parametrize("name", ["mmc4", "obelics", "llava", "annt"])
def test_official_records_are_read_by_our_loaders(tmp_path, name):
    read = read_documents(write_storyworld(tmp_path, 2, 9, "train", name))
    assert all(isinstance(part.load().size, tuple) for one in read for part in one.images)
    texts = " ".join(one.text for one in read)
    if name == "llava":
        assert document("train", 9, 0, "caption").target[0].text in texts
    else:
        story = document("train", 9, 0, "story")
        assert story.parts[0].text in texts
        assert np.array_equal(part_pixels(read[0].images[0]), part_pixels(story.parts[1]))


@pytest.mark.parametrize("name", [name for name in EXPORTS if name != "obelics-parquet"])
def test_every_export_is_whole_and_repeats(tmp_path, name):
    first, second = tmp_path / "first", tmp_path / "second"
    assert write_storyworld(first, 1, 10, "validation", name).is_file()
    write_storyworld(second, 1, 10, "validation", name)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for path in files:
        assert (first / path).read_bytes() == (second / path).read_bytes(), path


def test_unknown_formats_and_no_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'tsv'"):
        write_storyworld(tmp_path, 1, 0, "train", "tsv")
    with pytest.raises(ValueError, match="found 0"):
        write_storyworld(tmp_path, 0, 0, "train")


def test_an_export_replaces_nothing_that_is_there(tmp_path):
    (tmp_path / "documents.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="expected a new or an empty folder"):
        write_storyworld(tmp_path, 1, 0, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_ready_prompts_of_the_command_line_are_those_that_were_trained():
    def asked(task):
        return document("train", 0, 0, task).parts[1].text

    assert inspect.signature(shortcuts.caption).parameters["prompt"].default == asked("caption")
    before, after = inspect.signature(shortcuts.ground).parameters["prompt"].default.split("{phrase}")
    assert asked("ground").startswith(before) and asked("ground").endswith(after)


@pytest.mark.parametrize("text", ["(102,355)(480,910)", "at (102, 355) (480,0910)."])
def test_a_box_is_read_alike_where_it_is_scored_and_where_it_is_shown(text):
    assert read_box(text) == (102, 355, 480, 910)
    assert shortcuts.box_in_pixels(text, (1000, 1000)) == (102, 355, 480, 910)
    assert read_box(write_box((1, 2, 30, 999))) == (1, 2, 30, 999)
