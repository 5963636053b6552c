"""What the synchronizers are worth: variants that differ in them alone, trained one after another.

`settings` names every number; `train` trains what is missing and leaves each variant as a model of its own.
Everything is resumable, and what is finished is never trained again. `scores` scores the variants; what came
out stands in docs/ablation.md.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch

from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.devices import rank_device, use_threads
from mm_interleaved.files import make_folder, new_folder
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.recipes.storyworld.batches import BatchKind, DocumentBatches
from mm_interleaved.recipes.storyworld.recipe import save_model
from mm_interleaved.recipes.storyworld.stage_cost import average_flops
from mm_interleaved.recipes.storyworld.text_stage import TextStage
from mm_interleaved.recipes.storyworld.unet_stage import UNetStage
from mm_interleaved.storyworld.training_documents import INTERVIEW
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.training.loop import train_stage
from mm_interleaved.training.optimizer import ParameterRule
from mm_interleaved.training.parameter_groups import synchronizer_rules
from mm_interleaved.training.settings import StageConfig
from mm_interleaved.training.stage import Stage
from mm_interleaved.typed_settings import to_record
from studies.ablation.build import build_variant
from studies.ablation.settings import AblationConfig
from studies.ablation.slot_stage import SlotStage
from studies.ablation.variants import (
    NO_LEVELS,
    ImageDecoderVariant,
    LanguageVariant,
    Variant,
    chosen_variants,
)
from studies.cost import weights_name, with_cost

logger = logging.getLogger(__name__)

VARIANTS_NAME = "twins"
"""The folder of the models, by the name of the first release."""

LANGUAGE_BATCHES = (
    BatchKind(share=5, batch_size=16, tasks={INTERVIEW: 1}),
    BatchKind(share=2, batch_size=16, tasks={"edit": 1}),
    BatchKind(share=2, batch_size=6, tasks={"story": 1}),
    BatchKind(share=1, batch_size=16, tasks={"story": 1}, is_text_only=True),
)
"""What language models learn from: questions about an image, and heroes who come again."""

DENOISING_BATCHES = (
    BatchKind(share=1, batch_size=24, tasks={"edit": 1}),
    BatchKind(share=2, batch_size=8, tasks={"story": 1}),
)
"""What image decoders learn from: images that follow from earlier ones."""


def train(config: AblationConfig, folder: Path, *, show_progress: bool = False) -> Path:
    """Trains the variants of `config` that `folder` lacks; returns the folder with one model a variant."""
    variants = chosen_variants(config.variants)
    device = rank_device(config.device)
    use_threads(config.num_threads)
    trainer = VariantTrainer(config, folder, device, show_progress=show_progress)
    for variant in variants:
        if not variant_folder(folder, variant).exists():
            trainer.make(variant)
    return folder / VARIANTS_NAME


def variant_folder(folder: Path, variant: Variant) -> Path:
    """Where a run leaves a variant's model."""
    return folder / VARIANTS_NAME / variant.name


