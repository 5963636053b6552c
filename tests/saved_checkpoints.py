"""What lies in the checkpoints of a run, as tests compare it."""

from pathlib import Path

from mm_interleaved.training.checkpoints import Checkpoint, newest_checkpoint


def load_newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint below `root` with all of its tensors."""
    found = newest_checkpoint(root)
    if found is None:
        return None
    tensors = {group: found.read(group) for group in sorted(found.groups)}
    return Checkpoint(found.step, tensors, found.state)
