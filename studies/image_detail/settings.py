"""Every number of a trial, and the trials that the log tells of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from mm_interleaved.errors import UsageError, escape
from mm_interleaved.spelling import hint
from mm_interleaved.training.settings import FACTOR, RATE, SIZE, check_ranges
from mm_interleaved.typed_settings import SEED

TASKS = ("copy", "edit", "move")
"""The same image again; a change of anything but the board; the board and its owner elsewhere."""
PYRAMIDS = ("tower", "tower-fine", "encoder", "latents")
"""What is looked at: the shipped vision tower's levels of 16 and 8 cells, as its U-Net has it, or of 32, 16
and 8; three levels of a small encoder that is trained along; or a level that is the earlier image's latents,
through one linear layer, and one of half as many cells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSettings:
    """One trial; `--set name=value` changes one number."""

    seed: Annotated[int, SEED] = 0
    """Seed of weights, scenes and noise."""
    tasks: tuple[str, ...] = ("copy",)
    """What the images of a step are, in equal parts, out of TASKS."""
    steps: Annotated[int, SIZE] = 300
    """Training steps."""
    batch_size: Annotated[int, SIZE] = 16
    """Images a step."""
    pool: Annotated[int, SIZE] = 384
    """Images that are made at once and denoised until as many steps have passed as see each four times."""
    learning_rate: Annotated[float, RATE] = 2e-3
    """AdamW's, after twenty steps of warm-up; it falls to a tenth."""
    synchronizer_rate: Annotated[float, FACTOR] = 1.0
    """Times the learning rate: that of synchronizers and encoder."""
    pyramid: str = "latents"
    """Out of PYRAMIDS."""
    pixel_levels: int = 0
    """Of how many of the tower's finest levels each cell also gets its own pixels, see `VisionAdapter`."""
    tower_steps: int = 0
    """Steps in which the vision tower learns on first, on images with boards, to hold pixels."""
    opening: Annotated[float, FACTOR] = 0.0
    """Deviation of the first weights of the 1 x 1 convolutions behind synchronizers, times the width's root;
    the paper's start is 0."""
    spread: Annotated[float, FACTOR] = 4.0
    """Cells of 16 by 16 within which points start; the recipe's is 4."""
    heads: Annotated[int, SIZE] = 4
    """Heads of each synchronizer."""
    points: Annotated[int, SIZE] = 4
    """Points of each head."""
    max_noise: Annotated[float, FACTOR] = 0.0
    """Share of the images that are denoised from pure noise, where the detail must come from elsewhere."""
    board_weight: Annotated[float, FACTOR] = 0.0
    """Extra weight of errors in cells of the board."""
    looking_weight: Annotated[float, FACTOR] = 0.0
    """Weight of a loss that says where to look, out of the truth of the world; see `looking_loss`
    of the recipe."""
    frozen_unet_steps: int = 0
    """Steps at first in which synchronizers and encoder train alone."""
    names_origin: bool = True
    """Whether the code says where the board hung in the earlier image, as a language model could know."""
    looks: bool = True
    """False: no synchronizers, what can be had without looking."""
    start_from: str = ""
    """Weights of an earlier trial, its `weights.pt`."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, values, known in (("tasks", self.tasks, TASKS), ("pyramid", (self.pyramid,), PYRAMIDS)):
            unknown = [value for value in values if value not in known]
            if unknown or not values:
                found = ", ".join(map(escape, unknown)) or "none"
                raise UsageError(f"{name}: found {found}, expected some of {', '.join(known)}", field=name)


TRIALS: dict[str, TrialSettings] = {
    "copy-latents": TrialSettings(steps=100),
    "edit-latents": TrialSettings(steps=200, tasks=("edit",)),
    "edit-without-looking": TrialSettings(steps=50, tasks=("edit",), looks=False),
    "copy-tower": TrialSettings(steps=100, pyramid="tower"),
    "copy-tower-pixels": TrialSettings(steps=150, pyramid="tower-fine", tower_steps=120),
    "copy-tower-linear": TrialSettings(steps=100, pyramid="tower", tower_steps=40, pixel_levels=2),
    "all-latents": TrialSettings(steps=300, tasks=TASKS),
    "move-wide": TrialSettings(steps=300, tasks=("move",), heads=8, points=8, spread=5.0),
    "move-supervised-little": TrialSettings(steps=250, tasks=("move",), looking_weight=0.2),
    "move-supervised": TrialSettings(steps=400, tasks=("move",), looking_weight=1.0, synchronizer_rate=2.0),
    "all-supervised": TrialSettings(steps=400, tasks=TASKS, looking_weight=1.0, synchronizer_rate=2.0),
}
"""The trials of the log, in the order in which they were made."""


def chosen_trials(names: Sequence[str], run: Path) -> dict[str, TrialSettings]:
    """Trials by their names, all if none is given; what one starts from is looked for in the run's folder.

    Raises:
        UsageError: there is no trial of that name.
    """
    for name in names:
        if name not in TRIALS:
            raise UsageError(f"--trial: found {escape(name)!r}, {hint(name, TRIALS)}", field="trial")
    return {
        name: replace(settings, start_from=str(run / settings.start_from))
        if settings.start_from
        else settings
        for name, settings in TRIALS.items()
        if name in names or not names
    }