class VariantTrainer:
    """Trains parts in folders of their own and joins them to variants."""

    def __init__(
        self, config: AblationConfig, folder: Path, device: torch.device, *, show_progress: bool = False
    ) -> None:
        self.config, self.folder, self.show_progress = config, folder, show_progress
        self.device = device
        self.source = find_model(config.start_from)
        self.start = weights_name(self.source)
        self.finished = load_model(self.source, dtype="float32")
        self.tokenizer = MMInterleavedProcessor.from_pretrained(self.source).tokenizer

    def make(self, variant: Variant) -> None:
        """One variant, from whatever of it has been trained so far."""
        logger.info("variant %s", variant.name)
        model = self._build(variant.language, variant.image_decoder)
        model.vision.load_state_dict(self.train_slots(variant.language).vision.state_dict())
        reading, denoising = self.train_language(variant.language), self.train_unet(variant.image_decoder)
        for name in ("language_model", "text_head", "context_projection"):
            getattr(model, name).load_state_dict(getattr(reading, name).state_dict())
        model.image_start_embedding.data.copy_(reading.image_start_embedding)
        decoder = model.image_decoder
        decoder.resampler.load_state_dict(reading.image_decoder.resampler.state_dict())
        decoder.unet.load_state_dict(denoising.image_decoder.unet.state_dict())
        decoder.negative_conditioning.data.copy_(denoising.image_decoder.negative_conditioning)
        if variant.image_decoder.levels:
            decoder.synchronizers.load_state_dict(denoising.image_decoder.synchronizers.state_dict())
        make_folder(self.folder / VARIANTS_NAME)
        with new_folder(variant_folder(self.folder, variant)) as temporary:
            save_model(model, self._processor(variant.language.num_slots), temporary)

    def train_slots(self, language: LanguageVariant) -> MMInterleavedForConditionalGeneration:
        """A model whose slots are trained; language models with as many slots share them."""
        sharing = replace(language, levels=NO_LEVELS, seed=self.config.seed)
        model = self._build(sharing, ImageDecoderVariant(levels=NO_LEVELS))
        stage = SlotStage(
            model.vision,
            seed=self.config.seed,
            batch_size=self.config.slot_batch_size,
            are_coarse=language.are_slots_coarse,
        )
        self._run(stage, self.config.slots, language.slots_name, self.config.seed)
        return model

    def train_language(self, language: LanguageVariant) -> MMInterleavedForConditionalGeneration:
        """A model whose language model is trained."""
        model = self._build(language, ImageDecoderVariant(levels=NO_LEVELS))
        model.vision.load_state_dict(self.train_slots(language).vision.state_dict())
        documents = DocumentBatches(self._processor(language.num_slots), LANGUAGE_BATCHES, seed=language.seed)
        stage = TextStage(model, documents)
        rules = synchronizer_rules(stage.trained_parts(), self.config.synchronizer_learning_rate)
        self._run(stage, self.config.text, language.name, language.seed, rules)
        return model

    def train_unet(self, image_decoder: ImageDecoderVariant) -> MMInterleavedForConditionalGeneration:
        """A model whose U-Net is trained; slots do not matter to it, so it gets one."""
        config = self.config
        language = LanguageVariant(num_slots=1, levels=NO_LEVELS, seed=image_decoder.seed)
        model = self._build(language, image_decoder)
        documents = DocumentBatches(
            self._processor(1), DENOISING_BATCHES, seed=image_decoder.seed, target_pixels=True
        )
        stage = UNetStage(
            model,
            documents,
            batch_size=config.image_batch_size,
            pool_batches=config.pool_batches,
            repeats=4,
            detail_weight=config.detail_weight,
            badge_weight=config.badge_weight,
        )
        self._run(stage, config.unet, image_decoder.name, image_decoder.seed)
        return model

    def _build(
        self, language: LanguageVariant, image_decoder: ImageDecoderVariant
    ) -> MMInterleavedForConditionalGeneration:
        """Made on the CPU, so that first weights are the same everywhere; then it moves."""
        model = build_variant(self.finished, self.config.sizes, language, image_decoder)
        cast(torch.nn.Module, model).to(self.device)
        return model

    def _processor(self, num_slots: int) -> MMInterleavedProcessor:
        size = self.finished.config.vision_config.image_size
        return MMInterleavedProcessor(self.tokenizer, size, size, num_slots)

    def _run(
        self,
        stage: Stage,
        config: StageConfig,
        name: str,
        seed: int,
        rules: Mapping[str, ParameterRule] = MappingProxyType({}),
    ) -> None:
        folder = self.folder / name
        with_cost(
            folder,
            config,
            flops_a_step=lambda: average_flops(stage),
            work=lambda: train_stage(
                stage, config, folder, seed=seed, settings=to_record(self.config),
                show_progress=self.show_progress, rules=rules,
            ),
            start=self.start,
        )  # fmt: skip
