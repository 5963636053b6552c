"""The two losses of a step: the same for any split over rows, micro-batches and ranks; options."""

import copy
import dataclasses
import multiprocessing
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file, save_file

from corpora import MemoryCorpus, pair, picture
from mm_interleaved.data.loader import BLANK_ROW, TrainingLoader
from mm_interleaved.data.mixture import Mixture, MixtureSource
from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import UsageError
from mm_interleaved.models.prediction_types import PREDICTION_TYPES
from mm_interleaved.models.targets import TrainingTargets
from mm_interleaved.training.objectives import Objective, ObjectiveConfig, count_targets, min_snr_weight
from tiny import tiny_config, tiny_model, tiny_processor

DOCUMENTS = (
    Document(id="a", parts=(Text("Pip"), picture(1), Text("is"), picture(2))),
    Document(id="b", parts=(picture(3), Text("a lamp"))),
    Document(id="c", parts=(Text("What?", role="user"), Text("seven", role="assistant"))),
    Document(id="d", parts=(Text("To paint:"),), target=(picture(4),)),
)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def original():
    return tiny_model().double()


@pytest.fixture
def model(original):
    # An objective changes the model's configuration.
    return copy.deepcopy(original)


def sequences(processor):
    return [processor.encode(document, eos=True, include_target=True) for document in DOCUMENTS]


def forward(model, batch, noise):
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return model(**fields, targets=TrainingTargets(noise=noise))


def step_losses(objective, batches, numbers, *, ranks=1):
    """The losses of a step and the gradients, each batch a micro-batch."""
    totals = objective.totals(batches)._replace(ranks=ranks)
    objective.model.zero_grad()
    text = image = 0
    for batch, rows in zip(batches, numbers, strict=True):
        losses = objective(batch, rows, totals)
        losses.total.backward()
        text, image = text + losses.text.item(), image + losses.image.item()
    gradients = {n: p.grad.clone() for n, p in objective.model.named_parameters() if p.grad is not None}
    return text, image, gradients


def assert_same(first, second):
    assert first[:2] == pytest.approx(second[:2], rel=1e-9)
    assert first[2].keys() == second[2].keys()
    for name, gradient in first[2].items():
        # The norms of the adapter's stem are float32 in a model of any precision.
        tolerance = 1e-7 if "spatial_prior" in name else 1e-9
        difference = (gradient - second[2][name]).abs().max().item()
        assert difference <= tolerance * (1 + gradient.abs().max().item()), (name, difference)


