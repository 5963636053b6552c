"""Words: the text of a document through transformers' `generate`, and how likely given texts are.

    session -> write_text -> runs of ids, the last one perhaps ended by a stop id
    session, options -> score_options -> log-probabilities

Letters: B rows, T tokens, t tokens and those of the document before them, D hidden channels, V vocabulary,
O options.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mm_interleaved.generation.released_beam_search import released_beam_search
from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.finite import check_finite
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.transformers_versions import CHUNKS_CONTINUE

STREAM_EVERY = 4
"""Tokens between two runs of streamed text. A call of `generate` takes about 1 ms beside the 8 ms of a token
of a model of the shipped size (one core, 2026-11).
"""
FAST_STREAM_EVERY = 16
"""The same where words come faster: compiled, or several at once."""
TOKENS_AT_ONCE = 256
"""Of options that are scored in one row. Attention between options is computed and masked: with more tokens
it would outweigh what fewer passes save.
"""
TEXT_SETTINGS = (
    "num_beams", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "length_penalty",
    "compat", "cache_implementation", "prompt_lookup_num_tokens",
)  # fmt: skip
"""Settings that change how words are written."""
RELEASED_TOP_K = 50
"""transformers' default of the time, which nobody had switched off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """The frame of one text part, whatever the settings of its search."""

    stop_ids: tuple[int, ...]
    """Ids that end it; they are no part of it."""
    max_new_tokens: int
    min_new_tokens: int = 0
    forbidden_ids: tuple[int, ...] = ()


class TextRun(NamedTuple):
    """Some more text. `stop`: the id that ended it, in the last run, if one did."""

    ids: list[int]
    stop: int | None
    is_last: bool


@dataclass(frozen=True, slots=True, eq=False)
class TextRequest:
    """A text part that is to be written: where, how, and with whose random numbers."""

    session: InterleavedSession
    settings: GenerationSettings
    rules: TextRules
    generator: torch.Generator | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What requests must have in common to share a pass: all but how long the texts may be."""
        settings = (getattr(self.settings, name) for name in TEXT_SETTINGS)
        return id(self.session.model), replace(self.rules, max_new_tokens=0), *settings


LOGITS = "the logits of the next word"


class TextBatch(NamedTuple):
    """Texts of a batch, see `generate_text_batch`."""

    ids: Tensor
    logits: tuple[Tensor, ...] | None
    sequence_scores: Tensor | None
    hypothesis_scores: Tensor | None


# ---- One document --------------------------------------------------------------------------------


def write_text(request: TextRequest, assistant_model: PreTrainedModel | None = None) -> Iterator[TextRun]:
    """Continue a document with text; the session grows by it, stop id excluded.

    One beam comes in runs of a few tokens, several beams in one run at the end.

    Args:
        assistant_model: a smaller language model with the same vocabulary, whose guesses are checked several
            at once; it sees ids alone, no images. Greedy text only.
    """
    session, settings, rules = request.session, request.settings, request.rules
    if settings.num_beams > 1:
        yield _write_beams(session, settings, rules)
        return
    if settings.do_sample or session.cache.is_static:
        assistant_model = None
    is_fast = session.cache.is_static or settings.prompt_lookup_num_tokens or assistant_model is not None
    stream_every = FAST_STREAM_EVERY if is_fast else STREAM_EVERY
    written: list[int] = []
    while len(written) < rules.max_new_tokens:
        run_length = min(stream_every, rules.max_new_tokens - len(written))
        # An assistant would be handed the embedding of a slot, which is not of its kind.
        is_alone = assistant_model is not None and not session.ends_in_table
        new_ids = _write_run(
            request, written, 1 if is_alone else run_length, None if is_alone else assistant_model
        )
        ids, stop = cut_at_stop(new_ids, rules.stop_ids)
        session.accept(ids)
        written += ids
        is_last = stop is not None or len(written) == rules.max_new_tokens
        yield TextRun(ids, stop, is_last)
        if is_last:
            return


def _write_run(
    request: TextRequest, written: list[int], max_new_tokens: int, assistant_model: PreTrainedModel | None
) -> list[int]:
    """The next few ids; `written` are those of the same text part before."""
    session, settings, rules = request.session, request.settings, request.rules
    model = session.model
    session.read_but_last()
    ids = torch.tensor([session.ids], dtype=torch.int64, device=model.device)
    processors = logits_processors(model, settings, rules, [request.generator])
    output = call_generate(
        model,
        ids,
        # What is guessed is looked up in the ids, but a slot cannot be read by its id.
        inputs_embeds=None if session.ends_in_table else session.prompt(),
        attention_mask=torch.ones_like(ids),
        cache=session.cache,
        processors=LogitsProcessorList(
            [OnTextAlone(processors, ids.shape[1] - len(written), decoder_start(model, settings))]
        ),
        settings=settings,
        stop_ids=rules.stop_ids,
        max_new_tokens=max_new_tokens,
        # Compiled code takes one token a pass, the first one too.
        prefill_chunk_size=1 if session.cache.is_static and session.ends_in_table else None,
        assistant_model=assistant_model,
    )
    return output.sequences[0, ids.shape[1] :].tolist()


def _write_beams(session: InterleavedSession, settings: GenerationSettings, rules: TextRules) -> TextRun:
    model, num_read = session.model, len(session.ids) - 1
    start, prompt = decoder_start(model, settings), session.prompt()
    output = call_generate(
        model,
        torch.tensor([start], dtype=torch.int64, device=model.device),
        inputs_embeds=prompt,
        attention_mask=torch.ones(prompt.shape[:2], dtype=torch.int64, device=model.device),
        cache=session.cache,
        processors=logits_processors(model, settings, rules),
        settings=settings,
        stop_ids=rules.stop_ids,
        max_new_tokens=rules.max_new_tokens,
    )
    # Back to the prompt, in one row: the chosen words are read again, in one pass, when they are needed.
    session.cache.crop(num_read - session.cache.num_tokens)
    session.cache.batch_select_indices(torch.zeros(1, dtype=torch.int64, device=model.device))
    ids, stop = cut_at_stop(output.sequences[0, len(start) :].tolist(), rules.stop_ids)
    session.accept(ids)
    return TextRun(ids, stop, is_last=True)


def cut_at_stop(ids: list[int], stop_ids: Sequence[int]) -> tuple[list[int], int | None]:
    """What stands before the first stop id, and that id, if there is one."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    return (ids, None) if end is None else (ids[:end], ids[end])


