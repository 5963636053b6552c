"""What the two stages share that train the U-Net: images in pools, and the denoising loss (section 3.3).

What is frozen costs more than half of a step (vision tower, VAE, language model), and its output for a
document is always the same. So documents are read in pools, and each image of a pool is denoised several
times, each time with other noise at another time step (16 images a second became 27, two cores, 2026-11).
Letters: I images, C context tokens, D their channels, K earlier images, J images that are attended to.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mm_interleaved.devices import training_format
from mm_interleaved.documents.document import Document
from mm_interleaved.models.denoising import denoising_loss, sample_noise
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.recipes.storyworld.attribute_supervision import badge_cells
from mm_interleaved.recipes.storyworld.batches import DocumentBatch
from mm_interleaved.recipes.storyworld.looking_supervision import (
    finest_maps,
    looking_loss,
    places_before,
    recorded_plans,
)
from mm_interleaved.recipes.storyworld.vae_stage import detail
from mm_interleaved.tokens.visibility import NO_IMAGE, context_images
from mm_interleaved.training.computation import autocast, device_of, fast_attention
from mm_interleaved.training.stage import Losses


@dataclass(frozen=True, slots=True)
class DenoisingExample:
    """One image to be denoised, as the frozen parts see it."""

    context: Tensor
    """(C, D): what its conditioning is computed from; each stage has a context of its own."""
    latents: Tensor
    """(channels, y, x), scaled: the image."""
    earlier: tuple[tuple[Tensor, ...], ...]
    """Pyramids of the earlier images that it may attend to, oldest first; each (channels, s, s) a level."""
    weight: Tensor
    """(1, y, x), mean 1: how much the error of each latent cell counts."""
    document_id: str
    places: Tensor | None = None
    """(K, y * x, 2): where what each latent cell shows was before, see `looking_supervision`, if asked."""


class DenoisingStage(ABC):
    """Trains an image decoder by the denoising loss, on documents as the frozen parts see them.

    Args:
        documents: batch number → documents, as `DocumentBatches` makes them, with target pixels.
        batch_size: images a step.
        pool_batches: batches of documents in a pool.
        repeats: how often each image of a pool is denoised, on average.
        detail_weight: extra weight of the errors beside the sharpest possible edges.
        badge_weight: extra weight of the errors in cells that show a badge, where a document has its scenes.
            A badge covers two hundredths of an image, and nothing but the conditioning says which it is:
            without this weight it was at chance after 1,600 steps when all else was right, with it right in
            nine of ten after 1,000 more.
        boards: documents have boards: conditionings say how these hang, see `board_supervision`.
        looking_weight: of a further loss, how far the U-Net looks from where things were in earlier images,
            where a document has its scenes.
    """

    name: str

    def __init__(
        self,
        model: MMInterleavedForConditionalGeneration,
        documents: Callable[[int], DocumentBatch],
        *,
        batch_size: int,
        pool_batches: int,
        repeats: int,
        detail_weight: float = 0.0,
        badge_weight: float = 0.0,
        boards: bool = False,
        looking_weight: float = 0.0,
    ) -> None:
        self.looking_weight = looking_weight
        self.detail_weight, self.badge_weight, self.boards = detail_weight, badge_weight, boards
        self.model, self.documents, self.batch_size = model, documents, batch_size
        self.pool_batches, self.repeats = pool_batches, repeats
        self._pool: list[DenoisingExample] = []
        self._pool_number = -1
        for frozen in (model.vision, model.language_model, model.text_head, model.image_decoder.vae):
            frozen.requires_grad_(False)
        model.image_start_embedding.requires_grad_(False)

    @abstractmethod
    def trained_parts(self) -> Mapping[str, nn.Module]:
        """See `stage.Stage`."""

    @abstractmethod
    def read_contexts(self, documents: DocumentBatch) -> list[Tensor]:
        """What the conditioning of each image of a batch is computed from, (C, D) each."""

    @abstractmethod
    def condition(self, contexts: list[Tensor]) -> Tensor:
        """Conditioning (I, R, D) from contexts."""

    def make_batch(self, step: int) -> list[DenoisingExample]:
        """Images sampled from the step's pool; which pool that is depends on the step alone."""
        number = step // (self.pool_batches * self.repeats)
        if number != self._pool_number:
            self._pool, self._pool_number = self.read_pool(number), number
        return self.sample(self._pool)

    def read_pool(self, number: int) -> list[DenoisingExample]:
        """The images of a pool, out of the documents of its own batches."""
        device, first = device_of(self.model), number * self.pool_batches
        batches = (self.documents(first + i).to(device) for i in range(self.pool_batches))
        return [example for batch in batches for example in self.read(batch)]

    def sample(self, pool: Sequence[DenoisingExample]) -> list[DenoisingExample]:
        """The images of a step, by torch's global generator."""
        return [pool[i] for i in torch.randint(len(pool), (self.batch_size,)).tolist()]

    @torch.no_grad()
    def read(self, documents: DocumentBatch) -> list[DenoisingExample]:
        """What the frozen parts make of a batch of documents: an example for each image that counts."""
        batch = documents.batch
        assert batch.target_pixel_values is not None, "documents come with target pixels"
        device = batch.pixel_values.device
        with autocast(training_format(None, device).name, device), fast_attention(device):
            contexts = self.read_contexts(documents)
            latents = self.model.image_decoder.encode(batch.target_pixel_values)
            weight_I1yx = self._weights(batch.target_pixel_values, documents.documents)
            settings = self.model.config.part("image_synchronizer")
            levels = []
            if settings is not None:
                pyramid = self.model.encode_images(batch.pixel_values).pyramid
                levels = [pyramid[level].float() for level in settings.levels]
        earlier_IK = context_images(
            batch.document_start,
            batch.image_start,
            self.model.config.context_images,
            max(1, self.model.max_context_images),
        )
        row_I = (batch.image_start != NO_IMAGE).nonzero(as_tuple=True)[0]
        first_of_row = torch.searchsorted(row_I, torch.arange(len(documents.documents), device=device))
        return [
            DenoisingExample(
                context=contexts[i].float(),
                latents=latents[i].float(),
                weight=weight_I1yx[i],
                earlier=tuple(
                    tuple(level[j] for level in levels) for j in earlier_IK[i].tolist() if j != NO_IMAGE
                ),
                document_id=documents.document_ids[row_I[i]],
                places=self._places(
                    documents.documents[row_I[i]],
                    i - int(first_of_row[row_I[i]]),
                    [j - int(first_of_row[row_I[i]]) for j in earlier_IK[i].tolist() if j != NO_IMAGE],
                    latents.shape[-1],
                ),
            )
            for i in batch.image_target.nonzero().flatten().tolist()
        ]

    def compute_losses(self, batch: list[DenoisingExample]) -> Losses:
        model, decoder = self.model, self.model.image_decoder
        latents = torch.stack([example.latents for example in batch])
        scheduler, device = model.training_scheduler, latents.device
        watched = finest_maps(decoder) if self.looking_weight else []
        with fast_attention(device), recorded_plans(watched) as plans:
            conditioning = self.condition([example.context for example in batch])
            earlier = self._earlier_images(batch)
            noise = sample_noise(
                latents.shape,
                scheduler.config.num_train_timesteps,
                model.config.condition_dropout,
                device=device,
                dtype=latents.dtype,
                with_latent_noise=False,
            )
            error_IXyx = denoising_loss(decoder, scheduler, latents, conditioning, earlier, noise)
        weight_I1yx = torch.stack([example.weight for example in batch])
        loss = (error_IXyx * weight_I1yx).mean()
        named, total = {"image": loss}, loss
        if plans:
            named["looking"] = looking_loss(plans[-1], self._stacked_places(batch).to(device))
            total = loss + self.looking_weight * named["looking"]
        return Losses(
            total=total,
            named=named,
            counts={"images": len(batch)},
            document_ids=tuple(example.document_id for example in batch),
        )

    def _places(self, document: Document, number: int, before: Sequence[int], size: int) -> Tensor | None:
        """(K, Q, 2), or None where nobody asks for it."""
        if not self.looking_weight:
            return None
        places = [places_before(document, number, one, size) for one in before]
        return torch.stack(places) if places else torch.full((0, size**2, 2), torch.nan)

    def _stacked_places(self, batch: list[DenoisingExample]) -> Tensor:
        """(I, K, Q, 2) of the images that see any, padded behind with NaN."""
        places = [example.places for example in batch if example.places is not None and len(example.places)]
        return pad_sequence(places, batch_first=True, padding_value=torch.nan)

    def _weights(self, pixels: Tensor, documents: Sequence[Document]) -> Tensor:
        change_I1HW = detail(2 * pixels.float() - 1)
        edges_I1yx = F.avg_pool2d(change_I1HW, self.model.image_decoder.latent_factor)
        badges_I1yx = badge_cells(documents, edges_I1yx.shape[-1])[:, None].to(pixels.device)
        # Mean 1, so that images with many edges do not count more than others, nor change the learning rate.
        weight_I1yx = 1 + self.detail_weight * edges_I1yx + self.badge_weight * badges_I1yx
        return weight_I1yx / weight_I1yx.mean((1, 2, 3), keepdim=True)

    def _earlier_images(self, batch: list[DenoisingExample]):
        """The earlier images of all examples behind one another; None where nothing attends to any."""
        images = [image for example in batch for image in example.earlier]
        if self.model.image_decoder.synchronizers is None or not images:
            return None
        index_IK = torch.full((len(batch), max(len(example.earlier) for example in batch)), NO_IMAGE)
        first = 0
        for row, example in zip(index_IK, batch, strict=True):
            row[: len(example.earlier)] = torch.arange(first, first + len(example.earlier))
            first += len(example.earlier)
        levels = [torch.stack(level) for level in zip(*images, strict=True)]
        return self.model.image_decoder.project_earlier_images(levels, index_IK.to(levels[0].device))
