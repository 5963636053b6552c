"""What the studies train, by name: recipes beside those of `mm_interleaved.recipes.registry`."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mm_interleaved.recipes.registry import Recipe
from studies.ablation import settings as ablation_settings
from studies.scaling import settings as scaling_settings


def _train_ablation(settings: Any, folder: Path, *, show_progress: bool) -> Path:
    from studies.ablation.recipe import train

    return train(settings, folder, show_progress=show_progress)


def _train_scaling(settings: Any, folder: Path, *, show_progress: bool) -> Path:
    from studies.scaling.recipe import train

    return train(settings, folder, show_progress=show_progress)


STUDY_RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "ablation": Recipe(
            ablation_settings.AblationConfig,
            _train_ablation,
            may_change=ablation_settings.MAY_CHANGE,
            former_names=ablation_settings.FORMER_NAMES,
        ),
        "scaling": Recipe(
            scaling_settings.ScalingConfig, _train_scaling, may_change=scaling_settings.MAY_CHANGE
        ),
    }
)