def test_packed_rows_have_the_losses_and_hidden_states_of_their_documents_alone(model, processor):
    own = sequences(processor)
    objective = Objective(model, ObjectiveConfig(condition_dropout=0.0))
    alone, packed = (processor.collate(rows, target_pixels=True) for rows in (own, [own[:2], own[2:]]))
    noise, _ = objective.sample_noise(alone, range(4))
    with torch.no_grad():
        outputs = [forward(model, batch, noise) for batch in (alone, packed)]
    rows = [(0, 0), (0, len(own[0])), (1, 0), (1, len(own[2]))]
    for index, ((row, start), sequence) in enumerate(zip(rows, own, strict=True)):
        found = outputs[1].hidden[row, start : start + len(sequence)]
        torch.testing.assert_close(found, outputs[0].hidden[index, : len(sequence)], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[0].text_loss, outputs[1].text_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(outputs[0].image_loss, outputs[1].image_loss, rtol=1e-12, atol=0)


def test_micro_batches_of_any_size_give_what_one_big_batch_gives(model, processor):
    own = sequences(processor)
    objective = Objective(model, ObjectiveConfig(synchronizer_dropout=0.5, min_snr_gamma=5.0), seed=3)
    whole = step_losses(objective, [processor.collate(own, target_pixels=True)], [range(4)])
    assert whole[0] > 0 and whole[1] > 0
    for borders in ((0, 1, 2, 3, 4), (0, 3, 4)):
        batches = [processor.collate(own[a:b], target_pixels=True) for a, b in pairwise(borders)]
        split = step_losses(objective, batches, [range(a, b) for a, b in pairwise(borders)])
        assert_same(split, whole)


def test_the_mean_over_ranks_of_their_gradients_is_the_gradient_of_the_whole_batch(model, processor):
    own = sequences(processor)
    objective = Objective(model, ObjectiveConfig())
    batches = [processor.collate(own[i : i + 2], target_pixels=True) for i in (0, 2)]
    whole = step_losses(objective, batches, [range(2), range(2, 4)])
    totals = objective.totals(batches)._replace(ranks=2)
    mean = {}
    for batch, rows in zip(batches, (range(2), range(2, 4)), strict=True):
        model.zero_grad()
        objective(batch, rows, totals).total.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                mean[name] = mean.get(name, 0) + parameter.grad / 2
    assert_same((*whole[:2], mean), whole)


def test_counts_are_added_up_over_ranks(model, processor, tmp_path):
    batch = processor.collate(sequences(processor), target_pixels=True)
    alone = Objective(model, ObjectiveConfig()).totals([batch, batch])
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert Objective(model, ObjectiveConfig()).totals([batch, batch]) == alone
    finally:
        dist.destroy_process_group()
    counts = count_targets(batch)
    assert (alone.text, alone.images) == (2 * counts.text, 2 * counts.images) and alone.micro_batches == 2


def test_what_is_counted_is_what_the_model_counts(processor):
    batch = processor.collate(sequences(processor), target_pixels=True)
    counts = count_targets(batch)
    # a: both images, nothing stands before b's, d's is the target. Text: see `sequence.encode_document`.
    assert counts.images == 3
    words = len("Pip") + 1 + len("is") + 1 + 1
    assert counts.text == words + len("a lamp") + 1 + len("seven") + 1 + 1 + 1
    assert count_targets(dataclasses.replace(batch, target_pixel_values=None)).images == 0


def test_released_losses_are_means_of_micro_batches_over_all_images(processor):
    model = tiny_model(compat="released", condition_dropout=0.0).double()
    own = sequences(processor)
    objective = Objective(model, ObjectiveConfig())
    batches = [processor.collate(own[i : i + 2], target_pixels=True) for i in (0, 2)]
    totals = objective.totals(batches)
    for batch, rows in zip(batches, (range(2), range(2, 4)), strict=True):
        noise, _ = objective.sample_noise(batch, rows)
        output = forward(model, batch, noise)
        losses = objective(batch, rows, totals)
        torch.testing.assert_close(losses.text, output.text_loss / 2)
        torch.testing.assert_close(losses.image, output.image_loss / 2)
        torch.testing.assert_close(losses.total, output.loss / 2)


def every_gradient(objective, batch, numbers):
    objective.model.zero_grad()
    objective(batch, numbers, objective.totals([batch])).total.backward()
    # The autoencoder is never trained.
    return {
        name: parameter.grad
        for name, parameter in objective.model.named_parameters()
        if parameter.requires_grad and not name.startswith("image_decoder.vae")
    }


def loaded(processor, *documents, **more):
    source = MixtureSource(name="s", source=MemoryCorpus((documents,)))
    loader = TrainingLoader(
        Mixture(sources=(source,), max_length=40),
        processor,
        global_batch_size=2,
        micro_batch_size=2,
        seed=0,
        **more,
    )
    return next(iter(loader)).micro_batches[0]


def test_a_batch_without_images_touches_all_parameters_and_changes_nothing(model, processor):
    objective = Objective(model, ObjectiveConfig())
    words = Document(id="w", parts=(Text("Pip finds a lamp."),))
    with_blank = loaded(processor, words)
    without = loaded(processor, words, add_blank_image=False)
    assert with_blank.row_numbers == (0, 1, BLANK_ROW)
    found = every_gradient(objective, with_blank.batch, with_blank.row_numbers)
    expected = every_gradient(objective, without.batch, without.row_numbers)
    assert [name for name, gradient in found.items() if gradient is None] == []
    # Without the blank row, most parts are left out of the step: ranks would wait for each other.
    assert any(gradient is None for gradient in expected.values())
    for name, gradient in found.items():
        reference = torch.zeros_like(gradient) if expected[name] is None else expected[name]
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12, msg=name)


