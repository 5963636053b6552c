"""Every number of a run that trains a model on documents: what `--set` takes, and what stands beside a
checkpoint.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from mm_interleaved.devices import FORMATS
from mm_interleaved.errors import UsageError
from mm_interleaved.models.prediction_types import PREDICTION_TYPES
from mm_interleaved.training.settings import DECAY, FACTOR, PROCESSES, RATE, SIZE, StageConfig, check_ranges
from mm_interleaved.typed_settings import COUNT, NUMBER, SEED, SHARE, Choice, Range

LORA_PARTS = ("language", "unet")
QUANTIZATIONS = ("", "nf4", "int8")
STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """One corpus of the mixture."""

    kind: str
    """Its format, e.g. `mmc4`, `llava`, `documents` (see docs/data.md)."""
    paths: tuple[str, ...] = ()
    """Files, globs or addresses; of a generated corpus, its tasks."""
    images: str | None = None
    """Folder, address or tars of the images; none = where the format has them."""
    options: str = ""
    """Further settings of the format, as a JSON object."""
    weight: Annotated[float, FACTOR] = 1.0
    """Share of the rows, against the other weights."""
    max_images: Annotated[int | None, COUNT] = None
    """Images a row."""
    learn_text: str = "all"
    """What text counts where a document does not say: `all`, `after_image` or `none`."""
    learn_images: str = "all"
    """What images count: `all`, `last` or `none`."""
    learn_prompts: bool = False
    """What is asked counts as well as the answer (pre-training)."""
    few_shot_share: Annotated[float, SHARE] = 0.0
    """How often documents are merged into few-shot documents, 0 to 1; never with `released_packing`, as the
    published loader does not."""
    shuffle_block: Annotated[int, SIZE] = 256
    """Documents that are read, shuffled and merged together; 1 keeps the order of the files."""
    keep_pairs: bool = False
    """With `released_packing`: what would lose its image at a row's end goes into the next row as a whole."""
    too_long: str = "cut"
    """What happens to a document that is longer than a row: `cut` at the borders of its parts, or `skip`."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def source_settings(self) -> dict[str, Any]:
        """What the source of this format is made with.

        Raises:
            UsageError: `options` is no JSON object.
        """
        try:
            options = json.loads(self.options) if self.options else {}
        except ValueError as error:
            raise UsageError(f"options of a corpus: expected a JSON object ({error})") from error
        if not isinstance(options, dict):
            raise UsageError(f"options of a corpus: expected a JSON object, found {self.options!r}")
        images = {} if self.images is None else {"images": self.images}
        return {"paths": list(self.paths), **images, **options}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank additions to frozen layers (arXiv 2106.09685), through PEFT."""

    rank: Annotated[int, Range(0, 2**16)] = 0
    """Rank of the additions; 0 = none."""
    alpha: Annotated[float, FACTOR] = 16.0
    """Additions are scaled by alpha / rank."""
    dropout: Annotated[float, DECAY] = 0.0
    """Dropout of what goes into them."""
    parts: tuple[str, ...] = LORA_PARTS
    """Whose linear layers get one: `language`, `unet`."""
    quantize: str = ""
    """Keep the frozen language model in 4 bits (`nf4`: QLoRA, arXiv 2305.14314) or 8 (`int8`), through
    bitsandbytes; empty = do not."""

    def __post_init__(self) -> None:
        check_ranges(self)
        unknown = sorted(set(self.parts) - set(LORA_PARTS))
        if unknown:
            raise UsageError(f"lora.parts must be some of {', '.join(LORA_PARTS)}, found {unknown[0]!r}")
        if self.quantize not in QUANTIZATIONS:
            raise UsageError(f"lora.quantize must be nf4, int8 or empty, found {self.quantize!r}")
        if self.quantize and not self.rank:
            raise UsageError("lora.quantize freezes the language model for good; set lora.rank above 0 too")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesConfig:
    """Documents that are continued while the model trains."""

    every: Annotated[int, NUMBER] = 0
    """Steps between two pages of samples; 0 = never."""
    documents: str = ""
    """A file of documents with holes; empty = those of the recipe."""
    count: Annotated[int, COUNT] = 4
    """How many documents."""
    num_inference_steps: Annotated[int, Range(1, 1000)] = 20
    """Denoising steps an image."""
    max_new_tokens: Annotated[int, COUNT] = 64
    """Tokens of a text."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised. None leaves a setting as the model's configuration has it."""

    text_loss_weight: Annotated[float | None, FACTOR] = None
    """Factor of the next-token loss."""
    image_loss_weight: Annotated[float | None, FACTOR] = None
    """Factor of the denoising loss."""
    condition_dropout: Annotated[float | None, SHARE] = None
    """How often an image is denoised without its text context, 0 to 1 (arXiv 2207.12598)."""
    prediction_type: str | None = None
    """What the U-Net predicts: `epsilon`, the noise; `v_prediction`, the velocity (arXiv 2202.00512);
    `sample`, the clean latents."""
    synchronizer_dropout: Annotated[float, SHARE] = 0.0
    """How often an image is denoised without attending to earlier images, 0 to 1."""
    min_snr_gamma: Annotated[float | None, Range(0, 1e6, excludes_low=True)] = None
    """Highest signal-to-noise ratio that counts in full (arXiv 2303.09556; there 5); None weighs all steps
    alike."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            known = " or ".join(PREDICTION_TYPES)
            raise UsageError(f"prediction_type must be {known}, found {self.prediction_type!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over the processes that torchrun started."""

    strategy: str = "ddp"
    """`ddp`: every process holds the whole model; `fsdp`: each holds a share of every weight (FSDP2)."""
    shard_ranks: Annotated[int, NUMBER] = 0
    """FSDP: over how many neighbouring ranks a weight is spread; 0 = all; a node's GPUs = hybrid sharding."""
    reshard_after_forward: bool = True
    """FSDP: gather weights once more for the backward pass instead of keeping them (less memory)."""
    timeout_seconds: Annotated[int, Range(1, 1e7)] = 600
    """How long a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.strategy not in STRATEGIES:
            raise UsageError(f"strategy must be {' or '.join(STRATEGIES)}, found {self.strategy!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartConfig:
    """How one part learns."""

    train: bool = False
    """Its weights change."""
    learning_rate: Annotated[float | None, RATE] = None
    """Its highest learning rate; none = the run's."""
    weight_decay: Annotated[float | None, RATE] = None
    """Its weight decay; none = the run's."""

    def __post_init__(self) -> None:
        check_ranges(self)


