"""Attention maps of one story: where the model samples while it names a badge, and while it denoises it.

OUT/word.png        the image that was asked about, under the attention of the answer's first token: all
                    layers, then each of them
OUT/badge.png       the earlier images of the story, under the attention of the badge's place in the new one
OUT/attention.json  the same as numbers: shares of the weight on images, heroes and badges, beside their
                    areas; of the word also by layer and head
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.images import to_png
from mm_interleaved.errors import UsageError
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.models.attention_maps import (
    Box,
    Samples,
    SynchronizerCall,
    by_head,
    heat_map,
    record_calls,
    samples_of_place,
    samples_of_token,
    weight_in,
)
from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE
from mm_interleaved.storyworld.renderer import badge_box, figure_box
from mm_interleaved.storyworld.tasks import document, scene_image
from mm_interleaved.storyworld.world import Figure, Scene, scene_from_record

_SCALE = 5
_GAP = 8
_STRIP = 34
_HEAT = np.array([255, 64, 0], np.float32)
_PAPER, _INK, _FRAME = (255, 255, 255), (30, 30, 36), (0, 150, 255)
MIN_MAP_SIZE = 8
"""Maps of the U-Net of fewer cells hold most of a figure in one cell: they say nothing about a badge."""


@dataclass(frozen=True, slots=True)
class AttendedImage:
    """Where one image was sampled."""

    image: PILImage.Image
    title: str
    samples: Samples
    figure: Figure | None
    """The hero as the image shows it, if it does."""


def write_attention_maps(generator: InterleavedGenerator, seed: int, index: int, out: Path) -> dict[str, Any]:
    """Writes the maps and numbers of one story of the test split; returns the numbers.

    Raises:
        UsageError: the model has no synchronizers, or nobody in the last panel has been seen before.
    """
    model = generator.model
    if not model.language_model.synchronized_layers or model.image_decoder is None:
        raise UsageError("attention maps need a model with synchronizers that generates images")
    story = document("test", seed, index, "story_last")
    scenes = [scene_from_record(record) for record in story.meta["scenes"]]
    hero = _hero(scenes)
    if hero is None:
        raise UsageError(f"story {index} of seed {seed}: nobody in its last image stood in an earlier one")
    make_folder(out)
    word = _map_of_answer(generator, scenes, hero, out / "word.png")
    badge = _map_of_badge(generator, story, scenes, hero, out / "badge.png")
    numbers = {"story": story.id, "hero": hero.character.species, "word": word, "badge": badge}
    write_file(out / "attention.json", (json.dumps(numbers, indent=2) + "\n").encode())
    return numbers


def _hero(scenes: Sequence[Scene]) -> Figure | None:
    """The first figure of the last scene whose character stood in an earlier one."""
    earlier = {figure.character for scene in scenes[:-1] for figure in scene.figures}
    return next((figure for figure in scenes[-1].figures if figure.character in earlier), None)


def _figure_of(scene: Scene, hero: Figure) -> Figure | None:
    return next((figure for figure in scene.figures if figure.character == hero.character), None)


def _map_of_answer(
    generator: InterleavedGenerator, scenes: Sequence[Scene], hero: Figure, path: Path
) -> dict[str, Any]:
    """Asks for the hero's badge in its first image, and records where the answer came from."""
    scene = next(scene for scene in scenes if _figure_of(scene, hero) is not None)
    question = f"What is on the badge of the {hero.character.species}?"
    given = Document(id="word", parts=(scene_image(scene, "user"), Text(question, role="user")), layout="T")
    answered = generator.generate(given)
    answer = answered.text.removeprefix(given.text).strip()
    with record_calls(generator.model) as calls:
        position = _read_to_answer(generator, given, answered)
    figure = _figure_of(scene, hero)

    def attended_by(calls: Sequence[SynchronizerCall], title: str = "") -> AttendedImage:
        [samples] = samples_of_token(calls, position)
        return AttendedImage(newest_image(given), title, samples, figure)

    attended = attended_by(calls, "all layers")
    layers = [attended_by([call], call.place) for call in calls]
    heads = [head for call in calls for head in by_head(call)]
    title = f"{question} {answer} (truth: {hero.character.badge})"
    write_file(path, to_png(sheet([attended, *layers], title)))
    return {
        "question": question,
        "answer": answer,
        "truth": hero.character.badge,
        "images": [numbers_of(attended)],
        "heads": {head.place: numbers_of(attended_by([head])) for head in heads},
    }


def newest_image(given: Document) -> PILImage.Image:
    """The newest image of a document."""
    return given.images[-1].load()


@torch.no_grad()
def _read_to_answer(generator: InterleavedGenerator, given: Document, answered: Document) -> int:
    """Reads the answered document in one pass; returns the token from which the answer's first one came."""
    model, processor = generator.model, generator.processor
    ids = processor.encode(given).input_ids
    whole = processor.encode(answered)
    batch = processor.collate([whole]).to(device=model.device)
    model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        image_start=batch.image_start,
        logits_to_keep=1,
    )
    return len(ids) - 1


