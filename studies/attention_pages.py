"""Pictures of sight for one story: where the model looks while it names a badge, and while it paints it.

OUT/word.png    the picture that was asked about, under what the answer's first token weighed: all layers,
                then each of them
OUT/badge.png   the earlier pictures of the story, under what the badge's place in the new one weighed
OUT/sight.json  the same as numbers: shares of the weight on images, heroes and badges, beside their areas;
                of the word also by layer and head
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
from mm_interleaved.storyworld.backgrounds import PICTURE_SIZE
from mm_interleaved.storyworld.renderer import badge_box, figure_box
from mm_interleaved.storyworld.tasks import document, picture
from mm_interleaved.storyworld.world import Figure, Scene, scene_from_record
from studies.attention_maps import (
    Box,
    Look,
    Samples,
    by_head,
    heat_map,
    record_looks,
    samples_of_place,
    samples_of_token,
    weight_in,
)

_SCALE = 5
_GAP = 8
_STRIP = 34
_HEAT = np.array([255, 64, 0], np.float32)
_PAPER, _INK, _FRAME = (255, 255, 255), (30, 30, 36), (0, 150, 255)
MIN_MAP_SIZE = 8
"""Maps of the U-Net of fewer cells hold most of a figure in one cell: they say nothing about a badge."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was looked at in one image."""

    image: PILImage.Image
    title: str
    samples: Samples
    figure: Figure | None
    """The hero as the image shows it, if it does."""


def show_sight(generator: InterleavedGenerator, seed: int, index: int, out: Path) -> dict[str, Any]:
    """Writes the pictures and numbers of one story of the test split; returns the numbers.

    Raises:
        UsageError: the model cannot look, or nobody in the last panel has been seen before.
    """
    model = generator.model
    if not model.language_model.synchronized_layers or model.image_decoder is None:
        raise UsageError("sight needs a model with synchronizers that reads and paints")
    story = document("test", seed, index, "story_last")
    scenes = [scene_from_record(record) for record in story.meta["scenes"]]
    hero = _hero(scenes)
    if hero is None:
        raise UsageError(f"story {index} of seed {seed}: nobody in its last picture stood in an earlier one")
    make_folder(out)
    word = _look_while_naming(generator, scenes, hero, out / "word.png")
    badge = _look_while_painting(generator, story, scenes, hero, out / "badge.png")
    numbers = {"story": story.id, "hero": hero.character.species, "word": word, "badge": badge}
    write_file(out / "sight.json", (json.dumps(numbers, indent=2) + "\n").encode())
    return numbers


def _hero(scenes: Sequence[Scene]) -> Figure | None:
    """The first figure of the last scene whose character stood in an earlier one."""
    earlier = {figure.character for scene in scenes[:-1] for figure in scene.figures}
    return next((figure for figure in scenes[-1].figures if figure.character in earlier), None)


def _figure_of(scene: Scene, hero: Figure) -> Figure | None:
    return next((figure for figure in scene.figures if figure.character == hero.character), None)


def _look_while_naming(
    generator: InterleavedGenerator, scenes: Sequence[Scene], hero: Figure, path: Path
) -> dict[str, Any]:
    """Asks for the hero's badge in its first picture, and looks where the answer came from."""
    scene = next(scene for scene in scenes if _figure_of(scene, hero) is not None)
    question = f"What is on the badge of the {hero.character.species}?"
    given = Document(id="word", parts=(picture(scene, "user"), Text(question, role="user")), layout="T")
    answered = generator.generate(given)
    answer = answered.text.removeprefix(given.text).strip()
    with record_looks(generator.model) as looks:
        position = _read_to_answer(generator, given, answered)
    figure = _figure_of(scene, hero)

    def seen_by(looks: Sequence[Look], title: str = "") -> Seen:
        [samples] = samples_of_token(looks, position)
        return Seen(scene_image(given), title, samples, figure)

    seen = seen_by(looks, "all layers")
    layers = [seen_by([look], look.place) for look in looks]
    heads = [head for look in looks for head in by_head(look)]
    title = f"{question} {answer} (truth: {hero.character.badge})"
    write_file(path, to_png(sheet([seen, *layers], title)))
    return {
        "question": question,
        "answer": answer,
        "truth": hero.character.badge,
        "images": [numbers_of(seen)],
        "heads": {head.place: numbers_of(seen_by([head])) for head in heads},
    }


def scene_image(given: Document) -> PILImage.Image:
    """The newest picture of a document."""
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


