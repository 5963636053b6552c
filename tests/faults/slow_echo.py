"""The generator without a model, slow enough that something can happen meanwhile; it says where it was."""

import os
import time
from pathlib import Path

from echo_generator import EchoGenerator

LOG = "continued"
"""A file without a suffix in the model's folder, so that the model stays the same."""
HANGING = "hanging"
"""Another, with the id of a node that never finishes a batch."""
SECONDS_A_BATCH = 0.5


class SlowEcho(EchoGenerator):
    """Half a second a batch; a line of the log before each: the node, and the ids."""

    def __init__(self, folder: Path):
        self.log, self.hanging = folder / LOG, folder / HANGING

    def stream_batch(self, documents, settings):
        import ray

        node = ray.get_runtime_context().get_node_id()
        line = " ".join([node, *(document.id for document in documents)]) + "\n"
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)
        hangs = self.hanging.exists() and self.hanging.read_text() == node
        time.sleep(3600 if hangs else SECONDS_A_BATCH)
        yield from super().stream_batch(documents, settings)


def load_slow_echo(folder: Path, *, device: str, dtype: str, acceleration: object = None) -> SlowEcho:
    """Stands where `load_generator` does."""
    return SlowEcho(folder)
