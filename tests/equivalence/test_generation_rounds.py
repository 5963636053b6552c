"""What is generated piece by piece, with everything remembered, equals a recomputation of the whole."""

import pytest
import torch

from mm_interleaved.generation import diffusion, schedulers
from mm_interleaved.generation.logits import TextRules
from mm_interleaved.generation.scoring import score_options
from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.generation.text import TextRequest
from mm_interleaved.tokens.visibility import context_images
from prompt_batches import generate_text_batch
from text_parts import write_text
from tiny import BOS, EOS, tiny_model

EXACT = 1e-10


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(4, 1, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def rules(model, length, **more):
    """Text that may hold anything but images, and that nothing ends."""
    special = (model.config.image_start_token_id, model.config.image_token_id)
    return TextRules(stop_ids=(EOS,), max_new_tokens=length, forbidden_ids=(EOS, *special), **more)


def write(session, length, **settings):
    runs = write_text(TextRequest(session, GenerationSettings(**settings), rules(session.model, length)))
    return [token for run in runs for token in run.ids]


def open_session(model, *parts):
    session = InterleavedSession(model)
    for part in parts:
        if isinstance(part, list):
            session.append_text(part)
        else:
            session.append_image(part)
    return session


@torch.no_grad()
def read_again(session, pictures):
    """The session's document in one pass, nothing remembered."""
    images = torch.cat(pictures[: len(session.image_starts)])
    return session.model(
        input_ids=torch.tensor([session.ids]),
        pixel_values=images.double(),
        image_start=torch.tensor([session.image_starts]),
    )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_hidden_states_of_many_rounds_equal_one_pass(model, pictures, num_beams):
    session = open_session(model, [BOS, 5, 6], pictures[0], [7])
    for picture in pictures[1:]:
        write(session, 6, num_beams=num_beams)
        session.start_image()
        session.conditioning()
        session.finish_image(picture)
    write(session, 3)
    assert len(session.image_starts) == 4
    difference = session.read() - read_again(session, list(pictures)).hidden
    assert difference.abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("rule", ["previous", "all", (0,)])
def test_latents_of_a_later_image_equal_a_full_recomputation(model, pictures, rule):
    session = open_session(model, [BOS, 5, 6], pictures[0], [7], pictures[1])
    write(session, 5)
    session.start_image()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def paint(conditioning, earlier):
        scheduler = schedulers.build_scheduler("ddim", model.config.scheduler_config)
        steps = diffusion.denoise(
            model.image_decoder,
            scheduler,
            noise,
            conditioning,
            earlier,
            num_inference_steps=2,
            guidance_scale=3,
        )
        return [step.latents for step in steps][-1]

    remembered = paint(session.conditioning(), session.earlier_images(rule))

    images = torch.cat(list(pictures[:2])).double()
    starts = torch.tensor([session.image_starts])
    given = starts[:, :2]
    output = model(input_ids=torch.tensor([session.ids]), pixel_values=images, image_start=given)
    zero = torch.zeros(1, dtype=torch.int64)
    conditioning, _ = model.condition(output.hidden, zero, zero, starts[0, -1:])
    one_document = torch.zeros(1, len(session.ids), dtype=torch.int64)
    index = context_images(one_document, starts, rule, model.max_context_images)[-1:]
    recomputed = paint(conditioning, model.project_earlier_images(model.encode_images(images).pyramid, index))
    assert (remembered - recomputed).abs().max() < EXACT


@torch.no_grad()
def test_greedy_text_equals_a_loop_written_by_hand(model, pictures):
    session = open_session(model, [BOS, 5, 6], pictures[0], [7, 8])
    by_hand = open_session(model, [BOS, 5, 6], pictures[0], [7, 8])
    forbidden = list(rules(model, 1).forbidden_ids)
    for _ in range(10):
        logits = read_again(by_hand, list(pictures)).logits[0, -1]
        logits[forbidden] = -torch.inf
        by_hand.append_text([int(logits.argmax())])
    assert write(session, 10) == by_hand.ids[-10:]
    assert session.ids == by_hand.ids


def test_beams_equal_those_of_transformers_without_our_session(model, pictures):
    session = open_session(model, [BOS, 5, 6], pictures[0], [7, 8])
    prompt = list(session.ids)
    session.read()  # a cache that is already full must make no difference
    expected = model.generate(
        torch.tensor([prompt]),
        pixel_values=pictures[0].double(),
        num_beams=4,
        max_new_tokens=9,
        length_penalty=0.5,
        eos_token_id=EOS,
        suppress_tokens=list(rules(model, 1).forbidden_ids),
        do_sample=False,
    )
    assert write(session, 9, num_beams=4, length_penalty=0.5) == expected[0].tolist()[-9:]


def test_penalty_and_minimum_look_at_the_new_words_alone(model, pictures):
    # Words of the prompt are free; a repeated new word is not.
    plain = write(open_session(model, [BOS, 5, 6], pictures[0], [7]), 8)
    penalised = write(open_session(model, [BOS, 5, 6], pictures[0], [7]), 8, repetition_penalty=50.0)
    assert plain[0] == penalised[0]
    assert len(set(penalised)) == 8


@torch.no_grad()
def test_option_scores_equal_one_pass_each_and_leave_the_session_alone(model, pictures):
    session = open_session(model, [BOS, 5, 6], pictures[0])
    options = [[9, 10, 11], [12], [13, 14, 15, 16], [9]]
    scores = score_options(session, options)
    for option, score in zip(options, scores, strict=True):
        whole = open_session(model, [BOS, 5, 6], pictures[0], option)
        log_probs = read_again(whole, list(pictures)).logits[0].log_softmax(-1)
        first = len(whole.ids) - len(option) - 1
        expected = sum(log_probs[first + i, token] for i, token in enumerate(option))
        assert abs(score - expected) < 1e-5
    assert torch.equal(scores, score_options(session, options))
    session.append_text([9, 10])
    assert (session.read() - read_again(session, list(pictures)).hidden).abs().max() < EXACT


@pytest.mark.parametrize("compat", [None, "released"])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("penalty", [1.0, 50.0])
def test_a_left_padded_batch_equals_its_rows_alone(model, pictures, compat, num_beams, penalty):
    settings = GenerationSettings(num_beams=num_beams, compat=compat, repetition_penalty=penalty)
    limits = rules(model, 6)
    slots = [model.config.image_start_token_id] + [model.config.image_token_id] * model.config.num_slots
    rows = [[BOS, 5, *slots, 6], [BOS, *slots, 7, 8, 9, 10]]
    length = max(len(row) for row in rows)
    together = generate_text_batch(
        model,
        torch.tensor([[2] * (length - len(row)) + row for row in rows]),
        torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        torch.cat(list(pictures[:2])).double(),
        torch.tensor([[length - len(row) + row.index(slots[0])] for row in rows]),
        settings,
        limits,
    ).ids
    for line, row, picture in zip(together, rows, pictures[:2], strict=True):
        session = open_session(
            model, row[: row.index(slots[0])], picture, row[row.index(slots[0]) + len(slots) :]
        )
        runs = write_text(TextRequest(session, settings, limits))
        expected = [token for run in runs for token in run.ids]
        assert line.tolist()[int(compat is not None) :][: len(expected)] == expected


@torch.no_grad()
def test_the_loop_reads_like_the_formula_of_guidance(model, pictures):
    session = open_session(model, [BOS, 5], pictures[0], [7])
    session.start_image()
    decoder, earlier = model.image_decoder, session.earlier_images("all")
    wanted, unwanted = session.conditioning(), decoder.negative_conditioning
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scheduler = schedulers.build_scheduler("ddpm", model.config.scheduler_config)
    steps = diffusion.denoise(
        decoder, scheduler, latents, wanted, earlier, num_inference_steps=3, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    result = [step.latents for step in steps][-1]

    by_hand, generator = latents, torch.Generator().manual_seed(4)
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        without = decoder.predict(by_hand, timestep, unwanted, earlier)
        noise = without + 3.0 * (decoder.predict(by_hand, timestep, wanted, earlier) - without)
        by_hand = scheduler.step(noise, timestep, by_hand, generator=generator).prev_sample
    assert (result - by_hand).abs().max() < EXACT


@torch.no_grad()
def test_strength_zero_equals_no_earlier_images_and_one_is_the_default(model, pictures):
    session = open_session(model, [BOS, 5], pictures[0], [7])
    session.start_image()
    conditioning, earlier = session.conditioning(), session.earlier_images("all")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def paint(earlier, **options):
        scheduler = schedulers.build_scheduler("ddim", model.config.scheduler_config)
        decoder = model.image_decoder
        steps = diffusion.denoise(
            decoder, scheduler, latents, conditioning, earlier, num_inference_steps=1, **options
        )
        return next(steps).latents

    assert torch.allclose(paint(earlier, context_strength=0.0), paint(None), atol=EXACT, rtol=0)
    assert not torch.allclose(paint(earlier), paint(None), atol=1e-6)
    assert torch.equal(paint(earlier), paint(earlier, context_strength=1.0))


@torch.no_grad()
def test_images_denoised_together_equal_images_denoised_alone(model, pictures):
    session = open_session(model, [BOS, 5], pictures[0], [7])
    session.start_image()
    conditioning, earlier = session.conditioning(), session.earlier_images("all")

    def paint(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        steps = diffusion.denoise(
            model.image_decoder,
            schedulers.build_scheduler("ddpm", model.config.scheduler_config),
            diffusion.initial_latents(model.image_decoder, 24, 40, generators),
            conditioning.expand(len(seeds), -1, -1),
            earlier.repeat(len(seeds)),
            num_inference_steps=2,
            guidance_scale=2.0,
            generator=generators,
        )
        return [step.latents for step in steps][-1]

    assert (paint([1, 2]) - torch.cat([paint([1]), paint([2])])).abs().max() < EXACT
