"""A tokenizer and a tiny model that read StoryWorld at 32 px; one thread, so that the same seed gives the
same bits.
"""

import pytest
import torch

from mm_interleaved.documents.document import Text
from mm_interleaved.models.config import ResamplerConfig
from mm_interleaved.recipes.storyworld.batches import BatchKind
from mm_interleaved.recipes.storyworld.tokenizer import train_tokenizer
from mm_interleaved.storyworld.training_documents import training_document
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from tiny import tiny_model

DRAWINGS = BatchKind(share=1, batch_size=2, tasks={"draw": 1})


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def processor():
    texts = [
        part.text
        for index in range(40)
        for part in training_document(0, index, DRAWINGS.tasks).parts
        if isinstance(part, Text)
    ]
    return MMInterleavedProcessor(train_tokenizer(texts, vocabulary_size=400), 32, 32, num_slots=3)


@pytest.fixture(scope="session")
def make_model(processor):
    """A function that makes the same model whenever it is called."""
    vocabulary = processor.vocabulary
    ids = {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}
    # Enough conditioning vectors for the code of a scene.
    conditioning = ResamplerConfig(dim=16, num_queries=15, num_layers=1, num_heads=2, mlp_dim=24)
    return lambda: tiny_model(vocab_size=len(vocabulary), conditioning_resampler=conditioning, **ids).train()


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def board_model(make_model):
    """The same with conditioning vectors enough for the code of a scene with a board."""
    config = make_model().config
    conditioning = ResamplerConfig(dim=16, num_queries=16, num_layers=1, num_heads=2, mlp_dim=24)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tiny_model(
        vocab_size=config.text_config.vocab_size, conditioning_resampler=conditioning, **ids
    ).train()
