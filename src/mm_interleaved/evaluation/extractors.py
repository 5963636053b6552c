"""What turns images and texts into features for metrics: Inception or CLIP.

Extractors are given by path or hub id and never fetched unasked. Letters: N images or texts, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.errors import ModelFileError, escape

INCEPTION_SIZE = 299
INCEPTION_FEATURES = 2048


class InceptionFeatures(nn.Module):
    """Pooled features of a TorchScript Inception: (N, 3, H, W) uint8 → (N, 2048).

    Args:
        path: the TorchScript file that published FID code uses (`pt_inception-2015-12-05`), or one that takes
            (N, 3, 299, 299) floats in [-1, 1] and returns (N, 2048).

    Raises:
        ModelFileError: there is no such file, or it is no TorchScript module.
    """

    num_features = INCEPTION_FEATURES

    def __init__(self, path: Path):
        super().__init__()
        if not path.is_file():
            raise ModelFileError(
                f"inception: {escape(str(path))!r} is no file; FID needs its weights as TorchScript"
            )
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ModelFileError(f"inception: {escape(str(path))!r} is no TorchScript module") from error

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = F.interpolate(
            images.float(),
            (INCEPTION_SIZE, INCEPTION_SIZE),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        return self.network(pixels / 127.5 - 1).flatten(1)


class ClipEmbedder:
    """A CLIP of transformers, in float32 on the CPU.

    Args:
        model: a folder or a hub id.

    Raises:
        ModelFileError: it is not there (offline, a hub id must have been fetched before).
    """

    def __init__(self, model: str | Path):
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        try:
            self.model: Any = CLIPModel.from_pretrained(model, dtype=torch.float32).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
            self.image_processor: Any = CLIPImageProcessorPil.from_pretrained(model)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelFileError(
                f"clip: {escape(str(model))!r} cannot be loaded ({escape(reason, 300)})"
            ) from error

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        found = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        pooled = self.model.text_model(**found).pooler_output
        return _unit(self.model.text_projection(pooled))

    @torch.no_grad()
    def images(self, images: Sequence[PILImage.Image]) -> np.ndarray:
        pixels = self.image_processor(list(images), return_tensors="pt")["pixel_values"]
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return _unit(self.model.visual_projection(pooled))


class ClipRanker:
    """How well images fit a text: the cosines of their embeddings, see `generation.engine`."""

    def __init__(self, embedder: ClipEmbedder):
        self.embedder = embedder

    def __call__(self, text: str, images: Sequence[PILImage.Image]) -> list[float]:
        found = self.embedder.images(images) @ self.embedder.texts([text])[0]
        return found.tolist()


class Segmenter:
    """A semantic segmentation of transformers, in float32 on the CPU: one that labels pixels (Segformer,
    UPerNet, DPT), or one that is asked for it (OneFormer, Mask2Former, MaskFormer).

    Args:
        model: a folder or a hub id.

    Raises:
        ModelFileError: it is not there (offline, a hub id must have been fetched before), or is none.
    """

    def __init__(self, model: str | Path):
        from transformers import AutoConfig, AutoProcessor
        from transformers.models.auto import modeling_auto as auto

        try:
            config = AutoConfig.from_pretrained(model)
            is_asked = type(config) in auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
            loader: Any = (
                auto.AutoModelForUniversalSegmentation if is_asked else auto.AutoModelForSemanticSegmentation
            )
            self.model: Any = loader.from_pretrained(model, dtype=torch.float32).eval()
            self.processor: Any = AutoProcessor.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ModelFileError(
                f"segmenter: {escape(str(model))!r} cannot be loaded ({escape(reason, 300)})"
            ) from error
        self.num_classes: int = config.num_labels
        self._task = {"task_inputs": ["semantic"]} if config.model_type == "oneformer" else {}

    @torch.no_grad()
    def classes(self, image: PILImage.Image) -> np.ndarray:
        """(H, W) int64: the class of each pixel, from 0."""
        inputs = self.processor(images=image, return_tensors="pt", **self._task)
        outputs = self.model(**inputs)
        size = [(image.height, image.width)]
        post: Any = getattr(self.processor, "image_processor", self.processor)
        [found] = post.post_process_semantic_segmentation(outputs, target_sizes=size)
        return found.numpy()


def _unit(features_ND: Tensor) -> np.ndarray:
    return F.normalize(features_ND, dim=-1).numpy()
