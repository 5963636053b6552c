"""The stage that trains the text side: slots, language model with synchronizers, text head."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.training.data import DocumentBatch
from mm_interleaved.training.loop import Losses
from mm_interleaved.training.naming import SceneCode, painting_labels
from mm_interleaved.visibility import NO_IMAGE


class TextSideStage:
    """Trains what reads slots and pyramids and writes text: by next-token prediction, and by naming.

    Naming: an image's conditioning has to be the code of what the image will show, as far as the document
    tells it. Else the hidden states before an image need to know nothing but the next word, and hold nothing
    that one could paint from (tried: after 700 steps the U-Net had learned to ignore them). The vision
    tower's pyramid stays as it was taught (`vision_side`); its resampler to the slots is trained.
    """

    name = "text"

    def __init__(
        self, model: MMInterleavedForConditionalGeneration, batches: Callable[[int], DocumentBatch]
    ) -> None:
        self.model, self.batches = model, batches
        model.vision.clip.requires_grad_(False)
        model.vision.adapter.requires_grad_(False)
        self.code = SceneCode(*model.image_decoder.resampler.queries.shape[1:])

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {
            "vision": self.model.vision,
            "language_model": self.model.language_model,
            "text_head": self.model.text_head,
            "image_start_embedding": nn.ParameterList([self.model.image_start_embedding]),
            "context_projection": self.model.context_projection,
            "image_decoder.resampler": self.model.image_decoder.resampler,
        }

    def make_batch(self, step: int) -> DocumentBatch:
        return self.batches(step)

    def compute_losses(self, batch: DocumentBatch) -> Losses:
        inputs = batch.batch
        # On a CPU the backward of the fused attention takes three times as long as plain matrix products at
        # these lengths in bfloat16 (0.37 s against 0.13 s a step, 2026-11).
        with sdpa_kernel(SDPBackend.MATH):
            output = self.model(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                position_ids=inputs.position_ids,
                pixel_values=inputs.pixel_values,
                image_start=inputs.image_start,
                text_target=inputs.text_target,
            )
            row_I, column_I = (inputs.image_start != NO_IMAGE).nonzero(as_tuple=True)
            end_I = inputs.image_start[row_I, column_I]
            conditioning, _ = self.model.condition(output.hidden, row_I, torch.zeros_like(end_I), end_I)
        named = {
            "text": output.text_loss,
            **self.code.losses(conditioning, painting_labels(batch.documents)),
        }
        return Losses(
            total=named["text"] + named["naming"] + named["distance"],
            named=named,
            counts={"images": inputs.num_images, "tokens": int(inputs.attention_mask.sum())},
            document_ids=batch.document_ids,
        )


@torch.no_grad()
def open_to_images(model: MMInterleavedForConditionalGeneration) -> None:
    """Lets a new model hear from the first step what its resamplers and synchronizers have to say.

    These start such that they do not disturb pretrained neighbours: small weights, small slots, closed gates.
    A model that starts from nothing has nothing to protect; with that start, slots differed by 0.02 % from
    image to image after 400 steps.
    """
    nn.init.normal_(model.vision.slot_projection.weight, std=model.vision.slot_projection.in_features**-0.5)
    for index in model.language_model.synchronized_layers:
        model.language_model.layers[index].synchronizer.gate.fill_(0.5)
    resamplers = [model.vision.resampler]
    if model.image_decoder is not None:
        resamplers.append(model.image_decoder.resampler)
    for resampler in resamplers:
        for module in resampler.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
