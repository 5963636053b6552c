"""Text parts of several documents, written in one pass, a run of a few tokens at a time.

Every document keeps a session of its own; what those remember is laid side by side for as long as no other
joins them, padded on the left, and what was written is handed back after each run. So lengths, images, turns
and settings may differ.
Letters: B rows, T tokens of the longest row, H heads, d channels a head, N images a row, D hidden channels.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessorList, PreTrainedModel

from mm_interleaved.errors import NumericalError
from mm_interleaved.generation.logits import (
    LOGITS,
    FiniteRows,
    OfRows,
    OnTextAlone,
    decoder_start,
    logits_processors,
)
from mm_interleaved.generation.text import (
    FAST_STREAM_EVERY,
    TextRequest,
    TextRun,
    call_generate,
    cut_at_stop,
    write_run,
)
from mm_interleaved.models.prefix_cache import PrefixCache, static_room
from mm_interleaved.tokens.visibility import NO_IMAGE

PROMPT_TOKENS = 512
"""New tokens of prompts that a step reads at most, beside those of its first one."""


class TextBatch:
    """Text parts that are being written: `step` writes a run of those that share a pass. Requests join and
    leave between runs, each with its own settings.

    Args:
        assistant_model: see `write_run`; only for whoever writes alone.
        run_length: tokens of a run of several rows.
    """

    def __init__(
        self, assistant_model: PreTrainedModel | None = None, *, run_length: int = FAST_STREAM_EVERY
    ):
        self.assistant_model, self.run_length = assistant_model, run_length
        self.sizes: Counter[int] = Counter()
        """How many runs had so many rows."""
        # Whoever was served goes to the end, so that passes of different kinds take turns.
        self._parts: dict[int, TextPart] = {}
        self._rows: _Rows | None = None

    def __len__(self) -> int:
        """Text parts that are not at their end."""
        return len(self._parts)

    def add(self, number: int, request: TextRequest) -> None:
        """Write one more text part, from the next step on."""
        self._parts[number] = TextPart(number, request)

    def drop(self, number: int) -> None:
        """Forget a text part, if it is there; nothing more is computed for it."""
        self._parts.pop(number, None)

    def step(self) -> list[tuple[int, TextRun | NumericalError]]:
        """One run of some text parts; the error of a row whose numbers are not finite is its last answer, and
        the others go on. Nothing, where the step went into reading prompts.
        """
        first = next(iter(self._parts.values()))
        parts = [first]
        if not first.request.is_written_alone:
            wanted = first.request.pass_key
            parts = [part for part in self._parts.values() if part.request.pass_key == wanted]
            if _read_prompts(parts):
                return []
            parts.sort(key=lambda part: part.number)
        self.sizes[len(parts)] += 1
        runs = self._write_alone(parts[0]) if len(parts) == 1 else self._write_together(parts)
        for number, run in runs:
            part = self._parts.pop(number)
            if isinstance(run, TextRun) and not run.is_last:
                part.written += run.ids
                self._parts[number] = part
        if not self._parts:
            self._rows = None
        return runs

    def _write_alone(self, part: "TextPart") -> list[tuple[int, TextRun | NumericalError]]:
        # Rows that it was one of have not seen what it writes now.
        self._rows = None
        try:
            return [(part.number, write_run(part.request, part.written, self.assistant_model))]
        except NumericalError as error:
            return [(part.number, error)]

    def _write_together(self, parts: list["TextPart"]) -> list[tuple[int, TextRun | NumericalError]]:
        if self._rows is None or not self._rows.shrink_to(parts):
            self._rows = _Rows(parts)
        return self._rows.write_run(self.run_length)


@dataclass(slots=True, eq=False)
class TextPart:
    """A text part, and what of it has been written."""

    number: int
    request: TextRequest
    written: list[int] = field(default_factory=list)


def _read_prompts(parts: Sequence[TextPart]) -> bool:
    """Reads what is new to the sessions, about `PROMPT_TOKENS` of it; whether something is left to read."""
    num_read = 0
    for part in parts:
        num_unread = part.request.session.num_unread - 1
        if num_read and num_read + num_unread > PROMPT_TOKENS:
            return True
        part.request.session.read_but_last()
        num_read += max(0, num_unread)
    return False


class _Rows:
    """Text parts side by side: what their sessions remember, in one cache."""

    def __init__(self, parts: Sequence[TextPart]):
        self.parts = list(parts)
        for part in parts:
            part.request.session.read_but_last()
        sessions = [part.request.session for part in parts]
        self.first = sessions[0]
        # Tokens of the longest row, the last one still to be read.
        self.length = max(len(session.ids) for session in sessions)
        caches = [session.cache for session in sessions]
        room = self.length + max(part.request.rules.max_new_tokens - len(part.written) for part in parts)
        self.cache = join_caches(caches, self.first.model.config.text_config, room)

    def shrink_to(self, parts: Sequence[TextPart]) -> bool:
        """Leave out all rows but these; False if that does not do, as one is new."""
        places = {id(part): place for place, part in enumerate(self.parts)}
        staying = [places.get(id(part), -1) for part in parts]
        if -1 in staying:
            return False
        if len(staying) < len(self.parts):
            self.cache.batch_select_indices(torch.tensor(staying, device=self.first.model.device))
            self.parts = list(parts)
        return True

    def write_run(self, run_length: int) -> list[tuple[int, TextRun | NumericalError]]:
        """The next run of each row."""
        limits = [part.request.rules.max_new_tokens - len(part.written) for part in self.parts]
        length = min(run_length, max(limits))
        finite = FiniteRows()
        new_ids = self._generate(length, finite)
        num_finite = finite.num_finite()
        # Each row takes what is its own; it finds its session as if it had been alone.
        runs: list[tuple[int, TextRun | NumericalError]] = []
        for row, (part, limit) in enumerate(zip(self.parts, limits, strict=True)):
            request = part.request
            ids, stop = cut_at_stop(new_ids[row][:limit], request.rules.stop_ids)
            # What comes behind its end belongs to no text.
            if num_finite[row] < len(ids) + (stop is not None):
                runs.append((part.number, NumericalError(f"{LOGITS} are not finite, expected numbers")))
                continue
            append_row(self.cache, row, self.length - 1, min(length, len(ids) + 1), request.session.cache)
            request.session.accept(ids)
            runs.append((part.number, TextRun(ids, stop, stop is not None or len(ids) == limit)))
        self.length += length
        return runs

    def _generate(self, length: int, finite: FiniteRows) -> list[list[int]]:
        sessions = [part.request.session for part in self.parts]
        model, settings = self.first.model, self.parts[0].request.settings
        pads = [self.length - len(session.ids) for session in sessions]
        ids = torch.tensor(
            [
                [model.config.pad_token_id or 0] * pad + session.ids
                for pad, session in zip(pads, sessions, strict=True)
            ],
            device=model.device,
        )
        pad_B = torch.tensor(pads, device=model.device)
        position_T = torch.arange(self.length, device=model.device)
        are_in_table = all(session.ends_in_table for session in sessions)
        embeddings = None
        if not are_in_table:
            last_B1D = torch.cat([session.prompt()[:, -1:] for session in sessions])
            embeddings = F.pad(last_B1D, (0, 0, self.length - 1, 0))
        # What ends one row is forbidden to those that it does not end.
        stop_ids = sorted({stop for part in self.parts for stop in part.request.rules.stop_ids})
        output = call_generate(
            model,
            ids,
            inputs_embeds=embeddings,
            attention_mask=(position_T >= pad_B[:, None]).long(),
            cache=self.cache,
            processors=LogitsProcessorList([finite, self._choices()]),
            settings=settings,
            stop_ids=stop_ids,
            max_new_tokens=length,
            prefill_chunk_size=1 if self.cache.is_static and are_in_table else None,
        )
        found = output.sequences[:, self.length :]
        # All rows may have stopped before.
        return F.pad(found, (0, length - found.shape[1]), value=stop_ids[0]).tolist()

    def _choices(self) -> OfRows:
        """How tokens are chosen: rows alike together, each kind of rows by its own rules."""
        alike: dict[Any, list[int]] = {}
        for row, part in enumerate(self.parts):
            alike.setdefault((part.request.choice_key, len(part.written)), []).append(row)
        model, choices = self.first.model, []
        for (_, num_written), rows in alike.items():
            requests = [self.parts[row].request for row in rows]
            settings, generators = requests[0].settings, [request.generator for request in requests]
            processors = logits_processors(model, settings, requests[0].rules, generators, finite=None)
            # What was written stands at the end of every row, however long its document is.
            start = self.length - num_written
            choice = OnTextAlone(processors, start, decoder_start(model, settings))
            choices.append((torch.tensor(rows, device=model.device), choice))
        return OfRows(choices)


def join_caches(caches: Sequence[PrefixCache], config: Any, room: int) -> PrefixCache:
    """Memories of one row each as the rows of one, padded on the left. Hidden states are left behind.

    Args:
        room: tokens that a static cache shall hold at least; it is one if those given are.
    """
    lengths = [cache.num_tokens for cache in caches]
    longest, device = max(lengths), caches[0].image_start.device
    joined = PrefixCache(
        config,
        batch_size=len(caches),
        device=device,
        max_cache_len=static_room(room) if caches[0].is_static else None,
    )
    if longest:
        longest_row = caches[lengths.index(longest)]
        for index in range(len(longest_row.layers)):
            keys, values = _joined_layer(caches, lengths, index)
            joined.update(keys, values, index)
        hidden_1TD = longest_row.hidden
        assert hidden_1TD is not None
        joined.append_hidden(hidden_1TD.new_zeros(len(caches), longest, hidden_1TD.shape[2]))
    _join_images(caches, [longest - length for length in lengths], joined)
    return joined


def _joined_layer(caches: Sequence[PrefixCache], lengths: Sequence[int], index: int) -> list[Tensor]:
    """Keys and values of one layer, (B, H, T, d) each, zeros where a row has none."""
    longest = max(lengths)
    joined = []
    for name in ("keys", "values"):
        parts = [getattr(cache.layers[index], name) for cache in caches]
        # What has read nothing yet has no tensor either.
        nothing = torch.zeros_like(parts[lengths.index(longest)][:, :, :longest])
        padded = [
            F.pad(part[:, :, :length], (0, 0, longest - length, 0)) if length else nothing
            for part, length in zip(parts, lengths, strict=True)
        ]
        joined.append(torch.cat(padded))
    return joined


def _join_images(caches: Sequence[PrefixCache], pads: Sequence[int], joined: PrefixCache) -> None:
    """All images of all rows; their places move by what the row is padded with."""
    most = max(cache.image_start.shape[1] for cache in caches)
    if not most:
        return
    start_BN = torch.cat([
        F.pad(cache.image_start + pad, (0, most - cache.image_start.shape[1]), value=NO_IMAGE)
        for cache, pad in zip(caches, pads, strict=True)
    ])  # fmt: skip
    index, num_before = [], 0
    for cache in caches:
        index.append(F.pad(cache.image_index + num_before, (0, most - cache.image_index.shape[1])))
        num_before += cache.num_images
    layers = next((cache.image_values for cache in caches if cache.image_values), {})
    # Layers that share one tensor shall go on sharing it.
    together: dict[tuple[int, ...], Tensor] = {}
    values = {}
    for layer, kind in layers.items():
        parts = [cache.image_values[layer].value[: cache.num_images] for cache in caches if cache.num_images]
        value = together.setdefault(tuple(part.data_ptr() for part in parts), torch.cat(parts))
        values[layer] = kind._replace(value=value, image_BN=torch.cat(index))
    joined.append_images(start_BN, values)


def append_row(joined: PrefixCache, row: int, first: int, count: int, to: PrefixCache) -> None:
    """Append what a row has read, `count` tokens from `first` on, to the memory of its own document."""
    for index, layer in enumerate(joined.layers):
        assert layer.keys is not None and layer.values is not None
        keys, values = (part[row : row + 1, :, first : first + count] for part in (layer.keys, layer.values))
        to.update(keys, values, index)
    assert joined.hidden is not None
    to.append_hidden(joined.hidden[row : row + 1, first : first + count])
