"""What changes the logits of the next token, in order, and how a token is sampled from them.

Letters: B rows, S steps so far, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.finite import check_finite
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration

LOGITS = "the logits of the next token"
RELEASED_TOP_K = 50
"""transformers' default of the time, which nobody had disabled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """The frame of one text part, whatever the settings of its search."""

    stop_ids: tuple[int, ...]
    """Ids that end it; they are no part of it."""
    max_new_tokens: int
    min_new_tokens: int = 0
    forbidden_ids: tuple[int, ...] = ()


def is_released(model: MMInterleavedForConditionalGeneration, settings: GenerationSettings) -> bool:
    """Whether the published rules hold: asked for, or the model's own (converted checkpoints)."""
    return "released" in (settings.compat, model.config.compat)


def decoder_start(model: MMInterleavedForConditionalGeneration, settings: GenerationSettings) -> list[int]:
    """Ids that stand before the written ones in the eyes of penalties and length rules.

    The released code starts the written part with a bos of its own, penalised and counted like any token.
    """
    return [model.config.bos_token_id] if is_released(model, settings) else []


def logits_processors(
    model: MMInterleavedForConditionalGeneration,
    settings: GenerationSettings,
    rules: TextRules,
    generators: Sequence[torch.Generator | None] = (None,),
    *,
    finite: LogitsProcessor | None = None,
) -> LogitsProcessorList:
    """Everything that changes the logits, in order; it reads the text part alone, never the prompt.

    Args:
        generators: where sampled tokens come from, see `SampledToken`.
        finite: checks whether they are finite; by default it refuses those that are not.
    """
    processors = LogitsProcessorList([finite or FiniteOnly()])
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if rules.min_new_tokens:
        min_length = rules.min_new_tokens + len(decoder_start(model, settings))
        stop_ids = list(rules.stop_ids)
        processors.append(MinLengthLogitsProcessor(min_length, stop_ids, device=str(model.device)))
    if rules.forbidden_ids:
        forbidden = list(rules.forbidden_ids)
        processors.append(SuppressTokensLogitsProcessor(forbidden, device=str(model.device)))
    if not settings.do_sample:
        return processors
    if settings.temperature != 1:
        processors.append(TemperatureLogitsWarper(settings.temperature))
    top_k = settings.top_k or (RELEASED_TOP_K if is_released(model, settings) else None)
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    processors.append(SampledToken(generators))
    return processors


class FiniteOnly(LogitsProcessor):
    """Refuses logits that are not finite: tokens sampled from those would be arbitrary."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return check_finite(scores, LOGITS)


class FiniteRows(LogitsProcessor):
    """The same for independent rows: one whose logits are not finite goes on with zeros in their place, and
    is reported afterwards.
    """

    def __init__(self) -> None:
        self._failed_BS: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        failed_B = ~scores.isfinite().all(-1)
        self._failed_BS.append(failed_B)
        return scores.masked_fill(failed_B[:, None], 0.0)

    def num_finite(self) -> list[int]:
        """How many tokens of each row, from the first one on, come from finite logits."""
        failed_BS = torch.stack(self._failed_BS, dim=1)
        return (failed_BS.long().cumsum(1) == 0).sum(1).tolist()


class OnTextAlone(LogitsProcessor):
    """Shows to others the text part alone, never the prompt.

    Args:
        num_before: tokens before the text part, padding included.
        start_ids: what stands in the place of the prompt, see `decoder_start`.
    """

    def __init__(self, others: LogitsProcessorList, num_before: int, start_ids: Sequence[int] = ()):
        self.others, self.num_before, self.start_ids = others, num_before, list(start_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        start = torch.tensor(
            [self.start_ids] * len(input_ids), dtype=input_ids.dtype, device=input_ids.device
        )
        ids: Any = torch.cat([start, input_ids[:, self.num_before :]], dim=1)
        return self.others(ids, scores)


class OfRows(LogitsProcessor):
    """Rows whose tokens are chosen differently, each by its own processors.

    Args:
        choices: rows (B', int64), and what changes their logits; together all rows.
    """

    def __init__(self, choices: Sequence[tuple[Tensor, LogitsProcessor]]):
        self.choices = choices

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.choices) == 1:
            return self.choices[0][1](input_ids, scores)  # pyright: ignore[reportArgumentType]
        changed = torch.empty_like(scores)
        for row_B, choice in self.choices:
            ids: Any = input_ids[row_B]
            changed[row_B] = choice(ids, scores[row_B])  # pyright: ignore[reportArgumentType]
        return changed


class SampledToken(LogitsProcessor):
    """Samples the next token of each row with its own generator, and leaves no other choice.

    `generate(do_sample=True)` samples with the global generator, which other threads and libraries use too.

    Args:
        generators: of each row, or one of all; on the CPU, so that tokens are the same on any device.
    """

    def __init__(self, generators: Sequence[torch.Generator | None]):
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probability_SV = check_finite(scores.softmax(-1), "the probabilities of the next token").cpu()
        parts = probability_SV.tensor_split(len(self.generators))
        tokens = [
            torch.multinomial(part, 1, generator=generator)
            for part, generator in zip(parts, self.generators, strict=True)
        ]
        token = torch.cat(tokens).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
