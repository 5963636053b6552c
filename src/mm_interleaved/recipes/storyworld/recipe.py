"""The shipped model from scratch, part by part, on two CPU cores.

`settings` names every number; `build_*` and `model_config` make the parts; `train` shows what is trained in
which order.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionConfig, LlamaConfig

from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.devices import rank_device, use_threads
from mm_interleaved.documents.document import Text
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.files import new_folder, remove_folder
from mm_interleaved.model_files.known_words import KnownWords
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.models.config import (
    AdapterConfig,
    MMInterleavedConfig,
    ResamplerConfig,
    SynchronizerConfig,
)
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.recipes.storyworld.batches import BatchKind, DocumentBatches, storyworld_pixels
from mm_interleaved.recipes.storyworld.former_names import stage_folder
from mm_interleaved.recipes.storyworld.image_stage import ImageStage
from mm_interleaved.recipes.storyworld.initialisation import open_to_images, open_to_learning
from mm_interleaved.recipes.storyworld.settings import SizesConfig, StoryWorldConfig
from mm_interleaved.recipes.storyworld.text_stage import TextStage
from mm_interleaved.recipes.storyworld.tokenizer import train_tokenizer
from mm_interleaved.recipes.storyworld.unet_stage import LookingStage, UNetStage
from mm_interleaved.recipes.storyworld.vae_stage import VAEStage, normalise_latents
from mm_interleaved.recipes.storyworld.vision_stage import VisionStage
from mm_interleaved.storyworld.detail.documents import DETAIL_TASKS
from mm_interleaved.storyworld.tasks import TASK_WEIGHTS
from mm_interleaved.storyworld.training_documents import DETAIL_INTERVIEW, INTERVIEW, training_document
from mm_interleaved.tokens.conversation_format import conversation_pieces
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.training.loop import train_stage
from mm_interleaved.training.parameter_groups import synchronizer_rules
from mm_interleaved.typed_settings import to_record

IMAGE_SIZE = 64

TEXT_BATCHES = (
    BatchKind(share=4, batch_size=16, tasks={INTERVIEW: 66, "caption": 10, "paragraph": 4, "ground": 20}),
    BatchKind(share=4, batch_size=8, tasks={"story": 86, "few_shot": 6, "edit": 4, "segmentation": 4}),
    BatchKind(share=2, batch_size=24, tasks={"edit": 1}),
    BatchKind(share=2, batch_size=16, tasks={"story": 1}, is_text_only=True),
    BatchKind(share=1, batch_size=40, tasks={"draw": 1}, is_text_only=True),
)
"""What the language model learns from; interviews stand for vqa and dialogue."""

BOARD_TEXT_BATCHES = (
    *TEXT_BATCHES,
    BatchKind(share=2, batch_size=16, tasks={DETAIL_INTERVIEW: 1}),
    BatchKind(share=2, batch_size=16, tasks={"detail_edit": 2, "detail_copy": 1, "detail_segmentation": 1}),
    BatchKind(share=2, batch_size=12, tasks={"detail_story": 1}),
)
"""The same with boards."""

GENERATION_SETTINGS = {"scheduler": "unipc", "num_inference_steps": 8, "guidance_scale": 3.0}
"""What the finished model prefers over the general defaults.

