"""Time steps of every sampler, for every number of them: right, or refused before the first one."""

import pytest
import torch

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import UsageError
from mm_interleaved.generation import diffusion, schedulers
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.settings import DISTILLED, MAX_DISTILLED_STEPS, SCHEDULERS
from mm_interleaved.models.prediction_types import PREDICTION_TYPES
from tiny import tiny_config, tiny_model, tiny_processor

LEADING = tiny_config().scheduler_config
SPACINGS = {
    "leading": LEADING,
    "leading, no offset": LEADING | {"steps_offset": 0},
    "linspace": LEADING | {"timestep_spacing": "linspace"},
    "trailing": LEADING | {"timestep_spacing": "trailing"},
    "a library's own": {k: v for k, v in LEADING.items() if k != "timestep_spacing"},
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_number_of_steps_goes_from_noise_to_the_picture(name, spacing):
    config = SPACINGS[spacing]
    most = MAX_DISTILLED_STEPS if name in DISTILLED else 1000
    # Time steps come from one and the same formula in all but one of them, and an own one in the other.
    is_full = spacing == "leading" and name in ("ddpm", "unipc")
    counts = {*range(1, most + 1, 1 if is_full else 13), 61, 501, 998, 999, 1000}
    for count in (count for count in counts if count <= most):
        steps = schedulers.scheduler_for(name, config, count).timesteps.double()
        assert len(steps) == count
        assert steps[-1] >= 0 and steps[0] <= 999 and bool((steps.diff() < 0).all()), count
        assert 999 - steps[0] <= 1000 / count + 50, f"{count} steps begin at {steps[0]}"


@pytest.mark.parametrize("trained", [1, 2, 8, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_short_schedules_are_gone_through_or_refused(name, trained):
    done = set()
    for count in range(1, trained + 3):
        try:
            steps = schedulers.scheduler_for(
                name, LEADING | {"num_train_timesteps": trained}, count
            ).timesteps
        except ValueError as error:
            assert f"cannot do {count} of {trained} steps" in str(error) and "\n" not in str(error)
            continue
        assert len(steps) == count and steps.min() >= 0 and steps.max() <= trained - 1
        done.add(count)
    expected = set() if name in DISTILLED and trained < MAX_DISTILLED_STEPS else set(range(1, trained + 1))
    assert done == expected


def test_usual_numbers_keep_the_spacing_that_the_model_was_published_with():
    for count in (1, 2, 8, 20, 25, 30, 50, 100, 250):
        ours = schedulers.scheduler_for("ddpm", LEADING, count).timesteps
        stock = schedulers.build_scheduler("ddpm", LEADING)
        stock.set_timesteps(count)
        assert torch.equal(ours, stock.timesteps)


def test_the_published_rule_keeps_its_spacing_wherever_it_begins_but_not_beyond_the_end():
    assert schedulers.scheduler_for("ddpm", LEADING, 501, is_published=True).timesteps[0] == 501
    with pytest.raises(ValueError, match="cannot do 1000 of 1000 steps"):
        schedulers.scheduler_for("ddpm", LEADING, 1000, is_published=True)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_prediction_of_any_kind_ends_in_the_picture(name, prediction_type):
    """A U-Net that knows the clean latents: the sampler must arrive at them, whatever it was told."""
    from mm_interleaved.models.losses import denoising_target

    scheduler = schedulers.scheduler_for(name, LEADING | {"prediction_type": prediction_type}, 20)
    training = schedulers.build_scheduler("ddpm", LEADING | {"prediction_type": prediction_type})
    clean = torch.linspace(-1, 1, 16).view(1, 1, 4, 4).double()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(clean.shape, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        seen = scheduler.scale_model_input(sample, step).double()
        product = training.alphas_cumprod[step.long()].double()
        noise = (seen - product.sqrt() * clean) / (1 - product).sqrt()
        target = denoising_target(training, clean, noise, step.long()[None])
        more = {"generator": generator} if name not in ("unipc",) else {}
        sample = scheduler.step(target, step, sample, **more).prev_sample.double()
    assert (sample - clean).abs().max() < 0.15


@pytest.mark.parametrize("settings", [{}, {"report_error": True, "num_inference_steps": 2}])
def test_a_number_that_no_sampler_can_do_is_refused_before_anything_runs(settings, monkeypatch):
    own = {"num_inference_steps": 9, "scheduler": "euler"}
    model = tiny_model(scheduler_config=LEADING | {"num_train_timesteps": 8}, generation_settings=own)
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    monkeypatch.setattr(model, "forward", None)
    field = "report_error" if settings else "num_inference_steps"
    with pytest.raises(UsageError, match=f"{field}: .* cannot do 9 of 8 steps") as refused:
        generator.generate(Document(id="d", parts=[Text("Hi")]), layout="T I", **settings)
    assert refused.value.field == field


def test_a_scheduler_of_ones_own_is_looked_at_too():
    model = tiny_model()
    scheduler = schedulers.build_scheduler("ddpm", LEADING)
    with pytest.raises(ValueError, match="found 1000 time steps from 1000 to 1, expected 1000 that fall"):
        next(
            diffusion.denoise(
                model.image_decoder, scheduler, torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 16), None,
                num_inference_steps=1000,
            )
        )  # fmt: skip


def test_a_prediction_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="prediction_type: found 'flow_prediction', expected one of epsilon"):
        schedulers.build_scheduler("ddim", LEADING | {"prediction_type": "flow_prediction"})
