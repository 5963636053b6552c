"""A generator that fits into the memory there is: a plan for a model here, smaller ones when it runs out.

The rules are in `models.memory_plan`; here they meet a folder, a device and the libraries that are installed.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.devices import torch_device
from mm_interleaved.documents.document import Document
from mm_interleaved.errors import StorageError, UsageError, escape, memory_wanted
from mm_interleaved.generation.events import Event, Failed, Finished
from mm_interleaved.generation.loading import AS_IT_IS, Acceleration, load_generator
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.model_files.config import read_config
from mm_interleaved.model_files.headers import saved_format, tensor_headers
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.models.cost import needs_of
from mm_interleaved.models.device_memory import room_of
from mm_interleaved.models.memory_plan import MEMORY_CHOICES, MemoryPlan, Room, memory_plans, size_text
from mm_interleaved.models.quantization import QUANTIZATIONS
from mm_interleaved.spelling import hint

if TYPE_CHECKING:
    from mm_interleaved.generation.engine import InterleavedGenerator

logger = logging.getLogger(__name__)


def plans_for(
    folder: Path,
    memory: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    most_at_once: int = 8,
    room: Room | None = None,
) -> list[MemoryPlan]:
    """Plans for a model on a device, in the order in which they are to be tried. See `memory_plans`.

    Args:
        memory: "auto" or "low".
        device, dtype, quantization: as `load_generator`; what is named is kept to.
        room: the memory to plan for; default: what is free here.

    Raises:
        UsageError: there is no such choice, or no such device.
        ModelFileError: no model of ours.
    """
    if memory not in MEMORY_CHOICES:
        raise UsageError(
            f"memory: found {escape(repr(memory))}, {hint(str(memory), MEMORY_CHOICES)}", field="memory"
        )
    shapes = {name: header.shape for name, header in tensor_headers(folder).items()}
    return memory_plans(
        needs_of(read_config(folder), shapes),
        room or room_of(torch_device(device)),
        memory=memory,
        saved=saved_format(folder),
        dtype=dtype,
        quantization=quantization,
        quantizations=installed_quantizations(),
        most_at_once=most_at_once,
    )


def load_fitting(
    model: str | Path,
    memory: str | None = "auto",
    *,
    device: str = "auto",
    dtype: str = "auto",
    acceleration: Acceleration = AS_IT_IS,
    most_at_once: int = 8,
    load: Callable[..., InterleavedGenerator] = load_generator,
) -> InterleavedGenerator:
    """A model in the form in which it fits here; says in one line which that is, and why.

    Args:
        model, device, dtype, acceleration: as `load_generator`.
        memory: "auto" or "low"; None: as it is, by `load` alone.
        most_at_once: documents that are to be continued at once, if there is room.
        load: what reads the model.

    Raises:
        StorageError: the smallest plan does not fit either.
        As `load_generator`.
    """
    if memory is None:
        return load(model, device=device, dtype=dtype, acceleration=acceleration)
    folder, room = find_model(model), room_of(torch_device(device))
    plans = plans_for(
        folder,
        memory,
        device=device,
        dtype=dtype,
        quantization=acceleration.quantization,
        most_at_once=most_at_once,
        room=room,
    )
    logger.warning("%s", explain(plans[0], memory, room))

    def load_by(plan: MemoryPlan) -> InterleavedGenerator:
        return load(folder, device=device, dtype=dtype, acceleration=acceleration, plan=plan)

    return FittingGenerator(load_by, plans).generator


def installed_quantizations() -> tuple[str, ...]:
    """The kinds of few bits whose libraries are here."""
    return tuple(kind for kind, library in QUANTIZATIONS.items() if find_spec(library) is not None)


def explain(plan: MemoryPlan, memory: str, room: Room) -> str:
    """What was chosen and why, in one line."""
    sentence = (
        f"memory {memory}: {plan.describe()}, {plan.needs()} of {size_text(room.free)} free on {room.device}"
    )
    if not plan.fits:
        return f"{sentence}; estimated not to fit, tried all the same"
    if plan.quantization is not None:
        return f"{sentence} (not exact; the smallest loss that fits)"
    if plan.dtype not in room.fast_formats:
        return f"{sentence} (slow: no units for {plan.dtype} here)"
    return sentence


class FittingGenerator:
    """Continues documents as an `InterleavedGenerator` does; where memory runs out, by the next smaller plan.

    The documents that were at work are begun again, those that are finished stay so.

    Args:
        load: makes the generator of a plan.
        plans: in the order in which they are tried; at least one.
        on_change: called with each plan that takes another's place.

    Raises:
        StorageError: the last plan does not fit either.
    """

    def __init__(
        self,
        load: Callable[[MemoryPlan], InterleavedGenerator],
        plans: Sequence[MemoryPlan],
        on_change: Callable[[MemoryPlan], object] = lambda plan: None,
    ):
        self._load, self._plans, self._on_change = load, list(plans), on_change
        self._most_at_once: int | None = None
        self._generator: InterleavedGenerator | None = None
        self._open()

    @property
    def generator(self) -> InterleavedGenerator:
        """The one that is at work."""
        assert self._generator is not None
        return self._generator

    @property
    def plan(self) -> MemoryPlan:
        """The one that is at work."""
        return self._plans[0]

    @property
    def model(self) -> Any:
        return self.generator.model

    def warn_of_unknown_words(self, documents: Iterable[Document]) -> None:
        """As the generator's."""
        self.generator.warn_of_unknown_words(documents)

    def stream_batch(
        self, documents: Sequence[Document], settings: Sequence[GenerationSettings]
    ) -> Iterator[tuple[int, Event]]:
        """As the generator's; a document that is begun again yields its events again, `Finished` once."""
        left = list(range(len(documents)))
        while left:
            group = left[: self._most_at_once]
            wanted = None
            try:
                events = self.generator.stream_batch(
                    [documents[place] for place in group], settings=[settings[place] for place in group]
                )
                for place, event in events:
                    if isinstance(event, Finished | Failed):
                        left.remove(group[place])
                    yield group[place], event
            except Exception as error:
                wanted = _memory_wanted(error)
                if wanted is None:
                    raise
            # Outside of the handler, where the failed computation is no longer held.
            if wanted is not None:
                self._shrink(wanted, len(group))

    def _shrink(self, wanted: str, at_once: int):
        """Less than before: half as many documents at once, then the next plan."""
        if at_once > 1:
            self._most_at_once = at_once // 2
            logger.warning("%s; going on with %d documents at once", wanted, self._most_at_once)
            _free()
            return
        self._next(wanted)
        self._open()

    def _open(self):
        """Load by the first plan that fits."""
        while True:
            self._generator = None
            _free()
            wanted = None
            try:
                self._generator = self._load(self.plan)
                return
            except Exception as error:
                wanted = _memory_wanted(error)
                if wanted is None:
                    raise
            self._next(wanted)

    def _next(self, wanted: str):
        if len(self._plans) == 1:
            raise StorageError(
                f"{wanted}, with {self.plan.describe()}; no smaller plan is left, use another device or model"
            )
        del self._plans[0]
        logger.warning("%s; going on with %s", wanted, self.plan.describe())
        self._on_change(self.plan)


def _memory_wanted(error: Exception) -> str | None:
    """What there was no memory for; None for an error of another kind."""
    # Loading says it in a sentence of its own, which has the reason behind it.
    if isinstance(error, StorageError):
        return None if error.__cause__ is None else memory_wanted(error.__cause__)
    return memory_wanted(error)


def _free():
    """Give back what is no longer used; libraries keep it otherwise."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
