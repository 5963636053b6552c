"""What the two stages share that teach the U-Net to paint: pictures in pools, and the denoising loss.

What is frozen costs more than half of a step (vision tower, VAE, language model), and its output for a
document is always the same. So documents are read in pools, and each picture of a pool is painted several
times, each time with other noise at another time step (16 pictures a second became 27, two cores, 2026-11).
Letters: I pictures, C context tokens, D their channels, K earlier images, J images that are looked at.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.devices import training_format
from mm_interleaved.documents.document import Document
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.losses import denoising_target
from mm_interleaved.recipes.storyworld.attribute_supervision import badge_cells
from mm_interleaved.recipes.storyworld.batches import DocumentBatch
from mm_interleaved.recipes.storyworld.vae_stage import detail
from mm_interleaved.tokens.visibility import NO_IMAGE, context_images
from mm_interleaved.training.computation import autocast, device_of, fast_attention
from mm_interleaved.training.loop import Losses


@dataclass(frozen=True, slots=True)
class PaintingTask:
    """One picture to be painted, as the frozen parts see it."""

    context: Tensor
    """(C, D): what it is painted from; a stage of its own knows how."""
    latents: Tensor
    """(channels, y, x), scaled: the picture."""
    earlier: tuple[tuple[Tensor, ...], ...]
    """Pyramids of the earlier images that it may look at, oldest first; each (channels, s, s) a level."""
    weight: Tensor
    """(1, y, x), mean 1: how much the error of each latent cell counts."""
    document_id: str


class PaintingStage(ABC):
    """Trains what paints, by the denoising loss, on documents as the frozen parts see them.

    Args:
        documents: batch number → documents, as `DocumentBatches` makes them, with target pixels.
        batch_size: pictures a step.
        pool_batches: batches of documents in a pool.
        repeats: how often each picture of a pool is painted, on average.
        detail_weight: extra weight of the errors beside the sharpest possible edges.
        badge_weight: extra weight of the errors in cells that show a badge, where a document tells its
            scenes. A badge covers two hundredths of a picture, and nothing but the code tells which it is:
            without this weight it was at chance after 1,600 steps when all else was right, with it right in
            nine of ten after 1,000 more.
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
    ) -> None:
        self.detail_weight, self.badge_weight = detail_weight, badge_weight
        self.model, self.documents, self.batch_size = model, documents, batch_size
        self.pool_batches, self.repeats = pool_batches, repeats
        self._pool: list[PaintingTask] = []
        self._pool_number = -1
        for frozen in (model.vision, model.language_model, model.text_head, model.image_decoder.vae):
            frozen.requires_grad_(False)
        model.image_start_embedding.requires_grad_(False)

    @abstractmethod
    def trained_parts(self) -> Mapping[str, nn.Module]:
        """See `loop.Stage`."""

    @abstractmethod
    def read_contexts(self, documents: DocumentBatch) -> list[Tensor]:
        """What each picture of a batch is painted from, (C, D) each."""

    @abstractmethod
    def condition(self, contexts: list[Tensor]) -> Tensor:
        """Conditioning (I, R, D) from contexts."""

    def make_batch(self, step: int) -> list[PaintingTask]:
        """Pictures drawn from the step's pool; which pool that is depends on the step alone."""
        number = step // (self.pool_batches * self.repeats)
        if number != self._pool_number:
            self._pool, self._pool_number = self.read_pool(number), number
        return self.draw(self._pool)

    def read_pool(self, number: int) -> list[PaintingTask]:
        """The pictures of a pool, out of the documents of its own batches."""
        device, first = device_of(self.model), number * self.pool_batches
        batches = (self.documents(first + i).to(device) for i in range(self.pool_batches))
        return [task for batch in batches for task in self.read(batch)]

    def draw(self, pool: Sequence[PaintingTask]) -> list[PaintingTask]:
        """The pictures of a step, by torch's global generator."""
        return [pool[i] for i in torch.randint(len(pool), (self.batch_size,)).tolist()]

    @torch.no_grad()
    def read(self, documents: DocumentBatch) -> list[PaintingTask]:
        """What the frozen parts make of a batch of documents: a task for each picture that counts."""
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
        return [
            PaintingTask(
                context=contexts[i].float(),
                latents=latents[i].float(),
                weight=weight_I1yx[i],
                earlier=tuple(
                    tuple(level[j] for level in levels) for j in earlier_IK[i].tolist() if j != NO_IMAGE
                ),
                document_id=documents.document_ids[row_I[i]],
            )
            for i in batch.image_target.nonzero().flatten().tolist()
        ]

    def compute_losses(self, batch: list[PaintingTask]) -> Losses:
        model, decoder = self.model, self.model.image_decoder
        device = batch[0].latents.device
        with fast_attention(device):
            # 1. What each picture is painted from.
            conditioning = self.condition([task.context for task in batch])
            earlier = self._look_at(batch)

            # 2. Noise it.
            latents = torch.stack([task.latents for task in batch])
            scheduler = model.training_scheduler
            num_steps = scheduler.config.num_train_timesteps
            timestep = torch.randint(0, num_steps, (len(batch),), device=device)
            noise = torch.randn_like(latents)
            noisy = scheduler.add_noise(latents, noise, timestep)
            chance_I = torch.rand(len(batch), device=device, dtype=torch.float32)
            drop_I11 = (chance_I < model.config.condition_dropout)[:, None, None]
            conditioning = torch.where(drop_I11, decoder.negative_conditioning, conditioning)

            # 3. Predict.
            prediction = decoder.predict(noisy, timestep, conditioning, earlier)
        target = denoising_target(scheduler, latents, noise, timestep)
        weight_I1yx = torch.stack([task.weight for task in batch])
        loss = ((prediction.float() - target).square() * weight_I1yx).mean()
        return Losses(
            total=loss,
            named={"image": loss},
            counts={"images": len(batch)},
            document_ids=tuple(task.document_id for task in batch),
        )

    def _weights(self, pixels: Tensor, documents: Sequence[Document]) -> Tensor:
        change_I1HW = detail(2 * pixels.float() - 1)
        edges_I1yx = F.avg_pool2d(change_I1HW, self.model.image_decoder.latent_factor)
        badges_I1yx = badge_cells(documents, edges_I1yx.shape[-1])[:, None].to(pixels.device)
        weight_I1yx = 1 + self.detail_weight * edges_I1yx + self.badge_weight * badges_I1yx
        return weight_I1yx / weight_I1yx.mean((1, 2, 3), keepdim=True)

    def _look_at(self, batch: list[PaintingTask]):
        """The earlier images of all tasks behind one another; None where nobody looks."""
        images = [image for task in batch for image in task.earlier]
        if self.model.image_decoder.synchronizers is None or not images:
            return None
        index_IK = torch.full((len(batch), max(len(task.earlier) for task in batch)), NO_IMAGE)
        first = 0
        for row, task in zip(index_IK, batch, strict=True):
            row[: len(task.earlier)] = torch.arange(first, first + len(task.earlier))
            first += len(task.earlier)
        levels = [torch.stack(level) for level in zip(*images, strict=True)]
        return self.model.image_decoder.look_at(levels, index_IK.to(levels[0].device))
