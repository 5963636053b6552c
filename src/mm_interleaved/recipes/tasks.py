"""The paper's training, task by task: each recipe a function that names its numbers, each with a small
version that runs on StoryWorld and a laptop, each also with low-rank additions.

Where numbers come from (see docs/training.md): the released configuration for pre-training; for fine-tuning,
which was never released, the nearest published runs on the same code base (DEEM, arXiv 2405.15232, and
VinaBench); where nobody has published any, our own choice, and the docstring says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from mm_interleaved.training.config import (
    TRAINED,
    CorpusConfig,
    LoraConfig,
    ObjectiveConfig,
    PartConfig,
    PartsConfig,
    SamplesConfig,
    TrainConfig,
)
from mm_interleaved.training.settings import StageConfig


def pretraining() -> TrainConfig:
    """Pre-training with the released mixture and numbers: 15,000 steps, about 11 billion tokens.

    Released: float16 with a loss scale (here bfloat16, `training.use_float16=true` for the same), 128 GPUs
    with 2.8 rows each a step on average (here 384 rows; GPUs times rows must divide it).
    `released_packing=true` fills rows as published.
    """
    pairs = CorpusConfig(kind="laion", max_images=30, few_shot_share=0.25, keep_pairs=True)
    web_pairs = replace(pairs, learn_text="after_image")
    return TrainConfig(
        seed=32,
        corpora={
            "blip2": pairs,
            "laion_en": web_pairs,
            "laion_coco": web_pairs,
            # Twice as often by micro-batch, and twice the rows in each.
            "mmc4": CorpusConfig(kind="mmc4", max_images=15, weight=4.0),
        },
        global_batch_size=384,
        num_workers=4,
        training=StageConfig(
            steps=15_000,
            learning_rate=1e-4,
            warmup_steps=1_000,
            decay_fraction=14 / 15,
            weight_decay=0.05,
            beta_2=0.995,
            epsilon=1e-6,
            use_bfloat16=None,
            save_every=500,
        ),
        parts=PartsConfig(
            gates=PartConfig(train=True, weight_decay=0.0),
            offsets=PartConfig(train=True, learning_rate=1e-5, weight_decay=0.0),
            unet=PartConfig(train=True, learning_rate=1e-5),
        ),
        objective=ObjectiveConfig(image_loss_weight=10.0, condition_dropout=0.1),
        frozen_type="auto",
        checkpoint_activations=True,
    )


def caption_vqa() -> TrainConfig:
    """Captioning and visual questions. Rates, betas, decay and steps as DEEM's run on this code base.

    The paper's list of corpora is not confirmed; these are those that DEEM names and we read.
    """
    return _fine_tuning(
        corpora={
            "coco_captions": CorpusConfig(kind="captions"),
            "vqav2": CorpusConfig(kind="vqa"),
            "okvqa": CorpusConfig(kind="vqa", weight=0.2),
            "textvqa": CorpusConfig(kind="vqa", weight=0.3),
            "llava_mix": CorpusConfig(kind="llava"),
        },
        steps=10_000,
        warmup_steps=500,
    )


def grounding() -> TrainConfig:
    """Referring expressions, boxes in thousandths. Steps and rates as DEEM's run (its flips and crops are not
    made here: a flip would need the words left and right exchanged).
    """
    return _fine_tuning(
        corpora={
            "refcoco": CorpusConfig(kind="refcoco"),
            "refcoco_plus": CorpusConfig(kind="refcoco"),
            "refcocog": CorpusConfig(kind="refcoco"),
            "flickr30k_entities": CorpusConfig(kind="flickr30k-entities"),
        },
        steps=20_000,
        warmup_steps=500,
        learning_rate=1e-6,
        language_rate=1e-7,
    )


def segmentation() -> TrainConfig:
    """Segmentation map to image. Nothing is published; rates as in pre-training, steps our choice."""
    return replace(
        pretraining(),
        corpora={"ade20k": CorpusConfig(kind="ade20k", learn_images="last", learn_text="none")},
        global_batch_size=128,
        training=replace(pretraining().training, steps=10_000, warmup_steps=500, decay_fraction=0.95),
    )


def storytelling() -> TrainConfig:
    """Visual storytelling. Rates, betas and steps as VinaBench's run on this code base."""
    return TrainConfig(
        corpora={
            "vist": CorpusConfig(kind="vist", options='{"num_given": 0}'),
            "pororosv": CorpusConfig(kind="pororosv", options='{"num_given": 0}'),
            "flintstonessv": CorpusConfig(kind="flintstonessv", options='{"num_given": 0}'),
        },
        global_batch_size=128,
        num_workers=4,
        training=StageConfig(
            steps=40_000,
            learning_rate=1e-5,
            warmup_steps=2_000,
            decay_fraction=0.95,
            weight_decay=0.05,
            beta_2=0.98,
            use_bfloat16=None,
            save_every=1_000,
        ),
        parts=PartsConfig(
            offsets=PartConfig(train=True, learning_rate=1e-4, weight_decay=0.0),
            gates=PartConfig(train=True, weight_decay=0.0),
            unet=PartConfig(train=True, learning_rate=1e-4),
        ),
        objective=ObjectiveConfig(image_loss_weight=10.0, condition_dropout=0.1),
        frozen_type="auto",
        checkpoint_activations=True,
    )


