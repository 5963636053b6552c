"""The whole model: the figure of the paper, in code.

    token ids + images -> vision tower -> slots, pyramid
        -> language model, attending to the pyramids of visible images -> text head -> next word
        -> hidden states before an image -> image decoder, attending to earlier images -> pixels

Letters: B rows, T tokens, V vocabulary, D hidden channels, N images a row, I images of all rows in row-major
order, K earlier images that a generated image attends to, H and W pixels.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Unpack

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from mm_interleaved.models.build import build_image_decoder, build_language_model, build_vision_tower
from mm_interleaved.models.config import MMInterleavedConfig
from mm_interleaved.models.context import add_distances, gather_contexts
from mm_interleaved.models.denoising import DiffusionNoise, denoising_loss, sample_noise
from mm_interleaved.models.image_decoder import EarlierImages
from mm_interleaved.models.image_placement import (
    ImageTokens,
    check_beside_embeddings,
    check_number,
    check_pixels,
    count_images,
    no_images,
    placed_images,
    shifted,
    slot_places,
)
from mm_interleaved.models.image_values import ImageValues, flatten_pyramid
from mm_interleaved.models.language import ImageView, TextHead
from mm_interleaved.models.losses import image_loss, text_loss
from mm_interleaved.models.offloading import value_of
from mm_interleaved.models.output import MMInterleavedOutput
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.pretrained import MMInterleavedPreTrainedModel, register_model
from mm_interleaved.models.prompt_generation import PromptGenerationMixin
from mm_interleaved.models.targets import (
    OtherArguments,
    TrainingTargets,
    check_targets,
    gathered_targets,
    kept_apart,
)
from mm_interleaved.models.transformers_versions import CACHE, one_cache
from mm_interleaved.models.vision import ImageFeatures, select_levels
from mm_interleaved.tokens.visibility import (
    NO_IMAGE,
    announced_images,
    context_images,
    relative_image_index,
    visible_images,
)


class MMInterleavedForConditionalGeneration(MMInterleavedPreTrainedModel, PromptGenerationMixin):
    """MM-Interleaved (arXiv 2401.10208): reads and writes documents of text and images.

    For documents in, documents out, see `InterleavedGenerator`. `forward` is the tensor level: with
    `TrainingTargets` it returns losses, with a `PrefixCache` it is one step of transformers' `generate`.
    What transformers wants besides is in `pretrained.py`.

    Args:
        when_built: is handed the model at the end of building it. `from_pretrained` passes it on, where
            nothing has been read yet and weights are on no device.
    """

    def __init__(self, config: MMInterleavedConfig, *, when_built: Callable[[nn.Module], None] | None = None):
        config.check_complete()
        super().__init__(config)
        dim = config.text_config.hidden_size
        self.vision = build_vision_tower(config)
        self.language_model: Any = build_language_model(config)
        self.text_head = TextHead(dim, config.text_config.vocab_size, config.num_new_tokens)
        self.image_start_embedding = nn.Parameter(torch.zeros(dim))
        # None in a model that only writes.
        self.image_decoder: Any = build_image_decoder(config)
        self.context_projection: Any = nn.Linear(dim, dim) if self.image_decoder is not None else None
        self.post_init()
        if when_built is not None:
            when_built(self)

    # ---- What generation and training are made of ------------------------------------------------

    def encode_images(self, pixel_values: Tensor) -> ImageFeatures:
        """Slots and pyramid of images: RGB in [0, 1], (I, 3, H, W), square.

        Raises:
            ValueError: these are no such pixels.
        """
        check_pixels(pixel_values)
        return self.vision(pixel_values.to(self.dtype))

    def project_images(self, pyramid: tuple[Tensor, ...]) -> dict[int, ImageValues]:
        """What each synchronized language layer samples, of all images: values (I, S, H, d)."""
        settings = self.config.part("text_synchronizer")
        if settings is None:
            return {}
        cells, level_sizes = flatten_pyramid(select_levels(pyramid, settings.levels))
        return self.language_model.project_images(cells, level_sizes)

    def values_by_row(self, pyramid: tuple[Tensor, ...], image_start: Tensor) -> dict[int, ImageValues]:
        """`project_images`, and which image stands where in the rows, as `image_start` (B, N) says."""
        index = torch.full_like(image_start, NO_IMAGE)
        present = image_start != NO_IMAGE
        index[present] = torch.arange(int(present.sum()), device=index.device)
        # Hidden images are never sampled, so any image may stand in for padding.
        index = index.clamp(min=0)
        projected = self.project_images(pyramid)
        return {layer: values._replace(image_BN=index) for layer, values in projected.items()}

    @property
    def image_tokens(self) -> ImageTokens:
        """What an image is made of in token ids."""
        config = self.config
        return ImageTokens(config.image_start_token_id, config.image_token_id, config.num_slots)

    def embed_words(self, input_ids: Tensor) -> Tensor:
        """Embeddings (B, T, D) of tokens none of which is a slot of an image, whatever its id."""
        hidden = self.language_model.embed_tokens(input_ids)
        is_start = (input_ids == self.config.image_start_token_id).to(hidden.device, hidden.dtype)
        return hidden + is_start[..., None] * value_of(self, "image_start_embedding").to(hidden.device)

    def embed(
        self, input_ids: Tensor, image_start: Tensor | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """Embeddings (B, T, D) of tokens, with image slots filled.

        Args:
            image_start: (B, N) index of each image's start token; its slots follow. `NO_IMAGE` where there is
                none. Default: read off the ids.
            slots: (I, num_slots, D), in row-major order of the images.

        Raises:
            ValueError: token ids, table of images and slots do not agree.
        """
        image_start = placed_images(input_ids, image_start, slots, self.image_tokens, "slots")
        return self._embed(input_ids, image_start, slots)

    def image_view(
        self,
        document_start: Tensor,
        image_start: Tensor,
        values: dict[int, ImageValues],
        cache: PrefixCache | None = None,
    ) -> ImageView | None:
        """Who sees which images in this pass: those of the batch (training), or of the cache (generation)."""
        if not self.language_model.synchronized_layers:
            return None
        first = 0
        if isinstance(cache, PrefixCache):
            image_start, values = cache.images_of_rows()
            first, document_start = cache.get_seq_length(), torch.zeros_like(document_start)
        visible = visible_images(document_start, image_start, first_position=first)
        if not values:
            values = self._no_images(image_start.shape[0])
        return ImageView(values, relative_image_index(visible))

    def predict_text(self, hidden: Tensor) -> Tensor:
        """Next-word logits (..., V)."""
        return self.text_head(hidden)

    def condition(self, hidden: Tensor, row: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Conditioning of images, (I, R, D), and how many tokens each was read from, (I,).

        Args:
            hidden: (B, T, D) final hidden states.
            row, start, end: (I,) int64: row of the image, first token of its document, its image-start token.
        """
        # A model that is spread over devices ends on another one than it begins on.
        places = (place.to(hidden.device) for place in (row, start, end))
        context, mask = gather_contexts(hidden, *places)
        context = add_distances(self.context_projection(context))
        return self.image_decoder.condition(context, mask), mask.sum(1)

    def project_earlier_images(
        self, pyramid: tuple[Tensor, ...], context_index: Tensor
    ) -> EarlierImages | None:
        """What the image decoder samples of earlier images; `context_index` (I, K) counts in `pyramid`, -1 =
        none.
        """
        settings = self.config.part("image_synchronizer")
        if settings is None:
            return None
        return self.image_decoder.project_earlier_images(
            select_levels(pyramid, settings.levels), context_index
        )

    # ---- One pass --------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: PrefixCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_start: Tensor | None = None,
        targets: TrainingTargets | None = None,
        logits_to_keep: int = 0,
        **others: Unpack[OtherArguments],
    ) -> MMInterleavedOutput:
        """Logits, and losses where there are targets.

        Args:
            input_ids: (B, T). With `inputs_embeds` (B, T, D), not needed.
            attention_mask: (B, T), 1 = token, 0 = padding.
            position_ids: (B, T); default: counted on from the cache.
            cache: what is remembered of the tokens before (generation).
            pixel_values: (I, 3, H, W) RGB in [0, 1], all rows' images in row-major order. With a cache, those
                of the tokens given now; it remembers them.
            image_start: (B, N) int64, index of each image's start token among the tokens given now,
                `NO_IMAGE` where there is none; default: read off the ids.
            targets: what shall be learned, and which documents the rows hold.
            logits_to_keep: only the last so many logits; 0 = all.
            others: single fields of a batch instead of `targets`, and arguments of transformers, see
                `OtherArguments`.

        Raises:
            ValueError: token ids, table of images, pixels, targets and cache do not agree.
        """
        # 1. See the images, embed the tokens.
        targets = gathered_targets(targets, others)
        cache = one_cache(cache, others.get("past_key_values"))
        cache = self.cache_of_pass(cache, others, input_ids if inputs_embeds is None else inputs_embeds)
        image_start = self._placed(input_ids, inputs_embeds, image_start, pixel_values)
        check_targets(targets, input_ids, image_start, pixel_values, attention_mask, cache)
        features = None
        if pixel_values is not None and len(pixel_values):
            features = self.encode_images(pixel_values)
        if inputs_embeds is None:
            assert input_ids is not None, "`_placed` asks for one of them"
            inputs_embeds = self._embed(input_ids, image_start, None if features is None else features.slots)

        # 2. Keep packed documents apart.
        are_apart = cache is None and self.config.compat != "released"
        document_start, attention_mask, position_ids = kept_apart(
            targets.document_start, inputs_embeds, attention_mask, position_ids, are_apart=are_apart
        )

        # 3. Read, attending to the images.
        values = {} if features is None else self.values_by_row(features.pyramid, image_start)
        if features is not None and isinstance(cache, PrefixCache):
            cache.append_images(shifted(image_start, cache.num_tokens), values)
        cache_by_name: dict[str, Any] = {CACHE: cache}
        read = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=cache is not None,
            image_view=self.image_view(document_start, image_start, values, cache),
            **self.captured(others),
            **cache_by_name,
        )
        hidden = read.last_hidden_state
        if isinstance(cache, PrefixCache):
            cache.append_hidden(hidden)
        logits = self.predict_text(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)

        # 4. Losses.
        captured = {"hidden_states": read.hidden_states, "attentions": read.attentions}
        output = MMInterleavedOutput(logits=logits, hidden=hidden, **captured, **cache_by_name)
        if targets.is_empty:
            return output
        targets = replace(targets, document_start=document_start)
        return self._with_losses(output, targets, input_ids, features, image_start)

    def _with_losses(
        self,
        output: MMInterleavedOutput,
        targets: TrainingTargets,
        input_ids: Tensor | None,
        features: ImageFeatures | None,
        image_start: Tensor,
    ) -> MMInterleavedOutput:
        """The output of a pass with the losses that its targets ask for."""
        assert output.logits is not None and output.hidden is not None
        device = output.logits.device
        if targets.text_target is not None and input_ids is not None:
            output.text_loss = text_loss(output.logits, input_ids.to(device), targets.text_target.to(device))
        if targets.has_images:
            assert features is not None, "`check_targets` asks for an image for each target"
            output.image_loss = self.denoising_loss(output.hidden, features, image_start, targets)
        if output.text_loss is not None or output.image_loss is not None:
            output.loss = self.config.text_loss_weight * (0 if output.text_loss is None else output.text_loss)
            output.loss = output.loss + self.config.image_loss_weight * (
                0 if output.image_loss is None else output.image_loss
            )
        return output

    def denoising_loss(
        self, hidden: Tensor, features: ImageFeatures, image_start: Tensor, targets: TrainingTargets
    ) -> Tensor:
        """Denoising loss of all images of a batch, a scalar.

        Args:
            hidden: (B, T, D), final hidden states.
            features: of the images, see `encode_images`.
            image_start: (B, N), see `forward`.
            targets: with `document_start` and `target_pixel_values`.
        """
        document_start, pixels = targets.document_start, targets.target_pixel_values
        assert document_start is not None and pixels is not None
        # 1. What each image is generated from.
        row, column = (image_start != NO_IMAGE).nonzero(as_tuple=True)
        end = image_start[row, column]
        conditioning, _ = self.condition(hidden, row, document_start[row, end], end)
        context_index = context_images(
            document_start, image_start, self.config.context_images, self.max_context_images
        )
        if targets.hide_earlier is not None:
            context_index = context_index.masked_fill(targets.hide_earlier[:, None], NO_IMAGE)
        earlier = self.project_earlier_images(features.pyramid, context_index)

        # 2. The error of each latent cell.
        noise = targets.noise or self.draw_noise(pixels)
        with torch.no_grad():
            latents = self.image_decoder.encode(pixels, noise.latent_noise).to(self.dtype)
        error = denoising_loss(
            self.image_decoder, self.training_scheduler, latents, conditioning, earlier, noise
        )

        # 3. The mean over the images that count.
        counts = announced_images(document_start, image_start)
        if targets.image_target is not None:
            counts = counts & targets.image_target.bool()
        count_all = self.config.compat == "released"
        return image_loss(error, counts, targets.image_weight, count_all=count_all)

    def draw_noise(
        self, target_pixel_values: Tensor, generator: torch.Generator | None = None
    ) -> DiffusionNoise:
        """Random numbers for the denoising loss of images (I, 3, h, w)."""
        images, _, height, width = target_pixel_values.shape
        factor = self.image_decoder.latent_factor
        return sample_noise(
            (images, self.image_decoder.unet.config.in_channels, height // factor, width // factor),
            self.training_scheduler.config.num_train_timesteps,
            self.config.condition_dropout,
            device=target_pixel_values.device,
            dtype=self.dtype,
            generator=generator,
        )

    @property
    def training_scheduler(self) -> Any:
        """The noise schedule of the configuration, a `DDPMScheduler`; stateless, made on demand."""
        return DDPMScheduler.from_config(self.config.scheduler_config)

    @property
    def max_context_images(self) -> int:
        """How many earlier images the U-Net can attend to."""
        settings = self.config.part("image_synchronizer")
        return 0 if settings is None else settings.max_images - 1

    def _no_images(self, rows: int) -> dict[int, ImageValues]:
        """Values of no image at all: layers then add the constant that "look nowhere" means."""
        settings = self.config.part("text_synchronizer")
        shape = (rows, 0, 0, settings.num_heads, settings.value_dim // settings.num_heads)
        empty = ImageValues(torch.empty(shape, dtype=self.dtype, device=self.device), ())
        return dict.fromkeys(self.language_model.synchronized_layers, empty)

    def _placed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        image_start: Tensor | None,
        pixel_values: Tensor | None,
    ) -> Tensor:
        """Where the images of a pass stand: (B, N)."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward needs input_ids or inputs_embeds, found neither")
            return placed_images(input_ids, image_start, pixel_values, self.image_tokens)
        if input_ids is not None and pixel_values is not None:
            image_start = placed_images(input_ids, image_start, pixel_values, self.image_tokens)
        if image_start is None:
            image_start = no_images(inputs_embeds)
        check_beside_embeddings(inputs_embeds, input_ids, image_start, self.config.num_slots)
        if pixel_values is not None:
            # Embeddings do not tell where images are.
            check_number(pixel_values, count_images(image_start), "image_start")
        return image_start

    def _embed(self, input_ids: Tensor, image_start: Tensor, slots: Tensor | None) -> Tensor:
        """`embed` of what was checked."""
        hidden = self.embed_words(input_ids)
        if slots is None or len(slots) == 0:
            return hidden
        row, position = slot_places(image_start.to(hidden.device), slots.shape[1])
        return hidden.index_put((row, position), slots.flatten(0, 1).to(hidden.device, hidden.dtype))


register_model(MMInterleavedForConditionalGeneration)
