"""The variants of `studies.ablation.recipe` on the same documents, by the same scorer.

RUN/data/documents.jsonl           questions, edits and last panels of stories, from the test split
RUN/scored/<variant>/              what `evaluate` writes, its predictions among it
RUN/scored/<variant>/result.json   scores, and what the variant cost
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, Image, answer_parts
from mm_interleaved.documents.document_files import read_documents, write_documents
from mm_interleaved.errors import UsageError
from mm_interleaved.evaluation.predictions import read_predictions
from mm_interleaved.evaluation.runner import evaluate_model
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.runs.engine import ModelChoice, OnEvent
from mm_interleaved.runs.generate import RunRequest
from mm_interleaved.storyworld.scores import first_image
from mm_interleaved.storyworld.tasks import document
from mm_interleaved.storyworld.world import Scene, scene_from_record
from studies.ablation.badges import conditioned_badges, generated_badges
from studies.ablation.recipe import variant_folder
from studies.ablation.variants import Variant
from studies.cost import made_by, read_cost

DATA_SEED = 0
RESULT_NAME = "result.json"
DATA_NAME = "data/documents.jsonl"
IMAGE_SHARES = {"edit": 2, "story_last": 3}
"""Documents that want an image, in twentieths of all; the others are questions."""


def ablation_documents(count: int, seed: int = DATA_SEED) -> list[Document]:
    """So many documents, at least one of each task: questions, edits, last panels."""
    num_images = {task: max(1, count * share // 20) for task, share in IMAGE_SHARES.items()}
    documents: list[Document] = []
    for task, number in {"vqa": max(1, count - sum(num_images.values())), **num_images}.items():
        first = len(documents)
        documents += [document("test", seed, first + index, task) for index in range(number)]
    return documents


def check_documents(run: Path, num_documents: int) -> None:
    """Refuses another number of documents than a run has begun with: its variants could not be compared.

    Raises:
        UsageError: the run's documents are there, and are more or fewer.
    """
    path = run / DATA_NAME
    if path.exists() and (found := len(read_documents(path))) != num_documents:
        raise UsageError(
            f"{path}: the run has {found} documents, found --documents {num_documents}; "
            f"give --documents {found}, or another folder"
        )


def score_variants(run: Path, variants: Sequence[Variant], num_documents: int, on_event: OnEvent) -> None:
    """Scores those of the variants that are trained and not scored yet.

    Raises:
        UsageError: the run's documents are there, and are more or fewer.
    """
    check_documents(run, num_documents)
    data = run / DATA_NAME
    if not data.exists():
        make_folder(data.parent)
        write_documents(data, ablation_documents(num_documents))
    for variant in variants:
        out = run / "scored" / variant.name
        model = variant_folder(run, variant)
        if not model.exists() or (out / RESULT_NAME).exists():
            continue
        request = RunRequest(documents=(), output=out, model=ModelChoice(name=str(model)))
        task = STORYWORLD
        scores, _ = evaluate_model(task, data, request, on_event)
        gold = task.read_gold(data)
        scores |= generated_badges(read_predictions(out / "predictions.jsonl"), gold)
        scores |= conditioned_badges(load_generator(model), gold)
        result = {
            # By the names of the first release, whose results lie beside.
            "twin": variant.name,
            "arm": variant.kind,
            "slots": variant.language.num_slots,
            "seed": variant.language.seed,
            "documents": len(gold),
            "scored_by": made_by(),
            "scores": {name: round(value, 4) for name, value in sorted(scores.items())},
            "cost": {part: read_cost(run / folder) for part, folder in _parts(variant).items()},
        }
        write_file(out / RESULT_NAME, (json.dumps(result, indent=2) + "\n").encode())


def read_results(run: Path, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The results of the variants that are scored."""
    paths = [run / "scored" / variant.name / RESULT_NAME for variant in variants]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _parts(variant: Variant) -> dict[str, str]:
    return {
        "slots": variant.language.slots_name,
        "reader": variant.language.name,
        "painter": variant.image_decoder.name,
    }


def generated_images(run: Path, variant: Variant, gold: Sequence[Document]) -> dict[str, Image]:
    """The images that a variant generated, by the document's id."""
    path = run / "scored" / variant.name / "predictions.jsonl"
    answers = {answer.id: answer for answer in read_predictions(path)} if path.exists() else {}
    images = {truth.id: first_image(answer_parts(answers[truth.id])) for truth in gold if truth.id in answers}
    return {identity: image for identity, image in images.items() if image is not None}


def last_scenes(truth: Document) -> tuple[Scene, Scene]:
    """The newest given scene and the one to be generated."""
    scenes = [scene_from_record(record) for record in truth.meta["scenes"]]
    return scenes[-2], scenes[-1]
