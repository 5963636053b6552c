"""Tasks as documents with a hole: `parts` is given, `target` the gold continuation, `meta` the truth.

Every document is a pure function of split, seed and index. `meta` holds `task`, `scenes` (the truth of each
image, in order of the images in parts and target), `is_held_out`, and what the task's score needs beside
that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE
from mm_interleaved.storyworld.language import (
    AT,
    DOES,
    WHERE,
    describe_relations,
    describe_scene,
    with_article,
)
from mm_interleaved.storyworld.questions import QUESTIONS, Question, ask, ask_several
from mm_interleaved.storyworld.renderer import figure_box, prop_box, render_scene
from mm_interleaved.storyworld.segmentation import render_map
from mm_interleaved.storyworld.stories import random_story
from mm_interleaved.storyworld.task_documents import document_with_hole, shows_held_out
from mm_interleaved.storyworld.world import (
    ACTIONS,
    HAT_COLOURS,
    HATS,
    PLACES,
    POSITIONS,
    PROP_COLOURS,
    PROPS,
    SPLITS,
    TIMES,
    WEATHERS,
    Figure,
    Prop,
    Scene,
    random_cast,
    random_scene,
    scene_to_record,
    split_of,
)
from mm_interleaved.tokens.boxes import BOX_RANGE, write_box
from mm_interleaved.tokens.task_prompts import CAPTION_PROMPT, GROUND_PROMPT, PARAGRAPH_PROMPT

_DOCUMENT_DOMAIN = 3
NUM_CANDIDATES = 10


def document(split: str, seed: int, index: int, task: str | None = None) -> Document:
    """One document, a pure function of its arguments.

    Args:
        split: "train", "validation" or "test"; no image of one split occurs in another.
        seed, index: integers from 0.
        task: a name out of TASKS; None takes the index's turn in a round of all tasks, as often as
            TASK_WEIGHTS says.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, found {task!r}")
    rng = SeededRandom(_DOCUMENT_DOMAIN, SPLITS.index(split), seed, index)
    task = task or _TASK_ROUND[index % len(_TASK_ROUND)]
    made = TASKS[task](rng, split)
    meta: dict[str, Any] = {"task": task, "split": split, "seed": seed, "index": index, **made.meta}
    meta["is_held_out"] = shows_held_out(meta["scenes"])
    return replace(made, id=f"storyworld-{split}-{seed}-{index}", meta=meta)


def _document(
    parts: Sequence[Part], target: Sequence[Part], scenes: Sequence[Scene], **more: Any
) -> Document:
    return document_with_hole(parts, target, [scene_to_record(scene) for scene in scenes], **more)


def scene_image(scene: Scene, role: str | None = None) -> Image:
    """The scene's image as a part."""
    return Image(PILImage.fromarray(render_scene(scene)), role=role)


def _caption(rng: SeededRandom, split: str) -> Document:
    scene = random_scene(rng, split)
    return _document(
        (scene_image(scene, "user"), Text(CAPTION_PROMPT, role="user")),
        (Text(describe_scene(scene), role="assistant"),),
        [scene],
    )


def _paragraph(rng: SeededRandom, split: str) -> Document:
    scene = random_scene(rng, split)
    return _document(
        (scene_image(scene, "user"), Text(PARAGRAPH_PROMPT, role="user")),
        (Text(f"{describe_scene(scene)} {describe_relations(scene)}", role="assistant"),),
        [scene],
    )


def _vqa(rng: SeededRandom, split: str) -> Document:
    scene = random_scene(rng, split)
    question = ask(rng, scene)
    return _document(
        (scene_image(scene, "user"), Text(question.text, role="user")),
        (Text(question.answer, role="assistant"),),
        [scene],
        question=question.text,
        question_kind=question.kind,
        is_fine_detail=question.is_fine_detail,
    )


def _dialogue(rng: SeededRandom, split: str) -> Document:
    """Two to four questions about one image; the last answer is to be ranked among ten candidates."""
    scene = random_scene(rng, split)
    questions = ask_several(rng, scene, rng.between(2, 4))
    parts: list[Part] = [scene_image(scene, "user")]
    for question in questions:
        parts += [Text(question.text, role="user"), Text(question.answer, role="assistant")]
    candidates = _candidates(rng, questions[-1])
    return _document(
        parts[:-1],
        parts[-1:],
        [scene],
        question_kind=questions[-1].kind,
        is_fine_detail=questions[-1].is_fine_detail,
        candidates=candidates,
        gold_index=candidates.index(questions[-1].answer),
    )


