"""A memory that is full while a model is loaded is no fault of the model's files."""

import errno
import os
import resource

import pytest
import torch
from safetensors import SafetensorError

from faults.filesystem import in_child
from mm_interleaved.checkpoint.load import load_model, model_file_errors
from mm_interleaved.errors import ModelFileError, StorageError
from tiny import tiny_model


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("can't start new thread"),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        SafetensorError("Cannot allocate memory (os error 12)"),
    ],
)
def test_what_there_is_no_memory_for_is_told_as_that(error):
    is_told = pytest.raises(StorageError, match=r"^here: the model cannot be loaded: the memory of this")
    with is_told as told, model_file_errors("here"):
        raise error
    assert told.value.exit_code == 6


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), SafetensorError("HeaderTooLarge"), OSError(5, "x")]
)
def test_other_faults_stay_faults_of_the_files(error):
    with pytest.raises(ModelFileError, match="here: the model cannot be loaded"), model_file_errors("here"):
        raise error


def test_a_model_that_does_not_fit_ends_with_6(tmp_path):
    """The kernel's own full memory: the process may grow by so many bytes."""
    text = {**tiny_model().config.text_config.to_dict(), "vocab_size": 200_000}
    tiny_model(vocab_size=200_000, text_config=text).save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size > 40e6
    endings = []
    for growth in (size // 4, size // 2, 40 * size):

        def limit(growth=growth):
            with open("/proc/self/statm") as file:
                now = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + growth, now + growth))

        endings.append(in_child(lambda: load_model(tmp_path), limit))
    assert endings == [6, 6, 0]
