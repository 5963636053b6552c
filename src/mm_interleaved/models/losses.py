"""The two losses: next token and denoising (paper, section 3.3).

Letters: B rows, T tokens, V vocabulary, I images, X latent channels, y and x rows and columns of the latents.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_interleaved.models.prediction_types import PREDICTION_TYPES
from mm_interleaved.tokens.visibility import IGNORED, next_token_labels


def text_loss(logits_BTV: Tensor, input_ids_BT: Tensor, text_target_BT: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens that count, each predicted from the ones before; 0 if none counts.

    Args:
        text_target_BT: bool, True where the token itself counts as a target.
    """
    label_BT = next_token_labels(input_ids_BT, text_target_BT)
    loss = F.cross_entropy(
        _at_least_single(logits_BTV).flatten(0, 1), label_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss / (label_BT != IGNORED).sum().clamp(min=1)


def image_loss(
    error_IXyx: Tensor,
    image_target_I: Tensor,
    weight_I: Tensor | None = None,
    *,
    count_all: bool = False,
) -> Tensor:
    """Mean squared error over the images that count; 0 if none counts.

    Args:
        error_IXyx: squared errors, see `denoising.denoising_loss`.
        image_target_I: bool.
        weight_I: factor of each image's error; the number of images is what is divided by all the same.
        count_all: divide by all images, as the released code does.
    """
    error_I = error_IXyx.flatten(1).mean(1) * image_target_I
    if weight_I is not None:
        error_I = error_I * weight_I
    count = torch.tensor(len(error_I), device=error_I.device) if count_all else image_target_I.sum()
    return error_I.sum() / count.clamp(min=1)


def denoising_target(scheduler: Any, latents: Tensor, noise: Tensor, timestep_I: Tensor) -> Tensor:
    """What the U-Net shall predict of noised latents, shaped as these: (I, X, y, x).

    Args:
        scheduler: of diffusers; its `prediction_type` decides.

    Raises:
        ValueError: it is none of `PREDICTION_TYPES`.
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return scheduler.get_velocity(latents, noise, timestep_I)
        case "sample":
            return latents
        case unknown:
            expected = " or ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction_type: found {unknown!r}, expected {expected}")


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Of each element of two tensors of one shape, in single precision or better."""
    return F.mse_loss(_at_least_single(prediction), _at_least_single(target), reduction="none")


def _at_least_single(tensor: Tensor) -> Tensor:
    """In float32, or as it is in float64: half precision would lose small losses."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
