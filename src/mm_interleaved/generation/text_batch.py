"""Text parts of several documents, written in one pass.

Every document keeps a session of its own; what it remembers is laid side by side for the length of a text
part, padded on the left, and what was written is handed back. So lengths, images and turns may differ.
Letters: B rows, T tokens of the longest row, H heads, d channels a head, N images a row, D hidden channels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessorList, PreTrainedModel

from mm_interleaved.errors import NumericalError
from mm_interleaved.generation.logits import (
    LOGITS,
    FiniteRows,
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
    write_text,
)
from mm_interleaved.models.prefix_cache import PrefixCache, static_room
from mm_interleaved.tokens.visibility import NO_IMAGE


def write_text_batch(
    requests: dict[int, TextRequest], assistant_model: PreTrainedModel | None = None
) -> Iterator[tuple[int, TextRun | NumericalError]]:
    """The runs of text parts, each as `write_text` gives them, several rows to a pass; the error of a row
    whose numbers are not finite is its last answer, and the others go on.

    Beams and guessed tokens are written one document after another.

    Args:
        requests: by number; of one `batch_key`.
        assistant_model: see `write_text`; only for whoever writes alone.
    """
    first = next(iter(requests.values()))
    if len(requests) == 1 or first.settings.num_beams > 1 or first.settings.prompt_lookup_num_tokens:
        for number, request in requests.items():
            yield from _write_alone(number, request, assistant_model)
        return
    batch = _Batch(requests)
    while batch.rows:
        yield from batch.write_run()


def _write_alone(
    number: int, request: TextRequest, assistant_model: PreTrainedModel | None
) -> Iterator[tuple[int, TextRun | NumericalError]]:
    try:
        for run in write_text(request, assistant_model):
            yield number, run
    except NumericalError as error:
        yield number, error


class _Batch:
    """Text parts that are being written side by side."""

    def __init__(self, requests: dict[int, TextRequest]):
        self.requests, self.rows = requests, list(requests)
        self.written: dict[int, list[int]] = {number: [] for number in requests}
        for request in requests.values():
            request.session.read_but_last()
        sessions = [request.session for request in requests.values()]
        self.first = sessions[0]
        # Tokens of the longest row, the last one still to be read.
        self.length = max(len(session.ids) for session in sessions)
        caches = [session.cache for session in sessions]
        room = self.length + max(request.rules.max_new_tokens for request in requests.values())
        self.cache = join_caches(caches, self.first.model.config.text_config, room)

    def write_run(self) -> Iterator[tuple[int, TextRun | NumericalError]]:
        """The next run of each row; rows that are done leave the batch."""
        requests = [self.requests[number] for number in self.rows]
        limits = [
            request.rules.max_new_tokens - len(self.written[number])
            for number, request in zip(self.rows, requests, strict=True)
        ]
        length = min(FAST_STREAM_EVERY, max(limits))
        finite = FiniteRows()
        new_ids = self._generate(requests, length, finite)
        num_finite = finite.num_finite()

        # 1. Each row takes what is its own, and leaves when it is done.
        runs: list[tuple[int, TextRun | NumericalError]] = []
        staying = []
        for row, (number, request, limit) in enumerate(zip(self.rows, requests, limits, strict=True)):
            ids, stop = cut_at_stop(new_ids[row][:limit], request.rules.stop_ids)
            # What comes behind its end belongs to no text.
            if num_finite[row] < len(ids) + (stop is not None):
                runs.append((number, NumericalError(f"{LOGITS} are not finite, expected numbers")))
                continue
            self.written[number] += ids
            is_last = stop is not None or len(ids) == limit
            append_row(self.cache, row, self.length - 1, min(length, len(ids) + 1), request.session.cache)
            request.session.accept(ids)
            runs.append((number, TextRun(ids, stop, is_last)))
            if not is_last:
                staying.append(row)
        self.length += length
        if 0 < len(staying) < len(requests):
            self.cache.batch_select_indices(torch.tensor(staying, device=self.first.model.device))
        self.rows = [self.rows[row] for row in staying]
        # 2. Whoever goes on now finds its session as if it had been alone.
        yield from runs

    def _generate(self, requests: list[TextRequest], length: int, finite: FiniteRows) -> list[list[int]]:
        sessions, rules = [request.session for request in requests], requests[0].rules
        model, settings = self.first.model, requests[0].settings
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
        # What was written stands at the end of every row, however long its document is.
        num_written = len(self.written[self.rows[0]])
        generators = [request.generator for request in requests]
        processors = logits_processors(model, settings, rules, generators, finite=finite)
        are_in_table = all(session.ends_in_table for session in sessions)
        embeddings = None
        if not are_in_table:
            last_B1D = torch.cat([session.prompt()[:, -1:] for session in sessions])
            embeddings = F.pad(last_B1D, (0, 0, self.length - 1, 0))
        output = call_generate(
            model,
            ids,
            inputs_embeds=embeddings,
            attention_mask=(position_T >= pad_B[:, None]).long(),
            cache=self.cache,
            processors=LogitsProcessorList(
                [OnTextAlone(processors, self.length - num_written, decoder_start(model, settings))]
            ),
            settings=settings,
            stop_ids=rules.stop_ids,
            max_new_tokens=length,
            prefill_chunk_size=1 if self.cache.is_static and are_in_table else None,
        )
        found = output.sequences[:, self.length :]
        # All rows may have stopped before.
        return F.pad(found, (0, length - found.shape[1]), value=rules.stop_ids[0]).tolist()


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