def instructions() -> TrainConfig:
    """Multi-modal instructions in LLaVA's form, multi-turn. Numbers as for captions and questions."""
    return _fine_tuning(corpora={"llava": CorpusConfig(kind="llava")}, steps=10_000, warmup_steps=500)


def interleaved_instructions() -> TrainConfig:
    """Instructions whose answers hold text and images (CoMM and our own format). Numbers are our choice:
    language as for instructions, images as in pre-training.
    """
    config = instructions()
    return replace(
        config,
        corpora={"documents": CorpusConfig(kind="documents")},
        parts=replace(
            config.parts, image_synchronizers=TRAINED, conditioning_resampler=TRAINED,
            unet=PartConfig(train=True, learning_rate=1e-5),
        ),
        objective=ObjectiveConfig(image_loss_weight=10.0, condition_dropout=0.1),
    )  # fmt: skip


def _fine_tuning(
    *,
    corpora: Mapping[str, CorpusConfig],
    steps: int,
    warmup_steps: int,
    learning_rate: float = 1e-5,
    language_rate: float = 1e-6,
) -> TrainConfig:
    """Fine-tuning of all but the image decoder: these corpora have no image to generate."""
    language = PartConfig(train=True, learning_rate=language_rate)
    still = PartConfig()
    return TrainConfig(
        corpora=corpora,
        global_batch_size=128,
        num_workers=4,
        training=StageConfig(
            steps=steps,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            decay_fraction=1 - warmup_steps / steps,
            weight_decay=0.05,
            beta_2=0.999,
            use_bfloat16=None,
            save_every=500,
        ),
        parts=PartsConfig(
            language=language, text_head=language, gates=PartConfig(train=True, weight_decay=0.0),
            image_synchronizers=still, conditioning_resampler=still, unet=still,
        ),
        objective=ObjectiveConfig(image_loss_weight=0.0),
        checkpoint_activations=True,
    )  # fmt: skip


