"""The tasks that `evaluate` knows, by name.

To add a task: a file in `tasks/` with a `Task` (how its gold documents are read, how answers are scored), a
line in `TASKS` below, and its name in `cli/evaluate.py`, which knows it without importing what scores.
To add a metric: a pure function of answers and truth in the file of its family in `metrics/`, and a line in
the `score` of each task that reports it, where it gets its name, "<task>.<metric>".
"""

from collections.abc import Mapping
from types import MappingProxyType

from mm_interleaved.evaluation.task import Task
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD

TASKS: Mapping[str, Task] = MappingProxyType({"storyworld": STORYWORLD})
