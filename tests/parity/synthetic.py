"""A folder of the golden shape out of our own model: random weights, other widths, any number of rows.

    python tests/parity/synthetic.py OUT --rows 4

It shows that the comparison runs for other shapes than those of the official folders, and finds what is
damaged: packed documents, documents with none to four images, rows padded on the left or right, rows without
any image, other names of cases, other levels and layers. It says nothing about the official code.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from golden import Golden
from producers import produce
from safetensors.torch import save_file
from torch import Tensor

from mm_interleaved.checkpoint.key_map import to_official
from mm_interleaved.checkpoint.released_config import RELEASED, released_config
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration

NUM_WORDS, NUM_SLOTS, NUM_LATENT_CHANNELS, LATENT_SIZE, TARGET_SIZE = 40, 3, 4, 8, 64
TOKENS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": NUM_WORDS - 1,
    "soi_token_id": NUM_WORDS,
    "image_token_id": NUM_WORDS + 1,
}
BOS, EOS, PAD, START, SLOT = TOKENS.values()
FIRST_WORD = 3
# Documents of each row, repeated from the first on where there are more rows: T for words, I for an image, a
# full stop for an end.
ROWS = (
    ("IT.", "T.", "TIT."),
    ("TITITITI",),
    ("T.", "T"),
    ("TITIT.", "T."),
    ("TI.",),
    ("T",),
    ("T.", "TI"),
    ("TITT.",),
)
PROMPTS = ("TIT", "ITITIT", "T", "TI", "T", "IT", "T", "TIT")
STORIES = ("TIT", "TITITIT", "T", "T", "TIT", "T", "T", "T")
"""What stands before a picture that is to be made."""
TOLERANCE = 6e-5
"""Of an output's largest value."""


# ---- Configuration and weights -------------------------------------------------------------------


def configuration(rows: int) -> dict[str, Any]:
    """`config.json`: the released numbers with small widths, none of them those of golden-a."""
    parts = {
        "llm": {
            "vocab_size": NUM_WORDS,
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "max_position_embeddings": 320,
        },
        "clip": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
        },
        "unet": {
            "sample_size": LATENT_SIZE,
            "block_out_channels": [8, 16, 16, 24],
            "attention_head_dim": [1, 2, 2, 3],
            "cross_attention_dim": 24,
            "norm_num_groups": 4,
        },
        "vae": {"sample_size": TARGET_SIZE, "block_out_channels": [4, 8, 8, 8], "norm_num_groups": 4},
        "model": _model_arguments(),
    }
    config = {name: RELEASED[name] | changes for name, changes in parts.items()}
    return config | {"meta": _cases(rows), "effective": {"scheduler": RELEASED["scheduler"]}}


def _model_arguments() -> dict[str, Any]:
    perceiver = {"num_attention_heads": 2, "intermediate_size": 40}
    return {
        "num_img_token": NUM_SLOTS,
        "txt_vocab_size": NUM_WORDS + 2,
        "image_embed_dim": 16,
        "cross_attention_frequency": 2,
        "spatial_shapes": [16, 8],
        "loss_img_weight": 3.0,
        "special_token_dict": TOKENS,
        "visual_tokenizer_config": {
            "perceiver_config": perceiver
            | {
                "num_queries": NUM_SLOTS,
                "hidden_size": 20,
                "cross_attention_frequency": 2,
                "num_hidden_layers": 2,
                "qk_normalization": True,
            }
        },
        "image_decoder_config": {
            "seq_len": 5,
            "image_size": TARGET_SIZE,
            "sd_base_seed": 7,
            "perceiver_config": perceiver
            | {
                "num_queries": 5,
                "hidden_size": 24,
                "cross_attention_frequency": 1,
                "num_hidden_layers": 1,
            },
        },
    }


