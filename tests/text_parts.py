"""A text part written by itself."""

from mm_interleaved.generation.text_batch import TextBatch


def write_text(request, assistant_model=None):
    """The runs of one text part, written alone."""
    batch, runs = TextBatch(assistant_model), []
    batch.add(0, request)
    while len(batch):
        runs += [run for _, run in batch.step()]
    return runs
