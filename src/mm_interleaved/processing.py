"""Documents to batches: the tokenizer, the image rule and the slot count of a model, saved beside it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.batch import Batch, collate
from mm_interleaved.checkpoint.headers import read_json
from mm_interleaved.checkpoint.model_card import publish
from mm_interleaved.checkpoint.processor_settings import (
    PROCESSOR_CONFIG,
    load_tokenizer,
    read_processor_settings,
    refuse_other_model,
    refuse_other_tokenizer,
)
from mm_interleaved.checkpoint.resolve import CONFIG, HUB_ARGUMENTS, SMALL_FILES, find_folder
from mm_interleaved.document import Document
from mm_interleaved.errors import ModelFileError
from mm_interleaved.images import SquareCrop
from mm_interleaved.sequence import Sequence, encode_document
from mm_interleaved.storage import make_folder, write_file
from mm_interleaved.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MMInterleavedProcessor:
    """Makes documents ready for a model.

    Args:
        tokenizer: a tokenizer of transformers.
        image_size: pixels a side that the encoder sees.
        target_size: pixels a side that the decoder paints in training; None for a model that does not paint.
        num_slots: tokens per image.
        resize: `released` or `clip`, see `images.SquareCrop`.
        special_ids: ids of `image_start`, `image`, `bos`, `eos`, `pad`; by default those that the tokenizer
            defines.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        target_size: int | None,
        num_slots: int,
        resize: str = "released",
        *,
        special_ids: Mapping[str, int] | None = None,
    ):
        if special_ids is None:
            self.vocabulary = Vocabulary.from_tokenizer(tokenizer, num_slots)
        else:
            self.vocabulary = Vocabulary(tokenizer, num_slots=num_slots, **special_ids)
        self.encoder_pixels = SquareCrop(image_size, resize)
        self.target_pixels = None if target_size is None else SquareCrop(target_size, resize)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.vocabulary.tokenizer

    def __call__(
        self,
        documents: Document | Iterable[Document],
        *,
        eos: bool = False,
        include_target: bool = False,
        target_pixels: bool = False,
        padding_side: str = "right",
    ) -> Batch:
        """A batch with one document a row.

        Args:
            eos: end each document.
            include_target: append the documents' gold targets.
            target_pixels: also make the pixels that the decoder has to learn.
            padding_side: "left" for generating text in a batch.

        Raises:
            InputError: text that cannot be encoded, an image that cannot be read.
        """
        if isinstance(documents, Document):
            documents = (documents,)
        sequences = [self.encode(document, eos=eos, include_target=include_target) for document in documents]
        return self.collate(sequences, target_pixels=target_pixels, padding_side=padding_side)

    def encode(self, document: Document, *, eos: bool = False, include_target: bool = False) -> Sequence:
        """The tokens of one document, see `sequence.encode_document`."""
        return encode_document(document, self.vocabulary, eos=eos, include_target=include_target)

    def collate(
        self,
        rows: Iterable[Sequence | list[Sequence]],
        *,
        target_pixels: bool = False,
        padding_side: str = "right",
    ) -> Batch:
        """A batch of rows, see `batch.collate`."""
        if target_pixels and self.target_pixels is None:
            raise ValueError("target_pixels: this processor has no target_size")
        target = self.target_pixels if target_pixels else None
        return collate(rows, self.vocabulary, self.encoder_pixels, target, padding_side=padding_side)

    def to_dict(self) -> dict[str, Any]:
        """The settings that `processor_config.json` holds."""
        return {
            "processor_class": type(self).__name__,
            "image_size": self.encoder_pixels.size,
            "target_size": None if self.target_pixels is None else self.target_pixels.size,
            "num_slots": self.vocabulary.num_slots,
            "resize": self.encoder_pixels.rule,
            "special_ids": self.vocabulary.special_ids(),
        }

    def save_pretrained(self, folder: str | Path):
        """Writes the settings and the tokenizer's files into a folder, each file whole or not at all."""
        folder = Path(folder)
        make_folder(folder)
        with tempfile.TemporaryDirectory(prefix="processor-") as temporary:
            self.tokenizer.save_pretrained(temporary)
            settings = json.dumps(self.to_dict(), indent=2) + "\n"
            Path(temporary, PROCESSOR_CONFIG).write_text(settings, encoding="utf-8")
            for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
                target = folder / file.relative_to(temporary)
                make_folder(target.parent)
                write_file(target, file.read_bytes())

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        """Uploads what `save_pretrained` writes, see `checkpoint.model_card.publish`."""
        with tempfile.TemporaryDirectory(prefix="processor-") as temporary:
            self.save_pretrained(temporary)
            return publish(Path(temporary), repo_id, **settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **of_transformers: Any) -> MMInterleavedProcessor:
        """The processor that `save_pretrained` wrote.

        Args:
            folder: a model's name, see `checkpoint.resolve`: "storyworld", a folder, or a hub id.
            of_transformers: what `AutoProcessor` hands to every processor. What says where files of the hub
                come from (`revision`, `cache_dir`, `token`, ...) is used; the rest does not matter here.

        Raises:
            ModelFileError: there is no (valid) `processor_config.json` or no tokenizer that fits it.
        """
        hub = {name: of_transformers[name] for name in HUB_ARGUMENTS if of_transformers.get(name) is not None}
        folder = find_folder(folder, files=SMALL_FILES, hub=hub)
        settings = read_processor_settings(folder)
        tokenizer = load_tokenizer(folder)
        refuse_other_tokenizer(tokenizer, settings["special_ids"], str(folder))
        try:
            processor = cls(tokenizer, **settings)
        except (TypeError, ValueError) as error:
            raise ModelFileError(f"{folder / PROCESSOR_CONFIG}: {error}") from error
        if (folder / CONFIG).is_file():
            processor.check_model(read_json(folder / CONFIG), str(folder / PROCESSOR_CONFIG))
        return processor

    def check_model(self, config: Mapping[str, Any], place: str = "processor") -> None:
        """Refuses to work for another model than the one it was made for.

        Args:
            config: of the model, as JSON.
            place: how messages call the processor.

        Raises:
            ModelFileError: names the first field that differs.
        """
        refuse_other_model(self.to_dict(), len(self.vocabulary), config, place)
