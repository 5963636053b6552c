"""What the synchronizers are worth: twins that differ in them alone, trained one after another.

`ablation_settings` names every number; `train` trains what is missing and leaves each twin as a model of its
own. Everything is resumable, and what is finished is never trained again. How twins are scored is told by
`studies.ablation.scores`, what comes out by docs/ablation.md.
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
from mm_interleaved.recipes.storyworld.text_stage import TextSideStage
from mm_interleaved.recipes.storyworld.unet_stage import PainterStage
from mm_interleaved.storyworld.training_documents import INTERVIEW
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.training.loop import Stage, train_stage
from mm_interleaved.training.optimizer import ParameterRule
from mm_interleaved.training.parameter_groups import synchronizer_rules
from mm_interleaved.training.settings import StageConfig
from mm_interleaved.typed_settings import to_record
from studies.ablation.build import build_twin
from studies.ablation.settings import AblationConfig
from studies.ablation.slot_stage import SlotSideStage
from studies.ablation.variants import NO_LEVELS, Painter, Reader, Twin, chosen_twins
from studies.provenance import weights_name, with_cost

logger = logging.getLogger(__name__)

TWINS_NAME = "twins"

READER_BATCHES = (
    BatchKind(share=5, batch_size=16, tasks={INTERVIEW: 1}),
    BatchKind(share=2, batch_size=16, tasks={"edit": 1}),
    BatchKind(share=2, batch_size=6, tasks={"story": 1}),
    BatchKind(share=1, batch_size=16, tasks={"story": 1}, is_blind=True),
)
"""What readers learn from: questions about a picture, and heroes who come again."""

PAINTER_BATCHES = (
    BatchKind(share=1, batch_size=24, tasks={"edit": 1}),
    BatchKind(share=2, batch_size=8, tasks={"story": 1}),
)
"""What painters learn from: pictures that follow from earlier ones."""


def train(config: AblationConfig, folder: Path, *, show_progress: bool = False) -> Path:
    """Trains the twins of `config` that `folder` lacks; returns the folder that holds one model a twin."""
    twins = chosen_twins(config.twins)
    device = rank_device(config.device)
    use_threads(config.num_threads)
    workshop = Workshop(config, folder, device, show_progress=show_progress)
    for twin in twins:
        if not twin_folder(folder, twin).exists():
            workshop.make(twin)
    return folder / TWINS_NAME


def twin_folder(folder: Path, twin: Twin) -> Path:
    """Where a run leaves a twin's model."""
    return folder / TWINS_NAME / twin.name


class Workshop:
    """Trains parts in folders of their own and joins them to twins."""

    def __init__(
        self, config: AblationConfig, folder: Path, device: torch.device, *, show_progress: bool = False
    ) -> None:
        self.config, self.folder, self.show_progress = config, folder, show_progress
        self.device = device
        self.source = find_model(config.start_from)
        self.start = weights_name(self.source)
        self.finished = load_model(self.source, dtype="float32")
        self.tokenizer = MMInterleavedProcessor.from_pretrained(self.source).tokenizer

    def make(self, twin: Twin) -> None:
        """One twin, from whatever of it has been trained so far."""
        logger.info("twin %s", twin.name)
        model = self._build(twin.reader, twin.painter)
        model.vision.load_state_dict(self.see(twin.reader).vision.state_dict())
        reader, painter = self.read(twin.reader), self.paint(twin.painter)
        for name in ("language_model", "text_head", "context_projection"):
            getattr(model, name).load_state_dict(getattr(reader, name).state_dict())
        model.image_start_embedding.data.copy_(reader.image_start_embedding)
        decoder = model.image_decoder
        decoder.resampler.load_state_dict(reader.image_decoder.resampler.state_dict())
        decoder.unet.load_state_dict(painter.image_decoder.unet.state_dict())
        decoder.negative_conditioning.data.copy_(painter.image_decoder.negative_conditioning)
        if twin.painter.levels:
            decoder.synchronizers.load_state_dict(painter.image_decoder.synchronizers.state_dict())
        make_folder(self.folder / TWINS_NAME)
        with new_folder(twin_folder(self.folder, twin)) as temporary:
            save_model(model, self._processor(twin.reader.num_slots), temporary)

    def see(self, reader: Reader) -> MMInterleavedForConditionalGeneration:
        """A model whose slots tell what they show; readers with as many slots share them."""
        sharing = replace(reader, levels=NO_LEVELS, seed=self.config.seed)
        model = self._build(sharing, Painter(levels=NO_LEVELS))
        stage = SlotSideStage(
            model.vision,
            seed=self.config.seed,
            batch_size=self.config.slot_batch_size,
            are_coarse=reader.are_slots_coarse,
        )
        self._run(stage, self.config.slots, reader.slots_name, self.config.seed)
        return model

    def read(self, reader: Reader) -> MMInterleavedForConditionalGeneration:
        """A model whose language model reads."""
        model = self._build(reader, Painter(levels=NO_LEVELS))
        model.vision.load_state_dict(self.see(reader).vision.state_dict())
        documents = DocumentBatches(self._processor(reader.num_slots), READER_BATCHES, seed=reader.seed)
        stage = TextSideStage(model, documents)
        rules = synchronizer_rules(stage.trained_parts(), self.config.synchronizer_learning_rate)
        self._run(stage, self.config.text, reader.name, reader.seed, rules)
        return model

    def paint(self, painter: Painter) -> MMInterleavedForConditionalGeneration:
        """A model whose U-Net paints; slots do not matter to it, so it gets one."""
        config = self.config
        reader = Reader(num_slots=1, levels=NO_LEVELS, seed=painter.seed)
        model = self._build(reader, painter)
        documents = DocumentBatches(
            self._processor(1), PAINTER_BATCHES, seed=painter.seed, target_pixels=True
        )
        stage = PainterStage(
            model,
            documents,
            batch_size=config.image_batch_size,
            pool_batches=config.pool_batches,
            repeats=4,
            detail_weight=config.detail_weight,
            badge_weight=config.badge_weight,
        )
        self._run(stage, config.painter, painter.name, painter.seed)
        return model

    def _build(self, reader: Reader, painter: Painter) -> MMInterleavedForConditionalGeneration:
        """Made on the CPU, so that first weights are the same everywhere; then it moves."""
        model = build_twin(self.finished, self.config.sizes, reader, painter)
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
