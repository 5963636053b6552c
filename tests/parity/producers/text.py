"""`gen_text.*` and `scores.*`: text continued from prompts of a batch, and how likely given options are."""

from collections.abc import Mapping
from typing import Any

import torch
from golden import Golden, shared
from torch import Tensor

from mm_interleaved.generation.logits import TextRules
from mm_interleaved.generation.scoring import score_options
from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.generation.settings import GenerationSettings
from prompt_batches import TextBatch, generate_text_batch

# Defaults of the official generation functions (GOLDEN.md, section 4.9).
DEFAULTS = {
    "num_beams": 5,
    "use_nucleus_sampling": False,
    "max_length": 30,
    "min_length": 8,
    "top_p": 0.9,
    "temperature": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "num_captions": 1,
    "torch_manual_seed": None,
}


@shared
def written(golden: Golden, case: str) -> TextBatch:
    """The prompts continued with a case's arguments."""
    arguments = DEFAULTS | golden.arguments(f"gen_text.{case}")
    ids, seed = golden.inputs["gen_text.text_ids"], arguments["torch_manual_seed"]
    return generate_text_batch(
        golden.model,
        ids,
        golden.inputs["gen_text.attention_mask"],
        golden.pixels(golden.inputs["gen_text.image_index"]),
        golden.image_start(ids),
        _settings(arguments),
        TextRules(
            stop_ids=(golden.tokens["eos_token_id"], golden.tokens["soi_token_id"]),
            max_new_tokens=arguments["max_length"],
            # The official minimum counts the bos that decoding starts with.
            min_new_tokens=arguments["min_length"] - 1,
        ),
        num_return_sequences=arguments["num_captions"],
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        output_logits=f"gen_text.{case}.step_logits" in golden.output_keys,
    )


def _settings(arguments: Mapping[str, Any]) -> GenerationSettings:
    same = ("top_p", "temperature", "repetition_penalty", "length_penalty")
    samples = arguments["use_nucleus_sampling"]
    return GenerationSettings(
        num_beams=1 if samples else arguments["num_beams"],
        do_sample=samples,
        **{name: arguments[name] for name in same},
    )


def text_ids(golden: Golden, case: str) -> Tensor:
    return written(golden, case).ids


def step_logits(golden: Golden, case: str) -> Tensor:
    return torch.stack(written(golden, case).logits)


def sequence_scores(golden: Golden, case: str) -> Tensor:
    return written(golden, case).sequence_scores


def hypothesis_scores(golden: Golden, case: str) -> Tensor:
    return written(golden, case).hypothesis_scores


def option_scores(golden: Golden) -> Tensor:
    prefix = "scores.text_ids."
    names = (name.removeprefix(prefix) for name in golden.inputs if name.startswith(prefix))
    prompts, rows, num_images = sorted(names, key=int), [], 0
    for prompt in prompts:
        session = _read_prompt(golden, prompt, num_images)
        num_images += len(session.images)
        rows.append(score_options(session, _options(golden, prompt)))
    return torch.stack(rows)[:, None]


def _read_prompt(golden: Golden, prompt: str, first_image: int) -> InterleavedSession:
    """A session that has taken one prompt in; `first_image`: number of the prompt's first image."""
    session = InterleavedSession(golden.model)
    mask = golden.inputs[f"scores.attention_mask.{prompt}"].bool()
    ids = golden.inputs[f"scores.text_ids.{prompt}"][mask].tolist()
    image_index = golden.inputs["scores.image_index"][first_image:]
    while golden.tokens["soi_token_id"] in ids:
        start, number = ids.index(golden.tokens["soi_token_id"]), len(session.images)
        session.append_text(ids[:start])
        session.append_image(golden.pixels(image_index[number : number + 1]))
        ids = ids[start + 1 + golden.model.config.num_slots :]
    session.append_text(ids)
    return session


def _options(golden: Golden, prompt: str) -> list[list[int]]:
    """Ids of each option, without padding."""
    ids = golden.inputs[f"scores.options_ids.{prompt}"]
    mask = golden.inputs[f"scores.options_attn_masks.{prompt}"].bool()
    return [option[is_token].tolist() for option, is_token in zip(ids, mask, strict=True)]


OUTPUTS = {
    r"gen_text\.([^.]+)\.text_ids": text_ids,
    r"gen_text\.([^.]+)\.step_logits": step_logits,
    r"gen_text\.([^.]+)\.sequence_scores": sequence_scores,
    r"gen_text\.([^.]+)\.final_hypothesis_scores": hypothesis_scores,
    r"scores\.scores": option_scores,
}
