"""Scores of options: one by one or side by side, whatever the attention; the prefix is read once."""

import pytest
import torch

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.scoring import TOKENS_AT_ONCE, likelihoods, score_options
from mm_interleaved.generation.session import InterleavedSession
from tiny import BOS, tiny_model, tiny_processor


def session_of(model):
    session = InterleavedSession(model)
    session.append_text([BOS, 5, 6])
    session.append_image(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double())
    session.append_text([7, 8])
    return session


OPTIONS = [[10 + (3 * number + 5 * place) % 200 for place in range(number % 13)] for number in range(60)]
"""Of none to twelve tokens."""


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_options_side_by_side_equal_options_alone(attention):
    model = tiny_model().double()
    model.set_attn_implementation(attention)
    assert sum(map(len, OPTIONS)) > TOKENS_AT_ONCE
    batches = []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, arguments, named: batches.append(tuple(named["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    session = session_of(model)
    scores = score_options(session, OPTIONS)
    hook.remove()
    # The document once; then each token of each option but its last; rows of one, so the cache is not copied.
    assert {rows for rows, _ in batches} == {1}
    assert sum(tokens for _, tokens in batches) == len(session.ids) + sum(max(0, len(o) - 1) for o in OPTIONS)
    assert (len(batches) < 5) == (attention == "sdpa")

    for option, score in zip(OPTIONS, scores, strict=True):
        whole = session_of(model)
        if option:
            whole.append_text(option)
        log_probs = model.predict_text(whole.read())[0].log_softmax(-1)
        first = len(session.ids) - 1
        expected = sum(float(log_probs[first + place, token]) for place, token in enumerate(option))
        assert float(score) == pytest.approx(expected, abs=2e-5)


@torch.no_grad()
def test_a_session_is_as_before_after_its_options_were_scored():
    model = tiny_model().double()
    scored, untouched = session_of(model), session_of(model)
    score_options(scored, OPTIONS[:9])
    for session in (scored, untouched):
        session.append_text([9])
    assert (scored.read() - untouched.read()).abs().max() < 1e-12
    assert torch.equal(score_options(scored, OPTIONS[:9]), score_options(scored, OPTIONS[:9]))
    assert score_options(scored, []).shape == (0,)


@torch.no_grad()
def test_a_text_is_greedy_if_each_of_its_tokens_is_the_likeliest():
    model = tiny_model(7).double()  # its likeliest tokens here are text
    session, written = session_of(model), []
    for _ in range(3):
        written.append(int(model.predict_text(session.read()[:, -1])[0].argmax()))
        session.append_text(written[-1:])
    first, second, third = written
    options = [[], [first], written, [first + 1, second], [first, second, third + 1], [first, second + 1]]
    found = likelihoods(session_of(model), options).is_greedy
    assert found.tolist() == [True, True, True, False, False, False]


def test_a_text_without_its_end_is_at_least_as_likely_as_with_it():
    model = tiny_model()
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    document, texts = Document(id="d", parts=[Text("Hi")]), ["", "a", "bc", "a"]
    open_ended = [score for score, _ in generator.likelihoods(document, texts)]
    ended = generator.score_options(document, texts)
    assert open_ended[0] == 0 and open_ended[1] == pytest.approx(open_ended[3], abs=1e-5)
    assert all(with_end < without for with_end, without in zip(ended, open_ended, strict=True))


def test_candidates_are_encoded_once_each():
    model = tiny_model()
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    encoded = []
    model.vision.register_forward_pre_hook(lambda module, arguments: encoded.append(len(arguments[0])))
    document = Document(id="d", parts=[Text("Hi")])
    generator.generate(document, layout="I I", num_candidates=3, num_inference_steps=1, guidance_scale=1.0)
    # Three, in one pass, to choose from for the text before them; of the three after an image, which have no
    # text between them, the first.
    assert encoded == [3, 1]
