"""Attribute supervision: labels of scenes, their embedding, and which of them a document states."""

import pytest
import torch
from torch.nn import functional

from mm_interleaved.recipes.storyworld.attribute_embedding import AttributeEmbedding
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    ATTRIBUTES,
    NO_LABEL,
    NUM_VALUES,
    attribute_losses,
    known_cross_entropy,
    known_labels,
    scene_labels,
    stated_labels,
    true_labels,
)
from mm_interleaved.storyworld.renderer import scene_at
from mm_interleaved.storyworld.training_documents import training_document
from mm_interleaved.storyworld.world import POSITIONS


def labels_of(count):
    return torch.tensor([scene_labels(scene_at("train", 0, index)) for index in range(count)])


def test_an_embedding_reads_back_as_its_attributes():
    labels = labels_of(50)
    embedding = AttributeEmbedding(16, 128)
    by_attribute = embedding.logits(embedding.encode(labels)).split(NUM_VALUES, dim=1)
    for name, logits, label in zip(ATTRIBUTES, by_attribute, labels.T, strict=True):
        is_there = label != NO_LABEL
        assert torch.equal(logits.argmax(1)[is_there], label[is_there]), name
    assert (
        max(
            float(loss)
            for loss in attribute_losses(embedding.logits(embedding.encode(labels)), labels).values()
        )
        < 0.2
    )


def test_embeddings_are_scaled_as_the_output_of_a_layer_norm():
    embeddings = AttributeEmbedding(16, 128).encode(labels_of(20))
    assert embeddings.shape == (20, 16, 128)
    assert embeddings.mean(-1).abs().max() < 1e-4 and (embeddings.std(-1) - 1).abs().max() < 0.02


def test_badges_are_known_from_earlier_images_only():
    story = training_document(0, 1, {"story": 1})
    first, second = known_labels([story])[:2]
    badges = [index for index, name in enumerate(ATTRIBUTES) if name.startswith("badge")]
    assert (first[badges] == NO_LABEL).all(), "nobody has been seen before the first image"
    assert (second[badges] != NO_LABEL).any(), "the hero has been seen in the first image"
    drawing = known_labels([training_document(0, 1, {"draw": 1})])[0]
    assert (drawing[badges] == NO_LABEL).all() and (drawing != NO_LABEL).any()


def test_an_image_that_nothing_announces_has_no_labels():
    assert (known_labels([training_document(0, 1, {"caption": 1})]) == NO_LABEL).all()
    assert len(ATTRIBUTES) == len(NUM_VALUES) == 9 * len(POSITIONS) + 3


def test_text_states_no_badges_and_the_truth_has_all():
    story = training_document(0, 1, {"story": 1})
    stated, seen, true = stated_labels([story]), known_labels([story]), true_labels([story])
    badges = [index for index, name in enumerate(ATTRIBUTES) if name.startswith("badge")]
    assert (stated[:, badges] == NO_LABEL).all() and (true[0, badges] != NO_LABEL).any()
    for less, more in ((stated, seen), (seen, true)):
        is_known = less != NO_LABEL
        assert torch.equal(less[is_known], more[is_known]) and (more != NO_LABEL).sum() > is_known.sum()


@pytest.mark.parametrize("shape", [(7,), (7, 4, 4)])
def test_what_is_not_known_does_not_count_and_nothing_known_is_zero(shape):
    torch.manual_seed(0)
    logits = torch.randn(shape[0], 5, *shape[1:], requires_grad=True)
    labels = torch.randint(0, 5, shape)
    labels[::2] = NO_LABEL
    expected = functional.cross_entropy(logits, labels, ignore_index=NO_LABEL)
    assert torch.equal(known_cross_entropy(logits, labels), expected)
    nothing = known_cross_entropy(logits, torch.full_like(labels, NO_LABEL))
    nothing.backward()
    assert float(nothing.detach()) == 0.0 and not logits.grad.any()
    assert float(known_cross_entropy(logits[:0], labels[:0])) == 0.0