def _map_of_badge(
    generator: InterleavedGenerator, story: Document, scenes: Sequence[Scene], hero: Figure, path: Path
) -> dict[str, Any]:
    """Generates the story's last image, and records where its hero's badge came from."""
    with record_calls(generator.model) as calls:
        generated = generator.generate(story, layout="I")
    new = next(part for part in reversed(generated.parts) if isinstance(part, Image)).load()
    place = shares_of(badge_box(hero))
    samples = samples_of_place(calls, place, MIN_MAP_SIZE)
    if not samples:
        raise UsageError("attention maps need a U-Net with synchronizers")
    # The U-Net attends to the newest so many of the earlier images.
    shown = list(zip(story.images, scenes, strict=False))[-len(samples) :]
    attended = [
        AttendedImage(image.load(), f"image {number}", part, _figure_of(scene, hero))
        for number, ((image, scene), part) in enumerate(
            zip(shown, samples, strict=True), start=len(story.images) - len(shown) + 1
        )
    ]
    title = f"the badge of the {hero.character.species} (truth: {hero.character.badge})"
    write_file(path, to_png(sheet(attended, title, new=new, place=place)))
    return {"truth": hero.character.badge, "images": [numbers_of(one) for one in attended]}


def shares_of(box: tuple[int, int, int, int]) -> Box:
    """A box of pixels, all included, as shares of the image."""
    left, top, right, bottom = box
    return left / IMAGE_SIZE, top / IMAGE_SIZE, (right + 1) / IMAGE_SIZE, (bottom + 1) / IMAGE_SIZE


def numbers_of(attended: AttendedImage) -> Mapping[str, float]:
    """Shares of all attention, and of the image's area."""
    numbers = {"on_image": float(attended.samples.weight.sum())}
    if attended.figure is not None:
        boxes = {"hero": figure_box(attended.figure), "badge": badge_box(attended.figure)}
        for name, box in ((name, shares_of(box)) for name, box in boxes.items()):
            numbers[f"on_{name}"] = weight_in(attended.samples, box, IMAGE_SIZE)
            numbers[f"area_of_{name}"] = (box[2] - box[0]) * (box[3] - box[1])
    return {name: round(value, 4) for name, value in numbers.items()}


def sheet(
    images: Sequence[AttendedImage],
    title: str,
    *,
    new: PILImage.Image | None = None,
    place: Box | None = None,
) -> PILImage.Image:
    """Images in a row under their heat; the hero's badge is framed in each, and `place` in the new one."""
    side = IMAGE_SIZE * _SCALE
    num_images = len(images) + (new is not None)
    width = num_images * (side + _GAP) + _GAP
    canvas = PILImage.new("RGB", (max(width, 460), side + 2 * _STRIP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    draw.text((_GAP, 8), title, fill=_INK, font=font)
    peak = max((float(heat_map(one.samples, IMAGE_SIZE).max()) for one in images), default=0.0)
    for number, one in enumerate(images):
        left = _GAP + number * (side + _GAP)
        canvas.paste(overlay(one.image, one.samples, peak), (left, _STRIP))
        if one.figure is not None:
            _frame(draw, shares_of(badge_box(one.figure)), left)
        caption = f"{one.title}: {float(one.samples.weight.sum()):.0%} of the weight"
        draw.text((left, _STRIP + side + 6), caption, fill=_INK, font=font)
    if new is not None:
        left = _GAP + len(images) * (side + _GAP)
        canvas.paste(_enlarged(new), (left, _STRIP))
        if place is not None:
            _frame(draw, place, left)
        draw.text((left, _STRIP + side + 6), "generated now", fill=_INK, font=font)
    return canvas


def overlay(image: PILImage.Image, samples: Samples, peak: float) -> PILImage.Image:
    """An enlarged image under its heat: opaque at `peak`, the heaviest pixel of all images of a sheet."""
    heat = heat_map(samples, IMAGE_SIZE).numpy()
    opacity = np.sqrt(np.clip(heat / max(peak, 1e-12), 0, 1))[..., None] * 0.9
    opacity = opacity.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
    pixels = np.asarray(_enlarged(image), np.float32)
    grey = pixels.mean(-1, keepdims=True).repeat(3, axis=-1)
    dimmed = 0.5 * pixels + 0.35 * grey + 0.15 * 255
    return PILImage.fromarray((dimmed * (1 - opacity) + _HEAT * opacity).astype(np.uint8))


def _enlarged(image: PILImage.Image) -> PILImage.Image:
    small = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.BOX)
    size = IMAGE_SIZE * _SCALE
    return small.resize((size, size), PILImage.Resampling.NEAREST)


def _frame(draw: ImageDraw.ImageDraw, box: Box, left: int) -> None:
    side = IMAGE_SIZE * _SCALE
    corners = [left + box[0] * side - 2, _STRIP + box[1] * side - 2, left + box[2] * side + 1]
    draw.rectangle([*corners, _STRIP + box[3] * side + 1], outline=_FRAME, width=2)
