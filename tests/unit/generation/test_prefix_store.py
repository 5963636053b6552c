"""What is remembered of documents that begin alike: the result is that of reading everything anew."""

from dataclasses import replace
from itertools import takewhile

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.images import to_png
from mm_interleaved.generation import prefix_store
from mm_interleaved.generation.batched import stream_batched
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.events import Finished
from mm_interleaved.generation.prefix_store import PrefixKey, PrefixStore, copy_prefix
from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.models.prefix_cache import PrefixCache
from tiny import BOS, tiny_model, tiny_processor

FAST = {"num_inference_steps": 2, "max_new_tokens": 12, "seed": 3}
CLOSE = 1e-5
MANY = 2**30


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


@pytest.fixture
def generator():
    model = tiny_model()
    return InterleavedGenerator(model, tiny_processor(model.config))


@pytest.fixture
def store(generator):
    return PrefixStore(generator.model, MANY)


def user(*parts):
    return [replace(part, role="user") for part in parts]


def conversation(*parts):
    return Document(id="c", parts=list(parts))


def answered(generator, document, store=None, **settings):
    """The completed document, and what it took."""
    continuation = generator.begin(document, prefixes=store, **FAST, **settings)
    last = [event for _, event in stream_batched([continuation.steps()])][-1]
    assert isinstance(last, Finished)
    return last.document, continuation.usage


def sent_again(document, *parts):
    """As a client sends it: generated images as files, and one more turn."""
    old = [
        replace(part, source=to_png(part.load()), seed=None, generated=False) if isinstance(part, Image)
        else replace(part, seed=None, generated=False)
        for part in document.parts
    ]  # fmt: skip
    return replace(document, parts=tuple(old + user(*parts)))


def assert_same(found, expected):
    for ours, theirs in zip(found.parts, expected.parts, strict=True):
        if isinstance(ours, Text):
            assert ours == theirs
        else:
            one, other = (np.asarray(image.load(), np.int16) for image in (ours, theirs))
            assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_another_turn_costs_that_turn_alone(generator, store, monkeypatch, settings):
    first = conversation(*user(Text("Look at this: "), Image(picture(0))))
    with_answer, usage = answered(generator, first, store, layout="T I", **settings)
    assert usage.reused_tokens == 0
    [entry] = store._entries.values()
    second = sent_again(with_answer, Image(picture(1)), Text(" and then?"))
    expected, _ = answered(generator, second, layout="T I T", **settings)

    seen, read, encode = [], [], generator.model.encode_images
    monkeypatch.setattr(
        generator.model, "encode_images", lambda pixels: (seen.append(len(pixels)), encode(pixels))[1]
    )
    hook = generator.model.language_model.register_forward_pre_hook(
        lambda _, args, named: read.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found, usage = answered(generator, second, store, layout="T I T", **settings)
    hook.remove()
    assert_same(found, expected)
    # All of the first turn but its last image, which nobody had read (and of a text what the tokenizer has
    # otherwise than the model wrote it). The image is known all the same: the two new ones are encoded.
    pairs = zip(entry.ids, generator.processor.encode(second).input_ids.tolist(), strict=False)
    assert usage.reused_tokens == sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) > 30
    assert seen == [1, 1]
    assert max(read) <= usage.prompt_tokens - usage.reused_tokens
    assert (store.statistics.hits, store.statistics.misses) == (1, 1)
    assert store.statistics.tokens == usage.reused_tokens and store.statistics.images == 2
    # One that is longer serves for all that it begins with.
    assert store.statistics.entries == (1 if usage.reused_tokens == len(entry.ids) else 2)


