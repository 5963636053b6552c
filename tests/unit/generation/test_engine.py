"""The interleaved loop on a tiny model: what comes out, in which order, and where it ends."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, ModelFileError, NumericalError, TooLongError, UsageError
from mm_interleaved.generation.continuation import part_seed
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.events import Finished, ImageDone, ImagePreview, ImageStarted, TextDelta
from mm_interleaved.generation.settings import SCHEDULERS, GenerationSettings, settings_for
from mm_interleaved.generation.text import TextRun
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from tiny import BOS, EOS, PAD, tiny_model, tiny_processor

FAST = {"num_inference_steps": 1, "guidance_scale": 1.0, "max_new_tokens": 6}
A_LETTER = 70


@pytest.fixture(scope="module")
def generator():
    model = tiny_model()
    return InterleavedGenerator(model, tiny_processor(model.config))


@pytest.fixture
def says(generator):
    """Makes the model want one token above all others."""
    bias = generator.model.text_head.base.bias
    before = bias.detach().clone()

    def wish(token: int, strength: float = 1000.0):
        with torch.no_grad():
            bias.copy_(before)
            bias[token] += strength

    yield wish
    with torch.no_grad():
        bias.copy_(before)


@pytest.fixture(scope="module")
def picture():
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def document(picture):
    return Document(id="d", parts=[Text("Hi"), Image(picture), Text(" you")])


def letters(document):
    return " ".join("T" if isinstance(part, Text) else "I" for part in document.parts if part.generated)


def pixels(document):
    return [np.asarray(image.source) for image in document.images if image.generated]


@pytest.mark.parametrize("layout", ["T I T", "T T I"])
def test_a_layout_is_always_satisfied(generator, document, layout):
    events = list(generator.stream(document, layout=layout, **FAST))
    assert isinstance(events[-1], Finished) and events[-1].reason == "layout"
    completed = events[-1].document
    assert completed.parts[: len(document.parts)] == document.parts
    assert letters(completed) == layout
    assert sum(isinstance(event, ImageDone) for event in events) == layout.count("I")
    for before, after in pairwise(events):
        assert isinstance(after, ImageDone) == isinstance(before, ImageStarted)
    written = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert written == "".join(
        part.text for part in completed.parts if isinstance(part, Text) and part.generated
    )


def test_a_layout_holds_even_if_the_model_would_rather_stop(generator, document, says):
    says(EOS)
    assert letters(generator.generate(document, layout="T I", **FAST)) == "T I"
    says(generator.model.config.image_start_token_id)
    assert letters(generator.generate(document, layout="T T", **FAST)) == "T T"


def test_the_model_ends_the_document_itself(generator, document, says):
    says(EOS)
    events = list(generator.stream(document, **FAST))
    assert events == [Finished("stop", document)]


def test_images_end_at_their_number(generator, document, says):
    says(generator.model.config.image_start_token_id)
    last = list(generator.stream(document, max_images=2, **FAST))[-1]
    assert (last.reason, letters(last.document)) == ("max_images", "I I")


def test_without_images_the_model_goes_on_in_words(generator, document, says):
    says(generator.model.config.image_start_token_id)
    last = list(generator.stream(document, max_images=0, min_new_tokens=6, **FAST))[-1]
    assert (last.reason, letters(last.document)) == ("length", "T")


def test_words_end_at_their_number(generator, document, says):
    says(A_LETTER)
    for beams in (1, 2):
        last = list(generator.stream(document, num_beams=beams, **FAST))[-1]
        assert last.reason == "length"
        assert len(last.document.parts[-1].text) == FAST["max_new_tokens"]


@pytest.mark.parametrize(
    ("token", "more"),
    [
        (BOS, {}),
        (PAD, {"num_beams": 2}),
        (299, {}),
        (299, {"do_sample": True, "temperature": 5.0}),
        (270, {}),
    ],
)
def test_special_and_unused_ids_never_become_text(generator, document, says, token, more):
    says(token)
    completed = generator.generate(document, layout="T", min_new_tokens=4, **FAST, **more)
    assert len(generator.processor.vocabulary.encode_text(completed.parts[-1].text)) >= 4


@pytest.mark.parametrize("parts", [[Text("Pip finds a lamp.")], [], "image"])
def test_any_prompt_will_do(generator, picture, parts):
    prompt = Document(id="p", parts=[Image(picture)] if parts == "image" else parts)
    assert letters(generator.generate(prompt, layout="T I", **FAST)) == "T I"


def test_a_conversation_is_answered_by_the_assistant(generator, picture):
    prompt = Document(id="c", parts=[Image(picture, role="user"), Text("What is it?", role="user")])
    completed = generator.generate(prompt, layout="T I", **FAST)
    assert [part.role for part in completed.parts[2:]] == ["assistant", "assistant"]


# ---- Runs ----


@pytest.mark.parametrize("length", [1, 2, 3, 5, 99])
@pytest.mark.parametrize("tail", [b"", b"\xe4", b"\xe4a", b"\xf0\x9f\x98\x80\xc3"])
def test_text_does_not_depend_on_how_its_ids_came_in_runs(
    llama_tokenizer, generator, monkeypatch, length, tail
):
    config = generator.model.config
    special = {"image_start": 340, "image": 341, "bos": 1, "eos": 2, "pad": 339}
    processor = MMInterleavedProcessor(
        llama_tokenizer, image_size=32, target_size=32, num_slots=config.num_slots, special_ids=special
    )
    model = tiny_model(
        vocab_size=342, bos_token_id=1, eos_token_id=2, pad_token_id=339, image_start_token_id=340,
        image_token_id=341,
    )  # fmt: skip
    pieces = [f"<0x{byte:02X}>" for byte in "é".encode() + tail]
    ids = llama_tokenizer.convert_tokens_to_ids(["a", *pieces, "b"])

    def in_runs(request, written, assistant_model=None):
        run = ids[len(written) : len(written) + length]
        request.session.accept(run)
        return TextRun(run, None, len(written) + length >= len(ids))

    monkeypatch.setattr("mm_interleaved.generation.text_batch.write_run", in_runs)
    stream = InterleavedGenerator(model, processor).stream(Document(id="d", parts=[Text("a")]), layout="T")
    events = list(stream)
    text = processor.vocabulary.decode(ids)
    assert events[-1].document.parts[-1].text == text
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == text


# ---- Seeds ----


def test_a_seed_decides_everything_and_the_global_generator_nothing(generator, document):
    settings = GenerationSettings(layout="T I", do_sample=True, **FAST)
    other_seed = replace(settings, seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generator.generate(document, settings)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second = generator.generate(document, settings)
    other = generator.generate(document, other_seed)
    assert first.parts[3] == second.parts[3] != other.parts[3]
    assert np.array_equal(pixels(first)[0], pixels(second)[0])
    assert not np.array_equal(pixels(first)[0], pixels(other)[0])


def test_two_sittings_equal_one(generator, document):
    # Seeds go by the place in the document, and a generated image is seen through its 8 bits.
    settings = GenerationSettings(layout="I I", **FAST)
    at_once = generator.generate(document, settings)
    first = generator.generate(document, GenerationSettings(layout="I", **FAST))
    then = generator.generate(first, GenerationSettings(layout="I", **FAST))
    assert [part.seed for part in then.parts] == [part.seed for part in at_once.parts]
    for ours, theirs in zip(pixels(then), pixels(at_once), strict=True):
        assert np.array_equal(ours, theirs)


def test_of_several_candidates_the_first_is_the_one_generated_alone(generator, document, monkeypatch):
    settings = {"layout": "I", "seed": 3, **FAST}
    alone = generator.generate(document, **settings)
    seen = []

    def keep_all(continuation, pictures, text_ids):
        seen.extend(pictures)
        assert generator.processor.vocabulary.decode(text_ids) == " you"
        [image] = yield from continuation._encode(continuation._pixels(pictures[2]))
        return 2, image

    monkeypatch.setattr("mm_interleaved.generation.continuation.Continuation._best_for", keep_all)
    chosen = generator.generate(document, num_candidates=3, **settings)
    assert np.abs(np.asarray(seen[0]).astype(int) - pixels(alone)[0]).max() <= 1
    assert np.array_equal(pixels(chosen)[0], np.asarray(seen[2]))
    assert chosen.parts[-1].seed != alone.parts[-1].seed


def test_the_candidate_that_explains_the_text_before_it_best_is_kept(generator, document, monkeypatch):
    likelihoods = iter([-5.0, -2.0, -3.0])
    asked = []

    def score(session, options):
        asked.append((list(session.ids[:2]), options))
        return torch.tensor([next(likelihoods)])

    monkeypatch.setattr("mm_interleaved.generation.continuation.score_options", score)
    completed = generator.generate(document, layout="I", num_candidates=3, seed=3, **FAST)
    own = part_seed(settings_for(document, {}, {"seed": 3}).seed, 3)
    assert completed.parts[-1].seed == part_seed(own, 1)
    vocabulary = generator.processor.vocabulary
    assert asked == [([BOS, vocabulary.image_start], [vocabulary.encode_text(" you")])] * 3


# ---- Limits ----


@pytest.fixture(scope="module")
def short():
    """A context of 24 tokens, and at most two images."""
    model = tiny_model(
        text_config={**SHORT_TEXT, "max_position_embeddings": 24},
        text_synchronizer={**tiny_model().config.text_synchronizer, "max_images": 3},
    )
    return InterleavedGenerator(model, tiny_processor(model.config))


SHORT_TEXT = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": PAD,
}  # fmt: skip


@pytest.mark.parametrize("layout", ["auto", "I I I", "T I T I T I"])
@pytest.mark.parametrize("prompt", ["", "twenty-three characters"])
def test_the_context_ends_generation_without_an_exception(short, layout, prompt, caplog):
    with torch.no_grad():
        short.model.text_head.base.bias[A_LETTER] = 1000
    given = Document(id="s", parts=[Text(prompt)] if prompt else [])
    limits = {**FAST, "max_new_tokens": 1000}
    last = list(short.stream(given, layout=layout, **limits))[-1]
    assert last.reason == "length"
    assert len(short.processor.encode(last.document)) <= 24
    assert len(last.document.images) <= 2
    if layout != "auto":
        made, wanted = len(last.document.parts) - len(given.parts), len(layout.split())
        assert f"'s': layout: the first {made} of its {wanted} parts were made" in caplog.text


def test_a_document_that_is_too_long_is_refused_with_both_numbers(short, picture):
    with pytest.raises(TooLongError, match="25 tokens, expected at most 24"):
        short.stream(Document(id="s", parts=[Text("twenty-four characters!!")]))
    with pytest.raises(TooLongError, match="3 images, expected at most 2"):
        short.stream(Document(id="s", parts=[Image(picture)] * 3))


# ---- Settings ----


def test_the_documents_own_settings_hold_and_arguments_outrank_them(generator, picture):
    own = Document(id="o", parts=[Text("Hi")], layout="I", generation={**FAST, "width": 24})
    assert pixels(generator.generate(own))[0].shape == (32, 24, 3)
    assert pixels(generator.generate(own, width=40, height=16))[0].shape == (16, 40, 3)
    wrong = Document(id="o", parts=[Text("Hi")], generation={"widht": 24})
    with pytest.raises(InputError, match="widht"):
        generator.generate(wrong)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"width": 30}, "multiples of 4"),
        ({"widht": 32}, "width"),
        ({"layout": "T Q"}, "'Q' as part 2"),
        ({"num_inference_steps": 1000, "scheduler": "heun"}, "scheduler"),
        ({"num_inference_steps": 51, "scheduler": "lcm"}, "at most 50"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(generator, document, settings, named):
    with pytest.raises(UsageError, match=named):
        generator.stream(document, **settings)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_by_name(generator, document, scheduler):
    settings = {**FAST, "num_inference_steps": 2, "scheduler": scheduler, "layout": "I"}
    events = list(generator.stream(document, preview_every=1, **settings))
    assert [type(event) for event in events] == [ImageStarted, ImagePreview, ImageDone, Finished]
    assert events[1].step == 1


def test_every_image_argument_changes_the_image(generator, document):
    base = {**FAST, "layout": "I", "guidance_scale": 4.0, "seed": 1, "context_images": "previous"}
    plain = pixels(generator.generate(document, **base))[0]
    changes = [{"negative_prompt": "blur"}, {"guidance_scale": 2.0}, {"context_strength": 0.0}, {"seed": 2}]
    for change in changes:
        assert not np.array_equal(plain, pixels(generator.generate(document, **{**base, **change}))[0]), (
            change
        )
    assert np.array_equal(plain, pixels(generator.generate(document, **{**base, "context_images": "0"}))[0])


def test_a_model_without_an_image_decoder_only_writes(document):
    model = tiny_model(
        unet_config=None, vae_config=None, conditioning_resampler=None, image_synchronizer=None
    )
    writer = InterleavedGenerator(model, tiny_processor(model.config))
    assert letters(writer.generate(document, min_new_tokens=3, **FAST)) == "T"
    with pytest.raises(UsageError, match="generates no images"):
        writer.generate(document, layout="T I")


def test_numbers_that_are_none_are_reported(generator, document, says):
    says(A_LETTER, float("nan"))
    with pytest.raises(NumericalError, match="next token"):
        generator.generate(document, layout="T", **FAST)


def test_a_processor_of_another_model_is_refused(generator):
    other = tiny_model(vocab_size=310)
    with pytest.raises(
        ModelFileError, match=r"another model's: special_ids\.image_start: found 298, expected 308"
    ):
        InterleavedGenerator(other, generator.processor)


def test_the_model_is_still_a_model(generator):
    assert isinstance(generator.model, MMInterleavedForConditionalGeneration)
    assert not generator.model.training


def test_context_images_that_are_not_there_are_warned_of(generator, document, caplog):
    generator.generate(document, layout="I I", context_images="0,1", **FAST)
    assert not caplog.text
    generator.generate(document, layout="I I", context_images="0,2,7", **FAST)
    assert "'d': context_images: nothing has the index 2, 7; 2 images stood before" in caplog.text


def test_images_that_the_decoder_no_longer_sees_are_warned_of(generator, document, caplog):
    limit = generator.model.max_context_images
    layout = " ".join("I" * (limit + 1))
    generator.generate(document, layout=layout, **FAST)
    assert not caplog.text  # the model's own rule is no news
    generator.generate(document, layout=layout, context_images="all", **FAST)
    warning = f"image {limit + 1} is generated from the newest {limit} of the {limit + 1} images before it"
    assert warning in caplog.text and caplog.text.count("generated from") == 1


@pytest.mark.parametrize("given", ["A red dog.", ["A red dog."], {"content": "A red dog."}, None])
def test_what_is_no_document_is_refused_with_what_is_expected(generator, given):
    with pytest.raises(
        TypeError, match=rf"expected a Document, found {type(given).__name__}; write Document"
    ):
        generator.generate(given, seed=0)
