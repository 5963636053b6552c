"""A small scaling study: the same reader in three sizes, trained for as many steps on the same documents.

Documents are made on the fly and none is seen twice, so the training loss is what a validation loss would be.
`studies.scaling.page` draws the curves and says what more compute should give.
"""

from pathlib import Path

from mm_interleaved.devices import rank_device, use_threads
from studies.ablation.recipe import Workshop
from studies.ablation.settings import AblationConfig, TwinSizes
from studies.ablation.variants import Reader
from studies.scaling.settings import ScalingConfig, num_heads


def train(config: ScalingConfig, folder: Path, *, show_progress: bool = False) -> Path:
    """Trains a reader of each size, each in a folder of its own; returns `folder`."""
    device = rank_device(config.device)
    use_threads(config.num_threads)
    for width, layers in zip(config.widths, config.layers, strict=True):
        settings = AblationConfig(
            start_from=config.start_from,
            num_threads=config.num_threads,
            device=config.device,
            seed=config.seed,
            sizes=TwinSizes(text_dim=width, text_layers=layers, text_heads=num_heads(width)),
            slot_batch_size=config.slot_batch_size,
            synchronizer_learning_rate=config.synchronizer_learning_rate,
            slots=config.slots,
            text=config.text,
        )
        workshop = Workshop(settings, size_folder(folder, width), device, show_progress=show_progress)
        workshop.read(Reader(seed=config.seed))
    return folder


def size_folder(folder: Path, width: int) -> Path:
    """Where a run keeps the size of this width."""
    return folder / f"width-{width}"
