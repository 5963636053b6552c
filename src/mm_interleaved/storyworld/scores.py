"""How right the predicted documents are, as a flat dict of numbers from 0 to 1: `<task>.<metric>`.

A pure function of documents: no model here, and no files but the images that the documents name. Texts are
read by the grammar of `language`, images by the oracle.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean

from mm_interleaved.documents.document import Document, Image, Part, Text, answer_parts
from mm_interleaved.storyworld.detail.scoring import score_detail_answer, score_detail_images
from mm_interleaved.storyworld.language import Said, read_figures, read_props, read_setting
from mm_interleaved.storyworld.oracle import FigureReading, attribute_matches
from mm_interleaved.storyworld.panels import LOOK_ATTRIBUTES, Mention, read_panels
from mm_interleaved.storyworld.readings import read_image
from mm_interleaved.storyworld.segmentation import class_map, mean_iou
from mm_interleaved.storyworld.world import Figure, Scene, scene_from_record
from mm_interleaved.tokens.boxes import box_iou, read_box

_MIN_IOU = 0.5

Found = dict[str, list[float]]


def score(predictions: Iterable[Document], gold: Sequence[Document]) -> dict[str, float]:
    """Every metric for which the gold documents have cases, averaged over the cases.

    Args:
        predictions: documents with the ids of the gold ones. Parts marked `generated` are the answer; where
            none is marked, all parts are. A document that is missing counts as wrong. A dialogue may carry
            `meta["ranking"]`, the indices of its candidates from best to worst; without it only the exact
            answer counts.
        gold: documents of `catalogue.document_of`, with their targets and meta.

    Raises:
        ValueError: a gold document has no task in its meta, or an id occurs twice.
    """
    by_id: dict[str, Document] = {}
    for prediction in predictions:
        if prediction.id in by_id:
            raise ValueError(f"the prediction {prediction.id!r} occurs twice")
        by_id[prediction.id] = prediction
    found: Found = {}
    for document in gold:
        for name, values in cases(by_id.get(document.id), document).items():
            found.setdefault(name, []).extend(values)
    return {name: mean(values) for name, values in sorted(found.items())}


def cases(prediction: Document | None, document: Document) -> Found:
    """Every metric's cases in one gold document, 0 to 1 each; arguments and errors as `score`."""
    task = document.meta.get("task")
    if task not in _SCORERS:
        raise ValueError(f"document {document.id!r}: expected a task in its meta, found {task!r}")
    answer = () if prediction is None else answer_parts(prediction)
    ranking = None if prediction is None else prediction.meta.get("ranking")
    found: Found = {}
    _add(found, "layout.correct", _kinds(answer) == _kinds(document.target))
    _SCORERS[task](found, document, answer, ranking)
    return found


def _add(found: Found, name: str, value: float) -> None:
    found.setdefault(name, []).append(float(value))


def _kinds(parts: Sequence[Part]) -> list[type]:
    """Text and Image in order; texts that follow each other are one."""
    kinds: list[type] = []
    for part in parts:
        if not (isinstance(part, Text) and kinds and kinds[-1] is Text):
            kinds.append(type(part))
    return kinds


def _text(parts: Sequence[Part]) -> str:
    return " ".join(part.text for part in parts if isinstance(part, Text)).strip()


def _last_scene(document: Document) -> Scene:
    return scene_from_record(document.meta["scenes"][-1])


def caption_matches(text: str, truth: Scene) -> list[bool]:
    """For every attribute of the truth, and for everything too much in the text, whether the text is right.

    The setting, each figure's species, colour, hat, hat colour, action (looked up by its position), each
    prop's kind and colour.
    """
    setting = read_setting(text)
    matches = [setting.get(name) == getattr(truth, name) for name in ("place", "time", "weather")]
    figures = {said.position: said for said in read_figures(text)}
    for figure in truth.figures:
        matches += _said_matches(figures.pop(figure.position, None), figure)
    props = {said.position: said for said in read_props(text)}
    for prop in truth.props:
        said = props.pop(prop.position, None)
        matches += [
            said is not None and said.subject == prop.kind,
            said is not None and said.colour == prop.colour,
        ]
    return matches + [False] * (len(figures) + len(props))


def _said_matches(said: Said | None, figure: Figure) -> list[bool]:
    if said is None:
        return [False] * 5
    character = figure.character
    return [
        said.subject == character.species,
        said.colour == character.body_colour,
        said.hat == character.hat,
        said.hat_colour == character.hat_colour,
        said.action == figure.action,
    ]


def _describing(metric: str) -> Callable[..., None]:
    def score_text(found: Found, document: Document, answer: Sequence[Part], ranking: object) -> None:
        _add(found, metric, mean(caption_matches(_text(answer), _last_scene(document))))

    return score_text


def normal(text: str) -> str:
    """A short answer in the form in which answers are compared."""
    return text.strip().rstrip(".!").strip().lower()


def _is_answer(document: Document, answer: Sequence[Part]) -> bool:
    return normal(_text(answer)) == normal(_text(document.target))


def _vqa(found: Found, document: Document, answer: Sequence[Part], ranking: object) -> None:
    is_right = _is_answer(document, answer)
    _add(found, "vqa.accuracy", is_right)
    if document.meta["is_fine_detail"]:
        _add(found, "vqa.fine_detail", is_right)


