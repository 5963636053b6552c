"""Several prompts continued in one batch, as the released code does it: against which sessions are compared.

Letters: B rows, T tokens, I images, N images a row, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mm_interleaved.generation.logits import TextRules, decoder_start, logits_processors
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.generation.text import call_generate
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.prefix_cache import PrefixCache


class TextBatch(NamedTuple):
    """Texts of a batch, see `generate_text_batch`."""

    ids: Tensor
    logits: tuple[Tensor, ...] | None
    sequence_scores: Tensor | None
    hypothesis_scores: Tensor | None


@torch.no_grad()
def generate_text_batch(
    model: MMInterleavedForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    pixel_values: Tensor,
    image_start: Tensor,
    settings: GenerationSettings,
    rules: TextRules,
    *,
    num_return_sequences: int = 1,
    generator: torch.Generator | None = None,
    output_logits: bool = False,
) -> TextBatch:
    """Continue several prompts with text, in one batch.

    Args:
        input_ids: (B, T), padded on the left.
        attention_mask: (B, T), 0 at padding.
        pixel_values: (I, 3, H, W) RGB in [0, 1], all rows' images in row-major order.
        image_start: (B, N), index of each image's start token, `NO_IMAGE` where there is none.

    Returns:
        ids (B * num_return_sequences, n), ended by a stop id and padded, after the released rule's leading
        bos; raw logits (B, V) a step, if asked for; scores of beams (B * num_return_sequences,), and under
        the released rule those of all kept hypotheses (B, num_beams).
    """
    features = model.encode_images(pixel_values)
    cache = PrefixCache(model.config.text_config, batch_size=len(input_ids), device=model.device)
    cache.append_images(image_start, model.values_by_row(features.pyramid, image_start))
    start = decoder_start(model, settings)
    output = call_generate(
        model,
        torch.tensor([start] * len(input_ids), dtype=torch.int64, device=model.device),
        inputs_embeds=model.embed(input_ids, image_start, features.slots),
        attention_mask=attention_mask,
        cache=cache,
        processors=logits_processors(model, settings, rules, [generator]),
        settings=settings,
        stop_ids=rules.stop_ids,
        max_new_tokens=rules.max_new_tokens,
        num_return_sequences=num_return_sequences,
        output_logits=output_logits,
    )
    return TextBatch(
        ids=output.sequences,
        logits=getattr(output, "logits", None),
        sequence_scores=getattr(output, "sequences_scores", None),
        hypothesis_scores=getattr(output, "hypothesis_scores", None),
    )