# ---- What `generate` is told ---------------------------------------------------------------------


def logits_processors(
    model: MMInterleavedForConditionalGeneration,
    settings: GenerationSettings,
    rules: TextRules,
    generators: Sequence[torch.Generator | None] = (None,),
    *,
    finite: LogitsProcessor | None = None,
) -> LogitsProcessorList:
    """Everything that changes the logits, in order; it looks at the text part alone, never at the prompt.

    Args:
        generators: where sampled words come from, see `DrawnWord`.
        finite: what looks whether they are numbers; by default it refuses those that are not.
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
    processors.append(DrawnWord(generators))
    return processors


class FiniteOnly(LogitsProcessor):
    """Lets logits pass, unless they are no numbers: the words drawn from those would be arbitrary."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return check_finite(scores, LOGITS)


class FiniteRows(LogitsProcessor):
    """The same for rows that do not know of each other: one whose logits are no numbers goes on with others
    in their place, and is told afterwards.
    """

    def __init__(self) -> None:
        self._failed_BS: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        failed_B = ~scores.isfinite().all(-1)
        self._failed_BS.append(failed_B)
        return scores.masked_fill(failed_B[:, None], 0.0)

    def good_words(self) -> list[int]:
        """How many words of each row come from numbers, from the first one on."""
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


class DrawnWord(LogitsProcessor):
    """Draws the next word of each row from its own generator, and leaves no other choice.

    `generate(do_sample=True)` draws from the global generator, which other threads and libraries use too.

    Args:
        generators: of each row, or one of all; on the CPU, so that words are the same on any device.
    """

    def __init__(self, generators: Sequence[torch.Generator | None]):
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chances = check_finite(scores.softmax(-1), "the chances of the next word").cpu()
        parts = chances.tensor_split(len(self.generators))
        words = [
            torch.multinomial(part, 1, generator=generator)
            for part, generator in zip(parts, self.generators, strict=True)
        ]
        word = torch.cat(words).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, word, 0.0)


def is_released(model: MMInterleavedForConditionalGeneration, settings: GenerationSettings) -> bool:
    """Whether the published rules hold: asked for, or the model's own (converted checkpoints)."""
    return "released" in (settings.compat, model.config.compat)


def decoder_start(model: MMInterleavedForConditionalGeneration, settings: GenerationSettings) -> list[int]:
    """Ids that stand before the written ones in the eyes of penalties and length rules.

    The released code starts the written part with a bos of its own, penalised and counted like any word.
    """
    return [model.config.bos_token_id] if is_released(model, settings) else []


