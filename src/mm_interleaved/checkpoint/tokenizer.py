"""The released model's tokenizer: Vicuna's, with the two image tokens behind its vocabulary."""

from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from mm_interleaved.errors import ModelFileError
from mm_interleaved.models.config import MMInterleavedConfig
from mm_interleaved.tokens.vocabulary import IMAGE_START_TOKEN, IMAGE_TOKEN


def load_released_tokenizer(folder: Path, config: MMInterleavedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model's folder, with the image tokens at the ids that the weights know.

    Raises:
        ModelFileError: it cannot be read, or its ids are not those of the configuration.
    """
    try:
        if (folder / "tokenizer.model").is_file():
            tokenizer = LlamaTokenizer.from_pretrained(str(folder), add_bos_token=False, add_eos_token=False)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # what a damaged file raises differs by its kind
        raise ModelFileError(
            f"{folder}: cannot load the tokenizer ({' '.join(str(error).split())})"
        ) from error
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_START_TOKEN, IMAGE_TOKEN]})
    expected = {
        "bos": config.bos_token_id,
        "eos": config.eos_token_id,
        IMAGE_START_TOKEN: config.image_start_token_id,
        IMAGE_TOKEN: config.image_token_id,
    }
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        IMAGE_START_TOKEN: tokenizer.convert_tokens_to_ids(IMAGE_START_TOKEN),
        IMAGE_TOKEN: tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    }
    if found != expected:
        raise ModelFileError(f"{folder}: the tokenizer has the ids {found}, the model expects {expected}")
    return tokenizer
