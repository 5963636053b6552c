"""One text part of one document, through transformers' `generate`.

TextRequest (session, settings, rules) -> write_run -> TextRun, again until the last, with the stop id
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from mm_interleaved.generation.logits import (
    OnTextAlone,
    TextRules,
    decoder_start,
    is_released,
    logits_processors,
)
from mm_interleaved.generation.released_beam_search import released_beam_search
from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.transformers_versions import CHUNKS_CONTINUE

STREAM_EVERY = 4
"""Tokens between two runs of streamed text. A call of `generate` takes about 1 ms beside the 8 ms of a token
of a model of the shipped size (one core, 2026-11).
"""
FAST_STREAM_EVERY = 16
"""The same where tokens come faster: compiled, or several at once."""
TEXT_SETTINGS = (
    "num_beams", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "length_penalty",
    "compat", "cache_implementation", "prompt_lookup_num_tokens",
)  # fmt: skip
"""Settings that change how text is generated."""


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
    def is_written_alone(self) -> bool:
        """Whether it shares no pass with others: beams, and guesses that are checked several at once."""
        return self.settings.num_beams > 1 or self.settings.prompt_lookup_num_tokens is not None

    @property
    def pass_key(self) -> tuple[Any, ...]:
        """What requests must have in common to share a pass."""
        return id(self.session.model), self.session.cache.is_static, self.is_written_alone

    @property
    def choice_key(self) -> tuple[Any, ...]:
        """What requests must have in common to have their tokens chosen alike: all but how long they are."""
        settings = (getattr(self.settings, name) for name in TEXT_SETTINGS)
        return replace(self.rules, max_new_tokens=0), *settings


# ---- One document --------------------------------------------------------------------------------


def write_run(
    request: TextRequest, written: Sequence[int], assistant_model: PreTrainedModel | None = None
) -> TextRun:
    """The next run of a text part: a few tokens of one beam, all of several beams.

    Args:
        written: ids of the same text part before.
        assistant_model: a smaller language model with the same vocabulary, whose guesses are checked several
            at once; it sees ids alone, no images. Greedy text only.
    """
    session, settings, rules = request.session, request.settings, request.rules
    if settings.num_beams > 1:
        return _write_beams(session, settings, rules)
    if settings.do_sample or session.cache.is_static:
        assistant_model = None
    is_fast = session.cache.is_static or settings.prompt_lookup_num_tokens or assistant_model is not None
    room = rules.max_new_tokens - len(written)
    run_length = min(FAST_STREAM_EVERY if is_fast else STREAM_EVERY, room)
    # An assistant would be handed the embedding of a slot, which is not of its kind.
    is_alone = assistant_model is not None and not session.ends_in_table
    new_ids = _generate_run(
        request, len(written), 1 if is_alone else run_length, None if is_alone else assistant_model
    )
    ids, stop = cut_at_stop(new_ids, rules.stop_ids)
    session.accept(ids)
    return TextRun(ids, stop, is_last=stop is not None or len(ids) == room)


def _generate_run(
    request: TextRequest, num_written: int, max_new_tokens: int, assistant_model: PreTrainedModel | None
) -> list[int]:
    """The next few ids, behind so many of the same text part."""
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
            [OnTextAlone(processors, ids.shape[1] - num_written, decoder_start(model, settings))]
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
    # Back to the prompt, in one row: the chosen tokens are read again, in one pass, when they are needed.
    session.cache.crop(num_read - session.cache.num_tokens)
    session.cache.batch_select_indices(torch.zeros(1, dtype=torch.int64, device=model.device))
    ids, stop = cut_at_stop(output.sequences[0, len(start) :].tolist(), rules.stop_ids)
    session.accept(ids)
    return TextRun(ids, stop, is_last=True)


def cut_at_stop(ids: list[int], stop_ids: Sequence[int]) -> tuple[list[int], int | None]:
    """What stands before the first stop id, and that id, if there is one."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    return (ids, None) if end is None else (ids[:end], ids[end])


# ---- transformers' `generate` --------------------------------------------------------------------


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
        # Without it the first pass of a call is not compiled; the tokens are the same.
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
