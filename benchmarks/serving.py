"""Eight clients of the serving engine at once, or one after another: documents a second of the shipped model.

The engine is `serving.engine.ServingEngine`, without HTTP. Both sides ask for the same documents, each client
the next one as soon as it has its answer; nothing is remembered from one document to the next. Texts must be
the same, images too but for what the last bits of their latents do to 8 bits.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from benchmarks.batch import PIXEL_TOLERANCE, TASKS, numbers_of
from benchmarks.harness import HALF, Case, Setting, compare
from mm_interleaved.documents.document import Document
from mm_interleaved.generation.events import Finished
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.serving.engine import ServingEngine
from mm_interleaved.storyworld.tasks import document

CLIENTS = 8
EACH = 2
"""Documents that each client asks for."""
QUICK = ("caption", "draw")


def run(setting: Setting) -> Iterator[Case]:
    dtype = str(setting.dtype).removeprefix("torch.")
    generator = load_generator(find_model("storyworld"), device=str(setting.device), dtype=dtype)
    # Whole documents take seconds: a few turns must do.
    setting = replace(setting, least=3, seconds=0.0, patience=0.0)
    for task in QUICK if setting.quick else TASKS:
        yield serving_case(setting, generator, task, TASKS[task])


def serving_case(setting: Setting, generator: Any, task: str, layout: str) -> Case:
    """Documents of one task of StoryWorld."""
    made = [document("test", 0, index, task) for index in range(CLIENTS * EACH)]
    documents = [replace(one, target=(), layout=layout) for one in made]
    engines = []

    def served(clients: int) -> list[Tensor]:
        engine = ServingEngine(generator, max_running=CLIENTS, max_queue=len(documents), prefix_bytes=0)
        engine.start()
        engines.append(engine)
        try:
            return numbers_of(asyncio.run(answers(engine, documents, clients)))
        finally:
            engine.close()

    result = compare(
        setting,
        {"one by one": lambda: served(1), f"{CLIENTS} clients": lambda: served(CLIENTS)},
        tolerance=float("inf") if setting.dtype in HALF else PIXEL_TOLERANCE,
    )
    record = result.record(f"{CLIENTS} clients")
    # What the engine's thread makes is not seen by whom counts tensors.
    record.pop("peak_bytes", None)
    return {
        "task": task,
        "layout": layout,
        "documents": len(documents),
        **record,
        **{f"mean_{kind}_rows": rows for kind, rows in mean_rows(engines[-1]).items()},
        **{f"documents_a_second_{side}": len(documents) / s for side, s in result.median.items()},
    }


async def answers(engine: ServingEngine, documents: Sequence[Document], clients: int) -> list[Document]:
    """The completed documents; each client asks for the next one when it has an answer."""
    left, found = list(enumerate(documents))[::-1], {}

    async def client() -> None:
        while left:
            place, given = left.pop()
            async with await engine.open(given, GenerationSettings()) as ticket:
                async for event in ticket:
                    if isinstance(event, Finished):
                        found[place] = event.document

    await asyncio.gather(*(client() for _ in range(clients)))
    return [found[place] for place in range(len(documents))]


def mean_rows(engine: ServingEngine) -> dict[str, float]:
    """Rows of a pass, on average, by kind."""
    sizes = engine.statistics().batch_sizes
    return {
        kind: sum(rows * passes for rows, passes in of_kind.items()) / sum(of_kind.values())
        for kind, of_kind in sizes.items()
        if of_kind
    }
