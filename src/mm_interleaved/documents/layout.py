"""Which parts are wanted, in which order: `"auto"`, or `"T I T I"` (T text, I image)."""

from __future__ import annotations

import re

from mm_interleaved.errors import UsageError, escape

AUTO = "auto"
TEXT = "T"
IMAGE = "I"
_LETTERS = {"t": TEXT, "text": TEXT, "i": IMAGE, "image": IMAGE}
EXPECTED = (
    f'expected "{AUTO}", or {TEXT} and {IMAGE} for texts and images in order, such as "T I T I" or TITI'
)


def parse_layout(layout: str) -> tuple[str, ...] | None:
    """The parts wanted in order, or None where the model decides.

    Case makes no difference; letters stand alone, between blanks or commas, or together (`TITI`); the words
    `text` and `image` will do.

    Raises:
        UsageError: naming the word that is neither T nor I.
    """
    words = [word for word in re.split(r"[\s,]+", layout) if word]
    if [word.casefold() for word in words] == [AUTO]:
        return None
    if not words:
        raise UsageError(f"layout: found no part, {EXPECTED}", field="layout")
    parts: list[str] = []
    for position, word in enumerate(words, start=1):
        whole = word.casefold()
        letters = [whole] if whole in _LETTERS else list(whole)
        if not _LETTERS.keys() >= set(letters):
            raise UsageError(
                f"layout: found {escape(repr(word))} as part {position}, {EXPECTED}", field="layout"
            )
        parts += [_LETTERS[letter] for letter in letters]
    return tuple(parts)


def canonical_layout(layout: str) -> str:
    """`auto`, or the letters in order with a blank between: the one spelling of a layout that is written.

    Raises UsageError as `parse_layout` does.
    """
    parts = parse_layout(layout)
    return AUTO if parts is None else " ".join(parts)
