"""Which twins the ablation compares.

A twin is a reader (slots and language model) and a painter (U-Net). Both have or lack synchronizers; what
else differs is the number of slots, the levels that are looked into, and which earlier images the painter
sees. Readers and painters are trained apart, so twins share them: sixteen twins are thirteen readers and
four painters.
"""

from dataclasses import dataclass
from typing import Any

from mm_interleaved.errors import UsageError

NO_LEVELS: tuple[int, ...] = ()
MIDDLE_LEVEL = (1,)
"""The pyramid's level of 16 cells, which has the resolution of the latents."""
ALL_LEVELS = (0, 1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What sees and reads."""

    num_slots: int = 4
    levels: tuple[int, ...] = ALL_LEVELS
    """Levels that the language model's synchronizers look into; none: it has no synchronizers."""
    are_slots_coarse: bool = False
    """Slots are taught all but badges and patterns, as those of the shipped model."""
    seed: int = 1

    @property
    def slots_name(self) -> str:
        return f"slots-{self.num_slots}{'-coarse' if self.are_slots_coarse else ''}"

    @property
    def name(self) -> str:
        slots = self.slots_name.removeprefix("slots-")
        return f"reader-{slots}-{_levels_name(self.levels)}-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Painter:
    """What paints."""

    levels: tuple[int, ...] = ALL_LEVELS
    """Levels that the U-Net's synchronizers look into; none: it has no synchronizers."""
    context_images: str = "all"
    """Which earlier images it sees, "previous" or "all"."""
    seed: int = 1

    @property
    def name(self) -> str:
        looks = _levels_name(self.levels)
        return f"painter-{looks}-{self.seed}" if not self.levels or self.context_images == "all" else (
            f"painter-{looks}-{self.context_images}-{self.seed}"
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A whole model."""

    arm: str
    """What it stands for; twins of the same arm differ in their seeds alone."""
    reader: Reader
    painter: Painter

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '-')}-{self.reader.seed}"


def _levels_name(levels: tuple[int, ...]) -> str:
    return {NO_LEVELS: "blind", MIDDLE_LEVEL: "one-level", ALL_LEVELS: "looking"}[levels]


WITH, WITHOUT = "both", "neither"
"""Arms of the main pair, at four slots: synchronizers on both sides, and none at all."""
SLOT_COUNTS = (1, 4, 16)


def arm_with(num_slots: int, *, is_looking: bool) -> str:
    """The arm of so many slots, with synchronizers on both sides or on none."""
    arm = WITH if is_looking else WITHOUT
    return arm if num_slots == 4 else f"{arm} {num_slots} slots"


def all_twins() -> tuple[Twin, ...]:
    """Every twin, those of the main pair first: three seeds for these, one for the others.

    A seed is the reader's; painters, which cost as much and differ less, have one seed.
    """
    looking, blind = {"levels": ALL_LEVELS}, {"levels": NO_LEVELS}

    def twin(arm: str, reader: dict[str, Any], painter: dict[str, Any], seed: int = 1) -> Twin:
        return Twin(arm=arm, reader=Reader(**reader, seed=seed), painter=Painter(**painter))

    twins = [twin(WITH, looking, looking), twin(WITHOUT, blind, blind)]
    twins.append(twin("LLM only", looking, blind))
    twins.append(twin("U-Net only", blind, looking))
    for num_slots in (16, 1):
        slots = {"num_slots": num_slots}
        twins.append(twin(arm_with(num_slots, is_looking=False), slots | blind, blind))
        twins.append(twin(arm_with(num_slots, is_looking=True), slots | looking, looking))
    for seed in (2, 3):
        twins += [twin(WITH, looking, looking, seed), twin(WITHOUT, blind, blind, seed)]
    twins.append(twin("both one level", {"levels": MIDDLE_LEVEL}, {"levels": MIDDLE_LEVEL}))
    twins.append(twin("both previous image", looking, looking | {"context_images": "previous"}))
    coarse = {"are_slots_coarse": True}
    twins.append(twin("both coarse slots", looking | coarse, looking))
    twins.append(twin("neither coarse slots", blind | coarse, blind))
    return tuple(twins)


def chosen_twins(names: tuple[str, ...]) -> tuple[Twin, ...]:
    """The twins of these names, all where none is given. Raises UsageError for an unknown one."""
    twins = {twin.name: twin for twin in all_twins()}
    for name in names:
        if name not in twins:
            raise UsageError(f"twins: found {name!r}, expected some of {', '.join(twins)}")
    return tuple(twins[name] for name in names) if names else tuple(twins.values())
