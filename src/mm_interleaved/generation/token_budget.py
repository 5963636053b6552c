"""How the parts of a layout share the tokens that there are."""

from __future__ import annotations

from collections.abc import Sequence

from mm_interleaved.documents.layout import IMAGE, TEXT


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
