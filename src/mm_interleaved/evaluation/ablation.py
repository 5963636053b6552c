"""The twins of `recipes.ablation` on the same documents, by the same scorer.

RUN/data/documents.jsonl        questions, edits and last panels of stories, from the test split
RUN/scored/<twin>/              what `evaluate` writes, its predictions among it
RUN/scored/<twin>/result.json   scores, and what the twin cost
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from mm_interleaved.document import Document, Image
from mm_interleaved.document_formats import write_documents
from mm_interleaved.evaluation.runner import evaluate_model, read_predictions
from mm_interleaved.evaluation.tasks import TASKS
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.generation_run import ModelChoice, OnEvent, RunRequest
from mm_interleaved.model_source import load_generator
from mm_interleaved.recipes.ablation import COST_NAME, twin_folder
from mm_interleaved.recipes.ablation_twins import Twin
from mm_interleaved.storage import make_folder, write_file
from mm_interleaved.storyworld.oracle import read_scene
from mm_interleaved.storyworld.scores import answer_parts
from mm_interleaved.storyworld.tasks import document, part_pixels
from mm_interleaved.storyworld.world import Figure, Scene, scene_from_record
from mm_interleaved.training.naming import NAMES, SIZES, SceneCode, painting_labels

logger = logging.getLogger(__name__)

DATA_SEED = 0
RESULT_NAME = "result.json"
SHARES = {"vqa": 15, "edit": 2, "story_last": 3}
"""Documents of each task, in twentieths."""


def ablation_documents(count: int, seed: int = DATA_SEED) -> list[Document]:
    """So many documents, at least one of each task: questions, edits, last panels."""
    documents: list[Document] = []
    for task, share in SHARES.items():
        first = len(documents)
        documents += [
            document("test", seed, first + index, task) for index in range(max(1, count * share // 20))
        ]
    return documents


def score_twins(run: Path, twins: Sequence[Twin], num_documents: int, on_event: OnEvent) -> None:
    """Scores those of the twins that are trained and not scored yet."""
    data = run / "data" / "documents.jsonl"
    if not data.exists():
        make_folder(data.parent)
        write_documents(data, ablation_documents(num_documents))
    for twin in twins:
        out = run / "scored" / twin.name
        model = twin_folder(run, twin)
        if not model.exists() or (out / RESULT_NAME).exists():
            continue
        request = RunRequest(documents=(), output=out, model=ModelChoice(name=str(model)))
        task = TASKS["storyworld"]
        scores, _ = evaluate_model(task, data, request, on_event)
        gold = task.read_gold(data)
        scores |= badges_kept(read_predictions(out / "predictions.jsonl"), gold)
        scores |= badges_told(load_generator(model), gold)
        result = {
            "twin": twin.name,
            "arm": twin.arm,
            "slots": twin.reader.num_slots,
            "seed": twin.reader.seed,
            "documents": len(gold),
            "scores": {name: round(value, 4) for name, value in sorted(scores.items())},
            "cost": {part: _cost(run / folder) for part, folder in _parts(twin).items()},
        }
        write_file(out / RESULT_NAME, (json.dumps(result, indent=2) + "\n").encode())


def read_results(run: Path, twins: Sequence[Twin]) -> list[dict[str, Any]]:
    """The results of the twins that are scored."""
    paths = [run / "scored" / twin.name / RESULT_NAME for twin in twins]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _parts(twin: Twin) -> dict[str, str]:
    return {
        "slots": twin.reader.slots_name,
        "reader": twin.reader.name,
        "painter": twin.painter.name,
    }


def _cost(folder: Path) -> dict[str, Any]:
    path = folder / COST_NAME
    return json.loads(path.read_text()) if path.exists() else {}


# ---- Badges ----


def badges_kept(predictions: Sequence[Document], gold: Sequence[Document]) -> dict[str, float]:
    """Of those in the painted picture who stood in an earlier one, how many wear their badge, where the truth
    has them; a picture that is missing keeps none. By task.
    """
    by_id = {prediction.id: prediction for prediction in predictions}
    found: dict[str, list[bool]] = {}
    for truth in gold:
        known = _known_figures(truth)
        if not known:
            continue
        answer = answer_parts(by_id[truth.id]) if truth.id in by_id else ()
        image = next((part for part in answer if isinstance(part, Image)), None)
        figures = {} if image is None else {f.position: f for f in read_scene(part_pixels(image)).figures}
        for figure in known:
            drawn = figures.get(figure.position)
            is_kept = drawn is not None and drawn.badge == figure.character.badge
            found.setdefault(f"{_metric_task(truth)}.drawn_badge", []).append(is_kept)
    return {name: mean(kept) for name, kept in found.items()}


def _metric_task(truth: Document) -> str:
    return str(truth.meta["task"])


def _known_figures(truth: Document) -> list[Figure]:
    """Who stands in the picture that is to be painted and stood in an earlier one."""
    if not any(isinstance(part, Image) for part in truth.target):
        return []
    *earlier, new = (scene_from_record(record) for record in truth.meta["scenes"])
    looks = {_look(figure) for scene in earlier for figure in scene.figures}
    return [figure for figure in new.figures if _look(figure) in looks]


def _look(figure: Figure) -> tuple[str, ...]:
    """Who it is; an edit may change the hat."""
    character = figure.character
    return character.name, character.species, character.badge


@torch.no_grad()
def badges_told(generator: InterleavedGenerator, gold: Sequence[Document]) -> dict[str, float]:
    """Of the same figures, how many badges the language model hands on to the painter: those that its
    conditioning, read as a scene's code, names. By task.
    """
    network, processor = generator.model, generator.processor
    code = SceneCode(*network.image_decoder.resampler.queries.shape[1:])
    found: dict[str, list[bool]] = {}
    for truth in gold:
        known = _known_figures(truth)
        if not known:
            continue
        whole = replace(truth, parts=(*truth.parts, *truth.target), target=())
        batch = processor((whole,))
        output = network(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            image_start=batch.image_start,
            logits_to_keep=1,
        )
        end = batch.image_start[0, -1:]
        row = torch.zeros_like(end)
        conditioning, _ = network.condition(output.hidden, row, row, end)
        labels_N = painting_labels([whole])[-1]
        answers = code.answers(conditioning.float()).split(SIZES, dim=1)
        for index in _badge_attributes([figure.position for figure in known]):
            is_told = int(answers[index].argmax()) == int(labels_N[index])
            found.setdefault(f"{_metric_task(truth)}.told_badge", []).append(is_told)
    return {name: mean(told) for name, told in found.items()}


def _badge_attributes(positions: Sequence[str]) -> Iterator[int]:
    return (NAMES.index(f"badge@{position}") for position in positions)


def painted_pictures(run: Path, twin: Twin, gold: Sequence[Document]) -> dict[str, Image]:
    """What a twin painted, by the document's id."""
    path = run / "scored" / twin.name / "predictions.jsonl"
    answers = {answer.id: answer for answer in read_predictions(path)} if path.exists() else {}
    images = {
        truth.id: next((part for part in answer_parts(answers[truth.id]) if isinstance(part, Image)), None)
        for truth in gold
        if truth.id in answers
    }
    return {identity: image for identity, image in images.items() if image is not None}


def last_scenes(truth: Document) -> tuple[Scene, Scene]:
    """The newest given scene and the one to be painted."""
    scenes = [scene_from_record(record) for record in truth.meta["scenes"]]
    return scenes[-2], scenes[-1]
