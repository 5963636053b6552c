"""A small scaling study: one language model in three sizes, trained for as many steps on the same documents.

Documents are made on the fly and none is seen twice, so the training loss is what a validation loss would be.
`studies.scaling.page` plots the curves and extrapolates to more compute.
"""

from pathlib import Path

from mm_interleaved.devices import rank_device, use_threads
from studies.ablation.recipe import VariantTrainer
from studies.ablation.settings import AblationConfig, VariantSizes
from studies.ablation.variants import LanguageVariant
from studies.scaling.settings import ScalingConfig, num_heads


def train(config: ScalingConfig, folder: Path, *, show_progress: bool = False) -> Path:
    """Trains a language model of each size, each in a folder of its own; returns `folder`."""
    device = rank_device(config.device)
    use_threads(config.num_threads)
    for width, layers in zip(config.widths, config.layers, strict=True):
        settings = AblationConfig(
            start_from=config.start_from,
            num_threads=config.num_threads,
            device=config.device,
            seed=config.seed,
            sizes=VariantSizes(text_dim=width, text_layers=layers, text_heads=num_heads(width)),
            slot_batch_size=config.slot_batch_size,
            synchronizer_learning_rate=config.synchronizer_learning_rate,
            slots=config.slots,
            text=config.text,
        )
        trainer = VariantTrainer(settings, size_folder(folder, width), device, show_progress=show_progress)
        trainer.train_language(LanguageVariant(seed=config.seed))
    return folder


def size_folder(folder: Path, width: int) -> Path:
    """Where a run keeps the size of this width."""
    return folder / f"width-{width}"
