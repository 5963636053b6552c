"""The serving engine on a tiny model: each request gets what it gets alone, whoever comes, goes or fails."""

import asyncio
import gc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, UsageError
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.events import Failed, Finished, ImageDone, ImagePreview, TextDelta
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.serving.engine import ServingEngine
from mm_interleaved.serving.metrics import Metrics
from mm_interleaved.serving.refusals import Draining, QueueFull
from tiny import tiny_model, tiny_processor

FAST = {"num_inference_steps": 3, "guidance_scale": 2.0, "max_new_tokens": 8, "seed": 5}
LEVELS = 1
"""Of 255, by which a pixel may be another."""
ENDLESS = GenerationSettings(
    layout=" ".join("I" * 8), **{**FAST, "num_inference_steps": 1000, "scheduler": "ddim"}
)


def picture(seed):
    return Image(
        PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    )


DOCUMENTS = [
    Document(id="a", parts=[Text("Hi")]),
    Document(id="b", parts=[Text("A longer one "), picture(0), picture(1), Text(".")]),
    Document(id="c", parts=[picture(2)]),
    Document(id="d", parts=[picture(3), Text("x")]),
]
SETTINGS = [
    GenerationSettings(layout="T I T", **FAST),
    GenerationSettings(layout="I T", **{**FAST, "scheduler": "euler", "num_inference_steps": 5}),
    GenerationSettings(layout="T I", do_sample=True, temperature=2.0, **FAST),
    GenerationSettings(layout="I I", **{**FAST, "guidance_scale": 1.0, "num_inference_steps": 2}),
    GenerationSettings(
        layout="T", repetition_penalty=1.5, min_new_tokens=3, **{**FAST, "max_new_tokens": 20}
    ),
    GenerationSettings(layout="I", height=40, width=24, step_cache=2, **FAST),
]


@pytest.fixture(scope="module")
def generator():
    model = tiny_model()
    return InterleavedGenerator(model, tiny_processor(model.config))


@pytest.fixture
def engine(generator):
    engine = ServingEngine(generator, max_running=4, max_queue=30)
    engine.start()
    yield engine
    engine.close()


async def answer(engine, document, settings, **more):
    async with await engine.open(document, settings, **more) as ticket:
        return [event async for event in ticket]


async def settled(engine, **wanted):
    """Waits until the statistics say so."""
    for _ in range(1000):
        found = engine.statistics()
        if all(getattr(found, name) == value for name, value in wanted.items()):
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"wanted {wanted}, found {engine.statistics()}")


def assert_same(found, expected):
    assert [type(part) for part in found.parts] == [type(part) for part in expected.parts]
    for ours, theirs in zip(found.parts, expected.parts, strict=True):
        if isinstance(ours, Text):
            assert ours == theirs
        else:
            assert replace(ours, source=theirs.source) == theirs
            one, other = (np.asarray(image.load(), np.int16) for image in (ours, theirs))
            assert np.abs(one - other).max() <= LEVELS


def test_requests_that_come_and_go_get_what_they_get_alone(engine, generator):
    work = [(DOCUMENTS[k % 4], SETTINGS[k % 6]) for k in range(8)]

    async def come(place):
        await asyncio.sleep(0.02 * (place % 5))
        return await answer(engine, *work[place])

    async def leave(place):
        async with await engine.open(*work[place]) as ticket:
            async for _ in ticket:
                return

    async def all_of_them():
        coming = [come(place) for place in range(8)]
        return await asyncio.gather(*coming, *(leave(place) for place in range(4)))

    events = asyncio.run(all_of_them())[:8]
    for (document, settings), found in zip(work, events, strict=True):
        assert isinstance(found[-1], Finished)
        assert_same(found[-1].document, generator.generate(document, settings))
        written = "".join(event.text for event in found if isinstance(event, TextDelta))
        parts = found[-1].document.parts
        assert written == "".join(part.text for part in parts if isinstance(part, Text) and part.generated)
    seen = engine.statistics()
    assert (seen.queued, seen.running, seen.unread) == (0, 0, 0)
    assert seen.accepted == 12 == seen.finished + seen.aborted
    assert max(seen.batch_sizes["text"]) > 1 and max(seen.batch_sizes["image"]) > 1


