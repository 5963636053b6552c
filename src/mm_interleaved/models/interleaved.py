"""The whole model: the figure of the paper, in code.

    token ids + images -> vision tower -> slots, pyramid
        -> language model, looking into the pyramids of visible images -> text head -> next word
        -> hidden states before an image -> image decoder, looking into earlier images -> pixels

Letters: B rows, T tokens, V vocabulary, D hidden channels, N images a row, I images of all rows in row-major
order, K earlier images a painted image looks at, H and W pixels.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from mm_interleaved.devices import slowness, torch_device, weight_format
from mm_interleaved.errors import UsageError
from mm_interleaved.model_files.headers import saved_format
from mm_interleaved.model_files.model_card import PUBLISH_ARGUMENTS, publish, write_model_card
from mm_interleaved.model_files.resolve import HUB_ARGUMENTS, find_model
from mm_interleaved.models.build import build_image_decoder, build_language_model, build_vision_tower
from mm_interleaved.models.config import MMInterleavedConfig
from mm_interleaved.models.context import add_distances, gather_contexts
from mm_interleaved.models.image_decoder import DiffusionDraws, EarlierImages
from mm_interleaved.models.image_placement import (
    ImageTokens,
    check_beside_embeddings,
    check_number,
    check_one_document,
    check_pixels,
    check_targets,
    count_images,
    no_images,
    placed_images,
    shifted,
    slot_places,
)
from mm_interleaved.models.image_values import ImageValues, flatten_pyramid
from mm_interleaved.models.initialisation import OwnInitialisation, is_own
from mm_interleaved.models.language import LANGUAGE_FAMILIES, ImageView, TextHead
from mm_interleaved.models.losses import denoising_target, image_loss, text_loss
from mm_interleaved.models.offloading import execution_device, value_of
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.prompt_generation import PromptGenerationMixin
from mm_interleaved.models.quantization import refuse_to_save
from mm_interleaved.models.transformers_versions import CACHE, one_cache
from mm_interleaved.models.vision import ImageFeatures, select_levels
from mm_interleaved.models.vocabulary_size import check_resizable, check_vocabulary_size, rounded_up
from mm_interleaved.tokens.visibility import (
    NO_IMAGE,
    announced_images,
    context_images,
    isolated_causal_mask,
    relative_image_index,
    visible_images,
)
from mm_interleaved.versions import warn_of_untried

logger = logging.getLogger(__name__)


@dataclass
class MMInterleavedOutput(ModelOutput):
    """`loss` is the weighted sum of `text_loss` and `image_loss`; losses are None without targets.

    The cache is read as `cache` and as `past_key_values`, whatever the installed transformers calls it.
    """

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    # `generate` looks for the field by the library's name for it; the other name is a property.
    if CACHE == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None
        cache = property(attrgetter("past_key_values"))

    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MMInterleavedForConditionalGeneration(OwnInitialisation, PreTrainedModel, PromptGenerationMixin):
    """MM-Interleaved (arXiv 2401.10208): reads and writes documents of text and images.

    For documents in, documents out, see `InterleavedGenerator`. `forward` is the tensor level: with
    `labels`-like targets it returns losses, with a `PrefixCache` it is one step of transformers' `generate`.

    Args:
        when_built: is handed the model at the end of building it. `from_pretrained` passes it on, where
            nothing has been read yet and weights are on no device.
    """

    config_class = MMInterleavedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Those, too, that join what their parts say, or read weights of their own between calls of their parts.
    _no_split_modules = [  # noqa: RUF012
        "VisionTower", "Resampler", "GatedSynchronizer", "MapSynchronizer", "BasicTransformerBlock",
        "ResnetBlock2D", *(family.layer_class.__name__ for family in LANGUAGE_FAMILIES.values()),
    ]  # fmt: skip
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012

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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # What is not ours and not a sub-model starts as torch or diffusers start it; ours: OwnInitialisation.
        if module is self:
            init.zeros_(self.image_start_embedding)
        elif not is_own(module) and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @property
    def device(self) -> torch.device:
        """Where inputs belong: where it is computed, also if weights are kept elsewhere (accelerate)."""
        return execution_device(self) or super().device

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

    def look_at(self, pyramid: tuple[Tensor, ...], context_index: Tensor) -> EarlierImages | None:
        """What painted images see of earlier ones; `context_index` (I, K) counts in `pyramid`, -1 = none."""
        settings = self.config.part("image_synchronizer")
        if settings is None:
            return None
        return self.image_decoder.look_at(select_levels(pyramid, settings.levels), context_index)

    # ---- One pass --------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: PrefixCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        image_start: Tensor | None = None,
        document_start: Tensor | None = None,
        text_target: Tensor | None = None,
        image_target: Tensor | None = None,
        target_pixel_values: Tensor | None = None,
        draws: DiffusionDraws | None = None,
        image_weight: Tensor | None = None,
        hide_earlier: Tensor | None = None,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: PrefixCache | None = None,
    ) -> MMInterleavedOutput:
        """Logits, and losses where there are targets.

        Args:
            input_ids: (B, T). With `inputs_embeds` (B, T, D), not needed.
            attention_mask: (B, T), 1 = token, 0 = padding.
            position_ids: (B, T); default: counted on from the cache.
            cache: what is remembered of the tokens before (generation); also as `past_key_values`, the name
                that transformers had for it before 5.24.
            use_cache: make a cache where none is given, and return it.
            pixel_values: (I, 3, H, W) RGB in [0, 1], all rows' images in row-major order. With a cache, those
                of the tokens given now; it remembers them.
            image_start: (B, N) int64, index of each image's start token among the tokens given now,
                `NO_IMAGE` where there is none; default: read off the ids.
            document_start: (B, T) int64, first token of each token's document; default: one document a row.
                Documents of a row do not see each other and count their positions from zero, unless the
                model's `compat` is "released".
            text_target: (B, T) bool, tokens that count in the text loss.
            image_target: (I,) bool, images that count in the image loss; default all.
            target_pixel_values: (I, 3, h, w) RGB in [0, 1], what the image decoder shall paint.
            draws: random numbers of the image loss; drawn here by default.
            image_weight: (I,) factor of each image's error (see `training.objectives`); default 1.
            hide_earlier: (I,) bool, images to be painted without a look at earlier ones (synchronizer
                dropout); default none.
            logits_to_keep: only the last so many logits; 0 = all.
            output_attentions, output_hidden_states: also return those of the language model, as its library
                does; default: as the configuration says.

        Raises:
            ValueError: token ids, table of images, pixels, targets and cache do not agree.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        cache = self._cache_of_pass(one_cache(cache, past_key_values), use_cache, tokens)
        # 1. See the images, embed the tokens, keep packed documents apart.
        image_start = self._placed(input_ids, inputs_embeds, image_start, pixel_values)
        check_targets(input_ids, image_start, pixel_values, text_target, target_pixel_values)
        if cache is not None:
            self._check_continuation(cache, pixel_values, target_pixel_values, document_start, attention_mask)
        features = None
        if pixel_values is not None and len(pixel_values):
            features = self.encode_images(pixel_values)
        if inputs_embeds is None:
            assert input_ids is not None, "`_placed` asks for one of them"
            inputs_embeds = self._embed(input_ids, image_start, None if features is None else features.slots)
        rows, num_tokens = inputs_embeds.shape[:2]
        if document_start is None:
            document_start = torch.zeros(rows, num_tokens, dtype=torch.int64, device=inputs_embeds.device)
        elif cache is None and self.config.compat != "released":
            attention_mask = isolated_causal_mask(document_start, attention_mask)
            if position_ids is None:
                position_ids = torch.arange(num_tokens, device=document_start.device) - document_start

        # 2. Read, looking into the images.
        values = {} if features is None else self.values_by_row(features.pyramid, image_start)
        if features is not None and isinstance(cache, PrefixCache):
            cache.append_images(shifted(image_start, cache.num_tokens), values)
        view = self.image_view(document_start, image_start, values, cache)
        cache_by_name: dict[str, Any] = {CACHE: cache}
        read = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=cache is not None,
            image_view=view,
            **self._captured(output_attentions, output_hidden_states),
            **cache_by_name,
        )
        hidden = read.last_hidden_state
        if isinstance(cache, PrefixCache):
            cache.append_hidden(hidden)
        logits = self.predict_text(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)

        # 3. Losses.
        output = MMInterleavedOutput(
            logits=logits,
            hidden=hidden,
            hidden_states=read.hidden_states,
            attentions=read.attentions,
            **cache_by_name,
        )
        if text_target is not None and input_ids is not None:
            output.text_loss = text_loss(logits, input_ids.to(logits.device), text_target.to(logits.device))
        if target_pixel_values is not None and len(target_pixel_values):
            assert features is not None, "`check_targets` asks for an image for each target"
            output.image_loss = self.painting_loss(
                hidden,
                features,
                image_start,
                document_start,
                target_pixel_values,
                image_target,
                draws,
                image_weight,
                hide_earlier,
            )
        if output.text_loss is not None or output.image_loss is not None:
            output.loss = self.config.text_loss_weight * (0 if output.text_loss is None else output.text_loss)
            output.loss = output.loss + self.config.image_loss_weight * (
                0 if output.image_loss is None else output.image_loss
            )
        return output

    def painting_loss(
        self,
        hidden: Tensor,
        features: ImageFeatures,
        image_start: Tensor,
        document_start: Tensor,
        target_pixel_values: Tensor,
        image_target: Tensor | None = None,
        draws: DiffusionDraws | None = None,
        image_weight: Tensor | None = None,
        hide_earlier: Tensor | None = None,
    ) -> Tensor:
        """Denoising loss of all images of a batch; arguments as `forward`."""
        # 1. What each image is painted from.
        row, column = (image_start != NO_IMAGE).nonzero(as_tuple=True)
        end = image_start[row, column]
        conditioning, _ = self.condition(hidden, row, document_start[row, end], end)
        context_index = context_images(
            document_start, image_start, self.config.context_images, self.max_context_images
        )
        if hide_earlier is not None:
            context_index = context_index.masked_fill(hide_earlier[:, None], NO_IMAGE)
        earlier = self.look_at(features.pyramid, context_index)

        # 2. Noise it.
        decoder, scheduler = self.image_decoder, self.training_scheduler
        draws = draws or self.draw(target_pixel_values)
        with torch.no_grad():
            latents = decoder.encode(target_pixel_values, draws.latent_noise).to(self.dtype)
        noisy = scheduler.add_noise(latents, draws.noise, draws.timestep)
        negative = decoder.learned_negative(conditioning)
        conditioning = torch.where(draws.drop[:, None, None], negative, conditioning)

        # 3. Predict.
        prediction = decoder.predict(noisy, draws.timestep, conditioning, earlier)
        target = denoising_target(scheduler, latents, draws.noise, draws.timestep)
        counts = announced_images(document_start, image_start)
        if image_target is not None:
            counts = counts & image_target.bool()
        count_all = self.config.compat == "released"
        return image_loss(prediction, target, counts, image_weight, count_all=count_all)

    def draw(self, target_pixel_values: Tensor, generator: torch.Generator | None = None) -> DiffusionDraws:
        """Random numbers for the denoising loss of images (I, 3, h, w)."""
        images, _, height, width = target_pixel_values.shape
        factor = self.image_decoder.latent_factor
        shape = (images, self.image_decoder.unet.config.in_channels, height // factor, width // factor)
        device = target_pixel_values.device

        def normal() -> Tensor:
            # Drawn in single precision whatever torch's default is, so that the numbers are the same.
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.dtype)

        steps = self.training_scheduler.config.num_train_timesteps
        return DiffusionDraws(
            timestep=torch.randint(0, steps, (images,), generator=generator, device=device),
            noise=normal(),
            latent_noise=normal(),
            drop=torch.rand(images, generator=generator, device=device, dtype=torch.float32)
            < self.config.condition_dropout,
        )

    @property
    def training_scheduler(self) -> Any:
        """The noise schedule of the configuration, a `DDPMScheduler`; stateless, made on demand."""
        return DDPMScheduler.from_config(self.config.scheduler_config)

    @property
    def max_context_images(self) -> int:
        """How many earlier images the U-Net can look at."""
        settings = self.config.part("image_synchronizer")
        return 0 if settings is None else settings.max_images - 1

    # ---- As users of transformers expect ---------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **settings: Any
    ) -> "MMInterleavedForConditionalGeneration":
        """As transformers', where "storyworld" is a name too, and weights are kept in what is fast here.

        Without `dtype`, or with "auto": as saved where the device is fast in that, else float32, said in one
        line. The device is that of `device_map`; without one, a GPU where there is one. A `dtype` named is
        used, with a line of warning where it is slow.

        Raises:
            ModelFileError: there is no such model, or its files are damaged.
        """
        is_elsewhere = settings.get("state_dict") is not None or settings.get("subfolder")
        if pretrained_model_name_or_path is None or is_elsewhere:
            return cls.read_pretrained(pretrained_model_name_or_path, *model_args, **settings)
        hub = {name: settings.get(name) for name in HUB_ARGUMENTS if settings.get(name) is not None}
        folder = find_model(pretrained_model_name_or_path, hub=hub)
        asked = settings.pop("torch_dtype", None) if settings.get("dtype") is None else settings["dtype"]
        settings["dtype"] = _chosen_dtype(folder, asked, settings.get("device_map"))
        return cls.read_pretrained(folder, *model_args, **settings)

    @classmethod
    def read_pretrained(
        cls, folder: Path | None, *model_args: Any, **settings: Any
    ) -> "MMInterleavedForConditionalGeneration":
        """transformers' `from_pretrained` of a folder, with its meaning of `dtype`: as saved by default.

        Says which libraries were never tried.
        """
        warn_of_untried()
        return super().from_pretrained(folder, *model_args, **settings)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        *arguments: Any,
        license: str | None = None,
        push_to_hub: bool = False,
        **settings: Any,
    ) -> None:
        """As transformers', with a model card beside it where there is none yet.

        Args:
            license: of the weights, for the card; default: of the model that this one was loaded from.
            push_to_hub: upload the folder afterwards, with those of `settings` that `push_to_hub` takes.

        Raises:
            ModelFileError: weights in few bits, before anything is written.
        """
        refuse_to_save(self)
        hub = {name: settings.pop(name) for name in PUBLISH_ARGUMENTS if name in settings}
        super().save_pretrained(save_directory, is_main_process, *arguments, **settings)
        if not is_main_process:
            return
        folder = Path(save_directory)
        name, tags = hub.pop("repo_id", None), hub.pop("tags", None) or ()
        source = self.config.name_or_path or ""
        write_model_card(folder, self.config.to_dict(), name=name, license=license, tags=tags, source=source)
        if push_to_hub:
            publish(folder, name or folder.name, **hub)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "5GB", **settings: Any) -> Any:
        """Uploads model and card; the processor has a method of the same name.

        Args:
            settings: `license`, `tags`, `private`, `token`, `commit_message`, `commit_description`,
                `revision`, `create_pr`, `api` (a `huggingface_hub.HfApi`).

        Raises:
            ModelFileError: weights in few bits.
        """
        refuse_to_save(self)
        license, tags = settings.pop("license", None), settings.pop("tags", None) or ()
        with TemporaryDirectory(prefix="model-") as temporary:
            folder = Path(temporary) / repo_id.rsplit("/", 1)[-1]
            self.save_pretrained(
                folder, max_shard_size=max_shard_size, license=license, tags=tags, repo_id=repo_id
            )
            return publish(folder, repo_id, **settings)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.text_head.base

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """The old half of the text head; a vocabulary of another size changes the new half with it."""
        self.text_head.set_base(value)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """As transformers does: tokens are added or removed at the end of the vocabulary.

        Added ones are new tokens of the text head: the model says none before it has learned to.

        Raises:
            ValueError: special tokens would be lost, or the weights cannot be resized where they are
                (offloaded, sharded, quantised, with adapters). Nothing is changed.
        """
        config: Any = self.config
        embeddings, head = self.get_input_embeddings(), self.text_head
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embeddings
        size = rounded_up(new_num_tokens or head.base.out_features, pad_to_multiple_of)
        check_vocabulary_size(config, size)
        check_resizable(embeddings, head)
        is_tied = head.base.weight is embeddings.weight
        if is_tied:
            # Else the head would be found as long as the embeddings, which grow first.
            head.base.weight = nn.Parameter(embeddings.weight.detach().clone())
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if is_tied:
            head.base.weight = embeddings.weight
        self.language_model.vocab_size, config.num_new_tokens = size, head.num_new
        return embeddings

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

    def _cache_of_pass(self, cache: Any, use_cache: bool | None, tokens: Tensor | None) -> Any:
        """The given cache, or a new one where it is asked for."""
        if cache is None and use_cache and tokens is not None:
            rows, device = len(tokens), tokens.device
            cache = PrefixCache(self.config.text_config, batch_size=rows, device=device)
        if cache is None:
            return None
        layers = self.language_model.layers
        if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise ValueError(
                "a cache stays empty in training mode with gradient checkpointing: call model.eval() before"
            )
        return cache

    def _check_continuation(
        self,
        cache: Any,
        pixel_values: Tensor | None,
        target_pixel_values: Tensor | None,
        document_start: Tensor | None,
        attention_mask: Tensor | None,
    ) -> None:
        """What stands behind a cache can be read, and nothing can be learned from it."""
        if target_pixel_values is not None and len(target_pixel_values):
            raise ValueError("target_pixel_values needs whole rows, found a cache: give none")
        if pixel_values is not None and len(pixel_values) and not isinstance(cache, PrefixCache):
            raise ValueError(f"cache: images need a PrefixCache, found {type(cache).__name__}")
        if document_start is not None:
            check_one_document(document_start, attention_mask)

    def _captured(self, attentions: bool | None, hidden_states: bool | None) -> dict[str, bool]:
        """What the language model shall return besides; nothing is said of what nobody asked for."""
        asked = {"output_attentions": attentions, "output_hidden_states": hidden_states}
        asked = {name: getattr(self.config, name, None) if v is None else v for name, v in asked.items()}
        return {name: value for name, value in asked.items() if value}

    def _embed(self, input_ids: Tensor, image_start: Tensor, slots: Tensor | None) -> Tensor:
        """`embed` of what was checked."""
        hidden = self.embed_words(input_ids)
        if slots is None or len(slots) == 0:
            return hidden
        row, position = slot_places(image_start.to(hidden.device), slots.shape[1])
        return hidden.index_put((row, position), slots.flatten(0, 1).to(hidden.device, hidden.dtype))


