"""The two objectives of a training step: next token and denoising, each a mean over all that counts in it.

The mean is taken over the whole global batch: targets are counted over all micro-batches and ranks before the
first backward pass, so that two ranks, or two micro-batches, give what one big batch gives. With
`compat="released"` each micro-batch is a mean of its own, images that do not count included, as published.
Letters: I images of a micro-batch, in row-major order.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mm_interleaved.errors import UsageError
from mm_interleaved.models.denoising import DiffusionNoise
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.prediction_types import PREDICTION_TYPES
from mm_interleaved.models.targets import TrainingTargets
from mm_interleaved.tokens.batch import Batch
from mm_interleaved.tokens.visibility import NO_IMAGE, announced_images
from mm_interleaved.training.config import ObjectiveConfig

_ROW_FACTOR = 1_000_003
_SEED_LIMIT = 2**63


class TargetCounts(NamedTuple):
    """How much counts in each loss."""

    text: int
    """Tokens that are predicted."""
    images: int
    """Images that are denoised."""


class StepTotals(NamedTuple):
    """What the losses of one optimizer step are divided by."""

    text: float
    images: float
    micro_batches: int
    """Of this rank."""
    ranks: int


class StepLosses(NamedTuple):
    """One micro-batch's contribution to the losses of its step.

    `text` and `image`, added up over micro-batches and ranks, are the step's means. `total` is what to call
    backward on: its gradients, added up over micro-batches and averaged over ranks (as DDP and FSDP do), are
    those of the weighted sum of the two means.
    """

    total: Tensor
    text: Tensor
    image: Tensor


class Objective:
    """Losses of a model.

    Args:
        model: the model itself, not wrapped.
        seed: of noise, time steps and dropout. What is sampled for a row depends on its number and on this
            alone, not on the ranks or micro-batches that rows are spread over.
    """

    def __init__(
        self, model: MMInterleavedForConditionalGeneration, config: ObjectiveConfig, *, seed: int = 0
    ) -> None:
        configure(model, config)
        self.model, self.config, self.seed = model, config, seed

    def totals(self, batches: Sequence[Batch]) -> StepTotals:
        """What the losses of a step are divided by; one all-reduce where there are several ranks.

        Args:
            batches: all micro-batches of this rank in the step.
        """
        counts = [count_targets(batch) for batch in batches]
        summed = torch.tensor([[float(c.text), float(c.images)] for c in counts], dtype=torch.float64).sum(0)
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size()
            # NCCL adds up what lies on its device only.
            summed = summed.to(self.model.device if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(summed)
        text, images = summed.tolist()
        return StepTotals(text, images, len(batches), ranks)

    def __call__(
        self,
        batch: Batch,
        row_numbers: Sequence[int],
        totals: StepTotals,
        forward: Callable[..., Any] | None = None,
    ) -> StepLosses:
        """The losses of a micro-batch.

        Args:
            row_numbers: number of each of its rows in the whole run.
            totals: result of `totals` for the step.
            forward: the wrapped model (DDP, compiled); default the model itself.
        """
        # Counted before the batch moves: what lies on a device has to be waited for.
        counts = count_targets(batch)
        batch = batch.to(self.model.device)
        noise, hide_earlier, weight = None, None, None
        if batch.target_pixel_values is not None:
            noise, hide_earlier = self.sample_noise(batch, row_numbers)
            if self.config.min_snr_gamma is not None:
                weight = min_snr_weight(
                    noise.timestep, self.model.training_scheduler, self.config.min_snr_gamma
                )
        output = (forward or self.model)(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values if batch.num_images else None,
            image_start=batch.image_start,
            targets=TrainingTargets(
                document_start=batch.document_start,
                text_target=batch.text_target,
                image_target=batch.image_target,
                target_pixel_values=batch.target_pixel_values,
                noise=noise,
                image_weight=weight,
                hide_earlier=hide_earlier,
            ),
        )
        return self._losses(output, counts, totals)

    def sample_noise(self, batch: Batch, row_numbers: Sequence[int]) -> tuple[DiffusionNoise, Tensor]:
        """Random numbers of the image loss, and (I,) bool, which images see no earlier ones.

        Args:
            batch: lies on the model's device.
        """
        targets = batch.target_pixel_values
        assert targets is not None
        images_a_row = (batch.image_start != NO_IMAGE).sum(1).tolist()
        noises, hidden = [], []
        generator = torch.Generator(device=targets.device)
        for number, pixels in zip(row_numbers, targets.split(images_a_row), strict=True):
            generator.manual_seed((self.seed * _ROW_FACTOR + number + 1) % _SEED_LIMIT)
            noises.append(self.model.draw_noise(pixels, generator))
            chance = torch.rand(len(pixels), generator=generator, device=targets.device, dtype=torch.float32)
            hidden.append(chance < self.config.synchronizer_dropout)
        return DiffusionNoise(*(torch.cat(values) for values in zip(*noises, strict=True))), torch.cat(hidden)

    def _losses(self, output: Any, counts: TargetCounts, totals: StepTotals) -> StepLosses:
        text_mean = output.text_loss
        image_mean = torch.zeros_like(text_mean) if output.image_loss is None else output.image_loss
        config = self.model.config
        if config.compat == "released":
            # Every micro-batch of every rank weighs the same, however much counts in it.
            share = 1 / (totals.micro_batches * totals.ranks)
            text, image = text_mean * share, image_mean * share
        else:
            text = text_mean * (counts.text / max(1.0, totals.text))
            image = image_mean * (counts.images / max(1.0, totals.images))
        total = totals.ranks * (config.text_loss_weight * text + config.image_loss_weight * image)
        return StepLosses(total, text, image)


def configure(model: MMInterleavedForConditionalGeneration, config: ObjectiveConfig) -> None:
    """Writes what is set into the model's own configuration: sampling has to know what the U-Net predicts.

    Raises:
        UsageError: the model's own configuration names a prediction that cannot be trained.
    """
    for name in ("text_loss_weight", "image_loss_weight", "condition_dropout"):
        value = getattr(config, name)
        if value is not None:
            setattr(model.config, name, value)
    if model.config.scheduler_config is None:
        return
    if config.prediction_type is not None:
        changed = {"prediction_type": config.prediction_type}
        model.config.scheduler_config = {**model.config.scheduler_config, **changed}
    predicted = model.training_scheduler.config.prediction_type
    if predicted not in PREDICTION_TYPES:
        raise UsageError(
            f"the model's prediction_type must be {' or '.join(PREDICTION_TYPES)}, found {predicted!r}"
        )


def count_targets(batch: Batch) -> TargetCounts:
    """What counts in a batch, by the rules of the model's losses."""
    if batch.target_pixel_values is None:
        images = 0
    else:
        is_announced_I = announced_images(batch.document_start, batch.image_start)
        images = int((is_announced_I & batch.image_target).sum())
    # The first token of a row is predicted by none.
    return TargetCounts(text=int(batch.text_target[:, 1:].sum()), images=images)


def min_snr_weight(timestep_I: Tensor, scheduler: Any, gamma: float) -> Tensor:
    """Weight of each image's error, so that in terms of the clean latents it is min(SNR, gamma).

    With a the product of (1 - beta) up to the step, SNR = a / (1 - a). An error of the noise is SNR times,
    one of the velocity SNR + 1 times, the error of the clean latents (arXiv 2303.09556, section 3.4).

    Returns:
        (I,) float32.
    """
    alphas = scheduler.alphas_cumprod.to(timestep_I.device)[timestep_I]
    ratio_I = alphas / (1 - alphas)
    if scheduler.config.prediction_type == "sample":
        return ratio_I.clamp(max=gamma)
    if scheduler.config.prediction_type == "v_prediction":
        return ratio_I.clamp(max=gamma) / (ratio_I + 1)
    # Written so that a step of pure noise (ratio 0) has weight 1.
    return (gamma / ratio_I).clamp(max=1)