def _few_shot(found: Found, document: Document, answer: Sequence[Part], ranking: object) -> None:
    _add(found, "few_shot.accuracy", _is_answer(document, answer))


def _dialogue(found: Found, document: Document, answer: Sequence[Part], ranking: object) -> None:
    _add(found, "dialogue.accuracy", _is_answer(document, answer))
    gold_index = document.meta["gold_index"]
    if isinstance(ranking, list):
        rank = ranking.index(gold_index) + 1 if gold_index in ranking else 0
    else:
        rank = 1 if _is_answer(document, answer) else 0
    _add(found, "dialogue.mrr", 1 / rank if rank else 0.0)


def _ground(found: Found, document: Document, answer: Sequence[Part], ranking: object) -> None:
    predicted, truth = read_box(_text(answer)), read_box(_text(document.target))
    assert truth is not None, f"{document.id}: the gold answer is a box"
    _add(found, "ground.accuracy", predicted is not None and box_iou(predicted, truth) >= _MIN_IOU)


def first_image(answer: Sequence[Part]) -> Image | None:
    """The first image of an answer; None where it has none."""
    return next((part for part in answer if isinstance(part, Image)), None)


def _drawing(metric: str) -> Callable[..., None]:
    def score_image(found: Found, document: Document, answer: Sequence[Part], ranking: object) -> None:
        image = first_image(answer)
        value = 0.0 if image is None else mean(attribute_matches(read_image(image), _last_scene(document)))
        _add(found, metric, value)

    return score_image


def _segmentation(found: Found, document: Document, answer: Sequence[Part], ranking: object) -> None:
    """The oracle is the segmenter: the map of what it reads is compared with the map that was given."""
    image = first_image(answer)
    if image is None:
        _add(found, "segmentation.miou", 0.0)
        return
    drawn = read_image(image).to_scene()
    _add(found, "segmentation.miou", mean_iou(class_map(drawn), class_map(_last_scene(document))))


def _story(found: Found, document: Document, answer: Sequence[Part], ranking: object) -> None:
    """Whom a panel's text names must stand where it says, and look as in the first panel in which it stands
    (see `panels`).

    Nobody is kept by an image that is missing, whose text names nobody, or whose text is that of the panel
    before (a story that stands still would keep everybody), and nobody who was never introduced. Beside the
    whole look each attribute of it has a score of its own, and `name_known` says how often a named character
    had been introduced. Last images alone, whose texts are all given, have scores of their own as well, under
    `story_last`.
    """
    scored: Found = {}
    num_images = 0
    for panel in read_panels(document, answer):
        num_images += 1
        if not panel.mentions:
            _keep_nobody(scored)
        for mention in panel.mentions:
            _score_mention(scored, mention)
    num_wanted = sum(isinstance(part, Image) for part in document.target)
    for _ in range(num_wanted - num_images):
        _keep_nobody(scored)
    groups = ("story", "story_last") if document.meta["task"] == "story_last" else ("story",)
    for group in groups:
        for name, values in scored.items():
            found.setdefault(f"{group}.{name}", []).extend(values)


def _keep_nobody(scored: Found) -> None:
    _add(scored, "character_kept", False)
    _add(scored, "badge_kept", False)


def _score_mention(scored: Found, mention: Mention) -> None:
    figure, introduced = mention.figure, mention.introduced
    _add(scored, "name_known", introduced is not None)
    if introduced is None:
        _keep_nobody(scored)
    elif mention.appearance is not None:
        kept = {
            key: figure is not None and getattr(figure, key) == mention.appearance[key]
            for key in (*LOOK_ATTRIBUTES, "badge")
        }
        for key, is_kept in kept.items():
            _add(scored, f"{key}_kept", is_kept)
        _add(scored, "character_kept", all(kept[key] for key in LOOK_ATTRIBUTES))
    else:
        _add(scored, "character_kept", figure is not None and _is_as_stated(figure, introduced))
    _add(scored, "action", figure is not None and figure.action == mention.said.action)


def _is_as_stated(figure: FigureReading, stated: Said) -> bool:
    """Whether somebody new looks as introduced."""
    return (stated.subject, stated.colour, stated.hat, stated.hat_colour) == (
        figure.species,
        figure.body_colour,
        figure.hat,
        figure.hat_colour,
    )


def _detail(add: Callable[[Found, Document, Sequence[Part]], None]) -> Callable[..., None]:
    def score_detail(found: Found, document: Document, answer: Sequence[Part], ranking: object) -> None:
        add(found, document, answer)

    return score_detail


_SCORERS: dict[str, Callable[[Found, Document, Sequence[Part], object], None]] = {
    "caption": _describing("caption.attributes"),
    "paragraph": _describing("paragraph.attributes"),
    "vqa": _vqa,
    "dialogue": _dialogue,
    "ground": _ground,
    "draw": _drawing("draw.attributes"),
    "segmentation": _segmentation,
    "story": _story,
    "story_last": _story,
    "story_all": _story,
    "few_shot": _few_shot,
    "edit": _drawing("edit.attributes"),
    "detail_copy": _detail(score_detail_images),
    "detail_vqa": _detail(score_detail_answer),
    "detail_edit": _detail(score_detail_images),
    "detail_segmentation": _detail(score_detail_images),
    "detail_story": _detail(score_detail_images),
    "detail_story_last": _detail(score_detail_images),
}
