"""CLIP chooses among candidates; a segmentation reads generated images: on tiny models of transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, ModelFileError, UsageError
from mm_interleaved.evaluation.extractors import Segmenter
from mm_interleaved.evaluation.task import TaskOptions
from mm_interleaved.evaluation.tasks import generated_images
from mm_interleaved.evaluation.tasks.generated_images import maps_to_images, stories, text_to_image
from mm_interleaved.files import make_folder
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.storyworld.exports import write_storyworld
from mm_interleaved.storyworld.segmentation import CLASSES
from tiny import tiny_model, tiny_processor


def test_the_image_that_the_ranker_likes_best_is_kept():
    """Of four candidates, each a seed of its own, the second; the text is the one before the image."""
    asked = []

    def second_best(text, images):
        asked.append((text, len(images)))
        return [0.0, 1.0, 0.5, 0.2][: len(images)]

    model = tiny_model()
    document = Document(id="d", parts=(Text("a red"), Text("fox")))
    wanted = {"layout": "I", "num_inference_steps": 1, "seed": 3}
    plain = InterleavedGenerator(model, tiny_processor())
    chosen = InterleavedGenerator(model, tiny_processor(), image_ranker=second_best)
    first = plain.generate(document, **wanted).images[-1]
    best = chosen.generate(document, num_candidates=4, **wanted).images[-1]
    assert asked == [("a red fox", 4)] and best.seed != first.seed
    # A single candidate is asked about by nobody.
    assert chosen.generate(document, **wanted).images[-1].seed == first.seed and len(asked) == 1


def test_published_candidates_and_steps():
    with_clip = text_to_image("coco-images", TaskOptions(clip="somewhere"))
    assert with_clip.settings["num_candidates"] == 8 and with_clip.image_ranker.name == "clip somewhere"
    assert "best of 8" in with_clip.notes[0]
    without = text_to_image("coco-images", TaskOptions(inception=__file__))
    assert "num_candidates" not in without.settings and without.image_ranker is None
    assert "published is the best of 8" in without.notes[0]
    assert "num_candidates" not in text_to_image("lncoco-images", TaskOptions(clip="x")).settings
    assert stories("vist", TaskOptions(clip="x")).settings["num_inference_steps"] == 30
    with pytest.raises(UsageError, match=r"--segmenter \(mean IoU\)"):
        maps_to_images(TaskOptions())


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    write_storyworld(folder, 4, 3, "test", "ade20k")
    return folder


class ReadsTruth:
    """Finds what the gold images show, as a perfect segmentation would, in other images nothing right."""

    def __init__(self, gold):
        self.num_classes = len(CLASSES)
        self.known = {}
        for document in gold:
            truth = generated_images._true_classes(document, (64, 64))
            self.known[document.target[0].load().convert("RGB").tobytes()] = truth - 1

    def classes(self, image):
        return self.known.get(image.tobytes(), np.full((image.height, image.width), 99))


def test_mean_iou_of_perfect_and_spoilt_images(maps, monkeypatch):
    task = maps_to_images(TaskOptions(segmenter="given"))
    gold = task.read_gold(maps)
    monkeypatch.setattr(generated_images, "Segmenter", lambda name: ReadsTruth(gold))
    perfect = [
        Document(id=d.id, parts=tuple(replace(part, generated=True) for part in d.target)) for d in gold
    ]
    assert task.score(perfect, gold) == {"ade20k.complete": 1.0, "ade20k.miou": 1.0}
    # A class counts over all images: one that is nowhere found loses what it has in that image.
    black = Image(PILImage.new("RGB", (64, 64)), generated=True)
    spoilt = task.score([*perfect[:-1], replace(perfect[-1], parts=(black,))], gold)["ade20k.miou"]
    truths = [generated_images._true_classes(document, (64, 64)) for document in gold]
    labels = sorted({int(label) for truth in truths for label in np.unique(truth)} - {0})
    right = [sum(int((truth == label).sum()) for truth in truths[:-1]) for label in labels]
    meant = [sum(int((truth == label).sum()) for truth in truths) for label in labels]
    assert spoilt == pytest.approx(np.mean([one / other for one, other in zip(right, meant, strict=True)]))


def test_labels_that_are_missing_are_named(maps, monkeypatch):
    task = maps_to_images(TaskOptions(segmenter="given"))
    gold = task.read_gold(maps)
    moved = Image(PILImage.new("RGB", (64, 64)))
    lost = [replace(gold[0], parts=(moved, *gold[0].parts[1:]))]
    monkeypatch.setattr(generated_images, "Segmenter", lambda name: ReadsTruth(gold))
    with pytest.raises(InputError, match="mean IoU needs the map of its labels"):
        task.score([Document(id=gold[0].id, parts=(replace(moved, generated=True),))], lost)


def test_a_segmentation_of_other_classes_is_refused(maps, monkeypatch):
    task = maps_to_images(TaskOptions(segmenter="of roads"))
    gold = task.read_gold(maps)
    few = ReadsTruth(gold)
    few.num_classes = 1
    monkeypatch.setattr(generated_images, "Segmenter", lambda name: few)
    made = [replace(d, parts=tuple(replace(part, generated=True) for part in d.target)) for d in gold]
    with pytest.raises(UsageError, match="'of roads' knows 1 classes"):
        task.score(made, gold)


def test_a_segmentation_of_transformers_labels_every_pixel(tmp_path):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8, num_labels=7,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    rule = {"image_processor_type": "SegformerImageProcessor", "size": {"height": 64, "width": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(rule))
    found = Segmenter(tmp_path)
    image = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    classes = found.classes(image)
    assert classes.shape == (40, 56) and found.num_classes == 7 and 0 <= classes.min() <= classes.max() < 7


def test_a_segmentation_that_is_not_there_is_named(tmp_path):
    make_folder(tmp_path / "empty")
    for name in (str(tmp_path / "empty"), "nobody/has-this"):
        with pytest.raises(ModelFileError, match=f"segmenter: .*{name.split('/')[-1]}.* cannot be loaded"):
            Segmenter(name)
