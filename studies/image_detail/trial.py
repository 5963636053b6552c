"""One trial: a small U-Net learns to paint an image from the one before it, and is asked what it kept.

Letters: I images, X latent channels, y and x latent cells, K earlier images (one).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from mm_interleaved.models.denoising import denoising_loss, sample_noise
from mm_interleaved.models.image_decoder import EarlierImages, ImageDecoder
from mm_interleaved.recipes.storyworld.looking_supervision import (
    finest_maps,
    looking_loss,
    recorded_plans,
)
from mm_interleaved.training.computation import fast_attention
from studies.image_detail.looking import places_of, weight_on_the_place
from studies.image_detail.network import Code, build_decoder, build_pyramid
from studies.image_detail.scenes import Examples, examples, right_patches
from studies.image_detail.settings import TrialSettings

CHANCE = 1 / 8
"""Of a patch, which has eight colours."""
_REPEATS = 4
_WARMUP = 20
_SAMPLING_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a U-Net can after some steps, on pairs of the validation split."""

    step: int
    cpu_minutes: float
    loss: float
    """Mean of training since the last measurement."""
    right_at_once: dict[str, float]
    """Share of patches right in what it predicts out of pure noise, by task."""
    right_painted: dict[str, float]
    """The same of whole images, denoised in ten steps; only at the end."""
    on_place: tuple[float, float]
    """Weight on the right place of the map that has most there: mean of its heads, and its best head."""

    def line(self) -> str:
        """For a terminal."""
        at_once, painted = (
            ", ".join(f"{task} {share:.3f}" for task, share in shares.items())
            for shares in (self.right_at_once, self.right_painted)
        )
        return (
            f"step {self.step}, {self.cpu_minutes:.2f} CPU minutes, loss {self.loss:.4f}, "
            f"right at once: {at_once}{', painted: ' if painted else ''}{painted}, "
            f"weight on the place {self.on_place[0]:.3f}, best head {self.on_place[1]:.3f}"
        )


class Trial:
    """The parts of a trial, and how they train."""

    def __init__(self, settings: TrialSettings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.pyramid = build_pyramid(settings)
        self.decoder: ImageDecoder = build_decoder(settings, self.pyramid)
        self.code = Code()
        self.scheduler = DDIMScheduler(
            num_train_timesteps=1000,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        )
        if settings.start_from:
            self.load(Path(settings.start_from))

    def parts(self) -> nn.ModuleDict:
        """All that trains: the U-Net, its synchronizers, and the pyramid if it is not frozen."""
        parts: dict[str, nn.Module] = {"unet": self.decoder.unet}
        if self.decoder.synchronizers is not None:
            parts["synchronizers"] = self.decoder.synchronizers
        if any(p.requires_grad for p in self.pyramid.parameters()):
            parts["pyramid"] = self.pyramid
        return nn.ModuleDict(parts)

    def save(self, path: Path) -> None:
        torch.save(self.parts().state_dict(), path)

    def load(self, path: Path) -> None:
        self.parts().load_state_dict(torch.load(path, weights_only=True))

    def earlier(self, batch: Examples) -> EarlierImages | None:
        """What each image may look at: the one before it."""
        if self.decoder.synchronizers is None:
            return None
        own_I1 = torch.arange(len(batch.pairs))[:, None]
        return self.decoder.project_earlier_images(self.pyramid(batch.earlier), own_I1)

    def loss(self, batch: Examples) -> Tensor:
        """The denoising loss of a batch."""
        settings, num = self.settings, self.scheduler.config.num_train_timesteps
        noise = sample_noise(
            batch.latents.shape,
            num,
            0.0,
            device=torch.device("cpu"),
            dtype=torch.float32,
            with_latent_noise=False,
        )
        is_pure_I = torch.rand(len(batch.pairs)) < settings.max_noise
        noise = noise._replace(timestep=noise.timestep.masked_fill(is_pure_I, num - 1))
        with recorded_plans(finest_maps(self.decoder)) as plans:
            error_IXyx = denoising_loss(
                self.decoder,
                self.scheduler,
                batch.latents,
                self.code(batch.labels),
                self.earlier(batch),
                noise,
            )
        weight_I1yx = 1 + settings.board_weight * batch.board
        loss = (error_IXyx * weight_I1yx / weight_I1yx.mean()).mean()
        if settings.looking_weight and plans:
            loss = loss + settings.looking_weight * looking_loss(plans[-1], places_of(batch))
        return loss

    @torch.no_grad()
    def at_once(self, batch: Examples) -> Tensor:
        """What is predicted out of pure noise, (I, X, y, x): there the velocity is the image, negated."""
        timestep = torch.full((len(batch.pairs),), self.scheduler.config.num_train_timesteps - 1)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
        return -self.decoder.predict(noise, timestep, self.code(batch.labels), self.earlier(batch))

    @torch.no_grad()
    def paint(self, batch: Examples) -> Tensor:
        """Whole images, (I, X, y, x), without guidance."""
        self.scheduler.set_timesteps(_SAMPLING_STEPS)
        latents = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(2))
        code, earlier = self.code(batch.labels), self.earlier(batch)
        for timestep in self.scheduler.timesteps:
            prediction = self.decoder.predict(latents, timestep.expand(len(latents)), code, earlier)
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        return latents


