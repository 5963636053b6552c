"""A hundred candidate answers to one document: read once and shared, or read again for each.

The naive side follows the released code: prompt and option in one pass, four options at a time, and the image
encoded for each option.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import TOLERANCE, Case, Setting, compare
from benchmarks.models import BOS, random_model, writer_config
from benchmarks.story import counted, image_of_round, text_of
from mm_interleaved.generation.scoring import score_options
from mm_interleaved.generation.session import InterleavedSession

RELEASED_BATCH = 4
CONTEXT = 149
"""Tokens after the image; with it the context has 214 tokens, as a dialogue of VisDial."""


def run(setting: Setting) -> Iterator[Case]:
    if setting.is_gpu and not setting.quick:
        config = writer_config(
            hidden=5120, layers=40, intermediate=13824, heads=40, value_dim=1024, vision_dim=1024
        )
    else:
        config = writer_config(hidden=256, layers=4, intermediate=512, heads=4, value_dim=128)
    model = random_model(config, setting.device, setting.dtype)
    yield score_case(setting, model, 20 if setting.quick else 100)


def score_case(setting: Setting, model: Any, num_options: int) -> Case:
    """Options of 6 to 14 tokens."""
    options = [text_of(100 + number, 6 + number % 9) for number in range(num_options)]
    context = text_of(0, CONTEXT)
    with counted(model) as naive:
        read_each(model, context, options)
    with counted(model) as shared:
        read_once(model, context, options)
    result = compare(
        setting,
        {
            "each alone": lambda: read_each(model, context, options),
            "shared": lambda: read_once(model, context, options),
        },
        # Log-probabilities are computed in single precision, whatever the model is.
        tolerance=max(1e-5, TOLERANCE[setting.dtype]),
    )
    return {
        "options": num_options,
        "context_tokens": 1 + 1 + model.config.num_slots + CONTEXT,
        **result.record("shared"),
        "tokens_read": {
            "each alone": naive.prefilled + naive.decoded,
            "shared": shared.prefilled + shared.decoded,
        },
        "images_encoded": {"each alone": naive.encoded, "shared": shared.encoded},
        "bytes": {"each alone": naive.bytes(model), "shared": shared.bytes(model)},
        "model_ratio_bytes": naive.bytes(model) / shared.bytes(model),
        "model_ratio": (naive.prefilled + naive.decoded) / (shared.prefilled + shared.decoded),
    }


@torch.inference_mode()
def read_once(model: Any, context: Sequence[int], options: Sequence[Sequence[int]]) -> Tensor:
    """Ours: one session, its prefix shared by all options."""
    session = InterleavedSession(model)
    session.append_text([BOS])
    session.append_image(image_of_round(0, model))
    session.append_text(context)
    return score_options(session, options)


@torch.inference_mode()
def read_each(model: Any, context: Sequence[int], options: Sequence[Sequence[int]]) -> Tensor:
    """The released way."""
    config = model.config
    prompt = [BOS, config.image_start_token_id, *[config.image_token_id] * config.num_slots, *context]
    scores = []
    for first in range(0, len(options), RELEASED_BATCH):
        group = options[first : first + RELEASED_BATCH]
        length = len(prompt) + max(len(option) for option in group)
        ids = torch.zeros(len(group), length, dtype=torch.int64, device=model.device)
        counts = torch.zeros(len(group), length - 1, device=model.device)
        for row, option in enumerate(group):
            whole = [*prompt, *option]
            ids[row, : len(whole)] = torch.tensor(whole, device=model.device)
            counts[row, len(prompt) - 1 : len(whole) - 1] = 1
        logits = model(
            input_ids=ids,
            pixel_values=image_of_round(0, model).expand(len(group), -1, -1, -1),
            image_start=torch.ones(len(group), 1, dtype=torch.int64, device=model.device),
        ).logits
        log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        scores.append((log_probs * counts).sum(1))
    return torch.cat(scores)
