"""Naming: labels of scenes, the code of a scene, and which of it a document tells."""

import pytest
import torch
from torch.nn import functional

from mm_interleaved.recipes.storyworld.attribute_embedding import SceneCode
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    NAMES,
    NOT_THERE,
    SIZES,
    known_cross_entropy,
    naming_losses,
    painting_labels,
    scene_labels,
    told_labels,
    true_labels,
)
from mm_interleaved.storyworld.renderer import scene_at
from mm_interleaved.storyworld.training_documents import training_document
from mm_interleaved.storyworld.world import POSITIONS


def labels_of(count):
    return torch.tensor([scene_labels(scene_at("train", 0, index)) for index in range(count)])


def test_a_code_reads_back_as_its_scene():
    labels = labels_of(50)
    code = SceneCode(16, 128)
    answers = code.answers(code.encode(labels)).split(SIZES, dim=1)
    for name, logits, label in zip(NAMES, answers, labels.T, strict=True):
        is_there = label != NOT_THERE
        assert torch.equal(logits.argmax(1)[is_there], label[is_there]), name
    assert (
        max(float(loss) for loss in naming_losses(code.answers(code.encode(labels)), labels).values()) < 0.2
    )


def test_codes_are_scaled_as_what_a_layer_norm_puts_out():
    codes = SceneCode(16, 128).encode(labels_of(20))
    assert codes.shape == (20, 16, 128)
    assert codes.mean(-1).abs().max() < 1e-4 and (codes.std(-1) - 1).abs().max() < 0.02


def test_badges_are_told_by_earlier_pictures_only():
    story = training_document(0, 1, {"story": 1})
    first, second = painting_labels([story])[:2]
    badges = [index for index, name in enumerate(NAMES) if name.startswith("badge")]
    assert (first[badges] == NOT_THERE).all(), "nobody has been seen before the first picture"
    assert (second[badges] != NOT_THERE).any(), "the hero has been seen in the first picture"
    drawing = painting_labels([training_document(0, 1, {"draw": 1})])[0]
    assert (drawing[badges] == NOT_THERE).all() and (drawing != NOT_THERE).any()


def test_a_picture_that_nothing_announces_is_not_named():
    assert (painting_labels([training_document(0, 1, {"caption": 1})]) == NOT_THERE).all()
    assert len(NAMES) == len(SIZES) == 9 * len(POSITIONS) + 3


def test_words_tell_no_badges_and_the_truth_tells_all():
    story = training_document(0, 1, {"story": 1})
    told, seen, true = told_labels([story]), painting_labels([story]), true_labels([story])
    badges = [index for index, name in enumerate(NAMES) if name.startswith("badge")]
    assert (told[:, badges] == NOT_THERE).all() and (true[0, badges] != NOT_THERE).any()
    for less, more in ((told, seen), (seen, true)):
        is_known = less != NOT_THERE
        assert torch.equal(less[is_known], more[is_known]) and (more != NOT_THERE).sum() > is_known.sum()


@pytest.mark.parametrize("shape", [(7,), (7, 4, 4)])
def test_what_is_not_known_does_not_count_and_nothing_known_is_zero(shape):
    torch.manual_seed(0)
    logits = torch.randn(shape[0], 5, *shape[1:], requires_grad=True)
    labels = torch.randint(0, 5, shape)
    labels[::2] = NOT_THERE
    expected = functional.cross_entropy(logits, labels, ignore_index=NOT_THERE)
    assert torch.equal(known_cross_entropy(logits, labels), expected)
    nothing = known_cross_entropy(logits, torch.full_like(labels, NOT_THERE))
    nothing.backward()
    assert float(nothing.detach()) == 0.0 and not logits.grad.any()
    assert float(known_cross_entropy(logits[:0], labels[:0])) == 0.0
