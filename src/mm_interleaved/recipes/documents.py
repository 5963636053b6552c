"""A run on documents from its settings to a finished model: what all recipes but `storyworld` share."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError

from mm_interleaved.checkpoint.load import DTYPES, load_model
from mm_interleaved.data.loader_state import state_counts
from mm_interleaved.devices import rank_device, use_threads
from mm_interleaved.errors import ModelFileError, StorageError, UsageError
from mm_interleaved.files import new_folder, remove_folder
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.models.finite import damaged_weight
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.recipes.samples import SampleWriter, sample_documents
from mm_interleaved.runs.ranks import Ranks
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.training.adaptation import (
    add_low_rank,
    checkpoint_activations,
    compile_layers,
    keep_frozen_as,
    quantization_settings,
)
from mm_interleaved.training.bad_samples import BAD_SAMPLES, BadSamples
from mm_interleaved.training.checkpoints import newest_checkpoint
from mm_interleaved.training.config import CorpusConfig, TrainConfig
from mm_interleaved.training.curves import CurvesPage
from mm_interleaved.training.data_files import check_data
from mm_interleaved.training.documents import DocumentsStage, build_loader, build_mixture
from mm_interleaved.training.loop import train_stage
from mm_interleaved.training.metrics import LogWriter, TensorBoardWriter, WandbWriter
from mm_interleaved.training.objectives import Objective
from mm_interleaved.training.parallel import spread, training_ranks
from mm_interleaved.training.parameter_groups import choose_trained, count_parameters
from mm_interleaved.training.stage import trained_parameters
from mm_interleaved.typed_settings import to_record

logger = logging.getLogger(__name__)

STAGE_FOLDER = "documents"
MODEL_FOLDER = "model"
ADDITIONS_FOLDER = "lora"
_MAX_SHARD = "4GB"


class _Built(NamedTuple):
    """A model that is ready to train."""

    model: MMInterleavedForConditionalGeneration
    processor: MMInterleavedProcessor
    low_rank: Any
    """PEFT's handle, or None."""


def train_documents(config: TrainConfig, folder: Path, *, show_progress: bool = False) -> Path:
    """Trains a model on documents in `folder`, from its newest checkpoint there, and returns the finished
    model's folder, which is there once the first rank returns. All ranks call it.

    Raises:
        UsageError: settings that do not fit each other or the model.
        InputError, ModelFileError, NumericalError, StorageError, StoppedBySignal: see `loop.train_stage`.
    """
    _check(config)
    use_threads(config.num_threads)
    with training_ranks(config.parallel, config.device) as ranks:
        # 1. The model, and what of it trains; before it is loaded, which may take long, files that are not
        # there.
        mixture = build_mixture(config)
        place = folder / STAGE_FOLDER
        check_data(mixture, place, ranks, model=find_model(config.start_from))
        model, processor, low_rank = _build(config)
        rules = choose_trained(model, config.parts)
        frozen_type = _frozen_type(config, ranks.device)
        if frozen_type != "float32":
            keep_frozen_as(model, DTYPES[frozen_type])
        model.train()
        if config.parallel.strategy != "fsdp":
            # FSDP moves one unit after the other, so that no GPU has to hold all of it even once.
            cast(torch.nn.Module, model).to(ranks.device)
        if config.checkpoint_activations:
            checkpoint_activations(model)
        if config.compile_backend:
            compile_layers(model, config.compile_backend)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        logger.info(
            "%d of %d million parameters are trained",
            round(count_parameters(trained) / 1e6),
            round(count_parameters(model.parameters()) / 1e6),
        )

        # 2. Its data and its losses, on all ranks.
        objective = Objective(model, config.objective, seed=config.seed)
        # Images that count for nothing are not denoised.
        denoises = model.image_decoder is not None and model.config.image_loss_weight > 0
        loader = build_loader(config, processor, mixture=mixture, ranks=ranks, target_pixels=denoises)
        wrapped = spread(
            model,
            ranks,
            config.parallel,
            communication_type=_communication_type(config, ranks),
            has_unused=not denoises,
        )
        stage = DocumentsStage(
            model, loader, objective, wrapped=wrapped, ranks=ranks, bad_samples=BadSamples(place, ranks)
        )

        # 3. Train.
        train_stage(
            stage,
            config.training,
            place,
            seed=config.seed,
            settings=to_record(config),
            show_progress=show_progress,
            rules={f"model.{name}": rule for name, rule in rules.items()},
            ranks=ranks,
            observers=_observers(config, stage, processor, place) if ranks.is_first else (),
            writers=_writers(config, place) if ranks.is_first else (),
            measure_flops=config.measure_mfu,
        )

        # 4. Keep the result. The others do not wait for it: that may take longer than they have patience.
        left_out = _left_out(stage.state())
        if ranks.is_first:
            if left_out:
                logger.warning("left out of the data: %s; named in %s", left_out, place / BAD_SAMPLES)
            # A model of fewer steps gives way.
            _remove_model(folder)
            # Where a process holds shares, or frozen weights in fewer bits, the checkpoint knows better.
            is_less = config.frozen_type != "float32" or config.lora.quantize
            if config.parallel.strategy == "fsdp" or is_less:
                export_run(config, folder, folder / MODEL_FOLDER)
            else:
                _save(_Built(model, processor, low_rank), config, folder / MODEL_FOLDER)
    return folder / MODEL_FOLDER


