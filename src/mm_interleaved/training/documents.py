"""The stage that trains a whole model on documents: pre-training, fine-tuning, low-rank additions."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import nn

from mm_interleaved.data.few_shot import FewShot
from mm_interleaved.data.loader import MicroBatch, StepRows, TrainingLoader
from mm_interleaved.data.loader_state import merge_states
from mm_interleaved.data.mixture import Mixture, MixtureSource
from mm_interleaved.data.registry import make_source
from mm_interleaved.data.source import Source, WholeDocuments
from mm_interleaved.devices import usable_cores
from mm_interleaved.errors import UsageError
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.runs.ranks import ALONE, Ranks
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.tokens.sequence import LearningRule
from mm_interleaved.training.bad_samples import BadSamples
from mm_interleaved.training.config import CorpusConfig, TrainConfig
from mm_interleaved.training.objectives import Objective, StepTotals
from mm_interleaved.training.parallel import summing_gradients
from mm_interleaved.training.stage import Losses, MicroBatches


class _Piece(NamedTuple):
    """A micro-batch, and what the losses of its step are divided by."""

    micro_batch: MicroBatch
    totals: StepTotals


class DocumentsStage:
    """Trains what requires gradients, by both losses of the paper, on rows of documents.

    Args:
        model: the model itself.
        wrapped: the model as it is called: spread over ranks, or the same.
        loader: this rank's rows.
        bad_samples: where it is listed what the loader leaves out.
    """

    name = "documents"

    def __init__(
        self,
        model: MMInterleavedForConditionalGeneration,
        loader: TrainingLoader,
        objective: Objective,
        *,
        wrapped: nn.Module | None = None,
        ranks: Ranks = ALONE,
        bad_samples: BadSamples | None = None,
    ) -> None:
        self.model, self.wrapped = model, model if wrapped is None else wrapped
        self.loader, self.objective, self.ranks = loader, objective, ranks
        self.bad_samples = bad_samples
        self._rows: Iterator[StepRows] | None = None

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {"model": self.model}

    def make_batch(self, step: int) -> MicroBatches:
        if self._rows is None:
            self._rows = iter(self.loader)
            if self.bad_samples is not None:
                self.bad_samples.begin(step)
        rows = next(self._rows)
        assert rows.step == step, f"the loader is at step {rows.step}, expected {step}"
        if self.bad_samples is not None:
            self.bad_samples.add(step + 1, rows.skips)
        totals = self.objective.totals([micro_batch.batch for micro_batch in rows.micro_batches])
        return MicroBatches(tuple(_Piece(micro_batch, totals) for micro_batch in rows.micro_batches))

    def compute_losses(self, batch: _Piece) -> Losses:
        micro_batch, totals = batch
        rows = micro_batch.batch
        losses = self.objective(rows, micro_batch.row_numbers, totals, forward=self.wrapped)
        config = self.model.config
        weighted = config.text_loss_weight * losses.text + config.image_loss_weight * losses.image
        return Losses(
            total=losses.total,
            named={"loss": weighted, "text": losses.text, "image": losses.image},
            counts={
                "tokens": int(rows.attention_mask.sum()),
                "images": rows.num_images,
                "documents": len(micro_batch.document_ids),
            },
            document_ids=micro_batch.document_ids,
        )

    def state(self) -> Mapping[str, Any]:
        return merge_states(self.ranks.gather(self.loader.state_dict()))

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(state)

    def summing_gradients(self, is_last: bool) -> AbstractContextManager[None]:
        return summing_gradients(self.wrapped, is_last)


def build_mixture(config: TrainConfig) -> Mixture:
    """The corpora of a run; those of weight 0 are left out.

    Raises:
        UsageError: corpora that do not exist or do not fit together.
    """
    corpora = {name: corpus for name, corpus in config.corpora.items() if corpus.weight}
    if config.corpora and not corpora:
        raise UsageError(f"the weights of {', '.join(config.corpora)} are all 0, expected one above 0")
    return Mixture(
        sources=tuple(_mixture_source(name, corpus, config) for name, corpus in corpora.items()),
        max_length=config.max_length,
        compat="released" if config.released_packing else None,
    )


def build_loader(
    config: TrainConfig,
    processor: MMInterleavedProcessor,
    *,
    mixture: Mixture | None = None,
    ranks: Ranks = ALONE,
    target_pixels: bool = True,
) -> TrainingLoader:
    """The rows of a run.

    Args:
        mixture: result of `build_mixture`, where it is there already.
        target_pixels: False for a model that only writes.

    Raises:
        UsageError: corpora that do not exist or do not fit together.
        InputError: files that are not there.
    """
    return TrainingLoader(
        mixture or build_mixture(config),
        processor,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        seed=config.seed,
        rank=ranks.rank,
        num_ranks=ranks.size,
        # More than there are cores are slower, and PyTorch warns of them; what is read is the same.
        num_workers=min(config.num_workers, usable_cores()),
        target_pixels=target_pixels,
        fixed_length=config.fixed_length,
        max_bad_fraction=config.max_bad_fraction,
    )


def _mixture_source(name: str, corpus: CorpusConfig, config: TrainConfig) -> MixtureSource:
    # The published loader means to merge pairs and does not.
    share = 0.0 if config.released_packing else corpus.few_shot_share
    try:
        learn = LearningRule(text=corpus.learn_text, images=corpus.learn_images)
        return MixtureSource(
            name=name,
            source=_source(name, corpus, config.seed),
            weight=corpus.weight,
            max_images=corpus.max_images,
            too_long=corpus.too_long,
            learn=learn,
            few_shot=FewShot(share=share) if share else None,
            shuffle_block=corpus.shuffle_block,
            keep_pairs=corpus.keep_pairs,
        )
    except ValueError as error:
        raise UsageError(f"corpora.{name}: {error}") from error


def _source(name: str, corpus: CorpusConfig, seed: int) -> Source:
    if not corpus.paths:
        raise UsageError(
            f"corpora.{name}.paths: empty; give its files with --set corpora.{name}.paths=..., "
            f"or leave it out with --set corpora.{name}.weight=0"
        )
    try:
        source = make_source(corpus.kind, corpus.source_settings(), run_seed=seed)
    except UsageError as error:
        raise UsageError(f"corpora.{name}: {error}") from error
    return WholeDocuments(source) if corpus.learn_prompts else source
