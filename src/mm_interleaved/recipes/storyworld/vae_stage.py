"""The VAE stage: pixels → latents → pixels, with extra weight on small things.

It stands where the released model takes Stable Diffusion's autoencoder, and trains one by the weighted
reconstruction error and the KL term (arXiv 2112.10752).

Letters: B images, C channels, H and W pixels.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mm_interleaved.training.computation import device_of
from mm_interleaved.training.stage import Losses


class PixelSource(Protocol):
    """Images without documents."""

    def __call__(self, start: int, count: int) -> Tensor:
        """(count, 3, H, W) float32 in [0, 1]: the images with numbers start ... start + count - 1."""
        ...


class VAEStage:
    """Trains an AutoencoderKL to reconstruct images.

    The loss of a pixel counts up to `1 + detail_weight` times as much where neighbouring pixels differ: a
    badge covers less than 2 % of an image, and a plain mean would be content with a grey smudge.
    """

    name = "vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        pixels: PixelSource,
        *,
        batch_size: int,
        detail_weight: float,
        kl_weight: float,
    ) -> None:
        self.vae, self.pixels, self.batch_size = vae, pixels, batch_size
        self.detail_weight, self.kl_weight = detail_weight, kl_weight

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {"vae": self.vae}

    def make_batch(self, step: int) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1]."""
        pixels = self.pixels(step * self.batch_size, self.batch_size)
        return 2 * pixels.to(device_of(self.vae)) - 1

    def compute_losses(self, batch: Tensor) -> Losses:
        images_BCHW = batch.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(images_BCHW).latent_dist
        rebuilt_BCHW = self.vae.decode(posterior.sample()).sample.float()
        pixel = reconstruction_loss(rebuilt_BCHW, images_BCHW, self.detail_weight)
        # Mean over elements, so that the weight means the same for any number of latent channels.
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return Losses(
            total=pixel + self.kl_weight * kl,
            named={"pixel": pixel, "kl": kl},
            counts={"images": batch.shape[0]},
            document_ids=(),
        )


def reconstruction_loss(rebuilt: Tensor, images: Tensor, detail_weight: float) -> Tensor:
    """Weighted mean of absolute and squared differences; scalar.

    Args:
        rebuilt, images: (B, 3, H, W) in [-1, 1].
        detail_weight: extra weight of a pixel beside the sharpest possible edge.
    """
    difference_BCHW = rebuilt - images
    weight_B1HW = 1 + detail_weight * detail(images)
    loss_BCHW = weight_B1HW * (difference_BCHW.abs() + difference_BCHW.square())
    return loss_BCHW.mean() / weight_B1HW.mean()


def detail(images: Tensor) -> Tensor:
    """How much each pixel's 3 × 3 neighbourhood changes: (B, 1, H, W) in [0, 1], of images in [-1, 1]."""
    across_BCHW = F.pad((images[..., :, 1:] - images[..., :, :-1]).abs(), (0, 1))
    down_BCHW = F.pad((images[..., 1:, :] - images[..., :-1, :]).abs(), (0, 0, 0, 1))
    change_B1HW = torch.maximum(across_BCHW, down_BCHW).amax(1, keepdim=True) / 2
    return F.max_pool2d(change_B1HW, 3, stride=1, padding=1)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Changes a trained VAE so that each latent channel has mean 0 and deviation 1; what it decodes stays
    the same.

    The two 1 x 1 convolutions around the latents take up shift and scale, so that the stock
    `scaling_factor` is 1 and noise weighs the same on every channel.

    Args:
        images: (B, 3, H, W) in [-1, 1], some hundred typical ones.
    """
    images = images.to(device_of(vae))
    mean_C, std_C = (f(vae.encode(images).latent_dist.mean.float()) for f in (_channel_mean, _channel_std))
    # New latents are (z - mean) / std, for the decoder z = std * new + mean. The posterior's moments are the
    # first convolution's outputs: means first, then logarithms of variances.
    channels = len(mean_C)
    before, after = vae.quant_conv, vae.post_quant_conv
    assert before is not None and after is not None, "a VAE has a convolution on either side of its latents"
    assert before.bias is not None and after.bias is not None, "and both have a bias"
    before.bias[:channels].sub_(mean_C).div_(std_C)
    before.weight[:channels].div_(std_C[:, None, None, None])
    before.bias[channels:].sub_(2 * std_C.log())  # the logarithm of the posterior's variance
    after.bias.add_(after.weight[:, :, 0, 0] @ mean_C)
    after.weight.mul_(std_C[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0)


def _channel_mean(latents_BCyx: Tensor) -> Tensor:
    return latents_BCyx.mean((0, 2, 3))


def _channel_std(latents_BCyx: Tensor) -> Tensor:
    return latents_BCyx.std((0, 2, 3))
