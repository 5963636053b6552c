"""How a task's documents are answered: continued, and their candidate answers ranked by how likely they are.

Documents alike are answered side by side, since a batch takes as long as its longest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import InputError
from mm_interleaved.generation.events import Event, Failed, Finished
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.runs.engine import continue_in_batches

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """How documents with `candidates` in their meta are answered."""

    is_answer: bool = False
    """The likeliest candidate is the answer; otherwise the document is continued as well."""
    counts_end: bool = True
    """A candidate's likelihood is that of a whole answer, its end included; otherwise that of a beginning."""

    def record(self) -> dict[str, Any]:
        """What makes two runs differ."""
        return {"candidates": "ranked", "is_answer": self.is_answer, "counts_end": self.counts_end}

    def answer(
        self,
        generator: InterleavedGenerator,
        documents: Sequence[Document],
        settings: Sequence[GenerationSettings],
        batch_size: int,
    ) -> Iterator[tuple[int, Event]]:
        """Continues and ranks; see `runs.generate.Answer`. The ranking, indices from the likeliest to the
        least likely, stands in the meta of the finished document.
        """
        is_chosen = [self.is_answer and "candidates" in document.meta for document in documents]
        others = [place for place, chosen in enumerate(is_chosen) if not chosen]
        continued = continue_in_batches(
            generator, [documents[i] for i in others], [settings[i] for i in others], batch_size
        )
        for number, event in continued:
            place = others[number]
            is_ranked = isinstance(event, Finished) and "candidates" in documents[place].meta
            if isinstance(event, Finished) and is_ranked:
                ranking = self._ranking(generator, documents[place])
                event = replace(event, document=with_ranking(event.document, ranking))
            yield place, event
        for place, chosen in enumerate(is_chosen):
            if chosen:
                yield place, self._chosen(generator, documents[place])

    def _ranking(self, generator: InterleavedGenerator, document: Document) -> list[int]:
        """The ranking; an empty one, which counts as wrong, where a candidate does not fit the model."""
        try:
            return self.rank(generator, document)
        except InputError as error:
            logger.warning(
                "document %r: its candidates are not ranked (%s); it counts as wrong", document.id, error
            )
            return []

    def _chosen(self, generator: InterleavedGenerator, document: Document) -> Event:
        try:
            ranking = self.rank(generator, document)
        except InputError as error:
            return Failed(error)
        best = Text(document.meta["candidates"][ranking[0]], generated=True)
        return Finished("stop", with_ranking(document.extended(best), ranking))

    def rank(self, generator: InterleavedGenerator, document: Document) -> list[int]:
        """Indices of a document's candidates, from the likeliest to the least likely."""
        candidates = document.meta["candidates"]
        if self.counts_end:
            scores = generator.score_options(document, candidates)
        else:
            scores = [score for score, _ in generator.likelihoods(document, candidates)]
        return sorted(range(len(scores)), key=lambda index: -scores[index])


def with_ranking(document: Document, ranking: Sequence[int]) -> Document:
    return replace(document, meta={**document.meta, "ranking": list(ranking)})


def alike_together(documents: Sequence[Document]) -> list[Document]:
    """The documents, those of one task and form next to each other, short ones first."""

    def form(document: Document) -> tuple[str, str, int, int]:
        meta: Mapping[str, Any] = document.meta
        return str(meta.get("task", "")), document.layout or "", len(document.images), len(document.text)

    return sorted(documents, key=form)
