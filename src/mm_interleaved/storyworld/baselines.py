"""What can be had without a model: answers that look at nothing, at words alone, or at single neighbours.

A predictor answers from training documents of the same task and layout:

constant   one answer for all, the one that scores best on other training documents
text-only  the commonest answer of those with the same words; else the answer of the nearest by words
nearest    the answer of the nearest image among those with the same words, or among the nearest by words
copy       what was given last, again: the newest text for a text, the newest image for an image

They see what a model sees: parts, layout, and a dialogue's candidates; never the target or the scenes.
Letters: E training documents, W words that occur in them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean

import numpy as np

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.document_files import write_documents
from mm_interleaved.files import make_folder
from mm_interleaved.storyworld.scores import score
from mm_interleaved.storyworld.tasks import document, part_pixels

NUM_EXAMPLES = 2000
"""Training documents of each task that a predictor knows."""
_SEED = 1
_NEAREST_BY_WORDS = 50


@dataclass(frozen=True, slots=True)
class Example:
    """A training document as predictors see it; its answer is made again when it is wanted."""

    task: str
    index: int
    last_text: str
    """The last text that is given."""
    text: str
    """All texts that are given."""
    image: np.ndarray | None
    """The newest image that is given, (64, 64, 3) uint8."""

    @property
    def target(self) -> tuple[Part, ...]:
        return document("train", _SEED, self.index, self.task).target


def write_predictions(predictor: str, gold: Sequence[Document], out: Path) -> Path:
    """Answers the gold documents (never looking at their targets) and writes `predictions.jsonl` into a
    folder; returns its path.

    Args:
        predictor: a name out of PREDICTORS.
    """
    answer = PREDICTORS[predictor]
    predictions = []
    for question in gold:
        parts, ranking = answer(replace(question, target=(), meta=_visible(question)))
        meta = {} if ranking is None else {"ranking": ranking}
        answers = tuple(replace(part, role=None, generated=True) for part in parts)
        predictions.append(Document(id=question.id, parts=answers, meta=meta))
    make_folder(out)
    path = out / "predictions.jsonl"
    write_documents(path, predictions)
    return path


def _visible(question: Document) -> Mapping[str, object]:
    """Of the meta what a model is given too: which task it is shows from the prompt alone."""
    return {name: question.meta[name] for name in ("task", "candidates") if name in question.meta}


Answer = tuple[Sequence[Part], list[int] | None]


def constant(question: Document) -> Answer:
    """One answer for all."""
    examples = _examples(question.meta["task"], question.layout)
    return _constant_target(question.meta["task"], question.layout), _ranking(question, examples.members)


def text_only(question: Document) -> Answer:
    """What the words alone make likely."""
    examples = _examples(question.meta["task"], question.layout)
    alike, is_same = _alike(question, examples)
    if not is_same or any(isinstance(part, Image) for part in alike[0].target):
        return alike[0].target, _ranking(question, alike[:1])
    texts = Counter(_text(example.target) for example in alike)
    commonest, count = texts.most_common(1)[0]
    if count == 1 and len(alike) == len(examples.members):
        # All are asked the same and answered otherwise: words say nothing.
        return _constant_target(question.meta["task"], question.layout), None
    return (Text(commonest),), _ranking(question, alike)


def nearest(question: Document) -> Answer:
    """What the nearest image is answered with."""
    examples = _examples(question.meta["task"], question.layout)
    alike, is_same = _alike(question, examples)
    image = _newest_image(question)
    seen = [(example, example.image) for example in alike if example.image is not None]
    if image is None or not seen:
        return alike[0].target, _ranking(question, alike[:1])
    if not is_same:
        seen = seen[:_NEAREST_BY_WORDS]
    difference_E = [
        float(np.square(theirs.astype(np.float32) - image.astype(np.float32)).mean()) for _, theirs in seen
    ]
    by_distance = [seen[index][0] for index in np.argsort(difference_E, kind="stable")]
    return by_distance[0].target, _ranking(question, by_distance, is_ordered=True)


def copy(question: Document) -> Answer:
    """What was given last, again."""
    kinds: dict[str, type[Text] | type[Image]] = {"T": Text, "I": Image}
    answers = []
    for letter in (question.layout or "T").split():
        given = [part for part in question.parts if isinstance(part, kinds[letter])]
        answers += given[-1:]
    return answers, None


PREDICTORS: Mapping[str, Callable[[Document], Answer]] = {
    "constant": constant,
    "text-only": text_only,
    "nearest": nearest,
    "copy": copy,
}


# ---- Training documents ----


class _WordTable:
    """How often each word occurs in each of some texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [_words(text) for text in texts]
        self.column = {word: column for column, word in enumerate(sorted(set().union(*counts)))}
        self.count_EW = np.zeros((len(texts), len(self.column)), np.int16)
        for row, words in enumerate(counts):
            for word, count in words.items():
                self.count_EW[row, self.column[word]] = count
        self.total_E = self.count_EW.sum(1)

    def distance(self, text: str) -> np.ndarray:
        """One less the share of words that both texts have (Jaccard, of multisets): (E,), 0 to 1."""
        words = _words(text)
        count_W = np.zeros(len(self.column), np.int16)
        for word, count in words.items():
            if word in self.column:
                count_W[self.column[word]] = count
        shared_E = np.minimum(self.count_EW, count_W).sum(1)
        return 1 - shared_E / np.maximum(1, self.total_E + words.total() - shared_E)


