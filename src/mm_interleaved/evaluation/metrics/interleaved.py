"""Judge-free metrics of interleaved documents: what can be said of an answer without asking a large model.

Each is a pure function of one answer's parts (and of the wanted layout or the prompt), from 0 to 1, 1 being
best unless its name says otherwise. Embeddings come from whatever encodes texts and images into one space, as
unit vectors.
Letters: I images, T texts, D channels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import combinations
from statistics import fmean

import numpy as np

TEXT, IMAGE = "T", "I"
_WORD = re.compile(r"\w+", re.UNICODE)
_SENTENCE = re.compile(r"[.!?\n]+")


def structure(found: Sequence[str], wanted: Sequence[str]) -> float:
    """How far the parts are those wanted, in order: 2 * matches / (parts found + parts wanted).

    Args:
        found, wanted: "T" and "I" in order; texts that follow each other count as one.
    """
    first, second = _merged(found), _merged(wanted)
    if not first and not second:
        return 1.0
    matches = sum(block.size for block in SequenceMatcher(None, first, second, False).get_matching_blocks())
    return 2 * matches / (len(first) + len(second))


def count_agreement(found: int, wanted: int) -> float:
    """Of the number of images: the smaller over the larger; 1 where none is wanted and none there."""
    return min(found, wanted) / max(found, wanted) if found or wanted else 1.0


def consistency(image_ID: np.ndarray) -> float:
    """Mean cosine of all pairs of images that show one subject, -1 to 1; 1 for fewer than two."""
    if len(image_ID) < 2:
        return 1.0
    return fmean(float(image_ID[i] @ image_ID[j]) for i, j in combinations(range(len(image_ID)), 2))


def copy_rate(
    images: Sequence[np.ndarray], earlier: Sequence[np.ndarray], tolerance: float = 2 / 255
) -> float:
    """Share of images that are the same as an earlier one: who copies keeps everything and tells nothing.

    Args:
        images: (H, W, 3) float, 0 to 1, the generated ones in order.
        earlier: those of the prompt.
        tolerance: mean absolute difference up to which two images are the same.
    """
    seen, copies = list(earlier), 0
    for image in images:
        copies += any(
            image.shape == other.shape and float(np.abs(image - other).mean()) <= tolerance for other in seen
        )
        seen.append(image)
    return copies / len(images) if images else 0.0


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """Share of n-grams of words that occurred before in the document (as seq-rep-n, arXiv 1908.04319)."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def word_overlap(first: str, second: str) -> float:
    """F1 of words, 0 to 1: how far a caption of a generated image says what it was generated from."""
    one, other = Counter(_words(first)), Counter(_words(second))
    shared = sum((one & other).values())
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def phrase_overlap(first: str, second: str, n: int = 2) -> float:
    """F1 of n words that stand together in a sentence, 0 to 1: who has which looks, not just which words
    occur. What is said of two images overlaps as far as the same subjects are in both.
    """
    one, other = (
        Counter(gram for sentence in _SENTENCE.split(text) for gram in _ngrams(sentence, n))
        for text in (first, second)
    )
    shared = sum((one & other).values())
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def word_recall(text: str, caption: str) -> float:
    """Share of a text's words that a caption has too, 0 to 1: it may say more. 0 of no words."""
    wanted = Counter(_words(text))
    return (wanted & Counter(_words(caption))).total() / wanted.total() if wanted else 0.0


def _merged(kinds: Sequence[str]) -> list[str]:
    return [kind for i, kind in enumerate(kinds) if not (kind == TEXT and i and kinds[i - 1] == TEXT)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = _words(text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
