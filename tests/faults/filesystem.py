"""Faults of the file system, injected into a child process, at one event after the other.

Events are what Python sees of a folder: files opened for writing, synced, renamed and removed, folders made
and removed. A child that is killed at every one of them, or whose disk is full from every one of them on, has
been through all states that a crash of ours can leave; random kills hit a few. `limited` is the kernel's own
full disk: no file may grow beyond so many bytes.
"""

import errno
import os
import resource
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from mm_interleaved.errors import MMInterleavedError

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
_REMOVALS = ("os.remove", "os.rmdir", "shutil.rmtree")
KILLED = -signal.SIGKILL
Work = Callable[[], object]


def in_child(work: Work, prepare: Work = lambda: None) -> int:
    """Does something in a fork: 0, the exit code of an error of ours, 1 for any other, -9 if killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        prepare()
        work()
        code = 0
    except MMInterleavedError as error:
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed_at(number: int, work: Work, root: Path, *, is_torn: bool = False) -> int:
    """How a child ends that is killed at an event.

    Args:
        is_torn: count only what is written to files, and cut the file in half before the kill.
    """

    def fault(event: str, target: object) -> None:
        if is_torn:
            os.ftruncate(target, os.fstat(target).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    return in_child(work, lambda: _inject(root, lambda count: count == number, fault, only_files=is_torn))


def full_from(number: int, work: Work, root: Path, code: int = errno.ENOSPC) -> int:
    """How a child ends whose disk takes nothing more from an event on; files can still be removed."""

    def fault(event: str, target: object) -> None:
        if event not in _REMOVALS:
            raise OSError(code, os.strerror(code))

    return in_child(work, lambda: _inject(root, lambda count: count >= number, fault))


def limited(num_bytes: int, work: Work) -> int:
    """How a child ends in which no file can grow beyond so many bytes."""
    limits = (num_bytes, num_bytes)
    return in_child(work, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))


def every_event(attempt: Callable[[int], int], *, least: int) -> Iterator[tuple[int, int]]:
    """(number, how the child ended) for one event after the other, until one comes to its end undisturbed.

    Args:
        least: fewer events than these mean that the injection no longer sees them.
    """
    number = 0
    while code := attempt(number):
        yield number, code
        number += 1
    assert number >= least, f"only {number} events, expected {least} or more"


def _inject(
    root: Path, is_due: Callable[[int], bool], fault: Callable[[str, object], None], only_files: bool = False
) -> None:
    """From now on, in this process: `fault` at the events in `root` whose number is due."""
    count = -1

    def happens(event: str, target: object) -> None:
        nonlocal count
        count += 1
        if is_due(count):
            fault(event, target)

    def hook(event: str, arguments: tuple) -> None:
        is_write = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (is_write or event in _CHANGES) and str(root) in str(arguments[0]):
            happens(event, arguments[0])

    sync = os.fsync

    def syncing(descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) or not only_files:
            happens("fsync", descriptor)
        sync(descriptor)

    os.fsync = syncing
    if not only_files:
        sys.addaudithook(hook)
