"""Several ranks in one test: forked processes that talk over gloo on this machine.

Forking costs a fraction of a second where starting Python with all its libraries costs ten.
"""

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives

from mm_interleaved.runs.ranks import Ranks

TIMEOUT = timedelta(seconds=90)


def run_ranks(num_ranks: int, folder: Path, work) -> list[int]:
    """Runs `work(ranks)` on every rank; returns the exit codes. What a rank prints goes to stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"store-{os.urandom(4).hex()}"
    sys.stderr.flush()
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            os._exit(_run_rank(rank, num_ranks, store, work))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _run_rank(rank: int, num_ranks: int, store: Path, work) -> int:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=TIMEOUT
        )
        work(Ranks(rank, num_ranks))
        dist.destroy_process_group()
        return 0
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        return getattr(error, "exit_code", 1)
