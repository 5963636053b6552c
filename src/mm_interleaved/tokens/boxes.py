"""What the trained tasks ask in words, and how a box stands in an answer.

The ready prompts of the command line are these: a model is asked what it was trained on. Nothing here loads
anything, so that the help of a command can show them.
"""

import re

CAPTION_PROMPT = "Describe the picture."
PARAGRAPH_PROMPT = "Describe the picture in a paragraph."
GROUND_PROMPT = "Where is the {phrase}?"

BOX_RANGE = 1000
"""A box counts in this many parts of the picture's side: 0 to 999."""
_BOX = re.compile(r"\((\d{1,4}),\s*(\d{1,4})\)\s*\((\d{1,4}),\s*(\d{1,4})\)")


def write_box(box: tuple[int, int, int, int]) -> str:
    """`(xxx,yyy)(xxx,yyy)`: left, top, right, bottom, each below BOX_RANGE."""
    left, top, right, bottom = box
    return f"({left:03d},{top:03d})({right:03d},{bottom:03d})"


def read_box(text: str) -> tuple[int, int, int, int] | None:
    """The first box of a text (left, top, right, bottom), or None; numbers up to four digits are taken."""
    match = _BOX.search(text)
    if match is None:
        return None
    left, top, right, bottom = (int(number) for number in match.groups())
    return left, top, right, bottom