def _cases(rows: int) -> dict[str, Any]:
    """`meta`: the arguments of each case."""
    image = {"guidance_scale": 2.0, "num_inference_steps": 2, "scheduler": "ddpm"}
    return {
        "forward": {
            "hidden_state_layers": ["final", 2, 0],
            "variant_arguments": {
                "offset_of_all": {"ignore_prompt_token_offset": 5},
                "offset_of_each": {"ignore_prompt_token_offset": [3 + 2 * row for row in range(rows)]},
                "other_weights": {"loss_img_weight": 5.0, "loss_txt_weight": 0.4},
            },
        },
        "mmfs_sd.first": {"block": 0},
        "mmfs_sd.middle": {"block": "mid"},
        "gen_text.greedy": {"num_beams": 1, "max_length": 8, "min_length": 2, "repetition_penalty": 2.0},
        "gen_text.beams": {"num_beams": 3, "max_length": 6, "min_length": 3, "repetition_penalty": 1.2},
        "gen_text.captions": {"num_beams": 2, "max_length": 5, "num_captions": 2, "length_penalty": 2.0},
        "gen_text.sampled": {"use_nucleus_sampling": True, "max_length": 5, "torch_manual_seed": 3},
        "gen_image.guided": image,
        "gen_image.unguided": image | {"guidance_scale": 1.0, "scheduler": "ddim"},
        "gen_image.two_of_one": image | {"num_validation_images": 2},
    }


def random_model(config: dict[str, Any], seed: int) -> MMInterleavedForConditionalGeneration:
    """A model in which every parameter matters: what starts at zero gets random values too."""
    parts = {name: config[name] for name in ("llm", "clip", "unet", "vae", "model")}
    torch.manual_seed(seed)
    model = MMInterleavedForConditionalGeneration(
        released_config(**parts, scheduler=config["effective"]["scheduler"])
    )
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.3)
    model.text_head.base.bias.data.zero_()
    model.text_head.new.bias.data.zero_()
    return model


# ---- Inputs --------------------------------------------------------------------------------------


