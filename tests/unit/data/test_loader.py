"""Rows of a run: the same for any number of ranks and workers, resumed exactly, nothing lost in silence."""

import dataclasses
import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from corpora import BROKEN, FILTERED, UNREADABLE, MemoryCorpus, corpus, pair, picture
from mm_interleaved.data import row_streams
from mm_interleaved.data.few_shot import FewShot
from mm_interleaved.data.loader import BLANK_ROW, TrainingLoader
from mm_interleaved.data.loader_state import merge_states
from mm_interleaved.data.mixture import Mixture, MixtureSource
from mm_interleaved.data.row_streams import stream_shares
from mm_interleaved.data.sources.documents import DocumentFiles
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, StorageError, UsageError
from mm_interleaved.files import locked_folder
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.tokens.visibility import NO_IMAGE

# More workers than this machine has cores are slow, not wrong.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def processor(byte_level_tokenizer):
    return MMInterleavedProcessor(byte_level_tokenizer, 8, 8, 3)


def text(name):
    return Document(id=name, parts=(Text(f"words of {name}"),))


def long(name):
    return Document(id=name, parts=(Text("Pip finds a lamp."), picture(3), Text("He is glad.")) * 3)


def mixture(**changes):
    items = corpus("pair", [7, 12, 9]).items
    # Now and then something that is left out, so that counts have to be right as well.
    unusable = (BROKEN, FILTERED, Document(id="u", parts=(UNREADABLE, Text("x"))))
    pairs = MixtureSource(
        name="pairs",
        source=MemoryCorpus((items[0], (*items[1][:5], *unusable, *items[1][5:]), items[2])),
        max_images=3,
        few_shot=FewShot(),
        shuffle_block=4,
    )
    stories = MixtureSource(name="stories", source=corpus("story", [11], long), weight=2.0, shuffle_block=3)
    words = MixtureSource(name="words", source=corpus("text", [2, 3], text), weight=0.5, shuffle_block=5)
    return Mixture(**({"sources": (pairs, stories, words), "max_length": 96} | changes))


def loader(processor, *, batch=4, micro=1, **more):
    more = {"seed": 5, "target_pixels": False, "mixture": mixture(), "max_bad_fraction": 1.0} | more
    return TrainingLoader(processor=processor, global_batch_size=batch, micro_batch_size=micro, **more)


def rows_of(steps):
    """What each row holds, by its number in the run."""
    found = {}
    for step in steps:
        of_step = [number for micro in step.micro_batches for number in micro.row_numbers]
        assert of_step == sorted(of_step) or BLANK_ROW in of_step
        for micro in step.micro_batches:
            numbers = [number for number in micro.row_numbers if number != BLANK_ROW]
            for index, number in enumerate(numbers):
                ids = micro.batch.input_ids[index][micro.batch.attention_mask[index]]
                found[number] = (micro.sources[index], ids.tolist())
    return found


