"""The stage that teaches the language model its language, from the words of documents alone.

It stands where the released model takes a pretrained language model's weights. Pictures are there as places
without content: their slots are zero, and nobody looks at them. So a step costs a fraction of one of
`text_side`, and what takes most steps is learned here: who is meant, and what is known of them. (Without this
stage, names in later panels were at chance after 2,200 steps of `text_side`; here they are right after some
hundred.)
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.losses import text_loss
from mm_interleaved.training.data import DocumentBatch
from mm_interleaved.training.loop import Losses
from mm_interleaved.training.naming import SceneCode, painting_labels
from mm_interleaved.visibility import NO_IMAGE


class WordsStage:
    """Trains the language model by next-token prediction, and by naming what each picture has to show.

    See `text_side` for naming; what only pictures tell is not to be named here.
    """

    name = "words"

    def __init__(
        self, model: MMInterleavedForConditionalGeneration, batches: Callable[[int], DocumentBatch]
    ) -> None:
        self.model, self.batches = model, batches
        self.code = SceneCode(*model.image_decoder.resampler.queries.shape[1:])

    def trained_parts(self) -> Mapping[str, nn.Module]:
        model = self.model
        layers = {
            f"language_model.layers.{index}.{name}": part
            for index, layer in enumerate(model.language_model.layers)
            for name, part in layer.named_children()
            if name != "synchronizer"
        }
        return {
            "language_model.embed_tokens": model.language_model.embed_tokens,
            **layers,
            "language_model.norm": model.language_model.norm,
            "text_head": model.text_head,
            "image_start_embedding": nn.ParameterList([model.image_start_embedding]),
            "context_projection": model.context_projection,
            "image_decoder.resampler": model.image_decoder.resampler,
        }

    def make_batch(self, step: int) -> DocumentBatch:
        return self.batches(step)

    def compute_losses(self, batch: DocumentBatch) -> Losses:
        model, inputs = self.model, batch.batch
        num_slots = model.config.num_slots
        no_slots = torch.zeros(inputs.num_images, num_slots, model.config.text_config.hidden_size)
        with sdpa_kernel(SDPBackend.MATH):  # see text_side
            hidden = model.language_model(
                inputs_embeds=model.embed(inputs.input_ids, inputs.image_start, no_slots),
                attention_mask=inputs.attention_mask,
                position_ids=inputs.position_ids,
                use_cache=False,
            ).last_hidden_state
            row_I, column_I = (inputs.image_start != NO_IMAGE).nonzero(as_tuple=True)
            end_I = inputs.image_start[row_I, column_I]
            conditioning, _ = model.condition(hidden, row_I, torch.zeros_like(end_I), end_I)
        named = {
            "text": text_loss(model.predict_text(hidden), inputs.input_ids, inputs.text_target),
            **self.code.losses(conditioning, painting_labels(batch.documents, reader="words")),
        }
        return Losses(
            total=named["text"] + named["naming"] + named["distance"],
            named=named,
            counts={"documents": len(batch.documents), "tokens": int(inputs.attention_mask.sum())},
            document_ids=batch.document_ids,
        )


@torch.no_grad()
def open_to_learning(model: MMInterleavedForConditionalGeneration) -> None:
    """First weights for a language model that starts from nothing.

    transformers' deviation of 0.02 is meant for widths of thousands: at a width of 192 attention starts
    almost uniform and stays so for long. Here each layer's outputs start about as large as its inputs, and
    each block adds a third of that.
    """
    language_model = model.language_model
    nn.init.normal_(language_model.embed_tokens.weight, std=0.5)
    for layer in language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in block.named_children():
                if isinstance(linear, nn.Linear):
                    scale = 0.3 if name in ("o_proj", "down_proj") else 1.0
                    nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)
