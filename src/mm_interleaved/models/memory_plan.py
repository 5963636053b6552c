"""How a model fits into a memory: number format, few bits, what waits elsewhere, how many documents at once.

A ladder of plans, from what is exact and fast to what is small: the first that fits is chosen, the next is
taken when memory runs out although it seemed to fit. Sizes are those of `models.cost`: estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mm_interleaved.models.cost import Needs

MEMORY_CHOICES = ("auto", "low")
USABLE = 0.9
"""Of what is free: allocators and libraries take some, and an estimate is one."""
_LEAST_AT_HAND = 0.05
"""Of the weights; where fewer have room, all wait, and each layer is brought when it computes."""
MOST_WAITING = 0.8
"""Of the host's free memory, for weights that wait there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory that there is."""

    device: str
    """In a few words, for the sentence."""
    device_type: str
    """`cpu`, `cuda` or `mps`."""
    free: int
    """Bytes that a model may take on the device."""
    host_free: int
    """Bytes of the host's own memory; the same memory where the device is the CPU."""
    fast_formats: frozenset[str]
    """Number formats in which the device is fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What is kept where, in which form."""

    dtype: str
    """Of the weights."""
    quantization: str | None = None
    """One of `models.quantization.QUANTIZATIONS` for the language model's layers."""
    offload: str | None = None
    """Where weights wait that the device has no room for: `cpu`, `disk`; None: nothing waits."""
    batch_size: int = 1
    """Documents at once."""
    weights: int = 0
    """Bytes of the weights."""
    on_device: int = 0
    """Bytes that weights may take on the device; the others wait, and with 0 all of them."""
    on_host: int = 0
    """Bytes that waiting weights may take of the host's memory; the others wait on the disk."""
    documents: int = 0
    """Bytes of what is remembered and at work, for all documents at once."""
    fits: bool = True

    def record(self) -> dict[str, Any]:
        """As a manifest has it."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> MemoryPlan:
        """The same again; what later versions may add is left out."""
        return cls(**{each.name: record[each.name] for each in fields(cls) if each.name in record})

    def describe(self) -> str:
        """What is chosen, in a few words."""
        form = (
            self.dtype
            if self.quantization is None
            else f"{self.dtype}, the language model {self.quantization}"
        )
        places = {"cpu": "; weights wait in the host's memory", "disk": "; weights wait on the disk"}
        waiting = places.get(self.offload or "", "")
        at_once = "1 document" if self.batch_size == 1 else f"{self.batch_size} documents"
        return f"{form}{waiting}; {at_once} at once"

    @property
    def held(self) -> int:
        """Bytes that it takes of the device; a layer that is at work comes on top where weights wait."""
        return self.documents + min(self.weights, self.on_device)

    def needs(self) -> str:
        """How much of the device it takes, in a few words."""
        weights = min(self.weights, self.on_device)
        return f"{size_text(weights)} of weights and {size_text(self.documents)} for documents"


def size_text(num_bytes: float) -> str:
    """Bytes, as people say them."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def memory_plans(
    needs: Needs,
    room: Room,
    *,
    memory: str,
    saved: str,
    dtype: str = "auto",
    quantization: str | None = None,
    quantizations: Sequence[str] = (),
    most_at_once: int = 8,
) -> list[MemoryPlan]:
    """Plans in the order in which they are to be tried, the best that fits first.

    Args:
        needs: of the model.
        memory: "auto": the first of all that fits; "low": the one that takes the least of the device.
        saved: number format of the model's file.
        dtype: as asked: by name, then no other is planned; "auto".
        quantization: as asked, then no other is planned.
        quantizations: kinds whose libraries are there.
        most_at_once: documents that are continued at once where there is room.

    Returns:
        at least one; the last is tried whether it seems to fit or not.
    """
    if memory not in MEMORY_CHOICES:
        raise ValueError(f"memory: expected one of {', '.join(MEMORY_CHOICES)}, found {memory!r}")
    at_once = 1 if memory == "low" else most_at_once
    forms = list(_forms(room, saved, dtype, quantization, quantizations))
    ladder = [_fitted(needs, room, plan, at_once) for plan in forms]
    if memory == "low":
        ladder = [replace(plan, on_device=0) if plan.offload == "cpu" else plan for plan in ladder]
        ladder.sort(key=lambda plan: (not plan.fits, plan.offload == "disk", plan.held))
        return ladder
    first = next((index for index, plan in enumerate(ladder) if plan.fits), len(ladder) - 1)
    return ladder[first:]


def _forms(
    room: Room, saved: str, dtype: str, quantization: str | None, quantizations: Sequence[str]
) -> Iterator[MemoryPlan]:
    """The rungs of the ladder: exact and fast first."""
    native = dtype
    if dtype == "auto":
        native = saved if saved in room.fast_formats else "float32"
    half = native if dtype != "auto" or native != "float32" else _half(room)
    few = (quantization,) if quantization is not None else quantizations
    if quantization is None:
        yield MemoryPlan(dtype=native)
        if half != native:
            yield MemoryPlan(dtype=half)
    yield from (MemoryPlan(dtype=half, quantization=kind) for kind in few)
    if quantization is None:
        if room.device_type != "cpu":
            yield MemoryPlan(dtype=half, offload="cpu")
        yield MemoryPlan(dtype=half, offload="disk")


def _half(room: Room) -> str:
    """A format of two bytes; one in which the device is slow is better than none."""
    return "float16" if "bfloat16" not in room.fast_formats and "float16" in room.fast_formats else "bfloat16"


def _fitted(needs: Needs, room: Room, form: MemoryPlan, at_once: int) -> MemoryPlan:
    """A rung with its sizes: as many documents at once as there is room for, and whether one is."""
    usable = int(room.free * USABLE)
    weights = needs.weight_bytes(form.dtype, form.quantization)
    a_document = needs.document_bytes(form.dtype)
    if form.offload is None:
        batch_size = max(1, min(at_once, (usable - weights) // max(1, a_document)))
        fits = weights + batch_size * a_document <= usable
        return replace(
            form, weights=weights, on_device=weights, batch_size=batch_size,
            documents=batch_size * a_document, fits=fits,
        )  # fmt: skip
    # One document at once: room for weights is what makes it fast. Too little of it is of no use.
    on_device = usable - a_document
    if form.offload == "cpu" and on_device < weights * _LEAST_AT_HAND:
        on_device = 0
    waiting = weights - min(weights, on_device)
    on_host = int(room.host_free * MOST_WAITING)
    has_place = form.offload == "disk" or waiting <= on_host
    return replace(
        form, weights=weights, on_device=max(0, on_device), on_host=on_host, batch_size=1,
        documents=a_document, fits=has_place and usable > a_document,
    )  # fmt: skip