def export_run(config: TrainConfig, folder: Path, out: Path) -> int:
    """Writes the model of a run's newest checkpoint (its averaged weights, where kept) as a model folder.

    One process does it, however many trained; weights that were spread over ranks are put together, and
    low-rank additions to a language model in few bits are merged into the one in full.

    Returns:
        How many steps it was trained.

    Raises:
        ModelFileError: the run has no whole checkpoint.
        UsageError: something is in `out` already.
    """
    checkpoint = newest_checkpoint(folder / STAGE_FOLDER)
    if checkpoint is None:
        raise ModelFileError(f"{folder / STAGE_FOLDER}: expected a checkpoint, found none")
    _check(config)
    built = _build(replace(config, lora=replace(config.lora, quantize="")))
    choose_trained(built.model, config.parts)
    # What the objective writes into the model's configuration belongs to the model.
    objective = Objective(built.model, config.objective, seed=config.seed)
    stage = DocumentsStage(built.model, build_loader(_without_data(config), built.processor), objective)
    group = "average" if "average" in checkpoint.groups else "weights"
    checkpoint.read_into(group, {name: p.detach() for name, p in trained_parameters(stage).items()})
    _save(built, config, out)
    return checkpoint.step


def _check(config: TrainConfig) -> None:
    if not config.start_from:
        raise UsageError(
            "start_from: empty; give a model folder, e.g. one that `mm-interleaved compose` or `convert` made"
        )
    computed = config.training.number_format(rank_device(config.device)).name
    if config.frozen_type not in ("auto", "float32") and computed == "float32":
        raise UsageError(
            f"frozen_type={config.frozen_type} needs training.use_bfloat16 or training.use_float16"
        )


def _build(config: TrainConfig) -> _Built:
    """The model as it stands before the first step; new weights depend on the seed alone."""
    source = find_model(config.start_from)
    computed = config.training.number_format(rank_device(config.device)).name
    quantization = quantization_settings(config.lora, DTYPES[computed])
    processor = MMInterleavedProcessor.from_pretrained(source)
    # It learns the words of other documents too, which nobody counts.
    processor.known_words = None
    model = load_model(source, dtype="float32", **quantization)
    _check_weights(model, config)
    low_rank = None
    if config.lora.rank:
        torch.manual_seed(config.seed)
        low_rank = add_low_rank(model, config.lora)
    return _Built(model, processor, low_rank)


