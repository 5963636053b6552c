"""A story of many images: what a round costs with a cache, and when the whole document is read again.

Tokens and images are scripted, so both sides see the same document. The side without a cache follows the
released script: in every round it encodes all images and reads the whole document twice, once for the text
and once for the image, the second time with a grey image in the place of the one to come. Both use our
synchronizers, so the ratio is that of the cache alone.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import TOLERANCE, Case, Setting, cpu_seconds, peak_bytes, wait
from benchmarks.models import BOS, IMAGE_SIZE, random_model, writer_config
from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.models.transformers_versions import CACHE

ROUND_TOKENS = 40
"""Of text in a round, as in reference texts."""


@dataclass(slots=True)
class Work:
    """What the model computed."""

    prefilled: int = 0
    """Tokens read in passes of more than one."""
    decoded: int = 0
    """Tokens read one by one."""
    encoded: int = 0
    """Images."""
    passes: int = 0
    """Of the language model, and `encodings` of the image encoder: each reads all its weights."""
    encodings: int = 0
    attended: int = 0
    """Tokens whose keys and values a pass reads, of all passes."""

    def bytes(self, model: Any) -> int:
        """What memory must deliver at least: weights in every pass, keys and values."""
        text = model.config.text_config
        language, vision = (
            sum(each.numel() for each in part.parameters()) for part in (model.language_model, model.vision)
        )
        cached = 2 * text.num_hidden_layers * text.hidden_size * self.attended
        return model.dtype.itemsize * (self.passes * language + self.encodings * vision + cached)


@dataclass(slots=True)
class StoryRun:
    """A finished story: what the last image is conditioned on, and what each round took."""

    hidden: Tensor
    seconds: list[float] = field(default_factory=list)
    work: Work = field(default_factory=Work)


def run(setting: Setting) -> Iterator[Case]:
    if setting.is_gpu and not setting.quick:
        config = writer_config(
            hidden=5120, layers=40, intermediate=13824, heads=40, value_dim=1024, vision_dim=1024
        )
    elif not setting.quick:
        # Twenty rounds that read all again are many: a smaller model.
        config = writer_config(hidden=128, layers=2, intermediate=256, heads=2, value_dim=64)
    else:
        config = writer_config(hidden=256, layers=4, intermediate=512, heads=4, value_dim=128)
    lengths = (2, 10) if setting.quick else (2, 5, 10, 20)
    model = random_model(config, setting.device, setting.dtype)
    for rounds in lengths:
        yield story_case(setting, model, rounds, num_tokens=ROUND_TOKENS, repeats=2 if rounds <= 10 else 1)


def story_case(setting: Setting, model: Any, rounds: int, *, num_tokens: int, repeats: int) -> Case:
    """Both sides in turns; the times of a round are medians over the turns."""
    runs: dict[str, list[StoryRun]] = {"read again": [], "remembered": []}
    peaks = {}
    for name, way in (("read again", run_recomputing), ("remembered", run_incrementally)):
        with peak_bytes(setting.device) as peak:
            way(model, rounds, num_tokens)
        peaks[name] = peak["bytes"]
    for _ in range(repeats):
        runs["read again"].append(run_recomputing(model, rounds, num_tokens))
        runs["remembered"].append(run_incrementally(model, rounds, num_tokens))
    expected, found = runs["read again"][0].hidden, runs["remembered"][0].hidden
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    curve = {
        name: [statistics.median(times) for times in zip(*(each.seconds for each in turns), strict=True)]
        for name, turns in runs.items()
    }
    seconds = {name: sum(each) for name, each in curve.items()}
    work = {name: turns[0].work for name, turns in runs.items()}
    forgot, kept = work["read again"], work["remembered"]
    # Neighbours of the second and the last round are averaged with them: single rounds are too short to time.
    last, early = curve["remembered"][-3:], curve["remembered"][1:4]
    return {
        "images": rounds,
        "words_a_round": num_tokens,
        "ratio": seconds["read again"] / seconds["remembered"],
        "equal": error <= TOLERANCE[setting.dtype],
        "error": {"read again": 0.0, "remembered": error},
        "seconds": seconds,
        "rounds": curve,
        "last_to_second_round": curve["remembered"][-1] / curve["remembered"][1],
        "last_to_second_round_smoothed": statistics.median(last) / statistics.median(early),
        "tokens_prefilled": {"read again": forgot.prefilled, "remembered": kept.prefilled},
        "tokens_decoded": {"read again": forgot.decoded, "remembered": kept.decoded},
        "images_encoded": {"read again": forgot.encoded, "remembered": kept.encoded},
        "peak_bytes": peaks,
        "bytes": {name: each.bytes(model) for name, each in work.items()},
        "model_ratio": forgot.prefilled / kept.prefilled,
        "model_ratio_bytes": forgot.bytes(model) / kept.bytes(model),
        "images_ratio": forgot.encoded / kept.encoded,
    }


def expected_work(rounds: int, num_tokens: int, slots: int) -> dict[str, Work]:
    """What both sides must do, from the shape of the story; an image takes its start token and its slots."""
    a_round = num_tokens + 1 + slots
    again, kept = Work(), Work()
    for number in range(rounds):
        # The first pass of all reads one token, which is no prefill.
        again.prefilled += (number * a_round + 1 if number else 0) + (number + 1) * a_round + 1
        again.decoded += num_tokens + (0 if number else 1)
        again.encoded += number + number + 1
        kept.prefilled += slots + 1 if number else 2
        kept.decoded += num_tokens - 1 + 1
        kept.encoded += 1
    return {"read again": again, "remembered": kept}


def image_of_round(number: int, model: Any) -> Tensor:
    """The image of a round: (1, 3, H, W), in [0, 1]."""
    generator = torch.Generator().manual_seed(number)
    return torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(model.device, model.dtype)


def text_of(number: int, num_tokens: int) -> list[int]:
    """The token ids of a round."""
    return [3 + (7 * number + 11 * token) % 900 for token in range(num_tokens)]


@torch.inference_mode()
def run_incrementally(model: Any, rounds: int, num_tokens: int) -> StoryRun:
    """One session from the first token to the last image."""
    clock = time.perf_counter if model.device.type == "cuda" else cpu_seconds
    with counted(model) as work:
        session, story = InterleavedSession(model), StoryRun(torch.empty(0), work=work)
        session.append_text([BOS])
        for number in range(rounds):
            begin = clock()
            for token in text_of(number, num_tokens):
                session.append_text([token])
                session.read()
            session.start_image()
            hidden = session.read()
            session.finish_image(image_of_round(number, model))
            wait(model.device)
            story.seconds.append(clock() - begin)
        story.hidden = hidden.clone()
    return story


@torch.inference_mode()
def run_recomputing(model: Any, rounds: int, num_tokens: int) -> StoryRun:
    """A new session for every text and for every image."""
    grey = torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 0.5, device=model.device, dtype=model.dtype)
    clock = time.perf_counter if model.device.type == "cuda" else cpu_seconds
    with counted(model) as work:
        story = StoryRun(torch.empty(0), work=work)
        for number in range(rounds):
            begin = clock()
            session = _read_again(model, number, num_tokens)
            session.read()
            for token in text_of(number, num_tokens):
                session.append_text([token])
                session.read()
            session = _read_again(model, number, num_tokens)
            session.append_text(text_of(number, num_tokens))
            session.append_image(grey)
            story.hidden = session.read()[:, : session.image_starts[-1] + 1].clone()
            wait(model.device)
            story.seconds.append(clock() - begin)
    return story


def _read_again(model: Any, rounds: int, num_tokens: int) -> InterleavedSession:
    session = InterleavedSession(model)
    session.append_text([BOS])
    for number in range(rounds):
        session.append_text(text_of(number, num_tokens))
        session.append_image(image_of_round(number, model))
    return session


@contextmanager
def counted(model: Any) -> Iterator[Work]:
    """Counts what a model does within."""
    work = Work()

    def see(module: Any, arguments: tuple[Any, ...]) -> None:
        work.encoded += len(arguments[0])
        work.encodings += 1

    def read(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows, length = named["inputs_embeds"].shape[:2]
        tokens, cache = rows * length, named.get(CACHE)
        work.passes += 1
        work.attended += rows * (length + (0 if cache is None else cache.get_seq_length()))
        if length > 1:
            work.prefilled += tokens
        else:
            work.decoded += tokens

    hooks = [
        model.vision.register_forward_pre_hook(see),
        model.language_model.register_forward_pre_hook(read, with_kwargs=True),
    ]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()