Eight steps of UniPC score as 25 of DDIM do, but for one image in a hundred (LOG.md).
"""

IMAGE_BATCHES = (
    BatchKind(share=2, batch_size=24, tasks={"draw": 50, "segmentation": 5, "edit": 45}),
    BatchKind(share=4, batch_size=8, tasks={"story": 1}),
)
"""What the image decoder learns from: images that follow from text and earlier images."""
LOOKING_BATCHES = (
    BatchKind(share=3, batch_size=24, tasks={"detail_copy": 35, "detail_edit": 40, "edit": 15, "draw": 10}),
    BatchKind(share=2, batch_size=16, tasks={"detail_story": 60, "detail_segmentation": 20, "story": 20}),
)
"""What it learns to look by."""
BOARD_IMAGE_BATCHES = (
    *IMAGE_BATCHES,
    BatchKind(
        share=2, batch_size=24, tasks={"detail_copy": 10, "detail_edit": 75, "detail_segmentation": 15}
    ),
    BatchKind(share=2, batch_size=12, tasks={"detail_story": 1}),
)
"""The same as IMAGE_BATCHES with boards."""


def tokenizer_texts(seed: int, boards: bool = False) -> list[str]:
    """The texts of two thousand documents of the world, which hold all of its words."""
    weights = {**TASK_WEIGHTS, INTERVIEW: 10}
    if boards:
        weights |= {DETAIL_INTERVIEW: 20, **dict.fromkeys(DETAIL_TASKS, 5)}
    texts = []
    for index in range(2000):
        parts = training_document(seed, index, weights).parts
        if any(part.role for part in parts):
            parts = tuple(piece.part for piece in conversation_pieces(parts))
        texts += [part.text for part in parts if isinstance(part, Text)]
    return texts


def build_processor(config: StoryWorldConfig) -> MMInterleavedProcessor:
    """Tokenizer, image rule and known words of the model."""
    texts = tokenizer_texts(config.seed, config.boards)
    return MMInterleavedProcessor(
        train_tokenizer(texts, vocabulary_size=1024),
        IMAGE_SIZE,
        IMAGE_SIZE,
        config.sizes.num_slots,
        known_words=KnownWords.of_texts(texts),
    )


def build_vae(sizes: SizesConfig) -> AutoencoderKL:
    """A stock autoencoder of factor 4."""
    # diffusers annotates these as tuples of one.
    down: Any = ("DownEncoderBlock2D",) * len(sizes.vae_channels)
    up: Any = ("UpDecoderBlock2D",) * len(sizes.vae_channels)
    channels: Any = sizes.vae_channels
    return AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def model_config(sizes: SizesConfig, processor: MMInterleavedProcessor) -> MMInterleavedConfig:
    """The configuration of the whole model."""
    vocabulary = processor.vocabulary
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=sizes.unet_channels,
        layers_per_block=1,
        cross_attention_dim=sizes.conditioning_dim,
        attention_head_dim=4,
        norm_num_groups=16,
        use_linear_projection=True,
    )
    scheduler = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        # Without a pure-noise last step, training could read day or night off the mean of the noise.
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    synchronizer: dict[str, Any] = {"num_heads": 4, "num_points": 4, "value_dim": 96}
    looking: dict[str, Any] = {
        **synchronizer,
        "num_heads": sizes.image_heads,
        "num_points": sizes.image_points,
    }
    return MMInterleavedConfig(
        text_config=LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=sizes.text_dim,
            intermediate_size=512,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=sizes.max_length,
            rms_norm_eps=1e-6,
            pad_token_id=vocabulary.pad,
            bos_token_id=vocabulary.bos,
            eos_token_id=vocabulary.eos,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=sizes.vision_dim,
            intermediate_size=3 * sizes.vision_dim,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=8,
        ),
        unet_config=dict(unet.config),
        vae_config=dict(build_vae(sizes).config),
        scheduler_config=scheduler,
        adapter=AdapterConfig(stem_dim=24, pixel_levels=sizes.pixel_levels),
        slot_resampler=ResamplerConfig(
            dim=sizes.vision_dim, num_queries=sizes.num_slots, num_layers=2, num_heads=4, mlp_dim=256,
            query_key_norm=True,
        ),
        conditioning_resampler=ResamplerConfig(
            dim=sizes.conditioning_dim, num_queries=sizes.num_conditioning, num_layers=2, num_heads=4,
            mlp_dim=256,
        ),
        text_synchronizer=SynchronizerConfig(
            **synchronizer, levels=(0, 1, 2), max_images=16, base_size=8, offset_spread=3.0, every=2
        )
        if sizes.use_synchronizers
        else None,
        image_synchronizer=SynchronizerConfig(
            # Two earlier images, and the two levels around the latents' own resolution: all eight and four
            # levels cost twice as much as the rest of a training step together.
            **looking, levels=sizes.image_levels, max_images=3, base_size=16, offset_spread=4.0
        )
        if sizes.use_synchronizers
        else None,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        pad_token_id=vocabulary.pad,
        image_start_token_id=vocabulary.image_start,
        image_token_id=vocabulary.image,
        context_images="all",
        image_loss_weight=1.0,
    )  # fmt: skip


def train(config: StoryWorldConfig, folder: Path, *, show_progress: bool = False) -> Path:
    """Runs all stages in `folder`, each from its newest checkpoint, and returns the finished model's
    folder.
    """
    use_threads(config.num_threads)
    device = rank_device(config.device)
    run = partial(train_stage, seed=config.seed, settings=to_record(config), show_progress=show_progress)

    # 1. VAE and vision tower: trained from nothing, or taken from a finished model.
    if config.start_from:
        finished = find_model(config.start_from)
        processor = MMInterleavedProcessor.from_pretrained(finished)
        model = load_model(finished, dtype="float32")
        cast(torch.nn.Module, model).to(device)
    else:
        processor = build_processor(config)
        torch.manual_seed(config.seed)
        model = _build_model(config.sizes, processor)
        open_to_images(model)
        open_to_learning(model)
        cast(torch.nn.Module, model).to(device)
        _train_vision(model, config, run, folder)
    documents = partial(DocumentBatches, processor)

    # 2. The language model.
    kinds = BOARD_TEXT_BATCHES if config.boards else TEXT_BATCHES
    text = TextStage(model, documents(kinds, seed=config.seed), boards=config.boards)
    # As fast as the rest, synchronizers put out noise before they have learned where to sample, and the
    # language model learns to ignore them for good (LOG.md).
    slower = synchronizer_rules(text.trained_parts(), config.synchronizer_learning_rate)
    run(text, config.text, folder / "text", rules=slower)

    # 3. The image decoder: first from attribute embeddings, then from what the language model has read.
    kinds = BOARD_IMAGE_BATCHES if config.boards else IMAGE_BATCHES
    images = documents(kinds, seed=config.seed, target_pixels=True)
    settings: dict[str, Any] = {
        "batch_size": config.image_batch_size,
        "pool_batches": 24,
        "repeats": 4,
        "detail_weight": config.detail_weight,
        "badge_weight": config.badge_weight,
        "boards": config.boards,
    }
    # A pool holds the images of 24 batches, each of which is denoised four times before the next is read.
    if config.boards:
        pairs = documents(LOOKING_BATCHES, seed=config.seed, target_pixels=True)
        looking = LookingStage(model, pairs, **settings, looking_weight=config.looking_weight)
        run(looking, config.looking, folder / "looking")
    run(UNetStage(model, images, **settings), config.unet, stage_folder(folder, "unet"))
    run(ImageStage(model, images, **settings), config.image, folder / "image")
    remove_folder(folder / "model")
    with new_folder(folder / "model") as temporary:
        save_model(model, processor, temporary)
    return folder / "model"


def _build_model(
    sizes: SizesConfig, processor: MMInterleavedProcessor
) -> MMInterleavedForConditionalGeneration:
    """The model with new weights. Raises UsageError where numbers do not go together."""
    try:
        return MMInterleavedForConditionalGeneration(model_config(sizes, processor))
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        problem = " ".join(str(error).split())
        raise UsageError(f"sizes: no model can be made of these numbers ({escape(problem)})") from error


def _train_vision(
    model: MMInterleavedForConditionalGeneration,
    config: StoryWorldConfig,
    run: Callable[..., object],
    folder: Path,
) -> None:
    """The stages that need images alone: the VAE, and the vision tower."""
    vae = model.image_decoder.vae
    pixels = storyworld_pixels(config.seed, config.boards)
    vae_stage = VAEStage(
        vae,
        pixels,
        batch_size=config.batch_size,
        detail_weight=config.detail_weight,
        kl_weight=config.kl_weight,
    )
    run(vae_stage, config.vae, folder / "vae")
    normalise_latents(vae, 2 * pixels(0, 256) - 1)
    vision_stage = VisionStage(
        model.vision,
        seed=config.seed,
        batch_size=config.vision_batch_size,
        boards=config.boards,
        pixel_weight=config.pixel_weight,
    )
    run(vision_stage, config.vision, folder / "vision")


def save_model(
    model: MMInterleavedForConditionalGeneration, processor: MMInterleavedProcessor, folder: Path
) -> Path:
    """Writes a model in float16, in files of at most 15 MB; returns its folder."""
    copy = deepcopy(model).cpu().half().eval()
    copy.config.vae_config = dict(model.image_decoder.vae.config)
    copy.config.generation_settings = dict(GENERATION_SETTINGS)
    copy.save_pretrained(folder, max_shard_size="14MB")
    processor.save_pretrained(folder)
    return folder