def call_generate(
    model: MMInterleavedForConditionalGeneration,
    input_ids: Tensor,
    *,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor,
    cache: PrefixCache,
    processors: LogitsProcessorList,
    settings: GenerationSettings,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    num_return_sequences: int = 1,
    output_logits: bool = False,
    prefill_chunk_size: int | None = None,
    assistant_model: PreTrainedModel | None = None,
) -> Any:
    """transformers' `generate`; `input_ids` are what is continued, the prompt or, with `inputs_embeds` as the
    prompt, what was written so far.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=settings.num_beams,
        num_return_sequences=num_return_sequences,
        eos_token_id=list(stop_ids),
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        return_dict_in_generate=True,
        output_logits=output_logits,
        # Without it the first pass of a call is not compiled; the words are the same.
        prefill_chunk_size=prefill_chunk_size if CHUNKS_CONTINUE else None,
        prompt_lookup_num_tokens=settings.prompt_lookup_num_tokens,
    )
    search = None
    if settings.num_beams > 1:
        config.length_penalty = settings.length_penalty
        config.output_scores = True
        # `generate` repeats its tensors for the beams, but leaves a given cache to whoever gave it.
        cache.batch_repeat_interleave(settings.num_beams)
        search = released_beam_search if is_released(model, settings) else None
    return model.generate(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        cache=cache,
        generation_config=config,
        logits_processor=processors,
        custom_generate=search,
        assistant_model=assistant_model,
    )


# ---- Several prompts at once ---------------------------------------------------------------------


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


# ---- How likely texts are ------------------------------------------------------------------------


@torch.no_grad()
def score_options(session: InterleavedSession, options: Sequence[Sequence[int]]) -> Tensor:
    """Log-probability of each continuation, summed over its tokens: (O,) float32.

    The document is read once, whatever the number of options, and is the same afterwards: many options stand
    side by side in one row behind it and do not see each other.

    Raises:
        NumericalError: one is not finite.
    """
    model = session.model
    first_V = model.predict_text(session.read()[:, -1])[0].float().log_softmax(-1)
    scores = [_score_group(session, group, first_V) for group in _option_groups(model, options)]
    none = torch.empty(0, dtype=torch.float32, device=model.device)
    return check_finite(torch.cat(scores) if scores else none, "the log-probabilities of texts")


def _option_groups(
    model: MMInterleavedForConditionalGeneration, options: Sequence[Sequence[int]]
) -> Iterator[list[Sequence[int]]]:
    """Options of one pass each: many short ones where attention takes a mask of any form, else one."""
    limit = TOKENS_AT_ONCE if model.config.text_config._attn_implementation == "sdpa" else 0
    group: list[Sequence[int]] = []
    for option in options:
        if group and sum(map(len, group)) + len(option) > limit:
            yield group
            group = []
        group.append(option)
    if group:
        yield group


def _score_group(session: InterleavedSession, group: Sequence[Sequence[int]], first_V: Tensor) -> Tensor:
    """Scores of options in one pass: (O,).

    Args:
        first_V: log-probabilities of the first token, which are the same for all.
    """
    model, cache = session.model, session.cache
    score_O = torch.stack([first_V[option[0]] if len(option) else first_V.new_zeros(()) for option in group])
    # Each token tells of the next one; an option's last tells nothing. (Option, place in it, id, next id.)
    table = [
        (number, place, option[place], option[place + 1])
        for number, option in enumerate(group)
        for place in range(len(option) - 1)
    ]
    if not table:
        return score_O
    option_T, place_T, id_T, next_T = torch.tensor(table, dtype=torch.int64, device=model.device).unbind(1)
    num_tokens, num_before = len(table), cache.num_tokens

    # 1. Who sees whom: everyone the document, and of its own option what stands before.
    mask_11Tt = None
    if len(group) > 1:
        own_TT = (option_T[:, None] == option_T[None, :]).tril()
        mask_Tt = torch.cat([own_TT.new_ones(num_tokens, num_before), own_TT], dim=1)
        room = cache.get_mask_sizes(num_tokens, 0)[0] - mask_Tt.shape[1]
        mask_11Tt = F.pad(mask_Tt, (0, room))[None, None]

    # 2. One pass, forgotten afterwards.
    logits_TV = model(
        inputs_embeds=model.embed(id_T[None]).to(model.dtype),
        attention_mask=mask_11Tt,
        position_ids=(num_before + place_T)[None],
        cache=cache,
    ).logits[0]
    cache.crop(-num_tokens)

    log_prob_T = logits_TV.float().log_softmax(-1).gather(1, next_T[:, None])[:, 0]
    return score_O.index_add(0, option_T, log_prob_T)