TRAINED = PartConfig(train=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsConfig:
    """Every part of a model; by default all that the paper adds learns, and what is pretrained stays."""

    vision: PartConfig = field(default_factory=PartConfig)
    """CLIP's transformer."""
    adapter: PartConfig = TRAINED
    """The pyramid beside it."""
    slot_resampler: PartConfig = TRAINED
    """Images into slots, with norms and projections around it."""
    conditioning_resampler: PartConfig = TRAINED
    """Contexts into the U-Net's conditioning, with its projection and the conditioning of no context."""
    text_synchronizers: PartConfig = TRAINED
    """Through which the language model attends to image features."""
    image_synchronizers: PartConfig = TRAINED
    """Through which the U-Net attends to image features."""
    gates: PartConfig = TRAINED
    """How much of a synchronizer's output the language model takes: a number a layer."""
    offsets: PartConfig = TRAINED
    """Where synchronizers and adapter sample: their sampling offsets."""
    language: PartConfig = field(default_factory=PartConfig)
    """The language model: embeddings, layers, norm."""
    text_head: PartConfig = field(default_factory=PartConfig)
    """Next-token logits of the old vocabulary."""
    new_tokens: PartConfig = TRAINED
    """What is new about the image tokens: their logits, and the start token's embedding."""
    unet: PartConfig = TRAINED
    """Stable Diffusion's U-Net."""
    vae: PartConfig = field(default_factory=PartConfig)
    """Its autoencoder."""
    lora: PartConfig = TRAINED
    """Low-rank additions to frozen layers, where there are any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A run on documents: one name below, e.g. `training.steps`, is what `--set` takes."""

    start_from: str = ""
    """The model to train: a folder that `compose`, `convert` or a run made, or a shipped model's name."""
    seed: Annotated[int, SEED] = 0
    """Seed of data order, noise and new weights."""
    num_threads: Annotated[int, PROCESSES] = 0
    """Threads of PyTorch; the same number gives the same bits. 0 = OMP_NUM_THREADS, else one for each core
    that affinity and quota leave."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: this rank's GPU where there is one."""
    corpora: Mapping[str, CorpusConfig] = field(default_factory=dict)
    """The mixture, by names of its own."""
    max_length: Annotated[int, SIZE] = 2048
    """Tokens a row."""
    released_packing: bool = False
    """Fill rows as the published loader does."""
    fixed_length: bool = False
    """Pad all rows to `max_length`, so that compiled layers see one shape."""
    global_batch_size: Annotated[int, SIZE] = 8
    """Rows of an optimizer step over all ranks."""
    micro_batch_size: Annotated[int, SIZE] = 1
    """Rows that go through the model at a time on a rank; more rows a step are accumulated."""
    num_workers: Annotated[int, PROCESSES] = 0
    """Processes a rank that read data; 0 = none of their own."""
    max_bad_fraction: Annotated[float, SHARE] = 0.001
    """Share of unreadable items above which the run stops; `bad_samples.jsonl` names them."""
    training: StageConfig = field(default_factory=lambda: StageConfig(steps=1000, learning_rate=1e-4))
    """Steps, rates, precision, checkpoints."""
    parts: PartsConfig = field(default_factory=PartsConfig)
    """What trains, and how fast."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank additions."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Many processes."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them (gradient checkpointing)."""
    frozen_type: Annotated[str, Choice(("auto", *FORMATS))] = "float32"
    """Number type in which frozen weights are kept, `auto`: the one that the run computes in; what trains is
    kept in float32."""
    compile_backend: str = ""
    """Compile layers with torch.compile, e.g. `inductor`; empty = do not."""
    measure_mfu: bool = False
    """Count the multiplications of the first batch, so that the log has the share of the device in use."""
    tensorboard: bool = False
    """Curves for TensorBoard."""
    wandb: bool = False
    """Curves for Weights & Biases."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Samples generated while training."""
    model_type: Annotated[str, Choice(tuple(FORMATS))] = "float32"
    """Number type in which the finished model is saved."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.training.optimizer == "muon" and self.parallel.strategy == "fsdp":
            raise UsageError("training.optimizer=muon needs whole matrices; use adamw with strategy=fsdp")
