"""The text stage: the language model learns to read text and images, to write, and to condition images.

It trains the language model with its synchronizers, the text head, and what makes an image's conditioning,
by the next-token loss (paper, section 3.3) and two kinds of supervision of our own: attributes of the next
image, and coreference.
Letters: B rows, T tokens, I images, S slots, D hidden channels, M mentions.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.losses import text_loss
from mm_interleaved.recipes.storyworld.attribute_embedding import AttributeEmbedding
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    IMAGE_ONLY,
    NO_LABEL,
    known_cross_entropy,
    known_labels,
    stated_labels,
)
from mm_interleaved.recipes.storyworld.batches import DocumentBatch
from mm_interleaved.recipes.storyworld.board_supervision import NUM_BOARD_VALUES, board_labels
from mm_interleaved.recipes.storyworld.coreference_supervision import (
    ATTRIBUTES_OF_MENTION,
    CHARACTERS,
    NUM_VALUES_OF_MENTION,
    introduction_labels,
    mention_labels,
)
from mm_interleaved.tokens.batch import Batch
from mm_interleaved.tokens.visibility import NO_IMAGE
from mm_interleaved.training.computation import device_of, fast_attention
from mm_interleaved.training.parameter_groups import LinearProbe
from mm_interleaved.training.stage import Losses

MINIMISED = ("text", "attributes", "distance", "introductions", "coreference")
"""The losses whose sum is minimised."""
PROBES = "readers"
"""Name of the linear probes in checkpoints: that of the first release, whose runs can so be resumed."""


class TextStage:
    """Trains what reads slots and pyramids and writes text.

    Attribute supervision: an image's conditioning has to be the embedding of the attributes that the image
    will show, as far as the document determines them. Else the hidden states before an image need to predict
    nothing but the next word, and hold nothing that an image could be generated from (tried: after 700 steps
    the U-Net had learned to ignore them). The vision tower stays as the vision stage left it.

    Coreference supervision: linear probes have to read from the hidden states of names, positions and kinds,
    half-way and last, the appearance of the figure that is mentioned, and where it stands and stood, so that
    the synchronizers can attend there. Without it a single hero was recognised after 1,800 steps, but of two
    characters each at chance: the attributes of the whole image say too little about which word was meant.
    The first layer's states of an introduction ("Mia is a green mouse") have to hold whose it is, since only
    then can a later "Mia" find it.

    In text-only batches images are places without content: their slots are zero, nothing attends to them, and
    what only images show gets no label. They cost a fraction, and teach who is mentioned and what is known of
    them. They have to alternate with others: a language model that learned from text alone first did not
    learn to attend to images in 1,100 steps.

    Args:
        boards: conditionings also say how boards hang, see `board_supervision`.
    """

    name = "text"

    def __init__(
        self,
        model: MMInterleavedForConditionalGeneration,
        batches: Callable[[int], DocumentBatch],
        *,
        boards: bool = False,
    ) -> None:
        self.model, self.batches, self.boards = model, batches, boards
        layers = model.language_model.layers
        self.first, self.middle = layers[0], layers[len(layers) // 2]
        dim = model.config.text_config.hidden_size
        sizes = {
            "first": len(CHARACTERS),
            "middle": sum(NUM_VALUES_OF_MENTION),
            "last": sum(NUM_VALUES_OF_MENTION),
        }
        probes = nn.ModuleDict({name: LinearProbe(dim, size) for name, size in sizes.items()})
        self.probes = probes.to(device_of(model))
        for weight in self.probes.parameters():
            nn.init.zeros_(weight)  # so that every run starts from the same
        model.vision.requires_grad_(False)
        self.embedding = AttributeEmbedding.of(model.image_decoder, NUM_BOARD_VALUES if boards else ())

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {
            "language_model": self.model.language_model,
            "text_head": self.model.text_head,
            "image_start_embedding": nn.ParameterList([self.model.image_start_embedding]),
            "context_projection": self.model.context_projection,
            "image_decoder.resampler": self.model.image_decoder.resampler,
            PROBES: self.probes,
        }

    def make_batch(self, step: int) -> DocumentBatch:
        return self.batches(step).to(device_of(self.model))

    def compute_losses(self, batch: DocumentBatch) -> Losses:
        inputs = batch.batch
        device = inputs.input_ids.device
        taps = output_of(self.first), output_of(self.middle)
        with fast_attention(device), taps[0] as first, taps[1] as half_way:
            hidden = self._read_text_only(inputs) if batch.is_text_only else read_batch(self.model, inputs)
            row_I, column_I = (inputs.image_start != NO_IMAGE).nonzero(as_tuple=True)
            end_I = inputs.image_start[row_I, column_I]
            # One document a row: the context of each image is all that stands before it.
            conditioning, _ = self.model.condition(hidden, row_I, torch.zeros_like(end_I), end_I)
        labels_IN = (stated_labels if batch.is_text_only else known_labels)(batch.documents)
        if self.boards:
            labels_IN = torch.cat([labels_IN, board_labels(batch.documents)], dim=1)
        labels_IN = labels_IN.to(device)
        named = {
            "text": text_loss(self.model.predict_text(hidden), inputs.input_ids, inputs.text_target),
            **self.embedding.losses(conditioning, labels_IN),
            "introductions": self._introduction_loss(first[0], batch),
            "coreference": self._coreference_loss({"middle": half_way[0], "last": hidden}, batch),
        }
        return Losses(
            total=torch.stack([named[name] for name in MINIMISED]).sum(),
            named=named,
            counts={"images": inputs.num_images, "tokens": int(inputs.attention_mask.sum())},
            document_ids=batch.document_ids,
        )

    def _introduction_loss(self, hidden_BTD: Tensor, batch: DocumentBatch) -> Tensor:
        """Mean cross-entropy of who is introduced, over the words that do so, of hidden states (B, T, D)."""
        labels_BT = introduction_labels(batch.words).to(hidden_BTD.device)
        is_known_BT = labels_BT != NO_LABEL
        return known_cross_entropy(self.probes["first"](hidden_BTD[is_known_BT]), labels_BT[is_known_BT])

    def _coreference_loss(self, hidden: Mapping[str, Tensor], batch: DocumentBatch) -> Tensor:
        """Mean cross-entropy of the figures that words mention, out of hidden states (B, T, D) by probe.

        Half-way only what text states is asked for: who is mentioned must be known before a synchronizer can
        find it.
        """
        labels_BTA = mention_labels(
            batch.documents, batch.words, batch.batch.image_start, is_text_only=batch.is_text_only
        ).to(batch.batch.input_ids.device)
        is_known_BT = (labels_BTA != NO_LABEL).any(-1)
        labels_AM = labels_BTA[is_known_BT].T
        losses = []
        for name, hidden_BTD in hidden.items():
            logits = self.probes[name](hidden_BTD[is_known_BT]).split(NUM_VALUES_OF_MENTION, dim=1)
            for attribute, logits_MA, label_M in zip(ATTRIBUTES_OF_MENTION, logits, labels_AM, strict=True):
                if name == "last" or attribute not in IMAGE_ONLY:
                    losses.append(known_cross_entropy(logits_MA, label_M))
        return torch.stack(losses).mean()

    def _read_text_only(self, inputs: Batch) -> Tensor:
        model, config = self.model, self.model.config
        # Without pyramids the synchronizers are passed over, and the vision tower does not run.
        shape = inputs.num_images, config.num_slots, config.text_config.hidden_size
        slots_ISD = torch.zeros(shape, dtype=torch.float32, device=inputs.input_ids.device)
        return model(
            inputs_embeds=model.embed(inputs.input_ids, inputs.image_start, slots_ISD),
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            logits_to_keep=1,
        ).hidden


@contextmanager
def output_of(module: nn.Module) -> Generator[list[Tensor], None, None]:
    """A list that receives a module's outputs while it is called within."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def read_batch(model: MMInterleavedForConditionalGeneration, batch: Batch) -> Tensor:
    """Final hidden states (B, T, D) of a batch with one document a row, its images visible."""
    # Logits are computed by whoever needs them; the forward pass gives those of one position at least.
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        image_start=batch.image_start,
        logits_to_keep=1,
    ).hidden
