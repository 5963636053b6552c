"""How well the judge-free scores agree with the truth: on StoryWorld, where every answer's worth is known.

Stories are spoilt to a known degree, each in the one way that a score is for, and the score is ranked
against what the oracle reads in the spoilt story (or, where nothing has to be read, against the share that
was spoilt).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.evaluation.judge_free import judge_free_scores
from mm_interleaved.evaluation.metrics.confidence import rank_correlation
from mm_interleaved.evaluation.readers import Reader, read_answer
from mm_interleaved.storyworld.oracle import attribute_matches, read_scene
from mm_interleaved.storyworld.renderer import render_scene
from mm_interleaved.storyworld.tasks import document, part_pixels
from mm_interleaved.storyworld.world import Scene, scene_from_record

ENOUGH = 0.8
"""The rank correlation from which a score may stand in for the truth."""


class Case(NamedTuple):
    """A spoilt story: what was asked, what is answered, and how good that is."""

    question: Document
    answer: Document
    truth: float


class Agreement(NamedTuple):
    """How a score ranks stories against the truth."""

    score: str
    correlation: float
    """Spearman's rho, its sign turned where less of the score is better."""
    num_cases: int


Spoil = Callable[[Document, list[Document], float, random.Random], Case]


def agreements(reader: Reader, num_stories: int, seed: int = 0) -> Iterator[Agreement]:
    """The rank correlation of every judge-free score with the truth.

    Args:
        num_stories: of the test split; each is spoilt to one of five degrees, the first not at all.
    """
    stories = [document("test", seed, index, "story") for index in range(num_stories)]
    rng = random.Random(seed)
    for name, (spoil, sign) in SPOILT.items():
        cases = [spoil(story, stories, degree / 4, rng) for story, degree in _degrees(stories)]
        pairs = [
            (scores[name], case.truth)
            for case in cases
            if name in (scores := _scores(case, reader if name in READ else None))
        ]
        values, truths = zip(*pairs, strict=True)
        yield Agreement(name, sign * rank_correlation(values, truths), len(pairs))


def _scores(case: Case, reader: Reader | None) -> dict[str, float]:
    reading = None if reader is None else read_answer(case.question, case.answer, reader)
    return judge_free_scores(case.question, case.answer, reading)


def _degrees(stories: Sequence[Document]) -> list[tuple[Document, int]]:
    return [(story, place % 5) for place, story in enumerate(stories)]


def _whole(story: Document) -> list[Part]:
    return [*story.parts, *story.target]


def _answer(story: Document, parts: Sequence[Part]) -> Document:
    return Document(id=story.id, parts=tuple(replace(part, generated=True) for part in parts))


def _asked(story: Document) -> Document:
    """The story as it was asked for from nothing: everything is the answer."""
    return replace(story, parts=(), target=tuple(_whole(story)))


def _share_of(items: Sequence[int], degree: float, rng: random.Random) -> list[int]:
    return sorted(rng.sample(list(items), round(degree * len(items))))


def _scenes(story: Document) -> list[Scene]:
    return [scene_from_record(record) for record in story.meta["scenes"]]


def _image_places(parts: Sequence[Part]) -> list[int]:
    return [place for place, part in enumerate(parts) if isinstance(part, Image)]


def _of_others(story: Document, others: list[Document], degree: float, rng: random.Random) -> Case:
    """Images exchanged for those of other stories; the truth is how far the oracle reads what the texts
    are about.
    """
    parts = _whole(story)
    for place in _share_of(_image_places(parts), degree, rng):
        other = rng.choice([one for one in others if one.id != story.id])
        parts[place] = rng.choice([part for part in _whole(other) if isinstance(part, Image)])
    images = [part for part in parts if isinstance(part, Image)]
    pairs = zip(images, _scenes(story), strict=True)
    right = [np.mean(attribute_matches(read_scene(part_pixels(image)), scene)) for image, scene in pairs]
    return Case(_asked(story), _answer(story, parts), float(np.mean(right)))


