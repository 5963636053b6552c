"""A part made again is what the engine makes of the document before it: every edit equals generating anew."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import UsageError
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.generation.continuation import part_seed
from mm_interleaved.generation.events import Finished, ImageDone, ImagePreview, TextDelta
from mm_interleaved.generation.redo import another_seed
from mm_interleaved.generation.settings import settings_for
from tiny import tiny_model, tiny_processor

FEW = {"num_inference_steps": 2, "guidance_scale": 2.0, "max_new_tokens": 12, "seed": 5, "do_sample": True}


@pytest.fixture(scope="module")
def generator():
    """It writes letters alone, so that its texts are the same ids when they are read again."""
    model = tiny_model()
    processor = tiny_processor(model.config)
    with torch.no_grad():
        model.text_head.base.bias.fill_(-50)
        model.text_head.base.bias[processor.vocabulary.encode_text("abcdefghij ")] = 0
    return InterleavedGenerator(model, processor)


@pytest.fixture(scope="module")
def story(generator):
    """Given text, then a text, an image, a text, an image: all of them generated."""
    return generator.generate(Document(id="s", parts=[Text("Pip.")]), layout="T I T I", **FEW)


def same(part, other):
    """To the bit, whatever the part says of itself."""
    if isinstance(part, Text) and isinstance(other, Text):
        return part == other
    if not (isinstance(part, Image) and isinstance(other, Image)):
        return False
    return part.seed == other.seed and np.array_equal(np.asarray(part.load()), np.asarray(other.load()))


def all_same(parts, others):
    return len(parts) == len(others) and all(map(same, parts, others))


@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_a_part_made_again_is_the_next_part_of_what_stands_before_it(generator, story, part):
    layout = "I" if isinstance(story.parts[part], Image) else "T"
    again = generator.redo(story, part, **FEW | {"seed": 8})
    # Twelve tokens are for all texts, and the first has six of them.
    left = {"seed": 8, "max_new_tokens": 12 if part < 2 else 6}
    anew = generator.generate(story.branched(part), layout=layout, **FEW | left)
    assert same(again.parts[part], anew.parts[part])
    assert again.parts[:part] == story.parts[:part] and again.parts[part + 1 :] == story.parts[part + 1 :]
    assert again.parts[part].generated and not same(again.parts[part], story.parts[part])
    assert again.parts[part].seed == part_seed(settings_for(story, {}, {"seed": 8}).seed, part)


@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_the_same_seed_makes_the_same_part(generator, story, part):
    again = generator.redo(story, part, layout="T I T I", **FEW)
    assert same(again.parts[part], story.parts[part])


def test_going_on_equals_generating_the_edited_document_anew(generator, story):
    edited = story.edited(1, "Pip is cold.")
    went_on = generator.redo(edited, 2, rest="again", **FEW)
    anew = generator.generate(edited.branched(2), layout="I T I", **FEW)
    assert all_same(went_on.parts, anew.parts)
    # Without the edit, it is the story that was there.
    assert all_same(generator.redo(story, 2, rest="again", **FEW).parts, story.parts)


def test_a_deleted_part_leaves_the_same_as_if_it_had_never_been(generator, story):
    shorter = story.without(2)
    went_on = generator.redo(shorter, 2, rest="again", **FEW)
    never = Document(id="s", parts=story.parts[:2])
    anew = generator.generate(never, layout="T I", **FEW | {"max_new_tokens": 6})
    assert all_same(went_on.parts, anew.parts)


def test_what_was_given_between_generated_parts_stays(generator, story):
    given = story.inserted(3, "A word of mine.")
    went_on = generator.redo(given, 2, rest="again", **FEW | {"seed": 9})
    assert [type(part) for part in went_on.parts] == [type(part) for part in given.parts]
    assert went_on.parts[3] == Text("A word of mine.")
    assert not same(went_on.parts[2], given.parts[2]) and not same(went_on.parts[5], given.parts[5])
    # The later run is generated from the document with the new image in it.
    before = given.branched(3).edited(2, went_on.parts[2]).inserted(3, "A word of mine.")
    anew = generator.generate(before, layout="T I", **FEW | {"seed": 9, "max_new_tokens": 6})
    assert all_same(went_on.parts[4:], anew.parts[4:])


def test_the_model_may_decide_how_to_go_on(generator, story):
    went_on = generator.redo(story, 3, rest="auto", **FEW)
    anew = generator.generate(story.branched(3), layout="auto", **FEW | {"max_new_tokens": 6})
    assert all_same(went_on.parts, anew.parts)


@pytest.mark.parametrize(
    "more",
    [
        {"context_images": "0"},
        {"context_images": "previous"},
        {"num_candidates": 2},
        {"guidance_scale": 1.0},
        {"negative_prompt": "dark", "context_strength": 0.5},
    ],
)
def test_an_image_keeps_what_it_is_generated_from(generator, story, more):
    story = story.inserted(1, Image(PILImage.new("RGB", (32, 32), (200, 30, 40))))
    settings = FEW | more | {"seed": 11}
    again = generator.redo(story, 5, **settings).parts[5]
    assert same(again, generator.generate(story.branched(5), layout="I", **settings).parts[5])
    # The first of several candidates is the one that would be generated alone.
    assert "num_candidates" in more or not same(
        again, generator.redo(story, 5, **FEW | {"seed": 11}).parts[5]
    )


def test_a_document_keeps_all_that_it_has_besides_its_parts(generator, story):

    rich = replace(
        story, meta={"title": "Pip"}, target=(Text("gold"),), layout="T I T I", generation={"seed": 3}
    )
    for rest in ("keep", "again", "auto"):
        again = generator.redo(rich, 1, rest=rest, num_inference_steps=2, max_new_tokens=12)
        assert replace(again, parts=()) == replace(rich, parts=())
        # The document's own seed counts.
        assert again.parts[1].seed == part_seed(3, 1)


def test_events_are_those_of_a_stream(generator, story):
    events = list(generator.stream_redo(story, 2, rest="again", preview_every=1, **FEW))
    kinds = [type(event) for event in events]
    assert kinds.count(ImageDone) == 2 and kinds.count(Finished) == 1 and kinds[-1] is Finished
    assert TextDelta in kinds and ImagePreview in kinds


def test_in_a_conversation_the_model_makes_what_it_said(generator):
    talk = Document(id="t", parts=[Text("Who?", role="user")])
    talk = generator.generate(talk, layout="T I", **FEW).extended(Text("And?", role="user"))
    again = generator.redo(talk, 2, **FEW | {"seed": 6})
    assert [part.role for part in again.parts] == ["user", "assistant", "assistant", "user"]
    assert same(
        again.parts[2], generator.generate(talk.branched(2), layout="I", **FEW | {"seed": 6}).parts[2]
    )
    with pytest.raises(UsageError, match="part 3 is what 'user' says, expected one of 'assistant'"):
        generator.redo(talk, 3, **FEW)


def test_a_text_leaves_room_for_what_is_kept(generator):
    """The tiny model takes 192 tokens, one a byte."""
    full = Document(id="f", parts=[Text("a" * 90), Text("b", generated=True), Text("c" * 95)])
    again = generator.redo(full, 1, **FEW | {"max_new_tokens": 100})
    assert len(generator.processor.encode(again)) <= 192
    with pytest.raises(UsageError, match="leaves it no room"):
        generator.redo(full.inserted(1, "d" * 10), 2, **FEW)


def test_slips_are_refused(generator, story):
    with pytest.raises(UsageError, match="part: found 5, expected 0 to 4"):
        generator.redo(story, 5, **FEW)
    with pytest.raises(UsageError, match=r"rest: expected keep, again, auto, found 'keeps'.*keep"):
        generator.redo(story, 1, rest="keeps", **FEW)


def test_each_attempt_has_a_seed_of_its_own():
    seeds = [another_seed(0, attempt) for attempt in range(20)] + [another_seed(1, 0)]
    assert len(set(seeds)) == 21 and another_seed(0, 3) == seeds[3]