def _candidates(rng: SeededRandom, question: Question) -> list[str]:
    """Ten different answers in random order: the right one, others of its kind, then any."""
    wrong = [choice for choice in question.choices if choice != question.answer]
    fillers = dict.fromkeys((*PROPS, *PLACES, *POSITIONS, *HATS, *HAT_COLOURS))
    others = [choice for choice in fillers if choice not in question.choices]
    wrong = rng.sample(wrong, min(len(wrong), NUM_CANDIDATES - 1))
    wrong += rng.sample(others, NUM_CANDIDATES - 1 - len(wrong))
    return rng.sample([question.answer, *wrong], NUM_CANDIDATES)


def _ground(rng: SeededRandom, split: str) -> Document:
    scene = random_scene(rng, split)
    thing = rng.pick((*scene.figures, *scene.props))
    if isinstance(thing, Figure):
        words, box = f"{thing.character.body_colour} {thing.character.species}", figure_box(thing)
    else:
        words, box = f"{thing.colour} {thing.kind}", prop_box(thing)
    return _document(
        (scene_image(scene, "user"), Text(GROUND_PROMPT.replace("{phrase}", words), role="user")),
        (Text(box_text(box), role="assistant"),),
        [scene],
        box=list(box),
    )


def box_text(box: tuple[int, int, int, int]) -> str:
    """A box of the image as an answer: left, top, right, bottom in thousandths of the image.

    Args:
        box: pixels, all four ends included, so that the right end gains one before it is scaled.
    """
    left, top, right, bottom = (
        min(edge * BOX_RANGE // IMAGE_SIZE, BOX_RANGE - 1)
        for edge in (box[0], box[1], box[2] + 1, box[3] + 1)
    )
    return write_box((left, top, right, bottom))


def _draw(rng: SeededRandom, split: str) -> Document:
    scene = random_scene(rng, split)
    return _document((Text(describe_scene(scene)),), (scene_image(scene),), [scene])


def _segmentation(rng: SeededRandom, split: str) -> Document:
    scene = random_scene(rng, split)
    parts = (Image(PILImage.fromarray(render_map(scene))), Text(describe_scene(scene)))
    # The map shows the same scene; its truth stands once for each of the two images.
    return _document(parts, (scene_image(scene),), [scene, scene])


def _story(rng: SeededRandom, split: str) -> Document:
    """The first panel is given; texts and images of all others are to be made."""
    return _story_document(rng, split, lambda parts: 2)


def _story_last(rng: SeededRandom, split: str) -> Document:
    """Everything is given but the last image."""
    return _story_document(rng, split, lambda parts: len(parts) - 1)


def _story_all(rng: SeededRandom, split: str) -> Document:
    """The first panel and the second's text are given; from there on as `story`, beginning with an image.

    A runner that fills in the gold texts between the images gets the task "all images, texts given".
    """
    return _story_document(rng, split, lambda parts: 3)


def _story_document(rng: SeededRandom, split: str, num_given: Callable[[list[Part]], int]) -> Document:
    made = random_story(rng, split)
    parts: list[Part] = []
    for panel in made.panels:
        parts += [Text(panel.text), scene_image(panel.scene)]
    given = num_given(parts)
    return _document(parts[:given], parts[given:], [panel.scene for panel in made.panels])


_FEW_SHOT_KINDS = ("badge", "species", "body_colour", "place", "hat")


def _few_shot(rng: SeededRandom, split: str) -> Document:
    """Three examples of a question that is never asked in words, then an image."""
    kind = rng.pick(_FEW_SHOT_KINDS)
    parts: list[Part] = []
    scenes = []
    for _ in range(4):
        scene = _lonely_scene(rng, split)
        question = QUESTIONS[kind](rng, scene)
        assert question is not None
        scenes.append(scene)
        parts += [scene_image(scene), Text(question.answer)]
    return _document(parts[:-1], parts[-1:], scenes, question_kind=kind, is_fine_detail=kind == "badge")


def _lonely_scene(rng: SeededRandom, split: str) -> Scene:
    character = random_cast(rng, split, 1)[0]
    return Scene(
        place=rng.pick(PLACES),
        time=rng.pick(TIMES),
        weather=rng.pick(WEATHERS),
        figures=(Figure(character=character, position=rng.pick(POSITIONS), action=rng.pick(ACTIONS)),),
    )


def _edit(rng: SeededRandom, split: str) -> Document:
    """An image and an instruction; the image after it."""
    before = random_scene(rng, split)
    instruction, after = random_edit(rng, before)
    return _document((scene_image(before), Text(instruction)), (scene_image(after),), [before, after])


def random_edit(rng: SeededRandom, scene: Scene) -> tuple[str, Scene]:
    """An instruction that changes one thing of a scene, and the scene after it."""
    while (edit := rng.pick(_EDITS)(rng, scene)) is None:
        pass
    return edit


_Edit = tuple[str, Scene] | None


def _edit_setting(rng: SeededRandom, scene: Scene) -> _Edit:
    kind = rng.pick(("place", "time", "weather"))
    words = {"place": PLACES, "time": TIMES, "weather": WEATHERS}[kind]
    value = rng.pick([word for word in words if word != getattr(scene, kind)])
    after = replace(scene, **{kind: value})
    where = f"when it is {value}" if kind != "place" else WHERE[value]
    return f"The same scene {where}.", after


def _edit_action(rng: SeededRandom, scene: Scene) -> _Edit:
    figure = rng.pick(scene.figures)
    action = rng.pick([action for action in ACTIONS if action != figure.action])
    after = _with_figure(scene, figure, replace(figure, action=action))
    return f"Now the {figure.character.species} {DOES[action]}.", after


def _edit_hat(rng: SeededRandom, scene: Scene) -> _Edit:
    """Another hat, if there is one with which the character stays in its split."""
    figure = rng.pick(scene.figures)
    character = figure.character
    hats = [
        replace(character, hat=hat, hat_colour=colour)
        for hat in HATS
        if hat != "none"
        for colour in HAT_COLOURS
    ]
    hats = [changed for changed in hats if split_of(changed) == split_of(character) and changed != character]
    if not hats:
        return None
    changed = rng.pick(hats)
    after = _with_figure(scene, figure, replace(figure, character=changed))
    return f"Give the {character.species} {with_article(f'{changed.hat_colour} {changed.hat}')}.", after


def _edit_prop(rng: SeededRandom, scene: Scene) -> _Edit:
    free = [position for position in POSITIONS if position not in {prop.position for prop in scene.props}]
    unused = [kind for kind in PROPS if kind not in {prop.kind for prop in scene.props}]
    prop = Prop(kind=rng.pick(unused), colour=rng.pick(PROP_COLOURS), position=rng.pick(free))
    after = replace(scene, props=(*scene.props, prop))
    return f"Add {with_article(f'{prop.colour} {prop.kind}')} {AT[prop.position]}.", after


_EDITS: tuple[Callable[[SeededRandom, Scene], _Edit], ...] = (
    _edit_setting,
    _edit_action,
    _edit_hat,
    _edit_prop,
)


def _with_figure(scene: Scene, old: Figure, new: Figure) -> Scene:
    return replace(scene, figures=tuple(new if figure == old else figure for figure in scene.figures))


TASKS: dict[str, Callable[[SeededRandom, str], Document]] = {
    "caption": _caption,
    "paragraph": _paragraph,
    "vqa": _vqa,
    "dialogue": _dialogue,
    "ground": _ground,
    "draw": _draw,
    "segmentation": _segmentation,
    "story": _story,
    "story_last": _story_last,
    "story_all": _story_all,
    "few_shot": _few_shot,
    "edit": _edit,
}
TASK_WEIGHTS: Mapping[str, int] = {
    "caption": 12,
    "paragraph": 4,
    "vqa": 20,
    "dialogue": 8,
    "ground": 8,
    "draw": 12,
    "segmentation": 6,
    "story": 12,
    "story_last": 6,
    "story_all": 4,
    "few_shot": 4,
    "edit": 4,
}


# A fixed shuffle, so that any hundred documents in a row hold every task as often as its weight says.
_TASK_ROUND = tuple(
    SeededRandom(_DOCUMENT_DOMAIN).sample(
        [task for task, weight in TASK_WEIGHTS.items() for _ in range(weight)], 100
    )
)


def part_pixels(part: Image) -> np.ndarray:
    """(64, 64, 3) uint8: the image of a document at this world's size, whatever size it has."""
    loaded = part.load()
    if loaded.size != (IMAGE_SIZE, IMAGE_SIZE):
        loaded = loaded.resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.BOX)
    return np.asarray(loaded)


assert set(TASKS) == set(TASK_WEIGHTS)
