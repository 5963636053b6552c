"""A generator that runs out of memory where too many documents come at once."""

from echo_generator import EchoGenerator


class Narrow(EchoGenerator):
    """Has room for so many documents at once; runs out behind the first of a batch that is larger."""

    def __init__(self, room, error=None):
        self.room, self.error = room, error or MemoryError()
        self.batches = []

    def stream_batch(self, documents, settings):
        self.batches.append([document.id for document in documents])
        for place, event in super().stream_batch(documents, settings):
            if place >= self.room:
                raise self.error
            yield place, event
