"""Names that the first release (0.1) gave to stages, settings and losses: runs and logs of it are still read.

Light, so that settings are read before PyTorch is loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

FORMER_STAGES: Mapping[str, str] = MappingProxyType({"painter": "unet"})
"""Former name of a stage, of its settings and of its folder → its name."""
FORMER_LOSSES: Mapping[str, str] = MappingProxyType(
    {
        "naming": "attributes",
        "naming_badge": "attributes_badge",
        "naming_species": "attributes_species",
        "mentions": "coreference",
    }
)
"""Former name of a loss in the log of a stage → its name."""


def stage_folder(run: Path, stage: str) -> Path:
    """Where a run keeps a stage: in the folder of the former name where a run of that release began it."""
    former = [run / name for name, now in FORMER_STAGES.items() if now == stage]
    return next((folder for folder in former if folder.is_dir()), run / stage)


def present_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a log under the present names."""
    renamed = {FORMER_LOSSES.get(name, name): value for name, value in line.items()}
    if "stage" in renamed:
        renamed["stage"] = FORMER_STAGES.get(renamed["stage"], renamed["stage"])
    return renamed