class Draws:
    """Random tensors and documents of one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From `low` to `high`, inclusive."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def pixels(self, *shape: int) -> Tensor:
        return self.integers(0, 255, *shape).to(torch.uint8)

    def features(self, *shape: int) -> Tensor:
        return self.integers(-96, 96, *shape).to(torch.int8)

    def mask(self, *shape: int) -> Tensor:
        """Ones and zeros, the last element one."""
        mask = self.integers(0, 1, *shape)
        mask.view(-1)[-1] = 1
        return mask

    def words(self) -> list[int]:
        return self.integers(FIRST_WORD, PAD - 1, int(self.integers(1, 4, 1))).tolist()

    def document(self, parts: str) -> list[int]:
        """Ids of a document, see `ROWS`."""
        parts_of = {"T": self.words, "I": lambda: [START] + [SLOT] * NUM_SLOTS, ".": lambda: [EOS]}
        return [BOS, *(token for part in parts for token in parts_of[part]())]


def inputs(rows: int, seed: int) -> dict[str, Tensor]:
    """`inputs.safetensors`."""
    draw = Draws(seed)
    tensors = _forward_inputs(draw, rows)
    num_images = len(tensors["forward.image_tensors_u8"])
    return (
        tensors
        | _prompt_inputs(draw, rows, num_images)
        | _picture_inputs(draw, rows, num_images)
        | _score_inputs(draw, rows, num_images)
        | _synchronizer_inputs(draw)
        | {"vae_decode.latents": draw.normal(2, NUM_LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)}
    )


def _forward_inputs(draw: Draws, rows: int) -> dict[str, Tensor]:
    ids = [[token for parts in row for token in draw.document(parts)] for row in _cycled(ROWS, rows)]
    table, mask = _padded(ids, [row % 2 == 1 for row in range(rows)])
    num_images = int((table == START).sum())
    latent = (num_images, NUM_LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    return {
        "forward.text_ids": table,
        "forward.attention_mask": mask,
        "forward.num_image_per_seq": (table == START).sum(1),
        "forward.image_tensors_u8": draw.pixels(num_images, 3, 224, 224),
        "forward.image_tensors_dec_u8": draw.pixels(num_images, 3, TARGET_SIZE, TARGET_SIZE),
        "forward.timesteps": draw.integers(0, 999, num_images),
        "forward.diffusion_noise": draw.normal(*latent),
        "forward.vae_sample_noise": draw.normal(*latent),
        "forward.variant.image_loss_mask.image_loss_mask": draw.mask(num_images),
        "forward.variant.uncond.drop_mask": draw.mask(num_images),
    }


def _prompt_inputs(draw: Draws, rows: int, num_images: int) -> dict[str, Tensor]:
    """Prompts padded on the left."""
    table, mask = _padded([draw.document(parts) for parts in _cycled(PROMPTS, rows)], [True] * rows)
    return {
        "gen_text.text_ids": table,
        "gen_text.attention_mask": mask,
        "gen_text.image_index": draw.integers(0, num_images - 1, int((table == START).sum())),
    }


def _picture_inputs(draw: Draws, rows: int, num_images: int) -> dict[str, Tensor]:
    """Documents that each end in an image that is to be made, so far a placeholder."""
    stories = _cycled(STORIES, rows)
    table, mask = _padded([draw.document(parts + "I") for parts in stories], [False] * rows)
    index = draw.integers(0, num_images - 1, int((table == START).sum()))
    last = torch.tensor([parts.count("I") + 1 for parts in stories]).cumsum(0) - 1
    index[last] = -1
    return {
        "gen_image.text_ids": table,
        "gen_image.attention_mask": mask,
        "gen_image.image_index": index,
        "gen_image.two_of_one.target_image_idxs": last[-1:].clone(),
        "gen_image.unguided.target_image_idxs": last[:2].clone(),
    }


def _score_inputs(draw: Draws, rows: int, num_images: int) -> dict[str, Tensor]:
    """Prompts of one image, each with three options of one to four words."""
    tensors = {"scores.image_index": draw.integers(0, num_images - 1, rows)}
    for row in range(rows):
        prompt = torch.tensor(draw.document("TIT"))
        options, mask = _padded([draw.words() for _ in range(3)], [False] * 3)
        tensors |= {
            f"scores.text_ids.{row}": prompt,
            f"scores.attention_mask.{row}": torch.ones_like(prompt),
            f"scores.options_ids.{row}": options,
            f"scores.options_attn_masks.{row}": mask,
        }
    return tensors


def _synchronizer_inputs(draw: Draws) -> dict[str, Tensor]:
    """Three images seen by queries of two rows; then the U-Net's first and middle maps."""
    cells = sum(size * size for size in (16, 8))
    tensors = {
        "mmfs_llm.read.query": draw.normal(2, 4, 48),
        "mmfs_llm.read.features_i8": draw.features(2, 3, cells, 16),
        "mmfs_llm.read.mask": draw.mask(2, 4, 3).float(),
        "mmfs_llm.word.query": draw.normal(2, 1, 48),
        "mmfs_llm.word.features_i8": draw.features(2, 1, cells, 16),
        "mmfs_llm.word.mask": draw.mask(2, 3, 1).float(),
    }
    for level, size in enumerate((64, 32, 16, 8)):
        tensors[f"mmfs_sd.pool_i8.{level}"] = draw.features(3, 16, size, size)
    for case, channels, size in (("first", 8, LATENT_SIZE), ("middle", 24, LATENT_SIZE // 8)):
        tensors |= {
            f"mmfs_sd.{case}.image_index": draw.integers(0, 2, 2, 3),
            f"mmfs_sd.{case}.mask": draw.mask(2, 3),
            f"mmfs_sd.{case}.sample": draw.normal(2, channels, size, size),
        }
    return tensors


def _cycled(values: tuple, count: int) -> list:
    return [values[i % len(values)] for i in range(count)]


def _padded(rows: list[list[int]], on_the_left: list[bool]) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and their mask."""
    longest = max(map(len, rows))
    padding = [[PAD] * (longest - len(row)) for row in rows]
    ids = [
        pad + row if left else row + pad for row, pad, left in zip(rows, padding, on_the_left, strict=True)
    ]
    is_left = torch.tensor(on_the_left)[:, None]
    length = torch.tensor([len(row) for row in rows])[:, None]
    place = torch.arange(longest)
    mask = torch.where(is_left, place >= longest - length, place < length)
    return torch.tensor(ids), mask.long()


# ---- Outputs -------------------------------------------------------------------------------------


def output_keys() -> Iterator[str]:
    """What the folder shows: something of everything."""
    yield from ("vt.vis_embed", "vt.image_embeds", "vt.multiscale_features.2", "vt.debug.spm_c3")
    yield from (f"vt.debug.{name}" for name in ("pre_layrnorm", "injector0_out", "perceiver_out"))
    yield from (f"vt.debug.interaction2_{part}" for part in ("x", "cls", "c"))
    yield from (f"forward.{name}" for name in ("mm_embeds", "cross_attention_mask", "mmfs_features_mm"))
    yield from (f"forward.{name}" for name in ("llm_hidden_states", "mm_hidden_state", "text_logits"))
    yield from (f"forward.{name}" for name in ("context_features", "context_attention_mask"))
    yield from (f"forward.{name}" for name in ("perceiver_out", "mmfs_features.3", "mmfs_mask"))
    yield from (f"forward.{name}" for name in ("vae_mean", "vae_logvar", "latents", "noisy_latents"))
    yield from (f"forward.{name}" for name in ("unet_pred", "unet_pred_without_mmfs"))
    yield from (f"forward.unet_debug.{name}" for name in ("res1_in", "res1_mmfs_delta", "mid_mmfs_delta"))
    yield from ("forward.mmfs_context_image_index", "forward.loss_img_per_image_unmasked")
    variants = ("ignore_noimage", "offset_of_all", "offset_of_each", "image_loss_mask", "other_weights")
    for prefix in ("forward", *(f"forward.variant.{variant}" for variant in variants)):
        yield from (f"{prefix}.{name}" for name in ("gt_text_ids", "loss", "loss_txt", "loss_img"))
    yield from (f"forward.variant.uncond.{name}" for name in ("loss_img", "unet_pred"))
    yield from (f"gen_text.{case}.text_ids" for case in ("greedy", "beams", "captions", "sampled"))
    yield "gen_text.greedy.step_logits"
    yield from (f"gen_text.{case}.sequence_scores" for case in ("beams", "captions"))
    yield "gen_text.beams.final_hypothesis_scores"
    yield "scores.scores"
    yield from ("gen_image.context_features", "gen_image.context_attention_mask")
    yield from (f"gen_image.guided.trace.{name}" for name in ("latents_in", "unet_out"))
    yield from (f"gen_image.two_of_one.final_latents.val{number}" for number in range(2))
    for case in ("guided", "unguided", "two_of_one"):
        yield from (f"gen_image.{case}.{name}" for name in ("perceiver_out", "mmfs_mask_in_unet", "image_u8"))
    yield from ("gen_image.guided.image_first", "gen_image.unguided.final_latents")
    for case in ("read", "word"):
        yield from (f"mmfs_llm.{case}.layer2.{name}" for name in ("mmfs_core_out", "cross_attn_out"))
    yield "mmfs_llm.read.layer0.debug.point_weights"
    yield from ("mmfs_sd.first.block_out", "mmfs_sd.middle.block_out")
    yield from ("vae_decode.image_raw", "schedule.betas")


def make(folder: Path, rows: int, seed: int = 1) -> Golden:
    """Write the five files of a folder; what comes back has computed it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(rows)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(to_official(random_model(config, seed).state_dict()), folder / "model.safetensors")
    save_file(inputs(rows, seed), folder / "inputs.safetensors")
    golden = Golden(folder)
    golden.output_keys = sorted(output_keys())
    outputs = {key: produce(golden, key).contiguous().clone() for key in golden.output_keys}
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "tolerances.json").write_text(json.dumps({k: _tolerance(v) for k, v in outputs.items()}))
    return golden


def _tolerance(output: Tensor) -> dict[str, Any]:
    if not output.is_floating_point():
        return {"exact": True}
    return {"suggested_atol": TOLERANCE * float(output.abs().max()), "max_abs": float(output.abs().max())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    make(given.out, given.rows, given.seed)
