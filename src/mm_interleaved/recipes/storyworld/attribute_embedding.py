"""Attribute embedding: what an image shows, as a conditioning that a U-Net could generate it from.

Letters: I images, N attributes, d half the width of a conditioning vector.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_interleaved.errors import UsageError
from mm_interleaved.models.image_decoder import ImageDecoder
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    NO_LABEL,
    NUM_VALUES,
    attribute_losses,
    known_cross_entropy,
    mean_loss,
)


class AttributeEmbedding:
    """A fixed embedding of an image's attributes, in the shape of its conditioning.

    Each attribute has half a vector: one of some random ones, by its value, or the one of an unknown value.
    It is the target of the language model's conditioning and the input of the U-Net before the two meet, so
    that both can learn at once what the other means.

    Args:
        num_vectors, dim: shape of the conditioning; it has room for `2 * num_vectors` attributes.
        more_values: how many values further attributes have, which take the halves that are left. The
            embedding of the others is the same with them and without.
    """

    def __init__(
        self,
        num_vectors: int,
        dim: int,
        *,
        more_values: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> None:
        num_values = [*NUM_VALUES, *more_values]
        if 2 * num_vectors < len(num_values):
            raise UsageError(
                f"sizes.num_conditioning {num_vectors}: expected at least "
                f"{(len(num_values) + 1) // 2}, to hold the attributes of a scene"
            )
        generator = torch.Generator().manual_seed(0)
        sizes = [*num_values, *[0] * (2 * num_vectors - len(num_values))]
        self.more_values = tuple(more_values)
        self.num_vectors = num_vectors
        # Row 0 stands for an unknown value. Each row has mean 0 and deviation 1, like a LayerNorm's output.
        # They are made on the CPU, so that they are the same everywhere.
        self.tables = [
            F.layer_norm(
                torch.randn(size + 1, dim // 2, generator=generator, dtype=torch.float32), (dim // 2,)
            ).to(device)
            for size in sizes
        ]

    @classmethod
    def of(cls, decoder: ImageDecoder, more_values: Sequence[int] = ()) -> "AttributeEmbedding":
        """The embedding in the shape of an image decoder's conditioning, on its device."""
        queries = decoder.resampler.queries
        return cls(*queries.shape[1:], more_values=more_values, device=queries.device)

    def encode(self, labels: Tensor) -> Tensor:
        """Embeddings (I, num_vectors, dim) of labels (I, N), see `scene_labels`."""
        row_IN = torch.where(labels == NO_LABEL, 0, labels + 1)
        row_IN = F.pad(row_IN, (0, len(self.tables) - row_IN.shape[1]))
        halves = [table[row_I] for table, row_I in zip(self.tables, row_IN.T, strict=True)]
        return torch.stack(halves, dim=1).view(len(labels), self.num_vectors, -1)

    def logits(self, conditioning: Tensor) -> Tensor:
        """Logits (I, sum of all numbers of values): how much a conditioning resembles the embedding."""
        half_INd = conditioning.reshape(len(conditioning), len(self.tables), -1)
        # A row's product with itself is its width d, with another about sqrt(d): so the right value has logit
        # 8, and the others little, whatever the width.
        sharpness = 8.0 / half_INd.shape[-1]
        num_known = len(NUM_VALUES) + len(self.more_values)
        logits = [sharpness * half_INd[:, n] @ table[1:].T for n, table in enumerate(self.tables[:num_known])]
        return torch.cat(logits, dim=1)

    def losses(self, conditioning: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """How far conditionings (I, num_vectors, dim) are from the embeddings of labels (I, N): scalars.

        N counts the further attributes too, where there are any.

        "attributes" is the cross-entropy of the values, "distance" the mean square; images of which nothing
        is known do not count. The distance alone would be content with a mean of likely values.
        """
        conditioning = conditioning.float()
        logits, num = self.logits(conditioning), sum(NUM_VALUES)
        by_name = dict(attribute_losses(logits[:, :num], labels[:, : len(NUM_VALUES)]))
        if self.more_values:
            more = zip(
                logits[:, num:].split(self.more_values, dim=1), labels[:, len(NUM_VALUES) :].T, strict=True
            )
            by_name |= {f"more_{n}": known_cross_entropy(*pair) for n, pair in enumerate(more)}
        is_known_I = (labels != NO_LABEL).any(1)
        distance_I = (conditioning - self.encode(labels)).square().mean((1, 2))
        return {
            "attributes": mean_loss(by_name),
            "distance": (distance_I * is_known_I).sum() / is_known_I.sum().clamp(min=1),
            "attributes_badge": mean_loss(by_name, "badge"),
            "attributes_species": mean_loss(by_name, "species"),
        }
