"""The stage that teaches the U-Net to paint from codes of scenes, without a language model.

It stands where the released model takes Stable Diffusion's weights: a U-Net that already knows how a
conditioning becomes a picture. Letters: I pictures, N attributes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.losses import denoising_errors
from mm_interleaved.storyworld.dice import Dice
from mm_interleaved.storyworld.renderer import render_scene, scene_at
from mm_interleaved.training.loop import Losses
from mm_interleaved.training.naming import SceneCode, scene_labels

_DOMAIN = 24


@dataclass(frozen=True, slots=True)
class CodedPictures:
    """Pictures and their codes."""

    latents: Tensor
    """(I, channels, y, x), scaled."""
    codes: Tensor
    """(I, num_vectors, dim)."""
    ids: tuple[str, ...]


class PainterStage:
    """Trains the U-Net by the denoising loss on pictures of random scenes, conditioned on their codes.

    In half of the scenes badges and patterns are not told, as text alone never tells them.
    """

    name = "painter"

    def __init__(self, model: MMInterleavedForConditionalGeneration, *, seed: int, batch_size: int) -> None:
        self.model, self.seed, self.batch_size = model, seed, batch_size
        self.code = SceneCode(*model.image_decoder.resampler.queries.shape[1:])
        model.image_decoder.vae.requires_grad_(False)

    def trained_parts(self) -> Mapping[str, nn.Module]:
        decoder = self.model.image_decoder
        return {"unet": decoder.unet, "negative": nn.ParameterList([decoder.negative_conditioning])}

    def make_batch(self, step: int) -> CodedPictures:
        first = step * self.batch_size
        scenes = [scene_at("train", self.seed, first + i) for i in range(self.batch_size)]
        dice = Dice(_DOMAIN, self.seed, step)
        labels = [
            scene_labels(scene, frozenset(f.character.name for f in scene.figures if dice.chance(50)))
            for scene in scenes
        ]
        pixels = torch.from_numpy(np.stack([render_scene(scene) for scene in scenes])).permute(0, 3, 1, 2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = self.model.image_decoder.encode(pixels.float() / 255).float()
        ids = tuple(f"scene-{self.seed}-{first + i}" for i in range(self.batch_size))
        return CodedPictures(latents, self.code.encode(torch.tensor(labels)), ids)

    def compute_losses(self, batch: CodedPictures) -> Losses:
        decoder, scheduler = self.model.image_decoder, self.model.training_scheduler
        timestep = torch.randint(0, scheduler.config.num_train_timesteps, (len(batch.latents),))
        noise = torch.randn_like(batch.latents)
        noisy = scheduler.add_noise(batch.latents, noise, timestep)
        drop_I11 = (torch.rand(len(batch.latents)) < self.model.config.condition_dropout)[:, None, None]
        conditioning = torch.where(drop_I11, decoder.negative_conditioning, batch.codes)
        with sdpa_kernel(SDPBackend.MATH):  # see text_side
            prediction = decoder.predict(noisy, timestep, conditioning, None)
        target = scheduler.get_velocity(batch.latents, noise, timestep)
        loss = denoising_errors(prediction, target).mean()
        return Losses(loss, {"image": loss}, {"images": len(batch.latents)}, batch.ids)