@dataclass(frozen=True, slots=True)
class _Examples:
    """Training documents, and how often each word occurs in their last texts and in all of their texts."""

    members: tuple[Example, ...]
    last_words: _WordTable
    words: _WordTable


@lru_cache(maxsize=64)
def _examples(task: str, layout: str | None) -> _Examples:
    """Training documents of a task that are answered in this layout; all of the task where none is."""
    all_of_task = _task_examples(task)
    members = tuple(example for example, found in all_of_task if found == layout)
    members = members or tuple(example for example, _ in all_of_task)
    return _Examples(
        members,
        _WordTable([example.last_text for example in members]),
        _WordTable([example.text for example in members]),
    )


@lru_cache(maxsize=16)
def _task_examples(task: str) -> tuple[tuple[Example, str | None], ...]:
    def read() -> Iterator[tuple[Example, str | None]]:
        for index in range(NUM_EXAMPLES):
            made = document("train", _SEED, index, task)
            yield Example(task, index, _last_text(made), made.text, _newest_image(made)), made.layout

    return tuple(read())


@lru_cache(maxsize=64)
def _constant_target(task: str, layout: str | None) -> tuple[Part, ...]:
    """Of the commonest answers the one that scores best on other documents."""
    has_image = "I" in (layout or "")
    # An image takes the oracle fifteen milliseconds.
    num_candidates, num_judges = (4, 6) if has_image else (32, 200)
    examples = _examples(task, layout).members
    if has_image:
        candidates = [example.target for example in examples[:num_candidates]]
    else:
        commonest = Counter(_text(example.target) for example in examples).most_common(num_candidates)
        candidates = [(Text(text),) for text, _ in commonest]
    judges = [document("train", _SEED, example.index, task) for example in examples[-num_judges:]]

    def worth(candidate: tuple[Part, ...]) -> float:
        predictions = [replace(judge, parts=candidate, target=(), meta={}) for judge in judges]
        found = score(predictions, judges)
        return mean(value for name, value in found.items() if name != "layout.correct")

    return max(candidates, key=worth)


# ---- How alike documents are ----


def _alike(question: Document, examples: _Examples) -> tuple[list[Example], bool]:
    """Those whose last text has the same words, and True; where there are none, all, and False. The nearest
    words come first.
    """
    last_E, all_E = examples.last_words.distance(_last_text(question)), examples.words.distance(question.text)
    order = np.lexsort((all_E, last_E))
    same = [examples.members[index] for index in order if last_E[index] == 0]
    return (same, True) if same else ([examples.members[index] for index in order], False)


def _words(text: str) -> Counter[str]:
    return Counter("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _last_text(question: Document) -> str:
    return next((part.text for part in reversed(question.parts) if isinstance(part, Text)), "")


def _newest_image(question: Document) -> np.ndarray | None:
    images = question.images
    return part_pixels(images[-1]) if images else None


def _text(parts: Sequence[Part]) -> str:
    return " ".join(part.text for part in parts if isinstance(part, Text))


def _ranking(
    question: Document, examples: Sequence[Example], *, is_ordered: bool = False
) -> list[int] | None:
    """A dialogue's candidates by how common they are as answers of examples, or by how near the first example
    is that is answered so; None for other tasks.
    """
    candidates = question.meta.get("candidates")
    if not isinstance(candidates, list):
        return None
    answers = [_text(example.target) for example in examples]
    if is_ordered:
        place = {answer: index for index, answer in reversed(list(enumerate(answers)))}
        return sorted(range(len(candidates)), key=lambda index: place.get(candidates[index], len(answers)))
    counts = Counter(answers)
    return sorted(range(len(candidates)), key=lambda index: -counts[candidates[index]])
