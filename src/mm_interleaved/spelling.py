"""The right name for a wrong one: what others call it, what begins with it or holds it, what is spelt alike.

One table for all that has a name here (settings, flags, commands, schedulers, formats, number types): of the
names that others use, those are suggested that the place knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from mm_interleaved.errors import escape

_MANY = 16
"""Of so many names, all are listed where none is near."""

_OTHERS_SAY = {
    # settings and flags
    "num_inference_steps": "steps n_steps sampling_steps denoising_steps ddim_steps sample_steps",
    "guidance_scale": "guidance cfg cfg_scale cfg_weight guidance_weight unconditional_guidance_scale scale",
    "scheduler": "sampler sampling_method sampler_name noise_scheduler",
    "max_new_tokens": "max_tokens max_length max_len max_gen_len tokens length",
    "min_new_tokens": "min_tokens min_length min_len",
    "num_beams": "beams beam_size beam_width beam_search",
    "do_sample": "sample sampling",
    "temperature": "temp",
    "top_p": "nucleus nucleus_sampling",
    "num_candidates": "num_images_per_prompt candidates best_of num_samples n_samples",
    "panels": "pages num_images",
    "max_images": "images num_images max_num_images",
    "negative_prompt": "negative neg_prompt n_prompt",
    "context_images": "context image_context num_context_images",
    "height": "resolution size image_size",
    "layout": "order parts pattern",
    "seed": "random_seed manual_seed generator",
    "output": "outdir out_dir output_dir output_folder save_dir save_path dest destination folder",
    "model": "checkpoint ckpt model_path model_name model_name_or_path model_id weights",
    "text": "prompt caption",
    "image": "img picture images pictures input_image",
    "device": "gpu cuda",
    "dtype": "precision torch_dtype half fp16 bf16 float16 bfloat16",
    "new_run": "overwrite force clean restart",
    "retry_errors": "retry retry_failed",
    "debug": "verbose traceback",
    "image_root": "image_dir image_folder root data_root images_dir",
    "quantization": "quantize load_in_4bit load_in_8bit bits",
    "adapter": "lora lora_weights peft",
    "data": "dataset data_dir input",
    "set": "override config_override opt",
    "resume": "continue resume_from",
    # commands
    "generate": "continue run infer inference predict sample complete",
    "replay": "rerun repeat reproduce verify",
    "draw": "paint image txt2img text2image text_to_image t2i picture imagine",
    "caption": "describe img2txt image2text image_to_text captioning",
    "vqa": "ask question qa answer vqav2",
    "ground": "locate detect find box grounding where",
    "story": "tell storytelling write",
    "chat": "talk converse dialogue interactive repl",
    "info": "show inspect summary list models",
    "plan": "estimate memory cost",
    "doctor": "env environment system",
    "evaluate": "eval test score benchmark validate",
    "train": "finetune fine_tune fit pretrain training",
    "compose": "merge assemble init",
    "convert": "import port",
    "export": "save",
    "check": "validate inspect lint verify",
    # commands of a conversation
    "quit": "exit bye q end stop close",
    "new": "reset clear forget restart",
    "help": "commands h",
    # schedulers
    "dpm-solver++": "dpm++ dpmpp dpm dpmsolver dpm_solver dpmsolver_multistep dpm++_2m dpmpp_2m",
    "euler": "k_euler euler_discrete euler_a euler_ancestral",
    "unipc": "unipc_multistep uni_pc",
    "ddim": "plms pndm",
    # number types, devices
    "float32": "fp32 f32 float single 32",
    "float16": "fp16 f16 half 16",
    "bfloat16": "bf16 brain",
    "cuda": "gpu nvidia",
    "mps": "metal apple",
    "nf4": "int4 4bit fp4 4",
    "int8": "8bit 8",
    # formats of data and tasks
    "documents": "jsonl json interleaved canonical openai messages count num_documents samples number",
    "jsonl": "documents json canonical",
    "webdataset": "wds tar tars shards",
    "llava": "sharegpt conversations",
    "captions": "coco coco_captions nocaps flickr30k caption",
    "coco": "captions coco_captions",
    "vqav2": "vqa",
    "obelics": "parquet",
    "test": "eval testing",
    "validation": "val dev valid",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is likeliest meant by `name`; None where none is near.

    Case, blanks, hyphens and underscores make no difference.
    """
    names = list(known)
    spellings = _spellings(names)
    wanted, words = _letters(name), _words(name)
    if wanted in spellings:
        return spellings[wanted]
    holding = [right for right in names if words and words <= _words(right)]
    beginning = [right for right in names if len(wanted) > 2 and _letters(right).startswith(wanted)]
    if holding or beginning:
        return min(holding or beginning, key=len)
    own = {_letters(right): right for right in names}
    # What others say must be nearer: so many short words are near to anything.
    for letters, cutoff in ((own, 0.65), (spellings, 0.8)):
        if close := get_close_matches(wanted, letters, n=1, cutoff=cutoff):
            return letters[close[0]]
    held = [right for right in names if _words(right) and _words(right) <= words]
    return max(held, key=len, default=None)


def guess(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the end of a sentence, or nothing where no name is near."""
    right = nearest(name, known)
    return "" if right is None else f" (did you mean {right!r}?)"


def hint(name: str, known: Iterable[str]) -> str:
    """What to say after a wrong name: the right one, or which there are."""
    names = tuple(known)
    right = nearest(name, names)
    listed = f"expected one of {', '.join(names)}"
    if right is None:
        return listed
    return f"did you mean {right!r}?" if len(names) > _MANY else f"{listed} (did you mean {right!r}?)"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest one that does."""
    return f"unknown {kind} {escape(name)!r}: {hint(name, known)}"


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural but for one.

    >>> counted(1, "document"), counted(0, "document")
    ('1 document', '0 documents')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _spellings(known: Iterable[str]) -> dict[str, str]:
    """Each known name by the letters of every spelling of it; a known name's own spelling comes first."""
    found = {_letters(right): right for right in known}
    for ours, theirs in _OTHERS_SAY.items():
        for spelling in theirs.split() if _letters(ours) in found else ():
            found.setdefault(_letters(spelling), found[_letters(ours)])
    return found


def _letters(name: str) -> str:
    return re.sub(r"[^\w+]|_", "", name.casefold()).removesuffix("scheduler") or name.casefold()


def _words(name: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", name.casefold()))
