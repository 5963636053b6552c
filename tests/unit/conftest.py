"""Two real tokenizers, trained in a moment, and the profile of the property tests."""

import io

import pytest
from hypothesis import HealthCheck, settings

TEXT = [
    "Pip finds a lamp in the garden.",
    "The quick brown fox jumps over the lazy dog.",
    "What is on the shirt? The answer is seven.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|beginofimage|>", "<|image|>"]

# The same examples in every run; no deadline, for machines that share their cores.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def byte_level_tokenizer():
    """Byte-level BPE, as our own models have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory):
    """SentencePiece with byte pieces, read as the released model's tokenizer is."""
    import sentencepiece
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), add_bos_token=False, add_eos_token=False)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|beginofimage|>", "<|image|>"]})
    return tokenizer


@pytest.fixture(scope="session")
def byte_level_vocabulary(byte_level_tokenizer):
    from mm_interleaved.tokens.vocabulary import Vocabulary

    return Vocabulary.from_tokenizer(byte_level_tokenizer, num_slots=3)


@pytest.fixture(scope="session")
def llama_vocabulary(llama_tokenizer):
    from mm_interleaved.tokens.vocabulary import Vocabulary

    return Vocabulary.from_tokenizer(llama_tokenizer, num_slots=3, pad=339)


@pytest.fixture(scope="session", params=["byte_level", "llama"])
def vocabulary(request):
    """Each kind of vocabulary in turn."""
    return request.getfixturevalue(f"{request.param}_vocabulary")
