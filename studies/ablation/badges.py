"""Badges over several images: does who stood in an earlier image still wear the right one?

drawn   the oracle reads it in the image that was generated
told    the conditioning that the language model hands on to the U-Net holds it

Both are shares, by task: "<task>.drawn_badge", "<task>.told_badge". Letter: N attributes of a scene.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import mean

import torch

from mm_interleaved.documents.document import Document, Image, answer_parts
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.recipes.storyworld.attribute_embedding import AttributeEmbedding
from mm_interleaved.recipes.storyworld.attribute_supervision import ATTRIBUTES, NUM_VALUES, known_labels
from mm_interleaved.storyworld.oracle import read_scene
from mm_interleaved.storyworld.scores import first_image
from mm_interleaved.storyworld.tasks import part_pixels
from mm_interleaved.storyworld.world import Figure, scene_from_record


def generated_badges(predictions: Sequence[Document], gold: Sequence[Document]) -> dict[str, float]:
    """Of those in the generated image who stood in an earlier one, how many wear their badge, where the truth
    has them; an image that is missing shows none.
    """
    by_id = {prediction.id: prediction for prediction in predictions}
    found: dict[str, list[bool]] = {}
    for truth, known in _with_known_figures(gold):
        image = first_image(answer_parts(by_id[truth.id])) if truth.id in by_id else None
        figures = {} if image is None else {f.position: f for f in read_scene(part_pixels(image)).figures}
        for figure in known:
            shown = figures.get(figure.position)
            is_right = shown is not None and shown.badge == figure.character.badge
            found.setdefault(f"{truth.meta['task']}.drawn_badge", []).append(is_right)
    return {name: mean(right) for name, right in found.items()}


@torch.no_grad()
def conditioned_badges(generator: InterleavedGenerator, gold: Sequence[Document]) -> dict[str, float]:
    """Of the same figures, how many badges the language model hands on to the U-Net: those that its
    conditioning, compared with attribute embeddings, resembles most.
    """
    network, processor = generator.model, generator.processor
    embedding = AttributeEmbedding.of(network.image_decoder)
    found: dict[str, list[bool]] = {}
    for truth, known in _with_known_figures(gold):
        whole = replace(truth, parts=(*truth.parts, *truth.target), target=())
        batch = processor((whole,)).to(device=network.device)
        output = network(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            image_start=batch.image_start,
            logits_to_keep=1,
        )
        end = batch.image_start[0, -1:]
        row = torch.zeros_like(end)
        conditioning, _ = network.condition(output.hidden, row, row, end)
        labels_N = known_labels([whole])[-1]
        logits = embedding.logits(conditioning.float()).split(NUM_VALUES, dim=1)
        for figure in known:
            index = ATTRIBUTES.index(f"badge@{figure.position}")
            is_right = int(logits[index].argmax()) == int(labels_N[index])
            found.setdefault(f"{truth.meta['task']}.told_badge", []).append(is_right)
    return {name: mean(right) for name, right in found.items()}


def count_known_figures(gold: Sequence[Document]) -> dict[str, int]:
    """How many figures the shares of each task are of."""
    counts: dict[str, int] = {}
    for truth, known in _with_known_figures(gold):
        counts[truth.meta["task"]] = counts.get(truth.meta["task"], 0) + len(known)
    return counts


def _with_known_figures(gold: Sequence[Document]) -> Iterator[tuple[Document, list[Figure]]]:
    """Documents that want an image, with those in it who stood in an earlier one, where there are such."""
    for truth in gold:
        if any(isinstance(part, Image) for part in truth.target):
            *earlier, new = (scene_from_record(record) for record in truth.meta["scenes"])
            identities = {_identity(figure) for scene in earlier for figure in scene.figures}
            known = [figure for figure in new.figures if _identity(figure) in identities]
            if known:
                yield truth, known


def _identity(figure: Figure) -> tuple[str, ...]:
    """Who it is; an edit may change the hat."""
    character = figure.character
    return character.name, character.species, character.badge
