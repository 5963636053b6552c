"""How varied StoryWorld is, how fast it is rendered, and whether it is the same everywhere."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from mm_interleaved.documents.document import Image, Text
from mm_interleaved.storyworld.renderer import render_batch
from mm_interleaved.storyworld.stories import Story, story
from mm_interleaved.storyworld.tasks import TASKS, document, part_pixels
from mm_interleaved.storyworld.world import (
    ACTIONS,
    BADGES,
    BODY_COLOURS,
    HAT_COLOURS,
    HATS,
    NAMES,
    PATTERNS,
    PLACES,
    POSITIONS,
    SPECIES,
    SPLITS,
    TIMES,
    WEATHERS,
    Character,
    is_held_out,
    split_of,
)

_BATCH = 512


def appearances() -> list[Character]:
    """Every character that can be rendered, whatever the name."""
    hats = [("none", "none"), *product([hat for hat in HATS if hat != "none"], HAT_COLOURS)]
    return [
        Character(
            name=NAMES[0], species=species, body_colour=colour, pattern=pattern, hat=hat,
            hat_colour=hat_colour, badge=badge,
        )
        for species, colour, pattern, (hat, hat_colour), badge in product(
            SPECIES, BODY_COLOURS, PATTERNS, hats, BADGES
        )
    ]  # fmt: skip


def count_appearances(split: str) -> int:
    """How many appearances a character of a split may have; in the test split also the held-out ones."""
    return sum(
        split_of(character) == split
        and (split == "test" or not is_held_out(character.species, character.body_colour))
        for character in appearances()
    )


def count_hero_stories(split: str) -> int:
    """How many different stories of one hero without things on the ground a split has: a lower bound of all.

    Counted over the rules of `stories`: the first panel has any setting, position and action; each of the
    two to five later ones keeps or changes place and weather, keeps the time or goes to the next, and has
    any position and action but the last panel's.
    """
    first = len(PLACES) * len(TIMES) * len(WEATHERS) * len(POSITIONS) * len(ACTIONS)
    later = len(PLACES) * 2 * len(WEATHERS) * (len(POSITIONS) * len(ACTIONS) - 1)
    panels = sum(first * later ** (num_panels - 1) for num_panels in (3, 4, 5, 6))
    return count_appearances(split) * len(NAMES) * panels


@dataclass(frozen=True, slots=True, kw_only=True)
class Variety:
    """How many different ones there are among some stories."""

    stories: int
    scenes_and_texts: int
    """Whole stories, images and text."""
    texts: int
    """Text alone."""
    images: int
    all_images: int
    """Images in all, for comparison."""
    casts: int


def variety(stories: Sequence[Story]) -> Variety:
    """Counts what is different among them."""
    scenes = [panel.scene for story in stories for panel in story.panels]
    return Variety(
        stories=len(stories),
        scenes_and_texts=len({tuple(story.panels) for story in stories}),
        texts=len({tuple(panel.text for panel in story.panels) for story in stories}),
        images=len({repr(scene) for scene in scenes}),
        all_images=len(scenes),
        casts=len({story.cast for story in stories}),
    )


def drawn_stories(count: int, seed: int) -> list[Story]:
    """Stories of the training split."""
    return [story("train", seed, index) for index in range(count)]


def images_per_core_second(count: int, seed: int) -> float:
    """How many images one core renders in a second of its own time, scenes included."""
    render_batch(seed, 0, _BATCH)  # sprites and backgrounds are made once and kept
    started = time.process_time()
    for start in range(0, count, _BATCH):
        render_batch(seed, start, min(_BATCH, count - start))
    return count / (time.process_time() - started)


def fingerprint(documents_a_task: int, seed: int) -> str:
    """SHA-256 over texts and pixels of documents of every split and task: the same on any machine."""
    total = hashlib.sha256()
    for split, task, index in product(SPLITS, TASKS, range(documents_a_task)):
        made = document(split, seed, index, task)
        for part in (*made.parts, *made.target):
            if isinstance(part, Text):
                total.update(part.text.encode())
            elif isinstance(part, Image):
                total.update(part_pixels(part).tobytes())
    return total.hexdigest()