def _look_while_painting(
    generator: InterleavedGenerator, story: Document, scenes: Sequence[Scene], hero: Figure, path: Path
) -> dict[str, Any]:
    """Paints the story's last picture, and looks where its hero's badge came from."""
    with record_looks(generator.model) as looks:
        painted = generator.generate(story, layout="I")
    new = next(part for part in reversed(painted.parts) if isinstance(part, Image)).load()
    place = shares_of(badge_box(hero))
    samples = samples_of_place(looks, place, MIN_MAP_SIZE)
    if not samples:
        raise UsageError("sight needs a U-Net with synchronizers")
    # The painter sees the newest so many of the earlier images.
    shown = list(zip(story.images, scenes, strict=False))[-len(samples) :]
    seen = [
        Seen(image.load(), f"picture {number}", part, _figure_of(scene, hero))
        for number, ((image, scene), part) in enumerate(
            zip(shown, samples, strict=True), start=len(story.images) - len(shown) + 1
        )
    ]
    title = f"the badge of the {hero.character.species} (truth: {hero.character.badge})"
    write_file(path, to_png(sheet(seen, title, new=new, place=place)))
    return {"truth": hero.character.badge, "images": [numbers_of(one) for one in seen]}


def shares_of(box: tuple[int, int, int, int]) -> Box:
    """A box of pixels, all included, as shares of the picture."""
    left, top, right, bottom = box
    return left / PICTURE_SIZE, top / PICTURE_SIZE, (right + 1) / PICTURE_SIZE, (bottom + 1) / PICTURE_SIZE


def numbers_of(seen: Seen) -> Mapping[str, float]:
    """Shares of all that was looked at, and of the image's area."""
    numbers = {"on_image": float(seen.samples.weight.sum())}
    if seen.figure is not None:
        boxes = {"hero": figure_box(seen.figure), "badge": badge_box(seen.figure)}
        for name, box in ((name, shares_of(box)) for name, box in boxes.items()):
            numbers[f"on_{name}"] = weight_in(seen.samples, box, PICTURE_SIZE)
            numbers[f"area_of_{name}"] = (box[2] - box[0]) * (box[3] - box[1])
    return {name: round(value, 4) for name, value in numbers.items()}


def sheet(
    seen: Sequence[Seen], title: str, *, new: PILImage.Image | None = None, place: Box | None = None
) -> PILImage.Image:
    """Images in a row under their heat; the hero's badge is framed in each, and `place` in the new one."""
    side = PICTURE_SIZE * _SCALE
    num_images = len(seen) + (new is not None)
    width = num_images * (side + _GAP) + _GAP
    canvas = PILImage.new("RGB", (max(width, 460), side + 2 * _STRIP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    draw.text((_GAP, 8), title, fill=_INK, font=font)
    peak = max((float(heat_map(one.samples, PICTURE_SIZE).max()) for one in seen), default=0.0)
    for number, one in enumerate(seen):
        left = _GAP + number * (side + _GAP)
        canvas.paste(overlay(one.image, one.samples, peak), (left, _STRIP))
        if one.figure is not None:
            _frame(draw, shares_of(badge_box(one.figure)), left)
        caption = f"{one.title}: {float(one.samples.weight.sum()):.0%} of the weight"
        draw.text((left, _STRIP + side + 6), caption, fill=_INK, font=font)
    if new is not None:
        left = _GAP + len(seen) * (side + _GAP)
        canvas.paste(_enlarged(new), (left, _STRIP))
        if place is not None:
            _frame(draw, place, left)
        draw.text((left, _STRIP + side + 6), "painted now", fill=_INK, font=font)
    return canvas


def overlay(image: PILImage.Image, samples: Samples, peak: float) -> PILImage.Image:
    """An enlarged image under its heat: opaque at `peak`, the heaviest pixel of all images of a sheet."""
    heat = heat_map(samples, PICTURE_SIZE).numpy()
    opacity = np.sqrt(np.clip(heat / max(peak, 1e-12), 0, 1))[..., None] * 0.9
    opacity = opacity.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
    pixels = np.asarray(_enlarged(image), np.float32)
    grey = pixels.mean(-1, keepdims=True).repeat(3, axis=-1)
    dimmed = 0.5 * pixels + 0.35 * grey + 0.15 * 255
    return PILImage.fromarray((dimmed * (1 - opacity) + _HEAT * opacity).astype(np.uint8))


def _enlarged(image: PILImage.Image) -> PILImage.Image:
    small = image.convert("RGB").resize((PICTURE_SIZE, PICTURE_SIZE), PILImage.Resampling.BOX)
    size = PICTURE_SIZE * _SCALE
    return small.resize((size, size), PILImage.Resampling.NEAREST)


def _frame(draw: ImageDraw.ImageDraw, box: Box, left: int) -> None:
    side = PICTURE_SIZE * _SCALE
    corners = [left + box[0] * side - 2, _STRIP + box[1] * side - 2, left + box[2] * side + 1]
    draw.rectangle([*corners, _STRIP + box[3] * side + 1], outline=_FRAME, width=2)
