"""Every fast way of writing words equals the plain one: static, compiled, guessed and checked, in batches."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import (
    ImageError,
    MMInterleavedError,
    SomeFailedError,
    TooLongError,
    UsageError,
)
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.events import Failed, Finished, TextDelta
from mm_interleaved.generation.logits import TextRules
from mm_interleaved.generation.scoring import score_options
from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.generation.text import TextRequest
from mm_interleaved.generation.text_batch import TextBatch
from mm_interleaved.models.cache_layers import GrowingTensor
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.transformers_versions import CHUNKS_CONTINUE
from text_parts import write_text
from tiny import BOS, EOS, tiny_config, tiny_model, tiny_processor

EXACT = 1e-10
CLOSE = 1e-5


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(3, 1, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def request(session, length=11, *, settings=None, generator=None, stop_ids=(EOS,), **named):
    forbidden = tuple(i for i in (EOS, 298, 299) if i == EOS or i not in stop_ids)
    rules = TextRules(stop_ids=stop_ids, max_new_tokens=length, forbidden_ids=forbidden)
    return TextRequest(session, settings or GenerationSettings(**named), rules, generator)


def write(session, length=11, assistant_model=None, **named):
    """Ids, and of how many each run was."""
    runs = write_text(request(session, length, **named), assistant_model)
    assert [run.is_last for run in runs] == [False] * (len(runs) - 1) + [True]
    return [token for run in runs for token in run.ids], [len(run.ids) for run in runs]


def tell(model, pictures, room=None, length=20, **named):
    """A document of two pictures and texts: its ids, hidden states, lengths of runs."""
    session, lengths = InterleavedSession(model, room), []
    session.append_text([BOS, 5, 6])
    for picture in pictures[:2]:
        session.append_image(picture)
        lengths += write(session, length, **named)[1]
    return session.ids, session.read(), lengths


def count_passes(model):
    passes = []
    hook = model.language_model.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes, hook


# ---- Memory that grows in place ----------------------------------------------------------------------


@torch.no_grad()
def test_a_growing_tensor_holds_what_concatenation_would():
    generator = torch.Generator().manual_seed(1)
    growing, expected = GrowingTensor(axis=-2, least_room=4), torch.empty(2, 3, 0, 5)
    moves, place = 0, 0
    for step in range(60):
        new = torch.randn(len(expected), 3, 1 + step % 3, 5, generator=generator)
        expected = torch.cat([expected, new], dim=-2)
        assert torch.equal(growing.append(new), expected)
        if step % 7 == 6:
            growing.crop(2)
            expected = expected[:, :, :-2]
        if step in (20, 40):
            rows = torch.tensor([1, 1, 0])
            growing.select_rows(rows)
            expected = expected[rows]
        moves += growing.whole.data_ptr() != place
        place = growing.whole.data_ptr()
        assert torch.equal(growing.filled, expected)
    assert moves < 16, "most appends write where there is room"


def test_a_growing_tensor_lets_gradients_through_and_bears_both_modes():
    growing = GrowingTensor(axis=0)
    leaves = [torch.ones(1, 2, requires_grad=True) for _ in range(3)]
    for leaf in leaves:
        growing.append(2 * leaf)
    growing.filled.sum().backward()
    assert all(torch.equal(leaf.grad, torch.full((1, 2), 2.0)) for leaf in leaves)
    with torch.inference_mode():
        growing.append(torch.zeros(1, 2))
    growing.append(torch.ones(1, 2))
    assert growing.filled[:, 0].tolist() == [2, 2, 2, 0, 1]


def test_windows_cannot_be_static():
    text = {"model_type": "mistral", "sliding_window": 8}
    config = tiny_config(text_config=tiny_config().text_config.to_dict() | text).text_config
    assert PrefixCache(config).num_tokens == 0
    with pytest.raises(UsageError, match="windows"):
        PrefixCache(config, max_cache_len=32)


# ---- Static ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_static_cache_changes_no_word(model, pictures, num_beams):
    ids, hidden, runs = tell(model, pictures, num_beams=num_beams)
    static = {"cache_implementation": "static", "num_beams": num_beams}
    static_ids, static_hidden, static_runs = tell(model, pictures, room=100, **static)
    assert static_ids == ids
    assert (static_hidden - hidden).abs().max() < EXACT
    # Streamed in both.
    assert num_beams > 1 or (runs, static_runs) == ([4] * 10, [16, 4] * 2)


@torch.no_grad()
def test_options_are_scored_behind_a_static_cache_too(model, pictures):
    scores = []
    for room in (None, 64):
        session = InterleavedSession(model, room)
        session.append_text([BOS, 5])
        session.append_image(pictures[0])
        scores.append(score_options(session, [[9, 10, 11], [12], [13, 14]]))
        assert session.cache.num_tokens == len(session.ids)
    torch.testing.assert_close(*scores, rtol=0, atol=EXACT)


def test_generate_of_the_model_takes_the_names_of_transformers(model, pictures, monkeypatch):
    prompt = {"input_ids": torch.tensor([[BOS, 5, 298, 299, 299, 299, 7]]), "pixel_values": pictures[0]}
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "suppress_tokens": [298, 299]}
    plain = model.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options, cache_implementation="static"), plain)
    assert torch.equal(model.generate(**prompt, **options, prompt_lookup_num_tokens=3), plain)
    with pytest.raises(ValueError, match="'quantized'"):
        model.generate(**prompt, **options, cache_implementation="quantized")
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    assert torch.equal(model.generate(**prompt, **options), plain)
    session = InterleavedSession(model)
    session.append_text([BOS, 5])
    assert len(write(session, 3)[0]) == 3


# ---- Compiled ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_compiled_steps_are_one_graph_and_the_same_words(pictures, monkeypatch):
    graphs, steps, moving = [], [], []
    # One layer is traced in less time than three.
    config = tiny_config()
    model = tiny_model(
        text_config=config.text_config.to_dict() | {"num_hidden_layers": 1},
        text_synchronizer=replace(config.part("text_synchronizer"), every=1),
    )

    def backend(graph, inputs):
        graphs.append(graph)
        for node in graph.graph.find_nodes(op="placeholder"):
            value = node.meta.get("example_value")
            large = isinstance(value, torch.Tensor) and value.numel() > 32
            about = node.meta.get("tensor_dict", {})
            if (
                large
                and not isinstance(value, torch.nn.Parameter)
                and not about.get("_dynamo_static_input_type")
            ):
                moving.append(node.name)
        return lambda *inputs: (steps.append(1), graph.forward(*inputs))[1]

    expected, hidden, _ = tell(model, pictures, length=18)
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    # transformers compiles on GPUs by itself; this is how its own tests do it on a CPU.
    config._compile_all_devices = True
    monkeypatch.setattr(model.generation_config, "compile_config", config)
    for _ in range(2):
        ids, static_hidden, _ = tell(model, pictures, room=100, length=18, cache_implementation="static")
        assert ids == expected
        torch.testing.assert_close(static_hidden, hidden, rtol=0, atol=CLOSE)
    # All but the first word after each picture, which is read by its embedding, and where chunks do not go on
    # the first word of the second run; once for all documents.
    assert len(steps) == 2 * (36 - (2 if CHUNKS_CONTINUE else 4))
    assert len(graphs) == 1
    assert moving == ["l_kwargs_attention_mask_"], "all else CUDA graphs would copy at every word for nothing"


# ---- Guessed and checked -----------------------------------------------------------------------------


@torch.no_grad()
def test_guesses_from_the_prompt_change_no_word_and_save_passes(model, pictures):
    expected = tell(model, pictures)
    passes, hook = count_passes(model)
    with_guesses = tell(model, pictures, prompt_lookup_num_tokens=4)
    hook.remove()
    assert with_guesses[0] == expected[0]
    assert (with_guesses[1] - expected[1]).abs().max() < EXACT
    assert len(passes) < 30, "40 words, of which many were guessed right"


@torch.no_grad()
def test_an_assistant_changes_no_word_however_badly_it_guesses(model, pictures):
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=2,
    )  # fmt: skip
    expected = tell(model, pictures, length=9)
    assistant = LlamaForCausalLM(config).eval()
    ids, hidden, _ = tell(model, pictures, length=9, assistant_model=assistant)
    assert ids == expected[0]
    assert (hidden - expected[1]).abs().max() < EXACT


@torch.no_grad()
def test_an_assistant_that_guesses_well_saves_passes(model):
    assistant = copy.deepcopy(model)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    written, passes = [], []
    for helper in (None, assistant):
        session = InterleavedSession(model)
        session.append_text([BOS, 5, 6])
        counted, hook = count_passes(model)
        written.append(write(session, 16, assistant_model=helper)[0])
        hook.remove()
        passes.append(len(counted))
    assert written[0] == written[1]
    assert passes[1] < passes[0] / 3


def test_guesses_are_for_greedy_text_alone():
    for other in ({"do_sample": True}, {"num_beams": 2}, {"cache_implementation": "static"}):
        with pytest.raises(UsageError, match="prompt_lookup_num_tokens"):
            GenerationSettings(prompt_lookup_num_tokens=4, **other)


def test_an_assistant_of_another_vocabulary_is_refused(model):
    config = LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    with pytest.raises(ValueError, match="99"):
        InterleavedGenerator(model, tiny_processor(model.config), assistant_model=LlamaForCausalLM(config))


# ---- Several at once ---------------------------------------------------------------------------------


def four_sessions(model, pictures, room=None):
    """Of 1 to 16 tokens, with no picture, one in the middle, two, and one at the end."""
    contents = [[[BOS]], [[BOS, 5], 0, [7, 8, 9]], [[BOS, 6, 7, 8], 1, [3], 2, [4, 5]], [[BOS, 9, 9], 2]]
    sessions = []
    for parts in contents:
        session = InterleavedSession(model, room)
        for part in parts:
            if isinstance(part, list):
                session.append_text(part)
            else:
                session.append_image(pictures[part])
        sessions.append(session)
    return sessions


@torch.no_grad()
@pytest.mark.parametrize("room", [None, 96], ids=["dynamic", "static"])
@pytest.mark.parametrize("named", [{}, {"do_sample": True, "top_k": 20, "repetition_penalty": 1.3}])
def test_documents_written_in_one_pass_are_as_if_alone(model, pictures, room, named):
    lengths = (20, 3, 33, 18)
    named = named | {"cache_implementation": "static" if room else "dynamic"}

    def requests(sessions):
        return {
            10 + number: request(
                session, length, generator=torch.Generator().manual_seed(number), stop_ids=(EOS, 298), **named
            )
            for number, (session, length) in enumerate(zip(sessions, lengths, strict=True))
        }

    alone, together = four_sessions(model, pictures, room), four_sessions(model, pictures, room)
    expected = {number: write_text(each) for number, each in requests(alone).items()}
    passes, hook = count_passes(model)
    found = {number: [] for number in expected}
    batch = TextBatch()
    for number, each in requests(together).items():
        batch.add(number, each)
    while len(batch):
        for number, run in batch.step():
            found[number].append(run)
    hook.remove()
    for number, runs in expected.items():
        assert [i for run in found[number] for i in run.ids] == [i for run in runs for i in run.ids]
        assert found[number][-1].stop == runs[-1].stop and found[number][-1].is_last
        assert all(len(run.ids) <= 16 for run in found[number]), "streamed"
    assert len(passes) <= max(lengths) + 4 * 2
    # The documents go on as if nothing had been.
    for one, other in zip(alone, together, strict=True):
        assert one.ids == other.ids
        assert (one.read() - other.read()).abs().max() < EXACT


@torch.no_grad()
def test_logits_of_a_padded_row_are_those_of_the_row_alone(pictures):
    model = tiny_model()
    rows = [[BOS, 5, 298, 299, 299, 299, 7], [BOS, 298, 299, 299, 299]]
    padded = torch.tensor([rows[0], [2, 2, *rows[1]]])
    mask = torch.tensor([[1] * 7, [0, 0, *[1] * 5]])
    options = {
        "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": [298, 299],
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    images = torch.cat([pictures[0], pictures[1]])
    for implementation in ("dynamic", "static"):
        together = model.generate(
            padded, attention_mask=mask, pixel_values=images, cache_implementation=implementation, **options
        )
        for place, row in enumerate(rows):
            alone = model.generate(torch.tensor([row]), pixel_values=images[place : place + 1], **options)
            assert together.sequences[place, 7:].tolist() == alone.sequences[0, len(row) :].tolist()
            for ours, theirs in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(ours[place], theirs[0], rtol=0, atol=CLOSE)


def test_whole_documents_at_once_are_those_continued_alone(pictures):
    model = tiny_model()
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    picture = Image(tiny_picture(pictures[0]))
    documents = [
        Document(id="a", parts=(Text("Hi"),)),
        Document(id="b", parts=(Text("A longer one "), picture, Text("."))),
        Document(id="c", parts=(picture,), layout="T"),
    ]
    named = {"layout": "T I T", "max_new_tokens": 12, "num_inference_steps": 1, "seed": 3}
    expected = [generator.generate(document, **named) for document in documents]
    found, streamed = {}, []
    for place, event in generator.stream_batch(documents, **named):
        if isinstance(event, Finished):
            found[place] = event.document
        elif isinstance(event, TextDelta):
            streamed.append(place)
    for place, document in enumerate(expected):
        assert [part.text for part in texts(found[place])] == [part.text for part in texts(document)]
        assert found[place].parts[-1] == document.parts[-1]
    assert set(streamed) == {0, 1, 2}
    written = generator.generate_batch(documents, batch_size=2, layout="T", max_new_tokens=2)
    assert [(each.id, len(each.parts)) for each in written] == [("a", 2), ("b", 4), ("c", 2)]


def test_a_document_that_fails_does_not_end_its_batch(pictures):
    model = tiny_model()
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    broken = Image(b"no picture at all", name="broken.png")
    documents = [
        Document(id="unreadable", parts=(Text("Hi"), broken)),
        Document(id="good", parts=(Text("Hi"), Image(tiny_picture(pictures[0])))),
        Document(id="too long", parts=(Text("long " * 2000),)),
        Document(id="impossible", parts=(Text("Hi"),), generation={"height": 30}),
        Document(id="also good", parts=(Text("A longer one"),)),
    ]
    named = {"layout": "T I T", "max_new_tokens": 12, "num_inference_steps": 1}
    last, errors = {}, {}
    for place, event in generator.stream_batch(documents, **named):
        assert not isinstance(last.get(place), Finished | Failed), "the last event"
        last[place] = event
    for place, document in enumerate(documents):
        try:
            alone = generator.generate(document, **named)
        except MMInterleavedError as error:
            assert (type(last[place].error), str(last[place].error)) == (type(error), str(error))
            errors[document.id] = type(error)
        else:
            found = last[place].document
            assert [part.text for part in texts(found)] == [part.text for part in texts(alone)]
            assert [part.source for part in found.parts if isinstance(part, Image)] == [
                part.source for part in alone.parts if isinstance(part, Image)
            ]
    assert errors == {"unreadable": ImageError, "too long": TooLongError, "impossible": UsageError}

    with pytest.raises(SomeFailedError, match="3 of 5 documents failed, the first at place 0: ") as failed:
        generator.generate_batch(documents, batch_size=2, layout="T", max_new_tokens=2)
    assert (sorted(failed.value.completed), sorted(failed.value.errors)) == ([1, 4], [0, 2, 3])
    # What the caller asks of a model that cannot do it is wrong for all.
    with pytest.raises(UsageError, match="height"):
        generator.generate_batch(documents[1:2], height=30)


def texts(document):
    return [part for part in document.parts if isinstance(part, Text)]


def tiny_picture(pixels):
    from PIL import Image as PILImage

    return PILImage.fromarray((pixels[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy())
