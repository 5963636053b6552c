"""A number that tells whether a model's weights are those of before."""

import gc
import threading
import weakref

import torch
from torch import nn

from mm_interleaved.models.weights_at_hand import steady_weights, weights_version


def test_it_changes_with_each_change_of_the_weights_and_with_nothing_else():
    model, other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    versions = [weights_version(model)]
    assert weights_version(model) == versions[0] != weights_version(other)
    with torch.no_grad():
        model[0].weight.add_(1)
    versions.append(weights_version(model))
    model[1] = nn.Linear(2, 2)
    versions.append(weights_version(model))
    model.append(nn.Linear(2, 2))
    versions.append(weights_version(model))
    model(torch.ones(1, 2))
    assert weights_version(model) == versions[-1]
    assert len(set(versions)) == 4


def test_weights_that_hold_still_are_looked_at_once_by_this_thread_alone():
    model, elsewhere = nn.Linear(2, 2), []
    with steady_weights():
        before = weights_version(model)
        with steady_weights(), torch.no_grad():
            model.weight.add_(1)
            assert weights_version(model) == before
        thread = threading.Thread(target=lambda: elsewhere.append(weights_version(model)))
        thread.start()
        thread.join()
        assert weights_version(model) == before
    assert weights_version(model) == elsewhere[0] != before


def test_no_model_is_kept_alive():
    model = nn.Linear(2, 2)
    weights_version(model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
