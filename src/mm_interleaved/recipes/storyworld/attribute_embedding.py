"""The code of a scene: what a picture shows, as a conditioning that a U-Net could paint from.

Letters: I pictures, N attributes, d half the width of a conditioning vector.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_interleaved.errors import UsageError
from mm_interleaved.models.image_decoder import ImageDecoder
from mm_interleaved.recipes.storyworld.attribute_supervision import NOT_THERE, SIZES, mean_loss, naming_losses


class SceneCode:
    """A fixed code of what a picture shows, in the shape of an image's conditioning.

    Each attribute has half a vector: one of some random ones, by its answer, or the one that says "not
    told". The U-Net can learn to paint from codes, and the language model to write them, before they meet.

    Args:
        num_vectors, dim: shape of the conditioning; it has room for `2 * num_vectors` attributes.
    """

    def __init__(self, num_vectors: int, dim: int, *, device: torch.device | str | None = None) -> None:
        if 2 * num_vectors < len(SIZES):
            raise UsageError(
                f"sizes.num_conditioning {num_vectors}: a scene's code needs {(len(SIZES) + 1) // 2} vectors"
            )
        generator = torch.Generator().manual_seed(0)
        sizes = [*SIZES, *[0] * (2 * num_vectors - len(SIZES))]
        self.num_vectors = num_vectors
        # Row 0 says "not told". Each row has mean 0 and deviation 1, as what a LayerNorm puts out.
        # They are drawn on the CPU, so that they are the same everywhere.
        self.tables = [
            F.layer_norm(
                torch.randn(size + 1, dim // 2, generator=generator, dtype=torch.float32), (dim // 2,)
            ).to(device)
            for size in sizes
        ]

    @classmethod
    def of(cls, decoder: ImageDecoder) -> "SceneCode":
        """The code in the shape of what an image decoder is told, where that lies."""
        queries = decoder.resampler.queries
        return cls(*queries.shape[1:], device=queries.device)

    def encode(self, labels: Tensor) -> Tensor:
        """Codes (I, num_vectors, dim) of labels (I, N), see `scene_labels`."""
        row_IN = torch.where(labels == NOT_THERE, 0, labels + 1)
        row_IN = F.pad(row_IN, (0, len(self.tables) - row_IN.shape[1]))
        halves = [table[row_I] for table, row_I in zip(self.tables, row_IN.T, strict=True)]
        return torch.stack(halves, dim=1).view(len(labels), self.num_vectors, -1)

    def answers(self, conditioning: Tensor) -> Tensor:
        """Logits (I, sum(SIZES)) of all answers: how much a conditioning resembles the code of each."""
        half_INd = conditioning.reshape(len(conditioning), len(self.tables), -1)
        sharpness = 8.0 / half_INd.shape[-1]
        logits = [
            sharpness * half_INd[:, n] @ table[1:].T for n, table in enumerate(self.tables[: len(SIZES)])
        ]
        return torch.cat(logits, dim=1)

    def losses(self, conditioning: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """How far conditionings (I, num_vectors, dim) are from the codes of labels (I, N): scalars.

        "naming" is the cross-entropy of the answers, "distance" the mean square; pictures of which nothing is
        told do not count.
        """
        conditioning = conditioning.float()
        by_name = naming_losses(self.answers(conditioning), labels)
        is_told_I = (labels != NOT_THERE).any(1)
        distance_I = (conditioning - self.encode(labels)).square().mean((1, 2))
        return {
            "naming": mean_loss(by_name),
            "distance": (distance_I * is_told_I).sum() / is_told_I.sum().clamp(min=1),
            "naming_badge": mean_loss(by_name, "badge"),
            "naming_species": mean_loss(by_name, "species"),
        }
