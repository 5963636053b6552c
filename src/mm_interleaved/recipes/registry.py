"""Every recipe by its name: what `mm-interleaved train NAME` can train.

To add one, write its settings as a frozen dataclass whose defaults are the recipe (see `training.config`, or
`storyworld/settings.py` for one of several stages), and a function that trains by them; then give both a
line in `RECIPES`. A recipe that trains a whole model on documents needs no function of its own: a
`TrainConfig` in `tasks.py` is enough. Functions import PyTorch when they are called, so that a wrong setting
is refused before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mm_interleaved.recipes.storyworld.former_names import FORMER_STAGES
from mm_interleaved.recipes.storyworld.settings import StoryWorldConfig, with_boards
from mm_interleaved.recipes.tasks import task_recipes


@dataclass(frozen=True, slots=True)
class Recipe:
    """What can be trained under a name."""

    settings: Callable[[], Any]
    """The default settings, a frozen dataclass."""
    train: Callable[..., Path]
    """(settings, folder, show_progress=) → the folder of the finished model."""
    may_change: frozenset[str] | None = None
    """Settings that a run may be resumed with another value of; none = all. Where finished parts are compared
    with each other, all must have been trained alike."""
    former_names: Mapping[str, str] = field(default_factory=dict[str, str])
    """Former name of a setting, or of a group of them → its name; runs that were begun with it go on."""


def _train_storyworld(settings: Any, folder: Path, *, show_progress: bool) -> Path:
    from mm_interleaved.recipes.storyworld.recipe import train

    return train(settings, folder, show_progress=show_progress)


def _train_documents(settings: Any, folder: Path, *, show_progress: bool) -> Path:
    from mm_interleaved.recipes.documents import train_documents

    return train_documents(settings, folder, show_progress=show_progress)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "storyworld": Recipe(StoryWorldConfig, _train_storyworld, former_names=FORMER_STAGES),
        "storyworld-boards": Recipe(with_boards, _train_storyworld, former_names=FORMER_STAGES),
    }
    | {name: Recipe(settings, _train_documents) for name, settings in task_recipes().items()}
)
