"""Text to ids and back, with the ids that mean something else kept apart.

Text is data: whatever a user types, `</s>` or `<|image|>` included, becomes ids of ordinary text. The ids
that structure a document (begin and end, image start, image slot, padding) are put in by `sequence.py`, as
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mm_interleaved.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_START_TOKEN = "<|beginofimage|>"
IMAGE_TOKEN = "<|image|>"
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer shows of a character whose last bytes are still to come."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Vocabulary:
    """A tokenizer of transformers, and the special ids of an interleaved document.

    Args:
        tokenizer: any tokenizer with a byte fallback (byte-level BPE, or SentencePiece with byte pieces).
        image_start: id of the token before an image's slots.
        image: id of a slot; its embedding is always replaced by the image's.
        bos: id that begins each document.
        eos: id that ends one.
        pad: id that fills up rows. It may be an ordinary piece of text, as in the released checkpoint.
        num_slots: slots per image.

    Raises:
        ValueError: two special ids are the same, or the tokenizer reads a special id out of plain text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_start: int,
        image: int,
        bos: int,
        eos: int,
        pad: int,
        num_slots: int,
    ):
        self.tokenizer = tokenizer
        self.image_start = image_start
        self.image = image
        self.bos = bos
        self.eos = eos
        self.pad = pad
        self.num_slots = num_slots
        if num_slots < 1:
            raise ValueError(f"num_slots: expected at least 1, found {num_slots}")
        ids = {"image_start": image_start, "image": image, "bos": bos, "eos": eos, "pad": pad}
        if len(set(ids.values())) < len(ids) or min(ids.values()) < 0:
            raise ValueError(f"special ids must be different and not negative, found {ids}")
        # The released checkpoint pads with 31999, which is also a piece of text: then it is not reserved.
        reserved = frozenset((image_start, image, bos, eos))
        self._reserved = reserved if pad in self._ids(self.spelling(pad)) else reserved | {pad}
        unknown = tokenizer.unk_token_id
        self._unknown = unknown if isinstance(unknown, int) else None
        # A SentencePiece tokenizer of transformers marks the beginning of a piece of text by a space, unless
        # the text begins with one: that space would be lost, where SentencePiece itself keeps both.
        self._swallows_space = self._ids(" a") == self._ids("a")
        for special in sorted(self._reserved):
            self.encode_text(self.spelling(special))

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        num_slots: int,
        *,
        image_start_token: str = IMAGE_START_TOKEN,
        image_token: str = IMAGE_TOKEN,
        pad: int | None = None,
    ) -> Vocabulary:
        """The vocabulary of a tokenizer that already has all special tokens; `pad` where it defines none."""
        known = tokenizer.get_vocab()
        ids: dict[str, Any] = {
            "image_start": known.get(image_start_token),
            "image": known.get(image_token),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id if pad is None else pad,
        }
        missing = [name for name, value in ids.items() if value is None]
        if missing:
            raise ValueError(f"the tokenizer defines no {', '.join(missing)} token; it defines {ids}")
        return cls(tokenizer, num_slots=num_slots, **ids)

    def encode_text(self, text: str) -> list[int]:
        """The ids of a piece of text, none of them special. No bos, no eos.

        Raises:
            InputError: a lone surrogate, or a character that a tokenizer without byte fallback does not know.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: found the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
                "expected valid Unicode"
            ) from error
        if self._swallows_space and text.startswith(" "):
            text = " " + text
        ids = self._ids(text)
        if not self._reserved.isdisjoint(ids):
            special = sorted(self._reserved.intersection(ids))
            raise ValueError(f"the tokenizer reads the special ids {special} out of plain text")
        if self._unknown is not None and self._unknown in ids and self._unknown != self.pad:
            raise InputError(
                "text: found a character that the tokenizer does not know, and it has no byte fallback"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids, and ids beyond the tokenizer's own, are left out."""
        return self._text(self._kept(ids))

    def decode_settled(self, ids: Iterable[int]) -> str:
        """The beginning of `decode(ids)` that stays as it is, whatever ids follow.

        Left out at the end: a character whose last bytes may still come, and of a tokenizer with byte pieces
        all that stand there, since it makes text of a run of them only if the whole run is UTF-8.
        """
        kept = self._kept(ids)
        while kept and _BYTE_PIECE.fullmatch(self.spelling(kept[-1])):
            kept.pop()
        return self._text(kept).rstrip(INCOMPLETE)

    def decode_with_specials(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out; an image is its slots alone, as one token."""
        text, run = "", []
        for before, token in zip([None, *ids], [*ids, None], strict=True):
            if token is not None and token not in self._reserved:
                run.append(token)
                continue
            text, run = text + self.decode(run), []
            is_further_slot = token == self.image == before
            if token is not None and token != self.image_start and not is_further_slot:
                text += self.image_token if token == self.image else self.spelling(token)
        return text

    def _kept(self, ids: Iterable[int]) -> list[int]:
        size = len(self.tokenizer)
        return [int(i) for i in ids if int(i) not in self._reserved and 0 <= int(i) < size]

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def image_ids(self) -> list[int]:
        """The ids that stand for one image: its start token and its slots."""
        return [self.image_start] + [self.image] * self.num_slots

    @property
    def reserved_ids(self) -> frozenset[int]:
        """The special ids that never stand for text. `pad` is missing where it is an ordinary piece of it."""
        return self._reserved

    def special_ids(self) -> dict[str, int]:
        """The constructor's ids by name, for a configuration file."""
        names = ("image_start", "image", "bos", "eos", "pad")
        return {name: getattr(self, name) for name in names}

    def __len__(self) -> int:
        """One more than the largest id in use."""
        return max(len(self.tokenizer), *(special + 1 for special in self.special_ids().values()))

    def _ids(self, text: str) -> list[int]:
        # split_special_tokens: the spelling of a special token is cut into ordinary pieces.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def spelling(self, special: int) -> str:
        """How the tokenizer spells a special id; empty where it has no word for it."""
        if special >= len(self.tokenizer):
            return ""
        token: str | Sequence[str] | None = self.tokenizer.convert_ids_to_tokens(special)
        return token if isinstance(token, str) else ""

    @property
    def image_token(self) -> str:
        """What stands for an image in texts."""
        return self.spelling(self.image) or IMAGE_TOKEN