def test_previews_come_to_who_wants_them(engine):
    async def both():
        plain, seeing = await asyncio.gather(
            answer(engine, DOCUMENTS[0], SETTINGS[3]),
            answer(engine, DOCUMENTS[0], SETTINGS[0], preview_every=1),
        )
        return plain, seeing

    plain, seeing = asyncio.run(both())
    assert not any(isinstance(event, ImagePreview) for event in plain)
    assert {event.step for event in seeing if isinstance(event, ImagePreview)} <= {1, 2}
    assert any(isinstance(event, ImagePreview) for event in seeing)


@pytest.mark.parametrize("way", ["cancel", "with", "task", "garbage"])
def test_whoever_leaves_frees_the_place(engine, way):
    async def leave():
        ticket = await engine.open(DOCUMENTS[0], ENDLESS)
        await anext(ticket)
        if way == "cancel":
            await ticket.cancel()
            assert [event async for event in ticket] == []
        elif way == "with":
            async with ticket:
                pass
        elif way == "task":
            task = asyncio.create_task(answer(engine, DOCUMENTS[0], ENDLESS))
            await settled(engine, running=2)
            task.cancel()
            await settled(engine, running=1, aborted=1)
        del ticket
        gc.collect()
        passes = sum(engine.statistics().batch_sizes["image"].values())
        await settled(engine, running=0)
        # No more than the step that ran, and one that may have begun.
        assert sum(engine.statistics().batch_sizes["image"].values()) <= passes + 3
        return await answer(engine, DOCUMENTS[1], SETTINGS[0])

    assert isinstance(asyncio.run(leave())[-1], Finished)


def test_who_waits_may_leave_too_and_the_queue_has_an_end(generator):
    engine = ServingEngine(generator, max_running=1, max_queue=2)
    engine.start()

    async def crowd():
        tickets = [await engine.open(DOCUMENTS[0], ENDLESS) for _ in range(3)]
        with pytest.raises(QueueFull, match="3 requests are open") as refused:
            await engine.open(DOCUMENTS[0], ENDLESS)
        assert 1 <= refused.value.retry_after <= 60
        await tickets[2].cancel()
        await settled(engine, queued=1, aborted=1)
        later = asyncio.create_task(answer(engine, DOCUMENTS[0], SETTINGS[0]))
        await settled(engine, queued=2)
        for ticket in tickets[:2]:
            await ticket.cancel()
        assert isinstance((await later)[-1], Finished)
        await settled(engine, queued=0, running=0, unread=0, aborted=3, finished=1, refused=1)

    asyncio.run(crowd())
    engine.close()


def test_answers_that_nobody_takes_are_bounded(generator):
    engine = ServingEngine(generator, max_running=1, max_queue=1)
    engine.start()

    async def pile_up():
        tickets = []
        for number in range(4):
            tickets.append(await engine.open(DOCUMENTS[0], SETTINGS[4]))
            await settled(engine, unread=number + 1)
        with pytest.raises(QueueFull):
            await engine.open(DOCUMENTS[0], SETTINGS[4])
        # What waited was merged: two events each, whatever the number of runs.
        events = [event async for event in tickets[0]]
        assert [type(event) for event in events] == [TextDelta, Finished]
        await (await engine.open(DOCUMENTS[0], SETTINGS[4])).cancel()

    asyncio.run(pile_up())
    engine.close()


def test_what_cannot_be_is_refused_and_takes_no_place(engine):
    async def ask():
        with pytest.raises(UsageError, match="multiples"):
            await engine.open(DOCUMENTS[0], GenerationSettings(layout="I", width=30))
        with pytest.raises(InputError, match="expected at most 192"):
            await engine.open(Document(id="long", parts=[Text("x" * 400)]), SETTINGS[0])
        await settled(engine, queued=0, running=0, accepted=0)

    asyncio.run(ask())


def test_a_failure_of_one_request_is_its_own(engine, generator):
    broken = Document(id="broken", parts=[Image(b"no image")])

    async def ask():
        return await asyncio.gather(
            answer(engine, broken, SETTINGS[0]), answer(engine, DOCUMENTS[0], SETTINGS[0])
        )

    failed, fine = asyncio.run(ask())
    assert isinstance(failed[-1], Failed) and isinstance(failed[-1].error, InputError)
    assert_same(fine[-1].document, generator.generate(DOCUMENTS[0], SETTINGS[0]))


