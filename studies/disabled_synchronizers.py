"""A finished model without its synchronizers, as a model folder: what it loses shows what rests on them.

Nothing is trained anew, so this is another question than the ablation's, whose variants learned without: a
model that was trained with synchronizers has left to them what they do best.
"""

from copy import deepcopy
from pathlib import Path
from shutil import copyfile
from typing import Any

from mm_interleaved import MMInterleavedForConditionalGeneration, MMInterleavedProcessor
from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.files import new_folder
from mm_interleaved.model_files.known_words import FILE_NAME

SIDES = ("language", "unet")
"""Which synchronizers can be disabled: those of the language model's layers, those of the U-Net's maps."""
_FIELDS = {"language": "text_synchronizer", "unet": "image_synchronizer"}


def without_synchronizers(
    finished: MMInterleavedForConditionalGeneration, sides: tuple[str, ...] = SIDES
) -> MMInterleavedForConditionalGeneration:
    """The same weights in a model that is built without synchronizers on these sides.

    Raises:
        RuntimeError: a weight of the bare model is not the finished one's.
    """
    config: Any = deepcopy(finished.config)
    for side in sides:
        setattr(config, _FIELDS[side], None)
    bare = MMInterleavedForConditionalGeneration(config)
    wanted = bare.state_dict()
    bare.load_state_dict({name: value for name, value in finished.state_dict().items() if name in wanted})
    return bare.to(finished.dtype).eval()


def write_without_synchronizers(model: Path, sides: tuple[str, ...], out: Path) -> int:
    """Writes the folder of `without_synchronizers`; returns how many parameters were left out.

    Raises:
        ModelFileError: `model` is no model folder of ours.
        UsageError: `out` is there already.
    """
    finished = load_model(model)
    bare = without_synchronizers(finished, sides)
    with new_folder(out) as folder:
        bare.save_pretrained(folder)
        MMInterleavedProcessor.from_pretrained(model).save_pretrained(folder)
        if (model / FILE_NAME).is_file():
            copyfile(model / FILE_NAME, folder / FILE_NAME)
    return finished.num_parameters() - bare.num_parameters()
