"""Which attribute is lost: what should have been said or shown, against what was, attribute by attribute.

Images are read by the oracle, texts by the grammar of `language`, short answers as they are. What nothing
tells is no case: neither patterns and badges of an image that words alone describe, nor what an answer says
or shows too much, except that somebody or something stands where nobody should (`NOBODY`, `NOTHING`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from mm_interleaved.documents.document import Document, Part, Text, answer_parts
from mm_interleaved.storyworld.language import Said, read_figures, read_props, read_setting
from mm_interleaved.storyworld.oracle import SETTING_ATTRIBUTES, Reading
from mm_interleaved.storyworld.panels import LOOK_ATTRIBUTES, Mention, PanelReading, read_panels
from mm_interleaved.storyworld.questions import answers_of
from mm_interleaved.storyworld.readings import read_image
from mm_interleaved.storyworld.scores import first_image, normal
from mm_interleaved.storyworld.world import Figure, Prop, Scene, scene_from_record, words_of

MISSING = "(missing)"
"""What was read where the thing itself, its image or its text is not there."""
OTHER = "(other)"
"""What was answered where the answer is none of the kind that was asked for."""
NOBODY, NOTHING = "(nobody)", "(nothing)"
"""The truth of a position at which somebody, or something, is too much."""
SURPLUS = frozenset({NOBODY, NOTHING})
_STATED_LOOK = ("species", "body_colour", "hat", "hat_colour")

Case = tuple[str, str, str]
"""Attribute, truth, what was read."""
Things = Mapping[str, Mapping[str, str]]
"""By position: the attributes of what stands there."""


def kept_and_lost(prediction: Document | None, document: Document) -> Iterator[Case]:
    """Every case of one gold document.

    Args:
        prediction, document: as `scores.cases` takes them; without a prediction everything is missing.
    """
    answer = () if prediction is None else answer_parts(prediction)
    return _READERS.get(document.meta["task"], _no_cases)(document, answer)


def values_of(attribute: str) -> tuple[str, ...]:
    """The values of an attribute, or of the answers to questions for it, in the world's order; then what else
    may be read.
    """
    words = (*words_of(_WORLD_NAMES.get(attribute, attribute)), *answers_of(attribute))
    return (*dict.fromkeys(words), NOBODY, NOTHING, OTHER, MISSING)


_WORLD_NAMES = {"prop": "kind", "prop_position": "position"}


# ---- Images ----


def _drawn(*fine: str) -> Callable[[Document, Sequence[Part]], Iterator[Case]]:
    """Of one generated image.

    Args:
        fine: attributes beside those that words state, which an earlier image shows.
    """

    def read(document: Document, answer: Sequence[Part]) -> Iterator[Case]:
        image, scene = first_image(answer), scene_from_record(document.meta["scenes"][-1])
        reading = None if image is None else read_image(image)
        names = (*_STATED_LOOK, *fine)
        yield from _setting_cases(scene, {} if reading is None else _setting_of(reading))
        figures = {figure.position: _figure_of(figure, names) for figure in scene.figures}
        seen = () if reading is None else reading.figures
        found = {each.position: {key: getattr(each, key) for key in (*names, "action")} for each in seen}
        yield from _thing_cases(figures, found, "species", "position", NOBODY)
        props = () if reading is None else reading.props
        yield from _prop_cases(scene, {prop.position: _prop_of(prop) for prop in props})

    return read


def _setting_of(reading: Reading) -> dict[str, str]:
    return {name: getattr(reading, name) for name in SETTING_ATTRIBUTES}


def _setting_cases(scene: Scene, found: Mapping[str, str]) -> Iterator[Case]:
    for name in SETTING_ATTRIBUTES:
        yield name, getattr(scene, name), found.get(name, MISSING)


def _figure_of(figure: Figure, names: Sequence[str]) -> dict[str, str]:
    return {**{name: getattr(figure.character, name) for name in names}, "action": figure.action}


def _prop_of(prop: Prop) -> dict[str, str]:
    return {"prop": prop.kind, "prop_colour": prop.colour}


def _prop_cases(scene: Scene, found: Things) -> Iterator[Case]:
    truth = {prop.position: _prop_of(prop) for prop in scene.props}
    yield from _thing_cases(truth, found, "prop", "prop_position", NOTHING)


def _thing_cases(truth: Things, found: Things, kind: str, position: str, nothing: str) -> Iterator[Case]:
    """Things by where they stand. One that stands elsewhere has lost its position alone.

    Args:
        kind: the attribute by which a thing is known again at another position.
        position: the name of the attribute "position".
        nothing: the truth of a position that should be empty.
    """
    free = {at: thing for at, thing in found.items() if at not in truth}
    for at, thing in truth.items():
        where = at
        if at not in found:
            same = [other for other, seen in free.items() if seen.get(kind) == thing[kind]]
            where = same[0] if same else MISSING
        free.pop(where, None)
        yield position, at, where
        seen = found.get(where, {})
        for name, value in thing.items():
            # A text may name a prop without its colour.
            yield name, value, seen.get(name) or MISSING
    for at in free:
        yield position, nothing, at


# ---- Stories ----


def _story(document: Document, answer: Sequence[Part]) -> Iterator[Case]:
    """Of each generated panel: the setting as the texts left it, and whom its text names."""
    for panel in read_panels(document, answer):
        for name, value in panel.setting.items():
            yield name, value, getattr(panel.reading, name)
        for mention in panel.mentions:
            yield from _mention_cases(panel, mention)


def _mention_cases(panel: PanelReading, mention: Mention) -> Iterator[Case]:
    if mention.appearance is not None:
        look = {name: mention.appearance[name] for name in (*LOOK_ATTRIBUTES, "badge")}
    elif mention.introduced is not None:
        look = _look_of(mention.introduced)
    else:
        return
    figure, said = mention.figure, mention.said
    assert said.position is not None and said.action is not None, "a named character acts somewhere"
    elsewhere = [each.position for each in panel.reading.figures if each.species == look["species"]]
    moved = elsewhere[0] if elsewhere else MISSING
    yield "position", said.position, moved if figure is None else said.position
    if figure is None and elsewhere:
        figure = panel.reading.figure_at(moved)
    for name, value in {**look, "action": said.action}.items():
        yield name, value, MISSING if figure is None else getattr(figure, name)


def _look_of(said: Said) -> dict[str, str]:
    values = (said.subject, said.colour, said.hat, said.hat_colour)
    return {name: value for name, value in zip(_STATED_LOOK, values, strict=True) if value is not None}


# ---- Texts ----


def _text(parts: Sequence[Part]) -> str:
    return " ".join(part.text for part in parts if isinstance(part, Text))


def _described(document: Document, answer: Sequence[Part]) -> Iterator[Case]:
    """Of a caption or a paragraph."""
    text, scene = _text(answer), scene_from_record(document.meta["scenes"][-1])
    yield from _setting_cases(scene, read_setting(text))
    figures = {figure.position: _figure_of(figure, _STATED_LOOK) for figure in scene.figures}
    said = {
        each.position or "": {**_look_of(each), "action": each.action or ""} for each in read_figures(text)
    }
    yield from _thing_cases(figures, said, "species", "position", NOBODY)
    props = {
        each.position or "": {"prop": each.subject, "prop_colour": each.colour or ""}
        for each in read_props(text)
    }
    yield from _prop_cases(scene, props)


def _answered(document: Document, answer: Sequence[Part]) -> Iterator[Case]:
    """Of a short answer, by the kind of question."""
    kind = document.meta["question_kind"]
    known = {normal(word): word for word in answers_of(kind)}
    truth, found = normal(_text(document.target)), normal(_text(answer))
    yield kind, known.get(truth, truth), known.get(found, OTHER) if found else MISSING


def _no_cases(document: Document, answer: Sequence[Part]) -> Iterator[Case]:
    yield from ()


_READERS: Mapping[str, Callable[[Document, Sequence[Part]], Iterator[Case]]] = {
    "caption": _described,
    "paragraph": _described,
    "vqa": _answered,
    "dialogue": _answered,
    "few_shot": _answered,
    "draw": _drawn(),
    "segmentation": _drawn(),
    "edit": _drawn("pattern", "badge"),
    "story": _story,
    "story_last": _story,
    "story_all": _story,
}
