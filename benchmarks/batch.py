"""Eight documents of the shipped model: continued at once, or one after another.

Captions and answers are text about an image; stories are text and images in turn. Texts must be the same,
images too but for what the last bits of their latents do to 8 bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import HALF, Case, Setting, compare
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.storyworld.tasks import document

AT_ONCE = 8
TASKS = {"caption": "T", "vqa": "T", "draw": "I", "story": "T I T I"}
QUICK = ("caption", "draw")
PIXEL_TOLERANCE = 4 / 255
LONGEST = 1024
"""Bytes of a text part."""


def run(setting: Setting) -> Iterator[Case]:
    dtype = str(setting.dtype).removeprefix("torch.")
    generator = load_generator(find_model("storyworld"), device=str(setting.device), dtype=dtype)
    # Whole documents take seconds: a few turns must do.
    setting = replace(setting, least=3, seconds=0.0, patience=0.0)
    for task in QUICK if setting.quick else TASKS:
        yield batch_case(setting, generator, task, TASKS[task])


def batch_case(setting: Setting, generator: Any, task: str, layout: str) -> Case:
    """Documents of one task of StoryWorld."""
    made = [document("test", 0, index, task) for index in range(AT_ONCE)]
    documents = [replace(one, target=(), layout=layout) for one in made]
    result = compare(
        setting,
        {
            "one by one": lambda: continued(generator, documents, 1),
            "at once": lambda: continued(generator, documents, AT_ONCE),
        },
        # In half precision tokens may differ where two are as likely; what is compared then is the time.
        tolerance=float("inf") if setting.dtype in HALF else PIXEL_TOLERANCE,
    )
    return {"task": task, "layout": layout, "documents": AT_ONCE, **result.record("at once")}


def continued(generator: Any, documents: Sequence[Document], batch_size: int) -> list[Tensor]:
    """What was made of each, as numbers of 0 to 1: texts by their bits, images by their pixels."""
    return numbers_of(generator.generate_batch(documents, batch_size=batch_size))


def numbers_of(completed: Sequence[Document]) -> list[Tensor]:
    """What was generated, as numbers of 0 to 1."""
    parts = [part for one in completed for part in one.parts if part.generated]
    return [_bits(part.text) if isinstance(part, Text) else _pixels(part) for part in parts]


def _bits(text: str) -> Tensor:
    """A text that differs in one letter differs by 1, whatever its length."""
    data = torch.from_numpy(np.unpackbits(np.frombuffer(text.encode()[:LONGEST], np.uint8))).float()
    return F.pad(data, (1, 8 * LONGEST - len(data)), value=1.0)


def _pixels(image: Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.load(), np.float32) / 255)
