"""Boards: more bits than image tokens hold, and a program that reads every one of them back."""

import hashlib
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mm_interleaved.documents.document import Image, Text
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.errors import InputError, UsageError
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.catalogue import document_of
from mm_interleaved.storyworld.detail.boards import (
    KINDS,
    check_board,
    detail_from_record,
    detail_to_record,
    grid_of,
    random_detail_scene,
)
from mm_interleaved.storyworld.detail.documents import BOARD_RGB, DETAIL_TASKS, detail_document, detail_map
from mm_interleaved.storyworld.detail.reading import read_detail
from mm_interleaved.storyworld.detail.rendering import render_detail, visible_cells
from mm_interleaved.storyworld.detail.scoring import cells_right, knowable_cells, shown_before
from mm_interleaved.storyworld.exports import write_storyworld
from mm_interleaved.storyworld.oracle import attribute_matches
from mm_interleaved.storyworld.scores import score
from mm_interleaved.storyworld.segmentation import CLASS_RGB
from mm_interleaved.storyworld.tasks import TASKS, document
from mm_interleaved.storyworld.training_documents import training_document
from mm_interleaved.storyworld.world import random_cast

IMAGE_TASKS = [task for task in DETAIL_TASKS if task != "detail_vqa"]


def _scenes(image_size, count):
    for index in range(count):
        rng = SeededRandom(98, index)
        yield random_detail_scene(rng, random_cast(rng, "test", 1)[0], image_size)


def _images(parts):
    return [np.asarray(part.load()) for part in parts if isinstance(part, Image)]


@pytest.mark.parametrize("image_size", [64, 128])
def test_the_oracle_reads_every_cell_and_attribute_of_a_clean_image(image_size):
    num_cells = 0
    for detail in _scenes(image_size, 40):
        found = read_detail(render_detail(detail))
        cells = np.array(found.board.cells)
        assert replace(found.board, cells=()) == replace(detail.board, cells=())
        is_visible = visible_cells(detail)
        assert np.array_equal(cells[is_visible], np.array(detail.board.cells)[is_visible])
        assert all(attribute_matches(found.reading, detail.scene, badges=True))
        num_cells += is_visible.sum()
    assert num_cells > 1800


def test_a_quilt_has_more_bits_than_four_slots_have_channels():
    """Four slots of 96 channels, the shipped model's, at one bit a channel."""

    def bits(kind, image_size):
        return math.prod(grid_of(kind, image_size)) * math.log2(len(KINDS[kind].values))

    assert bits("quilt", 64) == 432 > 4 * 96
    for kind in KINDS:
        assert bits(kind, 128) == 4 * bits(kind, 64)


def test_cells_are_uniform_and_independent_of_what_the_scene_is():
    counts = np.zeros(8, int)
    for detail in _scenes(64, 60):
        if detail.board.kind == "quilt":
            counts += np.bincount(detail.board.cells, minlength=8)
    share = counts / counts.sum()
    assert np.abs(share - 1 / 8).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / counts.sum())


def test_documents_are_the_same_on_every_machine():
    """Made by `hashlib` over pixels, texts and cells of two documents of each task and size."""
    total = hashlib.sha256()
    for task in DETAIL_TASKS:
        for index, image_size in ((0, 64), (1, 128)):
            made = detail_document("validation", 3, index, task, image_size)
            for part in (*made.parts, *made.target):
                total.update(part.text.encode() if isinstance(part, Text) else part.load().tobytes())
            total.update(repr(made.meta["scenes"]).encode())
    assert total.hexdigest()[:16] == "b575ab69a4282059"


@pytest.mark.parametrize("task", DETAIL_TASKS)
def test_every_image_shows_its_scene(task):
    for index in range(4):
        made = detail_document("train", 1, index, task)
        images = _images((*made.parts, *made.target))
        assert len(images) == len(made.meta["scenes"])
        for number, (pixels, record) in enumerate(zip(images, made.meta["scenes"], strict=True)):
            detail = detail_from_record(record)
            assert detail_to_record(detail) == record
            is_map = task == "detail_segmentation" and number == 1
            assert np.array_equal(pixels, detail_map(detail) if is_map else render_detail(detail))


@pytest.mark.parametrize("task", IMAGE_TASKS)
def test_no_text_states_cells_and_an_earlier_image_shows_them(task):
    for index in range(6):
        made = detail_document("train", 2, index, task)
        scenes = [detail_from_record(record) for record in made.meta["scenes"]]
        assert len({scene.board.cells for scene in scenes}) == 1
        assert knowable_cells(scenes[-1], shown_before(made, len(scenes) - 1)).mean() > 0.3