def _frozen_type(config: TrainConfig, device: torch.device) -> str:
    """The format that frozen weights are kept in."""
    return config.training.number_format(device).name if config.frozen_type == "auto" else config.frozen_type


def _check_weights(model: MMInterleavedForConditionalGeneration, config: TrainConfig) -> None:
    """Refuses weights that are no numbers, from which no step could be made; warns of rows beyond the
    model's reach.
    """
    if (name := damaged_weight(model)) is not None:
        raise ModelFileError(f"{config.start_from}: {name} holds numbers that are not finite")
    reach = model.config.text_config.max_position_embeddings
    if config.max_length > reach:
        logger.warning(
            "max_length is %d, the model reads %d tokens: longer documents are learned where it never read",
            config.max_length,
            reach,
        )


def _left_out(state: Mapping[str, Any]) -> str:
    """What a run left out of its data, by source and reason; empty where that is nothing."""
    found = []
    for source, counts in state_counts(state).items():
        kinds = {
            name.removeprefix("skipped_"): n for name, n in counts.items() if name.startswith("skipped_")
        }
        if sum(kinds.values()):
            of = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
            found.append(f"{sum(kinds.values())} of {source} ({of})")
    return "; ".join(found)


def _save(built: _Built, config: TrainConfig, out: Path) -> None:
    """A folder that `--model` takes; low-rank additions are also kept alone, beside it.

    Raises:
        StorageError: the disk refused.
    """
    model = built.model
    try:
        if built.low_rank is not None:
            with new_folder(out.with_name(f"{out.name}-{ADDITIONS_FOLDER}")) as temporary:
                built.low_rank.save_pretrained(temporary)
            model = built.low_rank.merge_and_unload()
        model = model.to(device="cpu", dtype=DTYPES[config.model_type]).eval()
        with new_folder(out) as temporary:
            model.save_pretrained(temporary, max_shard_size=_MAX_SHARD)
            built.processor.save_pretrained(temporary)
    except SafetensorError as error:
        # A full disk in safetensors' own words.
        raise StorageError(f"{out}: cannot be written ({error}); the checkpoint has all of it") from error


def _remove_model(folder: Path) -> None:
    """Removes what an earlier end of the run left; its checkpoints still have all of it."""
    for name in (MODEL_FOLDER, f"{MODEL_FOLDER}-{ADDITIONS_FOLDER}"):
        remove_folder(folder / name)


def _communication_type(config: TrainConfig, ranks: Ranks) -> str:
    """The number type in which FSDP gathers weights; empty = as they are stored."""
    # On a CPU, norms do not take weights of another type than their input.
    if ranks.device.type == "cpu":
        return ""
    computed = config.training.number_format(ranks.device).name
    return "" if computed == "float32" else computed


def _writers(config: TrainConfig, folder: Path) -> Sequence[LogWriter]:
    writers: list[LogWriter] = [CurvesPage(folder)]
    if config.tensorboard:
        writers.append(TensorBoardWriter(folder))
    if config.wandb:
        writers.append(WandbWriter(folder, folder.parent.name, json.loads(json.dumps(to_record(config)))))
    return writers


def _observers(
    config: TrainConfig, stage: DocumentsStage, processor: MMInterleavedProcessor, folder: Path
) -> Sequence[SampleWriter]:
    if not config.samples.every:
        return ()
    if config.parallel.strategy == "fsdp":
        logger.warning("samples.every: samples are drawn from whole weights only; none with strategy=fsdp")
        return ()
    documents = sample_documents(config.samples)
    return (SampleWriter(stage.model, processor, config.samples, documents, folder / "samples"),)


def _without_data(config: TrainConfig) -> TrainConfig:
    """The same run on data that needs no files, for those who only want its model."""
    return replace(config, corpora={"none": CorpusConfig(kind="storyworld", paths=("draw",))})