@torch.no_grad()
def test_a_copy_goes_on_to_the_bit_as_its_original(generator):
    model = generator.model
    pixels = torch.rand(3, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def begun():
        session = InterleavedSession(model)
        session.append_text([BOS, 5, 6, 7, 8, 9, 10])
        session.append_image(pixels[0])
        session.append_text([11, 12])
        session.append_image(pixels[1])
        session.read()
        return session

    def go_on(session):
        session.append_text([20, 21])
        session.append_image(pixels[2])
        session.append_text([22])
        return session.read()

    original, copy = begun(), InterleavedSession(model)
    count = len(original.ids)
    copy_prefix(original.cache, count, copy.cache)
    copy.resume(original.ids, original.image_starts, original.images)
    assert torch.equal(go_on(original)[:, count:], go_on(copy)[:, count:])


@torch.no_grad()
def test_a_prefix_may_end_anywhere_but_within_an_image(generator):
    model = generator.model
    slots = model.config.num_slots
    pixels = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    session = InterleavedSession(model)
    session.append_text([BOS, 5, 6])
    for one in pixels:
        session.append_image(one)
        session.append_text([7, 8])
    hidden = session.read()
    key = PrefixKey.of(session.ids, session.image_starts, list(pixels[:, 0]), slots)
    ends = [key.whole(n) for n in range(len(session.ids) + 1)]
    for start in session.image_starts:
        assert ends[start : start + slots + 2] == [start] * (slots + 1) + [start + slots + 1]
    for end in sorted({*ends} - {0}):
        cache = PrefixCache(model.config.text_config)
        copy_prefix(session.cache, end, cache)
        assert cache.num_tokens == end and torch.equal(cache.hidden, hidden[:, :end])
        assert cache.image_start.tolist() == [[s for s in session.image_starts if s < end]]


def test_other_images_and_other_words_are_told_apart(generator, store):
    def asked(*parts):
        return answered(generator, conversation(*user(*parts)), store, layout="T")[1].reused_tokens

    words = Text("Eight bytes and more. ")
    assert asked(words, Image(picture(0)), Text("What?")) == 0
    shared = asked(words, Image(picture(1)), Text("What?"))
    # Up to the image, its start token excluded; the image itself is another.
    whole = generator.processor.encode(conversation(*user(words, Image(picture(1)))))
    assert shared == whole.image_starts[0]
    assert asked(Text("Nothing of this kind."), Image(picture(0))) < shared
    # It was seen elsewhere.
    assert store.statistics.images == 1
    assert asked(words, Image(picture(1)), Text("Why?")) > shared


def test_memory_is_bounded_and_the_least_used_go_first(generator):
    texts = [f"{letter * 20} story" for letter in "abc"]
    store = PrefixStore(generator.model, MANY)

    def ask(text):
        return answered(generator, Document(id="t", parts=[Text(text)]), store, layout="T")[1].reused_tokens

    ask(texts[0])
    one = store.statistics.bytes
    store.max_bytes = 2 * one
    ask(texts[1])
    assert ask(texts[0]) > 0
    ask(texts[2])
    assert store.statistics.entries == 2 and 0 < store.statistics.bytes <= 2 * one
    assert ask(texts[0]) > 0 and ask(texts[2]) > 0
    assert ask(texts[1]) < 8
    store.max_bytes = one // 2
    ask("another one, too large for what is left")
    store.clear()
    ask("another one, too large for what is left")
    assert (store.statistics.entries, store.statistics.bytes) == (0, 0)


def test_other_weights_empty_it(generator, store):
    document = conversation(*user(Text("Look at this: "), Image(picture(0))))
    answered(generator, document, store, layout="T")
    with torch.no_grad():
        generator.model.text_head.base.weight.mul_(1.5)
        generator.model.vision.requires_grad_(False)
        next(generator.model.language_model.parameters()).mul_(1.5)
    found, usage = answered(generator, document, store, layout="T")
    assert usage.reused_tokens == 0
    assert_same(found, answered(generator, document, layout="T")[0])


def test_an_answer_is_whole_though_there_is_no_memory_to_remember_it(generator, store, monkeypatch, caplog):
    asked = conversation(*user(Text("A question that is long enough.")))
    answered(generator, asked, store, layout="T")
    assert store.statistics.entries == 1

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(prefix_store, "copy_prefix", full)
    other = conversation(*user(Text("Something else that is asked.")))
    found, _ = answered(generator, other, store, layout="T")
    assert found.parts[-1].generated and "forgotten" in caplog.text
    assert (store.statistics.entries, store.statistics.bytes) == (0, 0)