def test_stories_hang_boards_elsewhere_and_larger_or_smaller():
    ways = set()
    for index in range(20):
        boards = [
            detail_from_record(r).board
            for r in detail_document("train", 0, index, "detail_story").meta["scenes"]
        ]
        ways |= {(one.scale, other.scale) for one, other in pairwise(boards)}
    assert ways == {(one, other) for one in ("small", "large") for other in ("small", "large")}


def test_the_map_shows_where_the_board_hangs():
    detail = next(_scenes(64, 1))
    is_board = (detail_map(detail) == BOARD_RGB).all(2)
    assert 0 < is_board.sum() <= (detail.board.units * (2 if detail.board.scale == "large" else 1)) ** 2
    assert np.abs(CLASS_RGB.astype(int) - np.array(BOARD_RGB)).max(1).min() >= 32


def test_gold_answers_score_one_and_missing_ones_zero():
    gold = [detail_document("test", 5, index, task) for task in DETAIL_TASKS for index in range(2)]
    answered = [replace(one, parts=one.target, meta={}) for one in gold]
    assert set(score(answered, gold).values()) == {1.0}
    assert set(score([], gold).values()) == {0.0}


def test_an_image_with_another_board_keeps_cells_by_chance():
    gold = [detail_document("test", 6, index, "detail_edit") for index in range(40)]
    kept = []
    for one in gold:
        detail = detail_from_record(one.meta["scenes"][-1])
        size = len(KINDS[detail.board.kind].values)
        other = tuple((cell + 1 + n % (size - 1)) % size for n, cell in enumerate(detail.board.cells))
        wrong = replace(detail, board=replace(detail.board, cells=other))
        kept.append(cells_right(render_detail(wrong), detail)[visible_cells(detail)].mean())
    assert max(kept) == 0.0


def test_tasks_about_boards_are_not_in_the_round_of_all_tasks():
    assert {document("train", 0, index).meta["task"] for index in range(100)} == set(TASKS)
    assert document_of("train", 0, 7, None).id == document("train", 0, 7).id


def test_training_documents_take_their_tasks_by_name():
    made = training_document(4, 3, {"detail_edit": 1})
    assert made.target == () and made.meta["task"] == "detail_edit" and len(_images(made.parts)) == 2


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="found 'detail_dance'"):
        detail_document("train", 0, 0, "detail_dance")
    with pytest.raises(ValueError, match="image_size must be one of 64, 128, found 96"):
        detail_document("train", 0, 0, "detail_copy", 96)
    with pytest.raises(ValueError, match="image_size 128: only detail_copy"):
        document_of("train", 0, 0, "draw", 128)
    with pytest.raises(ValueError, match="float64 of shape"):
        read_detail(np.zeros((64, 64, 3)))


def test_records_of_boards_are_checked():
    record = detail_to_record(next(_scenes(64, 1)))["board"]
    assert check_board(record).kind == record["kind"]
    for change in (
        {"kind": "rug"},
        {"cells": [0]},
        {"cells": [99] * len(record["cells"])},
        {"scale": "huge"},
        {"height": "up"},
        {"colour": 1},
    ):
        with pytest.raises(ValueError, match=r"board|KeyError"):
            check_board({**record, **change})
    with pytest.raises(ValueError, match="board"):
        check_board(None)


def test_documents_go_to_the_disk_and_are_scored_from_there(tmp_path):
    path = write_storyworld(tmp_path / "data", 4, 0, "test", tasks=("detail_edit", "detail_vqa"))
    gold = STORYWORLD.read_gold(path.parent)
    assert [one.meta["task"] for one in gold] == ["detail_edit", "detail_vqa"] * 2
    answered = [replace(one, parts=one.target, target=(), meta={}) for one in read_documents(path)]
    scores = STORYWORLD.score(answered, gold)
    assert scores["detail_edit.cells_kept"] == scores["detail_vqa.fine_detail"] == 1.0


def test_a_document_whose_board_is_spoilt_is_refused_before_a_model_runs(tmp_path):
    path = write_storyworld(tmp_path / "data", 1, 0, "test", tasks=("detail_edit",))
    text = path.read_text("utf-8")
    path.write_text(text.replace('"scale": "', '"scale": "very '), "utf-8")
    assert path.read_text("utf-8") != text
    with pytest.raises(InputError, match=r"meta\.scenes\[0\]: found .*board"):
        STORYWORLD.read_gold(path.parent)


def test_the_source_has_boards_of_either_size_and_refuses_others():
    from mm_interleaved.data.sources.storyworld import StoryWorldSource

    source = StoryWorldSource(paths=("detail_copy",), image_size=128)
    _, made = next(iter(source.read(source.shards()[0])))
    assert [image.shape for image in _images((*made.parts, *made.target))] == [(128, 128, 3)] * 2
    with pytest.raises(UsageError, match="image_size of draw must be 64, found 128"):
        StoryWorldSource(paths=("draw",), image_size=128)