def take(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


STEPS = 12


@pytest.fixture(scope="module")
def uninterrupted(processor):
    return rows_of(take(loader(processor), STEPS))


def test_rows_are_numbered_without_a_gap_and_mixed_by_weight(processor, uninterrupted):
    assert sorted(uninterrupted) == list(range(4 * STEPS))
    many = Counter(
        mixture().source_of_row(5, stream_index, row).name for stream_index in range(4) for row in range(300)
    )
    for name, share in (("pairs", 1 / 3.5), ("stories", 2 / 3.5), ("words", 0.5 / 3.5)):
        assert many[name] / 1200 == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("ranks, micro, workers", [(1, 4, 0), (2, 1, 0), (4, 1, 0), (2, 2, 1), (1, 2, 3)])
def test_rows_are_the_same_for_any_number_of_ranks_workers_and_micro_batches(
    processor, uninterrupted, ranks, micro, workers
):
    rows = {}
    for rank in range(ranks):
        own = loader(processor, micro=micro, rank=rank, num_ranks=ranks, num_workers=workers)
        steps = take(own, STEPS)
        assert all(len(step.micro_batches) == 4 // ranks // micro for step in steps)
        assert [step.step for step in steps] == list(range(STEPS))
        rows |= rows_of(steps)
    assert rows == uninterrupted


def resumed(processor, plan):
    """Rows of runs one after the other, each of (ranks, workers, steps), the state going through JSON."""
    rows, state = {}, None
    for ranks, workers, steps in plan:
        states = []
        for rank in range(ranks):
            own = loader(processor, rank=rank, num_ranks=ranks, num_workers=workers)
            if state is not None:
                own.load_state_dict(state)
            rows |= rows_of(take(own, steps))
            states.append(own.state_dict())
        state = json.loads(json.dumps(merge_states(states)))
    return rows


@pytest.mark.parametrize(
    "plan",
    [
        [(1, 0, 0), (1, 0, 12)],
        [(1, 0, 1)] * 12,
        [(1, 0, 5), (2, 0, 1), (4, 0, 3), (1, 0, 3)],
        [(1, 2, 4), (1, 0, 3), (1, 3, 5)],
    ],
    ids=["at the start", "behind every step", "other ranks", "other workers"],
)
def test_interrupted_runs_have_the_rows_of_the_uninterrupted_one(processor, uninterrupted, plan):
    assert resumed(processor, plan) == uninterrupted


@pytest.mark.parametrize("compat", [None, "released"])
@pytest.mark.parametrize("seed", range(4))
def test_a_run_can_be_interrupted_behind_any_row(processor, seed, compat):
    sources = mixture().sources if compat is None else mixture().sources[:2]
    mixed = mixture(sources=sources, compat=compat, max_length=50 if compat is None else 37)
    settings = {"mixture": mixed, "batch": 2, "seed": seed}
    whole = loader(processor, **settings)
    rows, states, counts = [], [], []
    for step in take_with(whole, 16):
        rows.append(rows_of([step]))
        states.append(json.loads(json.dumps(whole.state_dict())))
        counts.append(whole.counts())
    for index in range(0, 13, 3):
        again = loader(processor, **settings)
        again.load_state_dict(states[index])
        assert rows_of(take(again, 1)) == rows[index + 1]
        assert again.counts() == counts[index + 1]


STATE_OF_0_1 = Path(__file__).parent / "state_of_0.1.json"
"""What the first release wrote after five steps of `loader(processor)`; `lanes` are row streams by now."""


def test_a_state_of_the_first_release_goes_on(processor, uninterrupted):
    state = json.loads(STATE_OF_0_1.read_text(encoding="utf-8"))
    assert state["version"] == 1 and "lanes" in state
    own = loader(processor)
    own.load_state_dict(state)
    assert 0 < state["step"] < STEPS
    rest = rows_of(take(own, STEPS - state["step"]))
    assert rest == {number: row for number, row in uninterrupted.items() if number >= 4 * state["step"]}
    # It is written on in today's form.
    again = loader(processor)
    again.load_state_dict(own.state_dict())
    assert own.state_dict()["version"] == 2 and again.state_dict() == own.state_dict()


def take_with(loader, count):
    """One step after the other, for looking at the loader in between."""
    iterator = iter(loader)
    for _ in range(count):
        yield next(iterator)


def test_going_over_a_loader_again_goes_on(processor, uninterrupted):
    own = loader(processor)
    assert rows_of(take(own, 5)) | rows_of(take(own, STEPS - 5)) == uninterrupted


def test_a_state_of_other_data_is_refused_naming_old_and_new(processor):
    own = loader(processor)
    take(own, 2)
    state = own.state_dict()
    for change, message in (
        ({"batch": 8}, "global_batch_size was 4 and is 8 now"),
        ({"seed": 6}, "seed was 5 and is 6 now"),
        ({"mixture": mixture(max_length=90)}, "max_length was 96 and is 90 now"),
        (
            {"mixture": mixture(sources=mixture().sources[:2])},
            r"words\.weight was 0\.5 and is None now; rows go on only with the same data",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            loader(processor, **change).load_state_dict(state)
    with pytest.raises(UsageError, match="lacks row stream 0"):
        loader(processor).load_state_dict({**state, "row_streams": {}})
    with pytest.raises(ValueError, match=r"different steps: \[2, 3\]"):
        take(own, 1)
        merge_states([state, own.state_dict()])


def test_a_state_that_is_loaded_under_way_stops_the_old_steps(processor):
    own = loader(processor)
    iterator = iter(own)
    next(iterator)
    own.load_state_dict(own.state_dict())
    with pytest.raises(RuntimeError, match="loaded while"):
        next(iterator)


@pytest.mark.parametrize("sizes, num_streams", [([3, 1, 5], 8), ([2] * 9, 4), ([1], 5), ([4, 4], 2)])
def test_in_an_epoch_all_row_streams_together_read_every_item_once(sizes, num_streams):
    shards = corpus("x", sizes).shards()
    for epoch in range(3):
        seen = Counter(
            (share.shard.name, position)
            for stream_index in range(num_streams)
            for share in stream_shares(shards, stream_index + epoch, num_streams)
            for position in range(sizes[int(share.shard.name[-1])])
            if position % share.parts == share.part
        )
        assert set(seen.values()) == {1} and len(seen) == sum(sizes)


def one_source(items, max_length=40, **settings):
    source = MixtureSource(name="s", source=MemoryCorpus(items), **({"shuffle_block": 4} | settings))
    return Mixture(sources=(source,), max_length=max_length)


def unanswered(name):
    """Of a question without an answer, nothing counts."""
    return Document(id=name, parts=(Text("Where?", role="user"),))


def test_every_item_of_an_epoch_is_in_a_row_or_counted_by_the_reason_it_is_not(processor, caplog):
    items = [pair(f"p{i}") for i in range(9)]
    items[2:2] = [BROKEN, FILTERED, Document(id="u", parts=(UNREADABLE, Text("x")))]
    items += [unanswered("i"), Document(id="l", parts=(Text("x" * 50),))]
    items += [Document(id="m", parts=(Text("x"),), meta={"learn": 7})]
    mixed = one_source((tuple(items),), shuffle_block=100)
    own = loader(processor, mixture=mixed, batch=1)
    seen, skipped, epoch = set(), [], 0
    with caplog.at_level(logging.WARNING):
        iterator = iter(own)
        while epoch < 2:
            step = next(iterator)
            seen.update(step.micro_batches[0].document_ids)
            skipped += step.skips
            counts = own.counts()["s"]
            (epoch, *_), _, group, *_ = own.state_dict()["row_streams"]["0"]["sources"]["s"]["cursor"]
            # Two items of an epoch are no documents, 13 are.
            assert counts["skipped_broken"] == counts["filtered_no_image"] == epoch + 1
            kinds = ("image", "no_target", "too_long", "refused")
            unused = sum(counts.get(f"skipped_{kind}", 0) for kind in kinds)
            assert counts["documents"] + unused == 13 * epoch + group
    assert seen == {f"p{i}" for i in range(9)}
    # A run that goes on inside a block counts nothing of it a second time.
    again = loader(processor, mixture=mixed, batch=1)
    again.load_state_dict(own.state_dict())
    take(again, 1)
    next(iterator)
    assert again.counts() == own.counts()
    assert {(skip.place, skip.kind) for skip in skipped} == {
        ("memory-0:3", "broken"),
        ("u", "image"),
        ("i", "no_target"),
        ("l", "too_long"),
        ("m", "refused"),
    }
    logged = " ".join(record.getMessage() for record in caplog.records)
    for words in ("memory-0:3", "broken.png", "52 tokens and 0 images, expected at most 40", "meta.learn"):
        assert words in logged


def test_an_unreadable_image_of_a_group_leaves_the_others_of_it(processor):
    items = (pair("a"), Document(id="u", parts=(UNREADABLE, Text("x"))), pair("b"))
    few = FewShot(share=1.0, min_documents=3, max_documents=3)
    own = loader(
        processor,
        mixture=one_source((items,), 24, few_shot=few, shuffle_block=3),
        batch=1,
        max_bad_fraction=1.0,
    )
    step = take(own, 1)[0]
    assert step.micro_batches[0].batch.num_images == 2 and own.counts()["s"]["documents"] == 2
    assert [skip.place for skip in step.skips] == ["u"]
    assert sorted(step.micro_batches[0].document_ids) == ["a", "b"]


def test_documents_that_do_not_fit_together_go_in_smaller_groups_and_none_is_lost(processor):
    few = FewShot(share=1.0, min_documents=8, max_documents=8)
    mixed = one_source((tuple(pair(f"p{i}") for i in range(8)),), 30, few_shot=few, shuffle_block=8)
    own = loader(processor, mixture=mixed, batch=1)
    images = [step.micro_batches[0].batch.num_images for step in take(own, 4)]
    assert images == [2, 2, 2, 2] and own.counts()["s"]["documents"] == 8


def test_too_much_bad_data_stops_the_run_naming_the_numbers(processor):
    bad = tuple(Document(id=f"u{i}", parts=(UNREADABLE, Text("x"))) for i in range(12))
    own = loader(processor, mixture=one_source(((*bad, pair("a")),)), batch=1, max_bad_fraction=0.001)
    with pytest.raises(InputError, match=r"source 's': \d+ of \d+ items are bad, expected at most a share"):
        take(own, 3)


def test_a_source_without_images_makes_no_released_rows_and_no_endless_search(processor):
    mixed = mixture(sources=mixture().sources[2:], compat="released")
    with pytest.raises(InputError, match="source 'words': found only rows without images"):
        take(loader(processor, mixture=mixed), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_of_which_nothing_can_be_used_is_named(processor, workers):
    items = tuple(unanswered(f"i{i}") for i in range(3))
    own = loader(processor, mixture=one_source((items,)), batch=2, num_workers=workers)
    with pytest.raises(InputError, match=r"^source 's': found nothing that can be used \(.*no_target \d+\)$"):
        take(own, 1)


def test_more_ranks_than_shards_or_documents_take_equal_steps(processor):
    mixed = one_source(((pair("only"),),), 12)
    for rank in range(4):
        steps = take(loader(processor, mixture=mixed, batch=4, rank=rank, num_ranks=4), 2)
        assert [len(step.micro_batches) for step in steps] == [1, 1]


def test_storage_that_fails_is_tried_again_and_then_named(processor, monkeypatch):
    monkeypatch.setattr(row_streams, "RETRY_SECONDS", (0.0, 0.0))
    items = (tuple(pair(f"p{i}") for i in range(5)),)
    whole = rows_of(take(loader(processor, mixture=one_source(items), batch=1), 4))
    flaky = one_source(items)
    flaky.sources[0].source.failures[0, 2] = 2
    assert rows_of(take(loader(processor, mixture=flaky, batch=1), 4)) == whole
    flaky.sources[0].source.failures[0, 2] = 100
    with pytest.raises(StorageError, match="the disk is gone"):
        take(loader(processor, mixture=flaky, batch=1), 4)


class Killer(MemoryCorpus):
    """A source whose reader is killed, as a system without memory does it."""

    def read(self, shard, start=0):
        yield from super().read(shard, start)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_of_the_storage_and_no_hang(processor):
    source = MixtureSource(name="s", source=Killer(((pair("a"),),)))
    mixed = Mixture(sources=(source,), max_length=40)
    with pytest.raises(StorageError, match="a process that reads the data ended"):
        take(loader(processor, mixture=mixed, batch=1, num_workers=1), 3)


def test_workers_outlive_the_signals_that_stop_a_run(processor):
    own = loader(processor, num_workers=2)
    iterator = iter(own)
    rows = rows_of([next(iterator)])
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    rows |= rows_of([next(iterator) for _ in range(4)])
    assert rows == rows_of(take(loader(processor), 5))


def test_workers_of_a_killed_run_do_not_keep_its_folder(processor, tmp_path):
    child = os.fork()
    if child == 0:
        with locked_folder(tmp_path):
            steps = iter(loader(processor, num_workers=1))
            next(steps)
            workers = [process.pid for process in multiprocessing.active_children()]
            (tmp_path / "workers").write_text(" ".join(map(str, workers)))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    [worker] = map(int, (tmp_path / "workers").read_text().split())
    os.kill(worker, 0)  # is still there
    with locked_folder(tmp_path):
        os.kill(worker, signal.SIGKILL)


LEFT_OPEN = """
import sys
sys.path.insert(0, sys.argv[1])
from corpora import corpus
from mm_interleaved.data.loader import TrainingLoader
from mm_interleaved.data.mixture import Mixture, MixtureSource
from mm_interleaved.tokens.processor import MMInterleavedProcessor
mixture = Mixture(sources=(MixtureSource(name="pairs", source=corpus("pair", [5])),), max_length=96)
processor = MMInterleavedProcessor.from_pretrained(sys.argv[2])
sizes = {"global_batch_size": 2, "micro_batch_size": 1}
steps = iter(TrainingLoader(mixture, processor, **sizes, seed=0, num_workers=1, target_pixels=False))
next(steps)
print("one step")
"""


def test_a_process_with_open_workers_ends(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    command = [sys.executable, "-c", LEFT_OPEN, str(Path(__file__).parents[2]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (0, "one step\n"), done.stderr


def test_what_workers_get_can_be_sent_to_them(processor):
    """As it is where processes are not forked."""
    own = loader(processor)
    again = pickle.loads(pickle.dumps(own))
    assert rows_of(take(again, 2)) == rows_of(take(own, 2))


def test_rows_of_files_resume_like_others_and_name_what_is_broken(processor, tmp_path, caplog):
    for index in range(3):
        picture(40 * index).source.save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"<html>")
    lines = [
        {"id": str(n), "content": [{"type": "image", "image": name}, {"type": "text", "text": f"words {n}"}]}
        for n, name in enumerate(["0.png", "broken.png", "1.png", "2.png", "0.png"])
    ]
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, lines), "{"]))
    files = MixtureSource(name="f", source=DocumentFiles(paths=str(tmp_path / "a.jsonl")), shuffle_block=3)
    settings = {
        "mixture": Mixture(sources=(files,), max_length=30),
        "batch": 2,
        "target_pixels": True,
    }
    with caplog.at_level(logging.WARNING):
        whole = rows_of(take(loader(processor, **settings), 6))
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert "broken.png" in logged and "an HTML page" in logged and "a.jsonl" in logged
    first = loader(processor, **settings, num_workers=1)
    rows = rows_of(take(first, 3))
    second = loader(processor, **settings)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert rows | rows_of(take(second, 3)) == whole


def test_a_micro_batch_without_images_gets_a_blank_row(processor):
    source = MixtureSource(name="words", source=corpus("text", [3], text))
    mixed = Mixture(sources=(source,), max_length=64)
    with_blank = take(loader(processor, mixture=mixed, batch=2, micro=2, target_pixels=True), 1)[0]
    micro = with_blank.micro_batches[0]
    assert micro.batch.num_images == 1 and micro.row_numbers == (0, 1, BLANK_ROW)
    assert len(micro.batch.target_pixel_values) == 1 and not micro.batch.image_target.any()
    without = take(loader(processor, mixture=mixed, batch=2, micro=2, add_blank_image=False), 1)[0]
    assert without.micro_batches[0].batch.num_images == 0
    for field in ("input_ids", "text_target"):
        width = without.micro_batches[0].batch.input_ids.shape[1]
        both = [getattr(m.batch, field)[:2, :width] for m in (micro, without.micro_batches[0])]
        assert torch.equal(*both)


def test_images_without_text_and_text_without_images_share_a_batch(processor):
    pictures = Document(id="pictures", parts=(picture(1), picture(2)))
    mixed = one_source(((pictures, text("w")),), 15, shuffle_block=2)
    batch = take(loader(processor, mixture=mixed, batch=2, micro=2), 1)[0].micro_batches[0].batch
    assert sorted((batch.image_start != NO_IMAGE).sum(1).tolist()) == [0, 2]
    assert batch.image_target.tolist() == [False, True] and batch.text_target.any(1).all()


def test_rows_of_fixed_length_have_one_shape(processor):
    steps = take(loader(processor, micro=2, fixed_length=True), 4)
    assert {micro.batch.input_ids.shape[1] for step in steps for micro in step.micro_batches} == {96}


def test_the_pixels_of_a_row_are_its_documents_own(processor):
    shades = MixtureSource(
        name="s", source=MemoryCorpus((tuple(pair(f"{i}", shade=20 * i) for i in range(9)),)), shuffle_block=3
    )
    mixed = Mixture(sources=(shades,), max_length=64)
    for step in take(loader(processor, mixture=mixed, batch=2, micro=2, target_pixels=True), 4):
        micro = step.micro_batches[0]
        found = (micro.batch.pixel_values[:, 0, 0, 0] * 255 / 20).round().int().tolist()
        assert [str(number) for number in found] == list(micro.document_ids)
        assert torch.equal(micro.batch.pixel_values, micro.batch.target_pixel_values)


def test_an_impossible_mixture_is_refused_in_one_sentence():
    pairs = mixture().sources[0]
    for sources, message in (
        ((), "the mixture is empty, expected at least one source"),
        ((pairs, pairs), "two sources called 'pairs'"),
        ((dataclasses.replace(pairs, weight=0.0),), "the weights of pairs are all 0"),
    ):
        with pytest.raises(UsageError, match=message):
            Mixture(sources=sources)
    with pytest.raises(UsageError, match="weight must be 0 or more, found nan"):
        dataclasses.replace(pairs, weight=float("nan"))
    empty = Mixture(sources=(MixtureSource(name="e", source=MemoryCorpus(())),))
    with pytest.raises(InputError, match="source 'e': found no shards"):
        empty.find_shards()


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"batch": 6, "micro": 2, "num_ranks": 2}, "global_batch_size 6 must be a multiple of"),
        ({"micro": 0}, "must be 1 or more"),
        ({"rank": 2, "num_ranks": 2}, "rank below"),
    ],
)
def test_numbers_that_do_not_divide_each_other_are_refused(processor, numbers, message):
    with pytest.raises(UsageError, match=message):
        loader(processor, **numbers)


def test_a_model_that_does_not_paint_is_given_nothing_to_paint(byte_level_tokenizer):
    writer = MMInterleavedProcessor(byte_level_tokenizer, 8, None, 3)
    with pytest.raises(UsageError, match="it has no image decoder"):
        loader(writer, target_pixels=True)


def test_a_large_source_of_which_nothing_can_be_used_is_given_up_before_its_end(processor):
    items = tuple(unanswered(f"i{i}") for i in range(1100))
    with pytest.raises(InputError, match=r"in 1000 documents; of the last one, i\d+: nothing of it counts"):
        take(loader(processor, mixture=one_source((items,) * 9), batch=1), 1)


def test_pictures_are_opened_once_by_the_guard_and_named(processor):
    named = Document(id="d", parts=(Image(b"GIF89a", name="cat.gif"), Text("x")))
    own = loader(processor, mixture=one_source(((named, pair("a")),)), batch=1)
    skips = [skip for step in take(own, 2) for skip in step.skips]
    assert "cat.gif" in skips[0].reason and "a GIF image" in skips[0].reason
