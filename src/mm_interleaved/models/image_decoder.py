"""The image decoder: context in, images out.

    context (hidden states) -> resampler -> conditioning -> U-Net, looking into earlier images -> VAE

Letters: I images being denoised, K earlier images each attends to, T context tokens, D hidden channels, R
conditioning vectors, X latent channels, y and x rows and columns of the latents.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import initialization as init

from mm_interleaved.models.finite import check_finite
from mm_interleaved.models.image_values import ImageValues, flatten_pyramid
from mm_interleaved.models.offloading import execution_device, value_of
from mm_interleaved.models.resampler import Resampler
from mm_interleaved.models.unet import DeepFeatures, UNetSynchronizers, unet_forward
from mm_interleaved.tokens.visibility import relative_image_index

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EarlierImages:
    """What the U-Net sees of earlier images: one `ImageValues` a map (middle last), and who sees which.

    `relative_index_IK`: int64, 1 = newest, 0 = hidden. Computed once an image, shared by all denoising steps.
    """

    values: tuple[ImageValues, ...]
    relative_index_IK: Tensor  # noqa: N815

    def repeat(self, times: int) -> "EarlierImages":
        """The same, for a batch that is repeated along its first axis (guidance, candidates). Nothing is
        copied.
        """
        image_IK = self.values[0].image_BN
        assert image_IK is not None, "`project_earlier_images` says which image stands where"
        image_IK = image_IK.repeat(times, 1)
        values = tuple(v._replace(image_BN=image_IK) for v in self.values)
        return replace(self, values=values, relative_index_IK=self.relative_index_IK.repeat(times, 1))


class ProjectedImages:
    """What the U-Net sees of a document's images, over all images that it generates: projected once each.

    Images that a generated one does not attend to are forgotten when the next one wants others: in the
    published size one takes 145 MB in half precision (13 synchronizers x 5440 cells x 1024 channels), and
    "previous" wants one at a time.

    Args:
        project: `ImageDecoder.project_earlier_images` of the images with these numbers, each seen.
    """

    def __init__(self, project: Callable[[list[int]], EarlierImages | None]):
        self._project = project
        self._images: list[int] = []
        self._values: tuple[ImageValues, ...] = ()

    def of(self, images: Sequence[int]) -> EarlierImages | None:
        """What one generated image sees of these, from old to new; None without synchronizers."""
        new = [image for image in images if image not in self._images]
        if new or not self._values:
            projected = self._project(new)
            if projected is None:
                return None
            staying = [place for place, image in enumerate(self._images) if image in images]
            self._images = [self._images[place] for place in staying] + new
            self._values = _joined(self._values, staying, projected.values)
        device = self._values[0].value.device
        place_1K = torch.tensor([[self._images.index(image) for image in images]], device=device).long()
        relative_1K = relative_image_index(torch.ones_like(place_1K, dtype=torch.bool))
        return EarlierImages(tuple(v._replace(image_BN=place_1K) for v in self._values), relative_1K)


def _joined(
    old: Sequence[ImageValues], staying: list[int], new: Sequence[ImageValues]
) -> tuple[ImageValues, ...]:
    """Some of the old images, then the new; maps that share one tensor go on sharing it."""
    if not old:
        return tuple(new)
    values: dict[int, Tensor] = {}
    for before, after in zip(old, new, strict=True):
        if id(after.value) not in values:
            kept = [before.value[staying]] if staying else []
            values[id(after.value)] = torch.cat([*kept, after.value])
    # What was folded of the weights serves other images as well.
    return tuple(o._replace(value=values[id(n.value)]) for o, n in zip(old, new, strict=True))


class ImageDecoder(nn.Module):
    """Generates images from the language model's context and from earlier images (paper, section 3.1).

    Args:
        resampler: reads a context into the U-Net's conditioning.
        unet: a stock U-Net of the SD 1.x/2.x shape.
        vae: its autoencoder.
        synchronizers: what lets the U-Net see earlier images; None generates from the context alone.
    """

    def __init__(
        self,
        resampler: Resampler,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        synchronizers: UNetSynchronizers | None,
    ):
        super().__init__()
        self.resampler, self.unet, self.vae, self.synchronizers = resampler, unet, vae, synchronizers
        # What the conditioning is replaced by when it is dropped, and in the unguided half (released code:
        # starts from the text encoder's reading of the empty string).
        self.negative_conditioning = nn.Parameter(torch.zeros_like(resampler.queries))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.zeros_(self.negative_conditioning)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return execution_device(self) or self.negative_conditioning.device

    def learned_negative(self, like: Tensor) -> Tensor:
        """The learned conditioning of nothing said, on the device of `like`: (1, R, D)."""
        return value_of(self, "negative_conditioning").to(like.device)

    def condition(self, context_ITD: Tensor, mask_IT: Tensor) -> Tensor:
        """Read contexts (see `context.gather_contexts`) into conditioning: (I, R, D)."""
        return self.resampler(context_ITD, mask_IT)

    def project_earlier_images(
        self, pyramid: Sequence[Tensor], context_index_IK: Tensor
    ) -> EarlierImages | None:
        """Project the images that each generated image may attend to.

        Args:
            pyramid: all images' maps (J, C, s, s), finest first.
            context_index_IK: int64, indices into these images from old to new, -1 = none.
        """
        if self.synchronizers is None:
            return None
        cells_JSC, level_sizes = flatten_pyramid(pyramid)
        image_IK = context_index_IK.clamp(min=0)
        values = tuple(
            values._replace(image_BN=image_IK)
            for values in self.synchronizers.project_cells(cells_JSC, level_sizes)
        )
        return EarlierImages(values, relative_image_index(context_index_IK >= 0))

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Tensor,
        earlier: EarlierImages | None,
        *,
        context_strength: float = 1.0,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """The U-Net's prediction (noise or velocity, as the scheduler says): (I, X, y, x).

        Args:
            deep: see `unet_forward`; None is exact.
        """
        between = None
        if earlier is not None and self.synchronizers is not None:
            between = self.synchronizers.callback(earlier.values, earlier.relative_index_IK, context_strength)
        return unet_forward(self.unet, latents, timesteps, conditioning, between, deep)

    def encode(self, pixels_I3yx: Tensor, latent_noise: Tensor | None = None) -> Tensor:
        """Scaled latents of RGB images in [0, 1]; the posterior's mean if no noise is given."""
        posterior = self.vae.encode(2 * pixels_I3yx.to(self.vae.dtype) - 1).latent_dist
        latents = posterior.mean if latent_noise is None else posterior.mean + posterior.std * latent_noise
        return latents * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """RGB images in [0, 1] from scaled latents: (I, 3, y * factor, x * factor).

        Raises:
            NumericalError: they are not finite.
        """
        unscaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        decoded = self.vae.decode(unscaled).sample
        if decoded.dtype == torch.float16 and unscaled.isfinite().all() and not decoded.isfinite().all():
            # Some published autoencoders exceed the range of float16 inside; an overflow ends as no number.
            logger.warning("the autoencoder leaves the range of float16; its images are decoded in float32")
            decoded = copy.deepcopy(self.vae).float().decode(unscaled.float()).sample
        # Before they are clamped, which makes a number of what is infinite.
        return (check_finite(decoded, "the pixels of a generated image") / 2 + 0.5).clamp(0, 1)

    @property
    def latent_factor(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)