_STORYWORLD_CORPORA: Mapping[str, Mapping[str, CorpusConfig]] = {
    "pretrain": {
        "pairs": CorpusConfig(kind="storyworld", paths=("draw", "caption"), learn_prompts=True, weight=3.0),
        "stories": CorpusConfig(kind="storyworld", paths=("story",), learn_prompts=True, weight=4.0),
    },
    "caption-vqa": {
        "captions": CorpusConfig(kind="storyworld", paths=("caption", "paragraph")),
        "questions": CorpusConfig(kind="storyworld", paths=("vqa", "dialogue")),
    },
    "grounding": {"ground": CorpusConfig(kind="storyworld", paths=("ground",))},
    "segmentation": {
        "maps": CorpusConfig(
            kind="storyworld", paths=("segmentation",), learn_images="last", learn_text="none"
        )
    },
    "storytelling": {"stories": CorpusConfig(kind="storyworld", paths=("story", "story_last", "story_all"))},
    "instructions": {"dialogues": CorpusConfig(kind="storyworld", paths=("interview", "dialogue", "vqa"))},
    "interleaved-instructions": {
        "edits": CorpusConfig(kind="storyworld", paths=("edit", "draw")),
        "stories": CorpusConfig(kind="storyworld", paths=("story", "few_shot")),
    },
}
_FULL_SIZE: Mapping[str, Callable[[], TrainConfig]] = {
    "pretrain": pretraining,
    "caption-vqa": caption_vqa,
    "grounding": grounding,
    "segmentation": segmentation,
    "storytelling": storytelling,
    "instructions": instructions,
    "interleaved-instructions": interleaved_instructions,
}


def _on_storyworld(name: str) -> TrainConfig:
    """The recipe at StoryWorld's size: its parts and objective, rates for a model of some million weights.

    The same parts train, so that what the recipe states is what is tried; a part's rate keeps its ratio to
    the run's.
    """
    full = _FULL_SIZE[name]()
    rate = 3e-4
    scale = rate / full.training.learning_rate
    parts = {
        part: replace(how, learning_rate=None if how.learning_rate is None else how.learning_rate * scale)
        for part in PartsConfig.__dataclass_fields__
        for how in (getattr(full.parts, part),)
    }
    return replace(
        full,
        start_from="storyworld",
        seed=1,
        corpora=_STORYWORLD_CORPORA[name],
        max_length=384,
        global_batch_size=8,
        micro_batch_size=4,
        num_workers=0,
        training=replace(
            full.training, steps=200, learning_rate=rate, warmup_steps=20, decay_fraction=0.5,
            weight_decay=0.01, save_every=50, log_every=10,
        ),
        parts=PartsConfig(**parts),
        # The shipped model weighs both losses alike.
        objective=replace(
            full.objective, image_loss_weight=None if full.objective.image_loss_weight else 0.0
        ),
        frozen_type="float32",
        checkpoint_activations=False,
        samples=SamplesConfig(every=0),
    )  # fmt: skip


def _with_low_rank(config: TrainConfig, *, rank: int, learning_rate: float) -> TrainConfig:
    """The same run with language model and U-Net frozen, and additions of low rank to them.

    Rank and rate are those that LLaVA publishes for its low-rank run; `lora.quantize=nf4` makes it QLoRA.
    """
    still = PartConfig()
    parts = ("language", "unet") if config.objective.image_loss_weight != 0.0 else ("language",)
    return replace(
        config,
        parts=replace(
            config.parts, language=still, text_head=still, unet=still,
            lora=PartConfig(train=True, learning_rate=learning_rate, weight_decay=0.0),
        ),
        lora=LoraConfig(rank=rank, alpha=2.0 * rank, parts=parts),
    )  # fmt: skip


def task_recipes() -> dict[str, Callable[[], TrainConfig]]:
    """All recipes by name: `grounding`, `grounding-lora`, `grounding-storyworld`, ..."""
    recipes: dict[str, Callable[[], TrainConfig]] = {}
    for name, full_size in _FULL_SIZE.items():
        recipes[name] = full_size
        recipes[f"{name}-lora"] = lambda make=full_size: _with_low_rank(make(), rank=128, learning_rate=2e-4)
        recipes[f"{name}-storyworld"] = lambda name=name: _on_storyworld(name)
        recipes[f"{name}-storyworld-lora"] = lambda name=name: _with_low_rank(
            _on_storyworld(name), rank=8, learning_rate=1e-3
        )
    return recipes
