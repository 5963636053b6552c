"""How the tasks of a corpus are put into words.

The conversational prompts are those of the command line and of StoryWorld: a model is asked what it was
trained on. The released ones are plain text that the answer goes on with, as in the published evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mm_interleaved.documents.document import Image, Part, Text
from mm_interleaved.documents.strict_json import FieldError

CAPTION_PROMPT = "Describe the picture."
PARAGRAPH_PROMPT = "Describe the picture in a paragraph."
GROUND_PROMPT = "Where is the {phrase}?"
"""What the shipped model was trained on, word for word."""

_IMAGE = "{image}"
_TEXT = "{text}"
_ARTICLE = re.compile(r"(the|an?)\s+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """What is asked about an image."""

    words: str
    """`{image}` (once) and `{text}` stand for the image and for the item's own words, say its question."""
    is_conversation: bool = True
    """A question of the user that the assistant answers; otherwise text that goes on with the answer."""

    def __post_init__(self):
        if self.words.count(_IMAGE) != 1:
            raise ValueError(f"prompt: found {self.words!r}, expected {_IMAGE} in it once")

    def parts(self, image: Image, text: str = "") -> tuple[Part, ...]:
        """The prompt's parts; `image` should have `role` as its role.

        Raises FieldError: blanks, where the item's own words are asked for.
        """
        if _TEXT in self.words and not text.strip():
            raise FieldError("", "found nothing but blanks, expected a question or a phrase")
        before, after = (side.replace(_TEXT, text).strip() for side in self.words.split(_IMAGE))
        texts = [Text(words, role=self.role) if words else None for words in (before, after)]
        return tuple(part for part in (texts[0], image, texts[1]) if part is not None)

    def answer(self, text: str) -> tuple[Part, ...]:
        """The gold answer as a target."""
        return (Text(text, role="assistant" if self.is_conversation else None),)

    @property
    def role(self) -> str | None:
        """Whose words and image they are."""
        return "user" if self.is_conversation else None


CAPTION = TaskPrompt(_IMAGE + CAPTION_PROMPT)
CAPTION_RELEASED = TaskPrompt(_IMAGE + "a photo of", is_conversation=False)
PARAGRAPH = TaskPrompt(_IMAGE + PARAGRAPH_PROMPT)
PARAGRAPH_RELEASED = TaskPrompt(
    _IMAGE + "Please describe the image in detail. The image depicts", is_conversation=False
)
QUESTION = TaskPrompt(_IMAGE + _TEXT)
QUESTION_RELEASED = TaskPrompt(
    "Based on the image, please answer the question. {image}{text} Please provide an accurate answer "
    "within one word. The answer is:",
    is_conversation=False,
)
QUESTION_RELEASED_VIZWIZ = TaskPrompt(
    "Based on the image, please answer the question. {image}{text} When the provided information is "
    "insufficient, respond with 'Unanswerable'. Please provide an accurate answer within one word. "
    "The answer is:",
    is_conversation=False,
)
GROUND = TaskPrompt(_IMAGE + GROUND_PROMPT.replace("{phrase}", _TEXT))
GROUND_RELEASED = TaskPrompt(
    "{image}Provide the bounding box coordinate of the region this sentence describes. {text}<box>",
    is_conversation=False,
)

PROMPTS: Mapping[str, TaskPrompt] = MappingProxyType(
    {
        "caption": CAPTION,
        "caption-released": CAPTION_RELEASED,
        "paragraph": PARAGRAPH,
        "paragraph-released": PARAGRAPH_RELEASED,
        "question": QUESTION,
        "question-released": QUESTION_RELEASED,
        "question-released-vizwiz": QUESTION_RELEASED_VIZWIZ,
        "ground": GROUND,
        "ground-released": GROUND_RELEASED,
    }
)
"""By the names that settings give them."""


def phrase(text: str, prompt: TaskPrompt) -> str:
    """What is looked for, without the article that the prompt's own words bring."""
    text = text.strip()
    if f"the {_TEXT}" not in prompt.words:
        return text
    article = _ARTICLE.match(text)
    rest = text[article.end() :] if article else text
    # The first word of a sentence is no name just because it has a capital.
    return rest if article else rest[:1].lower() + rest[1:]
