"""Documents that are continued while a model trains, so that one sees what the losses mean."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, document_to_record
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.errors import MMInterleavedError
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.runs.page import render_page
from mm_interleaved.storyworld.tasks import document
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.training.config import SamplesConfig

logger = logging.getLogger(__name__)


def sample_documents(config: SamplesConfig) -> list[Document]:
    """What is continued: documents of a file, or StoryWorld's of the validation split, task by task.

    Raises:
        InputError: the file cannot be read.
    """
    if config.documents:
        return list(read_documents(Path(config.documents)))[: config.count]
    return [document("validation", 0, index) for index in range(config.count)]


class SampleWriter:
    """Writes a page of continued documents every so many steps; the same seed each time.

    Args:
        folder: gets `step-00000100.html`, one self-contained page each time.
    """

    def __init__(
        self,
        model: MMInterleavedForConditionalGeneration,
        processor: MMInterleavedProcessor,
        config: SamplesConfig,
        documents: Sequence[Document],
        folder: Path,
    ) -> None:
        self.model, self.processor, self.config = model, processor, config
        self.documents, self.folder = documents, folder
        self.every = config.every

    def __call__(self, step: int) -> None:
        was_training = self.model.training
        generator = InterleavedGenerator(self.model, self.processor)
        images: dict[str, PILImage.Image] = {}
        try:
            records = [self._continue(generator, asked, images) for asked in self.documents]
        finally:
            self.model.train(was_training)
        settings = f"after {step} steps, {self.config.num_inference_steps} denoising steps, seed 0"
        page = render_page(records, images.__getitem__, title=f"Samples after {step} steps", made_by=settings)
        make_folder(self.folder)
        write_file(self.folder / f"step-{step:08d}.html", page)

    def _continue(
        self, generator: InterleavedGenerator, asked: Document, images: dict[str, PILImage.Image]
    ) -> dict[str, Any]:
        """The record of a continued document; its images go into `images` by the names in the record."""
        settings = {
            "num_inference_steps": self.config.num_inference_steps,
            "max_new_tokens": self.config.max_new_tokens,
            "seed": 0,
        }
        try:
            # Scenes and gold answers are of no use on the page.
            made = replace(generator.generate(replace(asked, target=()), **settings), meta={})
        except MMInterleavedError as error:
            logger.warning("sample %s: %s", asked.id, error)
            return {"id": asked.id, "error": {"code": error.code, "message": str(error)}}

        def name(part: Image, index: int) -> str:
            path = f"{asked.id}_{index}.png"
            images[path] = part.load()
            return path

        return document_to_record(made, name)
