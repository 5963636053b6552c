"""The stage that trains the text side: language model with synchronizers, text head, conditioning.

Letters: I images, S slots, D hidden channels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.losses import text_loss
from mm_interleaved.recipes.storyworld.attribute_embedding import SceneCode
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    NOT_THERE,
    ONLY_SEEN,
    known_cross_entropy,
    painting_labels,
    told_labels,
)
from mm_interleaved.recipes.storyworld.batches import DocumentBatch
from mm_interleaved.recipes.storyworld.coreference_supervision import (
    CHARACTERS,
    OF_MENTION,
    SIZES_OF_MENTION,
    introduction_labels,
    mention_labels,
)
from mm_interleaved.tokens.batch import Batch
from mm_interleaved.tokens.visibility import NO_IMAGE
from mm_interleaved.training.computation import device_of, fast_attention
from mm_interleaved.training.loop import Losses
from mm_interleaved.training.parameter_groups import LinearProbe

LEARNED = ("text", "naming", "distance", "introductions", "mentions")
"""The losses whose sum is learned."""


class TextSideStage:
    """Trains what reads slots and pyramids and writes text: by next-token prediction, and by naming.

    Naming: an image's conditioning has to be the code of what the image will show, as far as the document
    tells it. Else the hidden states before an image need to know nothing but the next word, and hold nothing
    that one could paint from (tried: after 700 steps the U-Net had learned to ignore them). The vision tower
    stays as it was taught (`vision_side`).

    Mentions: the hidden states of names, positions and kinds, half-way and last, have to tell linear readers
    how the figure looks that is meant, and where it stands and stood, so that one can look there; the readers
    are thrown away. Without them a single hero was known by
    look after 1,800 steps, but of two characters each at chance: a code of the whole picture says too little
    about which word was meant. The first layer's states of an introduction ("Mia is a green mouse") have to
    tell whose it is, since only then can a later "Mia" find it.

    In blind batches pictures are places without content: their slots are zero, nobody looks at them, and what
    only pictures tell is not to be named. They cost a fraction, and teach who is meant and what is known of
    them. They have to alternate with others: a language model that was taught words alone first did not learn
    to look in 1,100 steps.
    """

    name = "text"

    def __init__(
        self, model: MMInterleavedForConditionalGeneration, batches: Callable[[int], DocumentBatch]
    ) -> None:
        self.model, self.batches = model, batches
        layers = model.language_model.layers
        self.first, self.middle = layers[0], layers[len(layers) // 2]
        dim = model.config.text_config.hidden_size
        sizes = {"first": len(CHARACTERS), "middle": sum(SIZES_OF_MENTION), "last": sum(SIZES_OF_MENTION)}
        readers = nn.ModuleDict({name: LinearProbe(dim, size) for name, size in sizes.items()})
        self.readers = readers.to(device_of(model))
        for weight in self.readers.parameters():
            nn.init.zeros_(weight)  # so that every run starts from the same
        model.vision.requires_grad_(False)
        self.code = SceneCode.of(model.image_decoder)

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {
            "language_model": self.model.language_model,
            "text_head": self.model.text_head,
            "image_start_embedding": nn.ParameterList([self.model.image_start_embedding]),
            "context_projection": self.model.context_projection,
            "image_decoder.resampler": self.model.image_decoder.resampler,
            "readers": self.readers,
        }

    def make_batch(self, step: int) -> DocumentBatch:
        return self.batches(step).to(device_of(self.model))

    def compute_losses(self, batch: DocumentBatch) -> Losses:
        inputs = batch.batch
        device = inputs.input_ids.device
        taps = output_of(self.first), output_of(self.middle)
        with fast_attention(device), taps[0] as first, taps[1] as half_way:
            hidden = self._read_words(inputs) if batch.is_blind else read_batch(self.model, inputs)
            row_I, column_I = (inputs.image_start != NO_IMAGE).nonzero(as_tuple=True)
            end_I = inputs.image_start[row_I, column_I]
            conditioning, _ = self.model.condition(hidden, row_I, torch.zeros_like(end_I), end_I)
        labels_IN = (told_labels if batch.is_blind else painting_labels)(batch.documents).to(device)
        named = {
            "text": text_loss(self.model.predict_text(hidden), inputs.input_ids, inputs.text_target),
            **self.code.losses(conditioning, labels_IN),
            "introductions": self._introduction_loss(first[0], batch),
            "mentions": self._mention_loss({"middle": half_way[0], "last": hidden}, batch),
        }
        return Losses(
            total=torch.stack([named[name] for name in LEARNED]).sum(),
            named=named,
            counts={"images": inputs.num_images, "tokens": int(inputs.attention_mask.sum())},
            document_ids=batch.document_ids,
        )

    def _introduction_loss(self, hidden_BTD: Tensor, batch: DocumentBatch) -> Tensor:
        """Mean cross-entropy of who is introduced, over the words that do so, of hidden states (B, T, D)."""
        labels_BT = introduction_labels(batch.words).to(hidden_BTD.device)
        is_known_BT = labels_BT != NOT_THERE
        return known_cross_entropy(self.readers["first"](hidden_BTD[is_known_BT]), labels_BT[is_known_BT])

    def _mention_loss(self, hidden: Mapping[str, Tensor], batch: DocumentBatch) -> Tensor:
        """Mean cross-entropy of whom words mean, out of hidden states (B, T, D) by reader.

        Half-way no more than words tell is asked: who is meant must be known before one can look.
        """
        labels_BTA = mention_labels(
            batch.documents, batch.words, batch.batch.image_start, is_blind=batch.is_blind
        ).to(batch.batch.input_ids.device)
        is_known_BT = (labels_BTA != NOT_THERE).any(-1)
        labels_AM = labels_BTA[is_known_BT].T
        losses = []
        for name, hidden_BTD in hidden.items():
            answers = self.readers[name](hidden_BTD[is_known_BT]).split(SIZES_OF_MENTION, dim=1)
            for attribute, answer, label_M in zip(OF_MENTION, answers, labels_AM, strict=True):
                if name == "last" or attribute not in ONLY_SEEN:
                    losses.append(known_cross_entropy(answer, label_M))
        return torch.stack(losses).mean()

    def _read_words(self, inputs: Batch) -> Tensor:
        model, config = self.model, self.model.config
        shape = inputs.num_images, config.num_slots, config.text_config.hidden_size
        slots_ISD = torch.zeros(shape, dtype=torch.float32, device=inputs.input_ids.device)
        return model(
            inputs_embeds=model.embed(inputs.input_ids, inputs.image_start, slots_ISD),
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            logits_to_keep=1,
        ).hidden


@contextmanager
def output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives what a module puts out."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def read_batch(model: MMInterleavedForConditionalGeneration, batch: Batch) -> Tensor:
    """Final hidden states (B, T, D) of a batch with one document a row, its pictures seen."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        image_start=batch.image_start,
        logits_to_keep=1,
    ).hidden
