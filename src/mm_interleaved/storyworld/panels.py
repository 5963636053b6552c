"""The generated panels of a story, against what its texts and its given images say of them.

Who is named stands in the image where the text says, and looks as in the first panel in which it stands: for
somebody whose first image is given that look is the truth, for others it is what the oracle reads in the
first generated image after the text that introduces it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.storyworld.language import Said, read_actions, read_introductions, read_setting
from mm_interleaved.storyworld.oracle import FigureReading, Reading
from mm_interleaved.storyworld.readings import read_image

LOOK_ATTRIBUTES = ("species", "body_colour", "pattern", "hat", "hat_colour")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mention:
    """A character that a panel's text names."""

    said: Said
    """With its action and position."""
    introduced: Said | None
    """How the texts introduced it; None where they never did."""
    appearance: Mapping[str, str] | None
    """Its look and badge in the first panel in which it stood; None for somebody who is new."""
    figure: FigureReading | None
    """Who stands where the text says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelReading:
    """One generated image of a story, and the text that it follows."""

    reading: Reading
    setting: Mapping[str, str]
    """Place, time and weather as the texts so far left them, as far as they name them."""
    mentions: tuple[Mention, ...]
    """Empty where the text names nobody, or is that of the panel before."""


def read_panels(document: Document, answer: Sequence[Part]) -> Iterator[PanelReading]:
    """Every image of an answer, in order.

    Args:
        document: of a story's task, with the scenes in its meta.
    """
    appearances = _given_appearances(document)
    texts = [part.text for part in document.parts if isinstance(part, Text)]
    for part in answer:
        if isinstance(part, Text):
            texts.append(part.text)
            continue
        reading = read_image(part)
        mentions = tuple(_mentions(texts, reading, appearances))
        yield PanelReading(reading=reading, setting=read_setting(" ".join(texts)), mentions=mentions)
        for mention in mentions:
            if mention.introduced is not None and mention.appearance is None and mention.figure is not None:
                appearances[mention.said.subject] = {
                    key: getattr(mention.figure, key) for key in (*LOOK_ATTRIBUTES, "badge")
                }


def _given_appearances(document: Document) -> dict[str, Mapping[str, str]]:
    """By name: what the given images show of each character."""
    num_given = sum(isinstance(part, Image) for part in document.parts)
    appearances: dict[str, Mapping[str, str]] = {}
    for scene in document.meta["scenes"][:num_given]:
        for figure in scene["figures"]:
            appearances.setdefault(figure["name"], figure)
    return appearances


def _mentions(
    texts: Sequence[str], reading: Reading, appearances: Mapping[str, Mapping[str, str]]
) -> Iterator[Mention]:
    is_told_again = len(texts) > 1 and texts[-1].split() == texts[-2].split()
    if not texts or is_told_again:
        return
    introductions = read_introductions(" ".join(texts))
    at = {figure.position: figure for figure in reading.figures}
    for name, said in read_actions(texts[-1]).items():
        yield Mention(
            said=said,
            introduced=introductions.get(name),
            appearance=appearances.get(name),
            figure=at.get(said.position or ""),
        )
