"""A judge on this machine: any vision-language model that transformers loads with a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mm_interleaved.documents.document import Image, Part
from mm_interleaved.errors import ModelFileError, escape


class LocalJudge:
    """Asks a model of transformers.

    Args:
        model: a folder or a hub id of an image-text-to-text model.
        device: as torch names it.

    Raises:
        ModelFileError: it cannot be loaded.
    """

    def __init__(self, model: str | Path, device: str = "cpu", *, max_new_tokens: int = 256):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor: Any = AutoProcessor.from_pretrained(model)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(model)
        except (OSError, ValueError) as error:
            reason = escape(str(error).splitlines()[0], 300)
            raise ModelFileError(f"judge {escape(str(model))!r}: cannot be loaded ({reason})") from error
        self.model = loaded.to(device).eval()
        self._name, self.max_new_tokens = str(model), max_new_tokens

    @property
    def name(self) -> str:
        return self._name

    @torch.no_grad()
    def reply(self, parts: Sequence[Part], attempt: int) -> str:
        content = [
            {"type": "image", "image": part.load()}
            if isinstance(part, Image)
            else {"type": "text", "text": part.text}
            for part in parts
        ]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        torch.manual_seed(attempt)
        ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=attempt > 0)
        return self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[
            0
        ]