def run_trial(
    settings: TrialSettings,
    on_measurement: Callable[[Measurement], None],
    *,
    every: int = 50,
    count: int = 48,
) -> tuple[Trial, list[Measurement]]:
    """Trains, measuring every so many steps on `count` held-out pairs."""
    trial = Trial(settings)
    start, losses, found = time.process_time(), [], []
    held_out = examples("validation", settings.seed, 0, count, settings.tasks)
    batches = _batches(settings)
    optimizer = _optimizer(trial)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(1, settings.steps + 1):
        scale = min(1.0, step / _WARMUP) * (1 - 0.9 * step / settings.steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            is_frozen = group["name"] == "unet" and step <= settings.frozen_unet_steps
            group["lr"] = 0.0 if is_frozen else scale * rate
        optimizer.zero_grad()
        with fast_attention(torch.device("cpu")):
            loss = trial.loss(next(batches))
            loss.backward()
        nn.utils.clip_grad_norm_(trial.parts().parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        is_last = step == settings.steps
        if step % every == 0 or is_last:
            minutes = (time.process_time() - start) / 60
            found.append(_measured(trial, held_out, step, minutes, sum(losses) / len(losses), is_last))
            on_measurement(found[-1])
            losses = []
    return trial, found


def _batches(settings: TrialSettings) -> Iterator[Examples]:
    generator = torch.Generator().manual_seed(settings.seed)
    first = 0
    while True:
        pool = examples("train", settings.seed, first, settings.pool, settings.tasks)
        for _ in range(settings.pool * _REPEATS // settings.batch_size):
            yield pool.take(torch.randint(settings.pool, (settings.batch_size,), generator=generator))
        first += settings.pool


def _optimizer(trial: Trial) -> torch.optim.Optimizer:
    settings = trial.settings
    groups: list[dict[str, Any]] = [
        {
            "name": name,
            "params": [p for p in part.parameters() if p.requires_grad],
            "lr": settings.learning_rate * (1.0 if name == "unet" else settings.synchronizer_rate),
        }
        for name, part in trial.parts().items()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def _measured(
    trial: Trial, held_out: Examples, step: int, minutes: float, loss: float, is_last: bool
) -> Measurement:
    with recorded_plans(finest_maps(trial.decoder)) as plans:
        at_once = trial.at_once(held_out)
    return Measurement(
        step=step,
        cpu_minutes=minutes,
        loss=loss,
        right_at_once=right_patches(at_once, held_out.pairs),
        right_painted=right_patches(trial.paint(held_out), held_out.pairs) if is_last else {},
        on_place=max((weight_on_the_place(plan, held_out) for plan in plans), default=(0.0, 0.0)),
    )
