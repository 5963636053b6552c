"""The tasks that there are."""

import pytest

from mm_interleaved.errors import UsageError
from mm_interleaved.evaluation.interleaved.registry import BENCHMARKS
from mm_interleaved.evaluation.names import INTERLEAVED, TASK_NAMES
from mm_interleaved.evaluation.registry import TASKS, make_task
from mm_interleaved.evaluation.task import TaskOptions
from mm_interleaved.generation.settings import GenerationSettings


def test_the_help_names_the_tasks_that_there_are():
    assert tuple(TASKS) == TASK_NAMES and tuple(BENCHMARKS) == INTERLEAVED


@pytest.mark.parametrize("name", TASK_NAMES)
def test_published_settings_can_be_followed(name):
    task = make_task(name, TaskOptions(clip="any"))
    assert GenerationSettings(**task.settings).given() == dict(task.settings)


def test_an_unknown_task_is_named_with_the_nearest():
    with pytest.raises(UsageError, match=r"'vqav'.*'vqav2'"):
        make_task("vqav")