def test_ranks_with_and_without_images_do_not_wait_for_each_other(model, processor, tmp_path):
    """Two processes under DDP, which here demands that every parameter takes part in every step."""
    documents = (Document(id="w", parts=(Text("words alone"),)), DOCUMENTS[0])
    source = MixtureSource(name="s", source=MemoryCorpus((documents,)), shuffle_block=1)
    mixture = Mixture(sources=(source,), max_length=24)
    model.image_decoder.vae.requires_grad_(False)

    def micro_batch(rank, num_ranks):
        size = 2 // num_ranks
        numbers = {"global_batch_size": 2, "micro_batch_size": size, "rank": rank, "num_ranks": num_ranks}
        return next(iter(TrainingLoader(mixture, processor, seed=0, **numbers))).micro_batches[0]

    both = micro_batch(0, 1)
    text, image, expected = step_losses(Objective(model, ObjectiveConfig()), [both.batch], [both.row_numbers])
    assert sorted(both.document_ids) == ["a", "w"] and text > 0 and image > 0

    def work(rank):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{tmp_path}/store",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=60),
        )
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        objective, micro = Objective(model, ObjectiveConfig()), micro_batch(rank, 2)
        losses = objective(micro.batch, micro.row_numbers, objective.totals([micro.batch]), forward=wrapped)
        losses.total.backward()
        save_file(
            {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
            tmp_path / f"{rank}.safetensors",
        )

    model.zero_grad()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        assert process.exitcode == 0
    expected = {name: gradient for name, gradient in expected.items() if "vae" not in name}
    for rank in range(2):
        assert_same((text, image, load_file(tmp_path / f"{rank}.safetensors")), (text, image, expected))


@pytest.mark.parametrize(
    "document",
    [
        Document(id="images", parts=(picture(1), picture(2))),
        pair("pair"),
        Document(id="text", parts=(picture(1), Text("x")), meta={"learn": {"images": "none"}}),
        Document(
            id="image", parts=(Text("x"), picture(1)), meta={"learn": {"text": "none", "images": "last"}}
        ),
    ],
    ids=lambda document: document.id,
)
def test_every_parameter_gets_a_gradient_whatever_counts(model, processor, document):
    micro = loaded(processor, document)
    found = every_gradient(Objective(model, ObjectiveConfig()), micro.batch, micro.row_numbers)
    assert [name for name, gradient in found.items() if gradient is None] == []


def test_a_step_in_which_nothing_counts_has_a_loss_of_zero(model, processor):
    silent = processor.collate(
        [processor.encode(Document(id="u", parts=(picture(1), Text("What?", role="user"))), eos=True)],
        target_pixels=True,
    )
    objective = Objective(model, ObjectiveConfig())
    losses = objective(silent, [0], objective.totals([silent]))
    assert losses.total.item() == losses.text.item() == losses.image.item() == 0


def test_synchronizer_dropout_hides_earlier_images_from_the_painter_alone(model, processor):
    two = Document(id="t", parts=(picture(1), Text("x"), picture(200)))
    other = dataclasses.replace(two, parts=(picture(90), *two.parts[1:]))
    hidden = Objective(model, ObjectiveConfig(synchronizer_dropout=1.0, condition_dropout=1.0))

    def image_loss(objective, document):
        batch = processor(document, eos=True, target_pixels=True)
        return objective(batch, [0], objective.totals([batch])).image.item()

    # Without its context and without earlier images, the painter cannot tell the two documents apart.
    assert image_loss(hidden, two) == image_loss(hidden, other)
    seen = Objective(model, ObjectiveConfig(condition_dropout=1.0))
    assert image_loss(seen, two) != image_loss(seen, other)


def test_condition_dropout_and_weights_go_into_the_models_own_configuration(model, processor):
    settings = {"condition_dropout": 0.3, "text_loss_weight": 2.0, "image_loss_weight": 5.0}
    Objective(model, ObjectiveConfig(**settings, prediction_type="v_prediction"))
    assert {name: getattr(model.config, name) for name in settings} == settings
    assert model.training_scheduler.config.prediction_type == "v_prediction"
    batch = processor([pair("a")] * 150)
    batch = dataclasses.replace(batch, target_pixel_values=torch.zeros(150, 3, 32, 32))
    noise, _ = Objective(model, ObjectiveConfig()).sample_noise(batch, range(150))
    assert noise.drop.double().mean() == pytest.approx(0.3, abs=0.1)


def scheduler(prediction_type, **more):
    settings = tiny_config().scheduler_config | {"prediction_type": prediction_type} | more
    return DDPMScheduler.from_config(settings)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_make_the_error_of_the_clean_latents_count_min_snr_times(prediction_type):
    """arXiv 2303.09556, section 3.4, from the definitions alone: x_t = a x_0 + s e, v = a e - s x_0."""
    schedule = scheduler(prediction_type)
    steps = torch.tensor([0, 10, 100, 400, 700, 999])
    generator = torch.Generator().manual_seed(0)
    clean, noise, wrong = torch.randn(3, 6, 4, 8, 8, generator=generator, dtype=torch.float64)
    product = schedule.alphas_cumprod[steps].double().view(-1, 1, 1, 1)
    a, s = product.sqrt(), (1 - product).sqrt()
    noisy = a * clean + s * noise
    if prediction_type == "epsilon":
        error, predicted_clean = wrong, (noisy - s * (noise + wrong)) / a
    elif prediction_type == "sample":
        error, predicted_clean = wrong, clean + wrong
    else:
        error, predicted_clean = wrong, a * noisy - s * (a * noise - s * clean + wrong)
    weight = min_snr_weight(steps, schedule, 5.0).double()
    weighted = weight * error.pow(2).flatten(1).mean(1)
    snr = (product / (1 - product)).flatten()
    expected = snr.clamp(max=5.0) * (predicted_clean - clean).pow(2).flatten(1).mean(1)
    torch.testing.assert_close(weighted, expected, rtol=1e-4, atol=0)


def test_min_snr_weights_use_the_ratio_of_diffusers_and_survive_pure_noise():
    schedule, steps = scheduler("epsilon"), torch.arange(0, 1000, 37)
    ratio = compute_snr(schedule, steps)
    torch.testing.assert_close(min_snr_weight(steps, schedule, 5.0), ratio.clamp(max=5.0) / ratio)
    for prediction_type, last in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        zero = scheduler(prediction_type, rescale_betas_zero_snr=True)
        weights = min_snr_weight(torch.tensor([0, 999]), zero, 5.0)
        assert torch.isfinite(weights).all() and weights[1] == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_what_the_unet_predicts_is_what_it_learns(model, processor, prediction_type):
    objective = Objective(model, ObjectiveConfig(prediction_type=prediction_type, condition_dropout=0.0))
    batch = processor(DOCUMENTS[3], eos=True, include_target=True, target_pixels=True)
    noise, _ = objective.sample_noise(batch, [0])
    said = []
    hook = model.image_decoder.unet.conv_out.register_forward_hook(lambda *a: said.append(a[-1].detach()))
    loss = objective(batch, [0], objective.totals([batch])).image
    hook.remove()
    latents = model.image_decoder.encode(batch.target_pixel_values.double(), noise.latent_noise)
    product = model.training_scheduler.alphas_cumprod[noise.timestep].double().view(-1, 1, 1, 1)
    targets = {
        "epsilon": noise.noise,
        "v_prediction": product.sqrt() * noise.noise - (1 - product).sqrt() * latents,
        "sample": latents,
    }
    expected = (said[0] - targets[prediction_type]).pow(2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"condition_dropout": 1.5}, r"condition_dropout must lie in \[0, 1\], found 1.5"),
        ({"synchronizer_dropout": -0.1}, "synchronizer_dropout"),
        (
            {"prediction_type": "flow_prediction"},
            "must be epsilon or v_prediction or sample, found 'flow_prediction'",
        ),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be more than 0"),
        ({"image_loss_weight": -1.0}, "image_loss_weight must be 0 or more"),
    ],
)
def test_impossible_objectives_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        ObjectiveConfig(**wrong)


@pytest.mark.parametrize("config", [{}, {"min_snr_gamma": 5.0}])
def test_a_model_that_predicts_what_nobody_knows_is_not_trained(config):
    model = tiny_model()
    # A configuration that is built with it is refused before.
    model.config.scheduler_config = model.config.scheduler_config | {"prediction_type": "flow_prediction"}
    with pytest.raises(UsageError, match=r"prediction_type must be .* found 'flow_prediction'"):
        Objective(model, ObjectiveConfig(**config))
