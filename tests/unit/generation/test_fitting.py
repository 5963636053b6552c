"""Memory that runs out costs a document's time and nothing else: less at once, then the next smaller plan."""

import logging

import pytest
import torch
from narrow_generator import Narrow

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import StorageError
from mm_interleaved.generation.events import Finished
from mm_interleaved.generation.fitting import FittingGenerator
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.memory_plan import MemoryPlan

LARGE, SMALL = MemoryPlan(dtype="float32"), MemoryPlan(dtype="bfloat16", offload="disk")
SETTINGS = GenerationSettings.combine({"layout": "T"})


def documents(number):
    return [Document(id=str(place), parts=[Text("words")]) for place in range(number)]


def made(generator, given):
    events = generator.stream_batch(given, [SETTINGS] * len(given))
    return [place for place, event in events if isinstance(event, Finished)]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_fewer_documents_at_once_come_first_and_none_is_made_twice(error, caplog):
    narrow = Narrow(2, error)
    generator = FittingGenerator(lambda plan: narrow, [LARGE, SMALL])
    with caplog.at_level(logging.WARNING):
        assert made(generator, documents(6)) == [0, 1, 2, 3, 4, 5]
    assert generator.plan == LARGE
    # Of six there was room for two; of three too; then one at a time fits for good.
    assert narrow.batches == [["0", "1", "2", "3", "4", "5"], ["2", "3", "4"], ["4"], ["5"]]
    assert "memory" in caplog.text and "going on with 1 documents at once" in caplog.text


def test_the_next_plan_is_taken_where_not_even_one_fits_and_is_said(caplog):
    loaded, changes = [], []

    def load(plan):
        loaded.append(plan)
        return Narrow(0 if plan == LARGE else 9)

    generator = FittingGenerator(load, [LARGE, SMALL], changes.append)
    with caplog.at_level(logging.WARNING):
        assert made(generator, documents(1)) == [0]
    assert loaded == [LARGE, SMALL] and changes == [SMALL] and generator.plan == SMALL
    assert "going on with bfloat16; weights wait on the disk" in caplog.text


def test_a_model_that_cannot_be_loaded_is_loaded_smaller_and_at_last_refused():
    def load(plan):
        if plan == LARGE:
            raise StorageError("here: the model cannot be loaded") from MemoryError()
        return Narrow(0)

    generator = FittingGenerator(load, [LARGE, SMALL])
    assert generator.plan == SMALL
    with pytest.raises(StorageError, match=r"no smaller plan is left"):
        made(generator, documents(1))


def test_an_error_of_another_kind_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="size mismatch"):
        made(FittingGenerator(lambda plan: Narrow(0, RuntimeError("size mismatch")), [LARGE]), documents(1))
    disk = StorageError("the disk is full")
    with pytest.raises(StorageError, match="the disk is full"):
        made(FittingGenerator(lambda plan: Narrow(0, disk), [LARGE, SMALL]), documents(1))
