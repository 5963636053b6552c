"""What a stage costs: multiplications of an average step, by PyTorch's own count of all that a step may be.

Steps are not alike: each is of one of several kinds of batches, and denoising stages read a whole pool of
documents once for many steps. So each kind of work is counted by itself, and weighs as much as training does
of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from statistics import mean
from typing import Any

import torch
from torch import nn

from mm_interleaved.recipes.storyworld.batches import BatchKind, DocumentBatches
from mm_interleaved.recipes.storyworld.denoising_stage import DenoisingExample, DenoisingStage
from mm_interleaved.recipes.storyworld.text_stage import TextStage
from mm_interleaved.training.metrics import count_flops
from mm_interleaved.training.stage import Stage

COUNTING = 2
"""Version of this count, which stands beside what it gave: another one is counted again."""


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of work that a stage does."""

    times_a_step: float
    """How often a step does it, on average."""
    examples: tuple[Callable[[], object], ...]
    """Does it, each time on other data; the mean is what it costs."""


def average_flops(stage: Stage, num_examples: int = 4) -> float:
    """Multiplications and additions of a stage's average step, forward and backward.

    Sampling from pyramids is no matrix product and is not counted. The stage is left as it was, but for
    gradients, which are gone.

    Args:
        num_examples: steps of each kind that are counted; their rows differ in length.
    """
    with torch.random.fork_rng(devices=[]):
        total = sum(
            work.times_a_step * mean(count_flops(example) for example in work.examples)
            for work in _works(stage, num_examples)
        )
    for part in stage.trained_parts().values():
        nn.Module.zero_grad(part)
    return total


def _works(stage: Stage, num_examples: int) -> list[Work]:
    if isinstance(stage, DenoisingStage):
        return _denoising(stage, num_examples)
    if isinstance(stage, TextStage) and isinstance(stage.batches, DocumentBatches):
        return _of_kinds(stage, stage.batches, num_examples)
    # All batches have the same shapes.
    return [Work(1.0, (_learning(stage, 0, stage.make_batch),))]


def _denoising(stage: DenoisingStage, num_examples: int) -> list[Work]:
    """Reading the first pool, and steps of denoising out of it."""
    pool: list[DenoisingExample] = []
    steps_a_pool = stage.pool_batches * stage.repeats
    steps = tuple(
        _learning(stage, step, lambda _: stage.sample(pool))
        for step in range(min(num_examples, steps_a_pool))
    )
    return [Work(1.0 / steps_a_pool, (lambda: pool.extend(stage.read_pool(0)),)), Work(1.0, steps)]


def _of_kinds(stage: TextStage, batches: DocumentBatches, num_examples: int) -> list[Work]:
    """The first steps of each kind of batch, which weighs its share."""
    shares = sum(kind.share for kind in batches.kinds)
    works = []
    for kind in batches.kinds:
        if kind.share:
            steps = islice(_steps_of(batches, kind), num_examples)
            examples = tuple(_learning(stage, step, stage.make_batch) for step in steps)
            works.append(Work(kind.share / shares, examples))
    return works


def _steps_of(batches: DocumentBatches, kind: BatchKind) -> Iterator[int]:
    return (step for step in count() if batches.kind_of(step) is kind)


def _learning(stage: Stage, step: int, make_batch: Callable[[int], Any]) -> Callable[[], object]:
    """Makes a step's batch and learns from it, without the optimizer."""

    def learn() -> None:
        torch.manual_seed(step)
        stage.compute_losses(make_batch(step)).total.backward()

    return learn
