"""Which parts are wanted, in which order: `"auto"`, or `"T I T I"` (T text, I image)."""

from __future__ import annotations

from collections.abc import Sequence

from mm_interleaved.errors import UsageError, escape

AUTO = "auto"
TEXT = "T"
IMAGE = "I"


def parse_layout(layout: str) -> tuple[str, ...] | None:
    """The parts wanted in order, or None where the model decides.

    Raises:
        UsageError: naming the word that is neither T nor I.
    """
    if layout == AUTO:
        return None
    words = tuple(layout.split())
    expected = 'expected "auto", or T (text) and I (image) separated by spaces, such as "T I T I"'
    if not words:
        raise UsageError(f"layout: found no part, {expected}", field="layout")
    for position, word in enumerate(words, start=1):
        if word not in (TEXT, IMAGE):
            raise UsageError(
                f"layout: found {escape(repr(word))} as part {position}, {expected}", field="layout"
            )
    return words


def text_share(parts_left: Sequence[str], budget: int, room: int, image_tokens: int) -> int:
    """How many tokens the text at the head of `parts_left` may take, so that the others get theirs.

    What there is, is divided evenly over the texts left; at least one token, as long as one fits.

    Args:
        budget: text tokens that may still be generated.
        room: tokens that still fit into the context.
        image_tokens: tokens of one image.
    """
    num_texts = parts_left.count(TEXT)
    room_for_text = room - parts_left.count(IMAGE) * image_tokens
    fair = min(budget, room_for_text) // num_texts
    return min(max(1, fair), budget, room)
