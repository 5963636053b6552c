"""The tasks that `evaluate` knows, by name.

To add a task: a file in `tasks/` with a function of `TaskOptions` that returns a `Task` (how its gold
documents are read, how answers are scored), a line in `TASKS` below, and its name in `names.py`, which the
help lists without importing what scores. To add a metric: a pure function of answers and truth in the file
of its family in `metrics/`, and a line in the `score` of each task that reports it, where it gets its name,
"<task>.<metric>".
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from mm_interleaved.errors import UsageError
from mm_interleaved.evaluation.interleaved.registry import BENCHMARKS
from mm_interleaved.evaluation.task import Task, TaskOptions
from mm_interleaved.evaluation.tasks.captioning import FILES as CAPTION_FILES
from mm_interleaved.evaluation.tasks.captioning import captioning, paragraphs
from mm_interleaved.evaluation.tasks.choices import pope, seed_bench
from mm_interleaved.evaluation.tasks.dialogue import visual_dialogue
from mm_interleaved.evaluation.tasks.generated_images import STORIES, maps_to_images, stories, text_to_image
from mm_interleaved.evaluation.tasks.grounding import NAMES as GROUNDING_NAMES
from mm_interleaved.evaluation.tasks.grounding import grounding
from mm_interleaved.evaluation.tasks.interleaved import interleaved
from mm_interleaved.evaluation.tasks.questions import FILES as QUESTION_FILES
from mm_interleaved.evaluation.tasks.questions import gqa, questions
from mm_interleaved.evaluation.tasks.storyworld import storyworld
from mm_interleaved.spelling import unknown_name

TASKS: Mapping[str, Callable[[TaskOptions], Task]] = MappingProxyType(
    {
        "storyworld": storyworld,
        **{name: partial(captioning, name) for name in CAPTION_FILES},
        "paragraphs": paragraphs,
        **{name: partial(questions, name) for name in QUESTION_FILES},
        "gqa": gqa,
        "visdial": visual_dialogue,
        **{name: partial(grounding, name) for name in GROUNDING_NAMES},
        **{name: partial(text_to_image, name) for name in ("coco-images", "lncoco-images")},
        "ade20k": maps_to_images,
        **{name: partial(stories, name) for name in STORIES},
        "seed-bench": seed_bench,
        "pope": pope,
        **{name: partial(interleaved, name) for name in BENCHMARKS},
    }
)


def make_task(name: str, options: TaskOptions | None = None) -> Task:
    """The task of a name. Raises UsageError for an unknown one, or for options that it cannot do without."""
    if name not in TASKS:
        raise UsageError(unknown_name("task", name, TASKS), field="task")
    options = options or TaskOptions()
    return replace(TASKS[name](options), name=name, options=options)
