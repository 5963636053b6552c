"""The denoising loss: noise latents at random steps of the schedule, predict, compare (paper, section 3.3).

Letters: I images, X latent channels, y and x rows and columns of the latents, R conditioning vectors, D their
channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm_interleaved.models.image_decoder import EarlierImages, ImageDecoder
from mm_interleaved.models.losses import denoising_target, squared_errors


class DiffusionNoise(NamedTuple):
    """The random numbers of one denoising loss.

    `timestep`: (I,) int64. `noise`: (I, X, y, x), standard normal, what latents are noised with. `drop`: (I,)
    bool, True where the conditioning is dropped. `latent_noise`: (I, X, y, x), standard normal, picks a
    latent from the VAE's posterior; None where latents are given.
    """

    timestep: Tensor
    noise: Tensor
    latent_noise: Tensor | None
    drop: Tensor


def sample_noise(
    shape: Sequence[int],
    num_timesteps: int,
    condition_dropout: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    with_latent_noise: bool = True,
) -> DiffusionNoise:
    """Random numbers for latents of a shape (I, X, y, x).

    Args:
        num_timesteps: of the schedule.
        condition_dropout: share of images whose conditioning is dropped.
        dtype: of both noises.
        generator: default torch's global one.
        with_latent_noise: whether `latent_noise` is sampled.
    """

    def normal() -> Tensor:
        # Sampled in single precision whatever torch's default is, so that the numbers are the same.
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    images = shape[0]
    # The order in which they are sampled is that of the logged losses: another one is another run.
    timestep = torch.randint(0, num_timesteps, (images,), generator=generator, device=device)
    noise = normal()
    latent_noise = normal() if with_latent_noise else None
    chance = torch.rand(images, generator=generator, device=device, dtype=torch.float32)
    return DiffusionNoise(timestep, noise, latent_noise, drop=chance < condition_dropout)


def denoising_loss(
    decoder: ImageDecoder,
    scheduler: Any,
    latents: Tensor,
    conditioning: Tensor,
    earlier: EarlierImages | None,
    noise: DiffusionNoise,
) -> Tensor:
    """Squared error of each latent cell, (I, X, y, x), in single precision or better; callers average.

    Args:
        scheduler: of diffusers; it adds the noise, and its `prediction_type` says what is to be predicted.
        latents: (I, X, y, x), scaled.
        conditioning: (I, R, D), see `ImageDecoder.condition`; where `noise.drop`, the learned negative one
            takes its place.
        earlier: see `ImageDecoder.project_earlier_images`.
    """
    # 1. Noise the latents.
    noisy = scheduler.add_noise(latents, noise.noise, noise.timestep)
    # 2. Forget the conditioning of some images, so that guidance has an unconditional prediction.
    negative = decoder.learned_negative(conditioning)
    conditioning = torch.where(noise.drop[:, None, None], negative, conditioning)
    # 3. Predict and compare.
    prediction = decoder.predict(noisy, noise.timestep, conditioning, earlier)
    target = denoising_target(scheduler, latents, noise.noise, noise.timestep)
    return squared_errors(prediction, target)