def _other_looks(story: Document, others: list[Document], degree: float, rng: random.Random) -> Case:
    """Everybody drawn as somebody else in some panels; the truth is how often two panels show the same
    heroes.
    """
    parts, scenes = _whole(story), _scenes(story)
    places = _image_places(parts)
    for number in _share_of(range(1, len(places)), degree, rng):
        scenes[number] = _recast(scenes[number], rng.choice(_scenes(rng.choice(others))))
        parts[places[number]] = Image(PILImage.fromarray(render_scene(scenes[number])))
    casts = [_looks(part_pixels(parts[place])) for place in places]
    same = [_shared(casts[i], casts[j]) for i in range(len(casts)) for j in range(i)]
    return Case(_asked(story), _answer(story, parts), float(np.mean(same)) if same else 1.0)


def _recast(scene: Scene, other: Scene) -> Scene:
    """The scene with the characters of another, as far as there are some."""
    others = [figure.character for figure in other.figures]
    figures = tuple(
        replace(figure, character=replace(others[i % len(others)], name=figure.character.name))
        if others
        else figure
        for i, figure in enumerate(scene.figures)
    )
    return replace(scene, figures=figures)


def _looks(pixels: np.ndarray) -> set[tuple[str, ...]]:
    """Who stands in an image, by what the oracle reads."""
    figures = read_scene(pixels).figures
    return {(figure.species, figure.body_colour, figure.hat, figure.hat_colour) for figure in figures}


def _shared(first: set[tuple[str, ...]], second: set[tuple[str, ...]]) -> float:
    return len(first & second) / max(1, min(len(first), len(second)))


def _parts_lost(story: Document, others: list[Document], degree: float, rng: random.Random) -> Case:
    """Parts left out; the truth is the share that is there."""
    parts = _whole(story)
    lost = set(_share_of(range(len(parts)), 0.8 * degree, rng))
    left = [part for place, part in enumerate(parts) if place not in lost]
    return Case(_asked(story), _answer(story, left), len(left) / len(parts))


def _images_lost(story: Document, others: list[Document], degree: float, rng: random.Random) -> Case:
    """Images left out; the truth is the share that is there."""
    parts = _whole(story)
    places = _image_places(parts)
    lost = set(_share_of(places, degree, rng))
    left = [part for place, part in enumerate(parts) if place not in lost]
    return Case(_asked(story), _answer(story, left), 1 - len(lost) / len(places))


def _copied(story: Document, others: list[Document], degree: float, rng: random.Random) -> Case:
    """Images that are copies of the first; the truth is the share that is not."""
    parts = _whole(story)
    places = _image_places(parts)
    copies = _share_of(places[1:], degree, rng)
    for place in copies:
        parts[place] = parts[places[0]]
    return Case(_asked(story), _answer(story, parts), 1 - len(copies) / len(places))


def _repeated(story: Document, others: list[Document], degree: float, rng: random.Random) -> Case:
    """Texts that say the first again; the truth is the share that does not."""
    parts = _whole(story)
    places = [place for place, part in enumerate(parts) if isinstance(part, Text)]
    again = _share_of(places[1:], degree, rng)
    for place in again:
        parts[place] = parts[places[0]]
    return Case(_asked(story), _answer(story, parts), 1 - len(again) / len(places))


SPOILT: Mapping[str, tuple[Spoil, int]] = {
    "structure": (_parts_lost, 1),
    "image_count": (_images_lost, 1),
    "text_image_agreement": (_of_others, 1),
    "caption_round_trip": (_of_others, 1),
    "image_consistency": (_other_looks, 1),
    "copy_rate": (_copied, -1),
    "repetition": (_repeated, -1),
}
"""How stories are spoilt for each score; -1 where less of it is better."""
READ = frozenset({"text_image_agreement", "caption_round_trip", "image_consistency"})
"""Those for which somebody has to look at images."""
