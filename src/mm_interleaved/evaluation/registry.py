"""The tasks that `evaluate` knows, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from mm_interleaved.evaluation.runner import Task
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD

TASKS: Mapping[str, Task] = MappingProxyType({"storyworld": STORYWORLD})
