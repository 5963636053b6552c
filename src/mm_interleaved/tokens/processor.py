"""Documents to batches: the tokenizer, the image rule and the slot count of a model, saved beside it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from transformers import BatchFeature, ProcessorMixin

from mm_interleaved.documents.document import Document
from mm_interleaved.documents.images import SquareCrop
from mm_interleaved.errors import ModelFileError
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.model_files.headers import read_json
from mm_interleaved.model_files.known_words import KnownWords
from mm_interleaved.model_files.model_card import publish
from mm_interleaved.model_files.processor_settings import (
    PROCESSOR_CONFIG,
    load_tokenizer,
    read_processor_settings,
    refuse_other_model,
    refuse_other_tokenizer,
)
from mm_interleaved.model_files.resolve import CONFIG, HUB_ARGUMENTS, SMALL_FILES, find_folder
from mm_interleaved.tokens.batch import Batch, collate
from mm_interleaved.tokens.chat_messages import is_conversation, read_messages
from mm_interleaved.tokens.conversation_format import PromptPiece, chat_pieces
from mm_interleaved.tokens.prompt_features import prompt_features
from mm_interleaved.tokens.sequence import Sequence, encode_document, encode_pieces
from mm_interleaved.tokens.text_prompts import RenderedPrompt, rendered, text_pieces, with_images
from mm_interleaved.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MMInterleavedProcessor(ProcessorMixin):
    """Makes documents ready for a model; also a processor as users of transformers know it.

        processor(documents)                            -> Batch, for training and scoring
        processor(text=..., images=...)                 -> BatchFeature, for `model.generate(**inputs)`
        processor.apply_chat_template(conversation)     -> a prompt as text, ids or BatchFeature
        processor.batch_decode(ids)                     -> texts

    It is transformers' `ProcessorMixin` because pipelines ask for one; how it computes, saves and loads is
    its own.

    Args:
        tokenizer: a tokenizer of transformers.
        image_size: pixels a side that the encoder sees.
        target_size: pixels a side that the decoder learns to generate; None for a model without one.
        num_slots: tokens per image.
        resize: `released` or `clip`, see `images.SquareCrop`.
        special_ids: ids of `image_start`, `image`, `bos`, `eos`, `pad`; by default those that the tokenizer
            defines.
        known_words: the words of a model whose language is closed; None where any word may be known.
    """

    # Conversations are written by `conversation_format`, so that no text in them can become markup.
    chat_template = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        target_size: int | None,
        num_slots: int,
        resize: str = "released",
        *,
        special_ids: Mapping[str, int] | None = None,
        known_words: KnownWords | None = None,
    ):
        self.known_words = known_words
        if special_ids is None:
            self.vocabulary = Vocabulary.from_tokenizer(tokenizer, num_slots)
        else:
            self.vocabulary = Vocabulary(tokenizer, num_slots=num_slots, **special_ids)
        self.encoder_pixels = SquareCrop(image_size, resize)
        self.target_pixels = None if target_size is None else SquareCrop(target_size, resize)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.vocabulary.tokenizer

    @overload
    def __call__(
        self,
        documents: Document | Iterable[Document],
        *,
        eos: bool = ...,
        include_target: bool = ...,
        target_pixels: bool = ...,
        padding_side: str | None = ...,
    ) -> Batch: ...

    @overload
    def __call__(
        self,
        documents: str | Iterable[str] | None = None,
        *,
        padding_side: str | None = ...,
        text: str | Iterable[str] | None = ...,
        images: Any = ...,
        videos: None = ...,
        audio: None = ...,
        add_special_tokens: bool = ...,
        return_tensors: Any = ...,
        padding: Any = ...,
        truncation: Any = ...,
    ) -> BatchFeature: ...

    def __call__(
        self,
        documents: Document | Iterable[Document] | str | Iterable[str] | None = None,
        *,
        eos: bool = False,
        include_target: bool = False,
        target_pixels: bool = False,
        padding_side: str | None = None,
        text: str | Iterable[str] | None = None,
        images: Any = None,
        videos: None = None,
        audio: None = None,
        add_special_tokens: bool = True,
        return_tensors: Any = None,
        padding: Any = True,
        truncation: Any = False,
    ) -> Batch | BatchFeature:
        """A batch with one document, or one text with its images, a row.

        Args:
            documents: documents; texts are taken as `text`.
            eos: end each document.
            include_target: append the documents' gold targets.
            target_pixels: also make the pixels that the decoder has to learn.
            padding_side: default "right" for documents, "left" for texts, which are prompts.
            text: one text or several. `image_token` marks the places of a text's images; without one they
                stand at its beginning. Whatever else a text spells is text.
            images: see `text_prompts.text_pieces`.
            add_special_tokens: begin each text with bos.
            return_tensors: of texts: "pt", "np", or None for lists.
            padding, truncation: rows are always padded, and never cut.

        Returns:
            of documents a `Batch`; of texts `input_ids` and `attention_mask` (B, T) and, if there are images,
            `pixel_values` (I, 3, H, W) and `image_start` (B, N), all that `model.generate` needs.

        Raises:
            InputError: text that cannot be encoded, an image that cannot be read.
            ValueError: images and their places do not agree, or videos, audio or truncation are asked for.
        """
        given, texts = _listed(documents), _listed(text)
        if texts is None and given and all(isinstance(each, str) for each in given):
            given, texts = None, given
        if given is not None and texts is None:
            rows = [self.encode(each, eos=eos, include_target=include_target) for each in given]
            return self.collate(rows, target_pixels=target_pixels, padding_side=padding_side or "right")
        if given is not None or texts is None:
            raise ValueError("expected either documents or text=, with images= or without")
        _refuse(videos=videos, audio=audio, truncation=truncation)
        prompts = text_pieces(texts, images, self.image_token)
        return self._prompt_batch(prompts, padding_side, return_tensors, bos=add_special_tokens)

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

    # ---- As users of transformers expect -------------------------------------------------------------

    @property
    def image_token(self) -> str:
        """What stands for an image in prompts that are shown or given as text."""
        return self.vocabulary.image_token

    @property
    def image_token_id(self) -> int:
        """The id of a slot."""
        return self.vocabulary.image

    @property
    def model_input_names(self) -> list[str]:
        """What a prompt is made of."""
        return ["input_ids", "attention_mask", "pixel_values", "image_start"]

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: None = None,
        tools: None = None,
        documents: None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: Any = None,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        *,
        images: Any = None,
        image_root: str | Path = ".",
        padding_side: str | None = None,
        **settings: Any,
    ) -> Any:
        """Conversations as prompts, in the one form that our models know (see `conversation_format`).

        What a message spells never becomes markup: `</s>` or an image token typed by a user are text.

        Args:
            conversation: messages, or a list of conversations; see `chat_messages.read_messages`.
            add_generation_prompt: end with the assistant's marker.
            continue_final_message: leave the assistant's last message open.
            tokenize: ids instead of text.
            return_dict: with `tokenize`, all that `model.generate` needs, as `__call__` returns it.
            return_tensors: as `__call__`.
            return_assistant_tokens_mask: also `assistant_masks` (B, T), 1 where the assistant speaks.
            processor_kwargs: `images`, `padding_side`, `return_tensors`, as arguments.
            images: for the parts of type image that name none, in their order; of several conversations a
                list each.
            image_root: folder that bounds paths in messages.

        Returns:
            with `tokenize=False` a `RenderedPrompt` (or a list of them), which the processor reads back as
            what it is.

        Raises:
            ValueError: a message is wrong, or what is asked for does not exist here (templates, tools).
        """
        given = dict(processor_kwargs or {}) | {name: v for name, v in settings.items() if v is not None}
        images, padding_side = given.pop("images", images), given.pop("padding_side", padding_side)
        return_tensors = given.pop("return_tensors", return_tensors)
        _refuse(chat_template=chat_template, tools=tools, documents=documents)
        _refuse(**{name: value for name, value in given.items() if name not in _WITHOUT_EFFECT})
        if add_generation_prompt and continue_final_message:
            raise ValueError("expected add_generation_prompt or continue_final_message, found both")
        is_one = is_conversation(conversation)
        conversations = [conversation] if is_one else list(conversation)
        texts = [
            self._rendered(
                chat_pieces(
                    read_messages(messages, image_root),
                    asks=add_generation_prompt,
                    goes_on=continue_final_message,
                )
            )
            for messages in conversations
        ]
        if not tokenize:
            return texts[0] if is_one else texts
        prompts = text_pieces(texts, images, self.image_token)
        found = self._prompt_batch(prompts, padding_side, return_tensors, masks=return_assistant_tokens_mask)
        return found if return_dict else found["input_ids"]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **settings: Any) -> Any:
        """The text of ids; of several rows, a list. Special tokens are left out, or spelled out: an image as
        one token.
        """
        _refuse(**{name: value for name, value in settings.items() if name not in _WITHOUT_EFFECT})
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        if any(isinstance(each, Iterable) for each in ids):
            return self.batch_decode(ids, skip_special_tokens)
        ids = [int(i) for i in ids]
        vocabulary = self.vocabulary
        return vocabulary.decode(ids) if skip_special_tokens else vocabulary.decode_with_specials(ids)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **settings: Any) -> list[str]:
        """The texts of rows of ids, see `decode`."""
        return [self.decode(row, skip_special_tokens, **settings) for row in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **settings: Any
    ) -> list[str]:
        """The texts of what `model.generate` returned."""
        rows = generated_outputs if getattr(generated_outputs, "ndim", 2) > 1 else [generated_outputs]
        return self.batch_decode(rows, skip_special_tokens, **settings)

    def _rendered(self, pieces: list[PromptPiece]) -> RenderedPrompt:
        spell = self.vocabulary.spelling
        return rendered(
            pieces, bos=spell(self.vocabulary.bos), eos=spell(self.vocabulary.eos), image=self.image_token
        )

    def _prompt_batch(
        self,
        prompts: list[list[PromptPiece]],
        padding_side: str | None,
        return_tensors: Any,
        *,
        bos: bool = True,
        masks: bool = False,
    ) -> BatchFeature:
        """Rows of pieces as `model.generate` takes them."""
        rows = [encode_pieces(with_images(pieces, None), self.vocabulary, bos=bos) for pieces in prompts]
        batch = self.collate(rows, padding_side=padding_side or "left")
        return prompt_features(batch, return_tensors, has_masks=masks)

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
            if self.known_words is not None:
                self.known_words.save(Path(temporary))
            for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
                target = folder / file.relative_to(temporary)
                make_folder(target.parent)
                write_file(target, file.read_bytes())

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        """Uploads what `save_pretrained` writes, see `model_files.model_card.publish`."""
        with tempfile.TemporaryDirectory(prefix="processor-") as temporary:
            self.save_pretrained(temporary)
            return publish(Path(temporary), repo_id, **settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **of_transformers: Any) -> MMInterleavedProcessor:
        """The processor that `save_pretrained` wrote.

        Args:
            folder: a model's name, see `model_files.resolve`: "storyworld", a folder, or a hub id.
            of_transformers: what `AutoProcessor` hands to every processor. What names where files of the hub
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
            processor = cls(tokenizer, known_words=KnownWords.of_folder(folder), **settings)
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


_WITHOUT_EFFECT = ("padding", "clean_up_tokenization_spaces", "add_special_tokens", "load_audio_from_video")
"""What callers in transformers say without being asked: rows are padded, texts are as they are."""


def _listed(given: Any) -> list[Any] | None:
    """One or several, as a list; None where nothing is given."""
    if given is None:
        return None
    return [given] if isinstance(given, Document | str) else list(given)


def _refuse(**asked: Any) -> None:
    """Refuses arguments of transformers that mean nothing here, unless they ask for nothing."""
    for name, value in asked.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: found {value!r}, expected none: this processor has no such thing")
