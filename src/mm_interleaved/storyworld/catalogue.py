"""Documents of any task by its name: those of the round (`tasks`), and those about boards (`detail`)."""

from mm_interleaved.documents.document import Document
from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE
from mm_interleaved.storyworld.detail.documents import DETAIL_TASKS, detail_document
from mm_interleaved.storyworld.tasks import TASKS, document

ALL_TASKS = (*TASKS, *DETAIL_TASKS)


def document_of(
    split: str, seed: int, index: int, task: str | None, image_size: int = IMAGE_SIZE
) -> Document:
    """One document, a pure function of its arguments.

    Args:
        task: a name out of ALL_TASKS, or None for the index's turn in the round of `tasks.document`.
        image_size: pixels a side; others than 64 are possible for tasks about boards alone.

    Raises:
        ValueError: another size for another task, or what `document` and `detail_document` refuse.
    """
    if task in DETAIL_TASKS:
        return detail_document(split, seed, index, task, image_size)
    if image_size != IMAGE_SIZE:
        raise ValueError(
            f"image_size {image_size}: only {', '.join(DETAIL_TASKS)} have other sizes than {IMAGE_SIZE}, "
            f"found {task or 'the round of all tasks'}"
        )
    return document(split, seed, index, task)