def _chosen_dtype(folder: Path, asked: Any, device_map: Any) -> torch.dtype:
    """The number format of a model's weights, see `from_pretrained`."""
    device = _first_device(device_map)
    if asked in (None, "auto"):
        chosen = weight_format(saved_format(folder), device)
        if chosen.remark:
            logger.warning("%s: %s", folder.name, chosen.remark)
        return getattr(torch, chosen.name)
    name = str(asked).removeprefix("torch.")
    if remark := slowness(name, device):
        logger.warning("%s", remark)
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"dtype: expected a floating-point type of torch, found {name!r}", field="dtype")
    return found


def _first_device(device_map: Any) -> torch.device:
    """The device that a `device_map` of transformers begins with; a CPU only if it names nothing else."""
    if isinstance(device_map, dict):
        places = [str(place) for place in device_map.values() if str(place) not in ("cpu", "disk")]
        device_map = places[0] if places else "cpu"
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch_device("auto")
    # Numbers are GPUs.
    place = str(device_map)
    return torch.device("cuda", int(place)) if place.isdecimal() else torch.device(place)


# transformers' registries are filled by whoever defines a model; `registration` adds the processor.
AutoConfig.register(MMInterleavedConfig.model_type, MMInterleavedConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto.register(MMInterleavedConfig, MMInterleavedForConditionalGeneration, exist_ok=True)
