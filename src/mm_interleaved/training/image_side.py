"""The stage that trains the image side: conditioning, U-Net and its synchronizers; what reads stays as it
is.
"""

from collections.abc import Callable, Mapping

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.training.data import DocumentBatch
from mm_interleaved.training.loop import Losses


class ImageSideStage:
    """Trains what paints, by the denoising loss, on the hidden states and pyramids of the frozen text
    side.
    """

    name = "image"

    def __init__(
        self, model: MMInterleavedForConditionalGeneration, batches: Callable[[int], DocumentBatch]
    ) -> None:
        self.model, self.batches = model, batches
        for frozen in (model.vision, model.language_model, model.text_head, model.image_decoder.vae):
            frozen.requires_grad_(False)
        model.image_start_embedding.requires_grad_(False)

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {
            "image_decoder": self.model.image_decoder,
            "context_projection": self.model.context_projection,
        }

    def make_batch(self, step: int) -> DocumentBatch:
        return self.batches(step)

    def compute_losses(self, batch: DocumentBatch) -> Losses:
        inputs = batch.batch
        with sdpa_kernel(SDPBackend.MATH):  # see text_side
            loss = self.model(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                position_ids=inputs.position_ids,
                pixel_values=inputs.pixel_values,
                image_start=inputs.image_start,
                image_target=inputs.image_target,
                target_pixel_values=inputs.target_pixel_values,
            ).image_loss
        return Losses(
            total=loss,
            named={"image": loss},
            counts={"images": inputs.num_images, "tokens": int(inputs.attention_mask.sum())},
            document_ids=batch.document_ids,
        )
