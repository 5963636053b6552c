"""A whole model on disk, tiny and untrained, for the command line."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder that `--model` takes: every part real, a few ten thousand parameters, two denoising steps."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from mm_interleaved.tokens.processor import MMInterleavedProcessor
    from tiny import tiny_config, tiny_model

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Pip finds a lamp in the garden."], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    # The model's two new tokens are the last ones.
    fast.add_special_tokens({"extra_special_tokens": ["<|beginofimage|>", "<|image|>"]})
    # Bytes are many tokens: a longer context than other tests have.
    text_config = tiny_config(len(fast)).text_config.to_dict() | {"max_position_embeddings": 2048}
    model = tiny_model(vocab_size=len(fast), text_config=text_config)
    model.config.generation_settings = {"num_inference_steps": 2, "max_new_tokens": 12}
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    MMInterleavedProcessor(fast, image_size=32, target_size=32, num_slots=3).save_pretrained(folder)
    return folder
