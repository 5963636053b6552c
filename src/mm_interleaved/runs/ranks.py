"""Several processes that torchrun started: which of them this one is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mm_interleaved.devices import rank_device
from mm_interleaved.errors import MMInterleavedError, StorageError, UsageError

Told = TypeVar("Told")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """This one writes what is written once."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the ranks."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def from_first(self, work: Callable[[], Told]) -> Told:
        """What `work` returns on the first rank, which alone does it; the others wait.

        Raises:
            MMInterleavedError: what `work` raised, on every rank.
        """
        if self.size == 1:
            return work()
        told: Any = None
        error: MMInterleavedError | None = None
        if self.is_first:
            try:
                told = work()
            except MMInterleavedError as raised:
                error = raised
        told, error = self.gather((told, error))[0]
        if error is not None:
            raise error
        return told


ALONE = Ranks()


@contextmanager
def joined_ranks(
    timeout_seconds: float, device: str = "auto", *, remark: str = ""
) -> Generator[Ranks, None, None]:
    """This process among those that torchrun started; alone where it started none.

    Args:
        timeout_seconds: how long one may keep the others waiting.
        device: `auto` takes this rank's GPU where there is one.
        remark: where to look for why another rank ended.

    Raises:
        UsageError: no such device, or the processes do not find each other.
        StorageError: another process ended, or did not answer in time.
    """
    place = rank_device(device)
    if "RANK" not in os.environ or dist.is_initialized():
        size = dist.get_world_size() if dist.is_initialized() else 1
        yield Ranks(dist.get_rank() if size > 1 else 0, size, place)
        return
    try:
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds)
        )
    except (ValueError, dist.DistError) as error:
        raise UsageError(
            f"rank {os.environ['RANK']} does not find the others ({_first_line(error)}); "
            "start them with torchrun"
        ) from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), place)
    except RuntimeError as error:
        # Gloo's errors have no class of their own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise StorageError(
            f"rank {dist.get_rank()}: another rank ended or did not answer within "
            f"{timeout_seconds:g} s{remark} ({_first_line(error)})"
        ) from error
    finally:
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