def test_a_bug_fails_those_that_ran_and_the_next_answer_is_exact(engine, generator, monkeypatch):
    expected = generator.generate(DOCUMENTS[1], SETTINGS[0])
    predict, calls = type(generator.model.image_decoder).predict, []

    def once_wrong(*arguments, **named):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("secret/path of this machine")
        return predict(*arguments, **named)

    monkeypatch.setattr(type(generator.model.image_decoder), "predict", once_wrong)

    async def ask():
        failed = await answer(engine, DOCUMENTS[1], SETTINGS[0])
        return failed, await answer(engine, DOCUMENTS[1], SETTINGS[0])

    failed, then = asyncio.run(ask())
    assert failed[-1].error.code == "internal" and "secret" not in str(failed[-1].error)
    assert engine.healthy
    assert_same(then[-1].document, expected)


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(generator):
    engine = ServingEngine(generator, max_running=2, max_queue=8)
    engine.start()

    async def stop():
        asked = [asyncio.create_task(answer(engine, DOCUMENTS[0], SETTINGS[0])) for _ in range(4)]
        await settled(engine, accepted=4)
        draining = asyncio.create_task(engine.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(Draining) as refused:
            await engine.open(DOCUMENTS[0], SETTINGS[0])
        assert refused.value.retry_after == 60
        events = await asyncio.gather(*asked)
        await draining
        return events

    assert all(isinstance(events[-1], Finished) for events in asyncio.run(stop()))
    assert not engine.healthy


def test_what_is_not_done_in_the_grace_fails(generator):
    engine = ServingEngine(generator, max_running=1, max_queue=8)
    engine.start()

    async def stop():
        asked = [asyncio.create_task(answer(engine, DOCUMENTS[0], ENDLESS)) for _ in range(2)]
        await settled(engine, running=1, queued=1)
        await engine.drain(0.05)
        return await asyncio.gather(*asked)

    for events in asyncio.run(stop()):
        assert isinstance(events[-1], Failed) and isinstance(events[-1].error, Draining)
        assert not any(isinstance(event, ImageDone) for event in events)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_its_thread_ends_nobody_waits_for_ever(generator):
    engine = ServingEngine(generator, max_running=1, max_queue=8)
    engine.start()

    def end():
        raise SystemExit

    async def ask():
        asked = [asyncio.create_task(answer(engine, DOCUMENTS[0], ENDLESS)) for _ in range(2)]
        await settled(engine, running=1, queued=1)
        engine._inbox.put(end)
        events = await asyncio.gather(*asked)
        engine._thread.join()
        with pytest.raises(Draining):
            await engine.open(DOCUMENTS[0], SETTINGS[0])
        return events

    assert all(isinstance(events[-1], Failed) for events in asyncio.run(ask()))
    assert not engine.healthy


def test_a_conversation_with_another_turn_is_not_read_anew(engine, generator):
    asked = Document(id="q", parts=[Text("Look at this: ", role="user"), replace(picture(0), role="user")])
    settings = GenerationSettings(layout="T", **FAST)

    async def talk():
        first = (await answer(engine, asked, settings))[-1].document
        again = replace(first, parts=(*first.parts, Text(" And then?", role="user")))
        async with await engine.open(again, settings) as ticket:
            events = [event async for event in ticket]
        return again, events[-1].document, ticket.usage

    again, found, usage = asyncio.run(talk())
    assert_same(found, generator.generate(again, settings))
    assert 20 < usage.reused_tokens < usage.prompt_tokens
    seen = engine.statistics()
    assert (seen.prefix_hits, seen.prefix_misses, seen.prefix_tokens) == (1, 1, usage.reused_tokens)
    assert seen.prefix_bytes > 0 and seen.text_tokens >= usage.text_tokens > 0
    shown = Metrics(engine).text().decode().splitlines()
    for name in ("prefix_hits_total", "prefix_misses_total", "finished_total", "text_tokens_total"):
        value = getattr(seen, name.removesuffix("_total"))
        assert f"mm_interleaved_{name} {value:.1f}" in shown
