"""What transformers expects of a model, apart from what the model computes.

`MMInterleavedPreTrainedModel` loads, saves and publishes, chooses device and number format, hands out and
resizes embeddings, and says how the library may split, cast and initialise it. The model itself is in
`interleaved.py`.
"""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers import initialization as init

from mm_interleaved.devices import first_device, model_format
from mm_interleaved.model_files.headers import saved_format
from mm_interleaved.model_files.model_card import PUBLISH_ARGUMENTS, publish, write_model_card
from mm_interleaved.model_files.resolve import HUB_ARGUMENTS, find_model
from mm_interleaved.models.config import MMInterleavedConfig
from mm_interleaved.models.initialisation import OwnInitialisation, is_own
from mm_interleaved.models.language import LANGUAGE_FAMILIES
from mm_interleaved.models.offloading import execution_device
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.quantization import refuse_to_save
from mm_interleaved.models.targets import OtherArguments
from mm_interleaved.models.transformers_versions import CACHE
from mm_interleaved.models.vocabulary_size import check_resizable, check_vocabulary_size, rounded_up
from mm_interleaved.versions import warn_of_untried

logger = logging.getLogger(__name__)


class MMInterleavedPreTrainedModel(OwnInitialisation, PreTrainedModel):
    """The model as users of transformers expect it; the figure is its subclass."""

    config_class = MMInterleavedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Those, too, that join what their parts say, or read weights of their own between calls of their parts.
    _no_split_modules = [  # noqa: RUF012
        "VisionTower", "Resampler", "GatedSynchronizer", "MapSynchronizer", "BasicTransformerBlock",
        "ResnetBlock2D", *(family.layer_class.__name__ for family in LANGUAGE_FAMILIES.values()),
    ]  # fmt: skip
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    language_model: Any
    text_head: Any
    image_start_embedding: nn.Parameter

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # What is not ours and not a sub-model starts as torch or diffusers start it; ours: OwnInitialisation.
        if module is self:
            init.zeros_(self.image_start_embedding)
        elif not is_own(module) and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @property
    def device(self) -> torch.device:
        """Where inputs belong: where it is computed, also if weights are kept elsewhere (accelerate)."""
        return execution_device(self) or super().device

    # ---- Loading, saving, publishing -------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **settings: Any) -> Self:
        """As transformers', where "storyworld" is a name too, and weights are kept in what is fast here.

        Without `dtype`, or with "auto": as saved where the device is fast in that, else float32, said in one
        line. The device is that of `device_map`; without one, a GPU where there is one. A `dtype` named is
        used, with a line of warning where it is slow.

        Raises:
            ModelFileError: there is no such model, or its files are damaged.
        """
        is_elsewhere = settings.get("state_dict") is not None or settings.get("subfolder")
        if pretrained_model_name_or_path is None or is_elsewhere:
            return cls.read_pretrained(pretrained_model_name_or_path, *model_args, **settings)
        hub = {name: settings.get(name) for name in HUB_ARGUMENTS if settings.get(name) is not None}
        folder = find_model(pretrained_model_name_or_path, hub=hub)
        asked = settings.pop("torch_dtype", None) if settings.get("dtype") is None else settings["dtype"]
        settings["dtype"] = _dtype_of_weights(folder, asked, first_device(settings.get("device_map")))
        return cls.read_pretrained(folder, *model_args, **settings)

    @classmethod
    def read_pretrained(cls, folder: Path | None, *model_args: Any, **settings: Any) -> Self:
        """transformers' `from_pretrained` of a folder, with its meaning of `dtype`: as saved by default.

        Says which libraries were never tried.
        """
        warn_of_untried()
        return super().from_pretrained(folder, *model_args, **settings)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        *arguments: Any,
        license: str | None = None,
        push_to_hub: bool = False,
        **settings: Any,
    ) -> None:
        """As transformers', with a model card beside it where there is none yet.

        Args:
            license: of the weights, for the card; default: of the model that this one was loaded from.
            push_to_hub: upload the folder afterwards, with those of `settings` that `push_to_hub` takes.

        Raises:
            ModelFileError: weights in few bits, before anything is written.
        """
        refuse_to_save(self)
        hub = {name: settings.pop(name) for name in PUBLISH_ARGUMENTS if name in settings}
        super().save_pretrained(save_directory, is_main_process, *arguments, **settings)
        if not is_main_process:
            return
        folder = Path(save_directory)
        name, tags = hub.pop("repo_id", None), hub.pop("tags", None) or ()
        source = self.config.name_or_path or ""
        write_model_card(folder, self.config.to_dict(), name=name, license=license, tags=tags, source=source)
        if push_to_hub:
            publish(folder, name or folder.name, **hub)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "5GB", **settings: Any) -> Any:
        """Uploads model and card; the processor has a method of the same name.

        Args:
            settings: `license`, `tags`, `private`, `token`, `commit_message`, `commit_description`,
                `revision`, `create_pr`, `api` (a `huggingface_hub.HfApi`).

        Raises:
            ModelFileError: weights in few bits.
        """
        refuse_to_save(self)
        license, tags = settings.pop("license", None), settings.pop("tags", None) or ()
        with TemporaryDirectory(prefix="model-") as temporary:
            folder = Path(temporary) / repo_id.rsplit("/", 1)[-1]
            self.save_pretrained(
                folder, max_shard_size=max_shard_size, license=license, tags=tags, repo_id=repo_id
            )
            return publish(folder, repo_id, **settings)

    # ---- Embeddings ------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.text_head.base

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """The old half of the text head; a vocabulary of another size changes the new half with it."""
        self.text_head.set_base(value)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """As transformers does: tokens are added or removed at the end of the vocabulary.

        Added ones are new tokens of the text head: the model says none before it has learned to.

        Raises:
            ValueError: special tokens would be lost, or the weights cannot be resized where they are
                (offloaded, sharded, quantised, with adapters). Nothing is changed.
        """
        config: Any = self.config
        embeddings, head = self.get_input_embeddings(), self.text_head
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embeddings
        size = rounded_up(new_num_tokens or head.base.out_features, pad_to_multiple_of)
        check_vocabulary_size(config, size)
        check_resizable(embeddings, head)
        is_tied = head.base.weight is embeddings.weight
        if is_tied:
            # Else the head would be found as long as the embeddings, which grow first.
            head.base.weight = nn.Parameter(embeddings.weight.detach().clone())
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if is_tied:
            head.base.weight = embeddings.weight
        self.language_model.vocab_size, config.num_new_tokens = size, head.num_new
        return embeddings

    # ---- One pass --------------------------------------------------------------------------------------

    def cache_of_pass(self, cache: Any, others: OtherArguments, tokens: Tensor | None) -> Any:
        """The given cache, or a new one where `use_cache` asks for it; tokens as ids or embeddings.

        Raises:
            ValueError: it would stay empty.
        """
        if cache is None and others.get("use_cache") and tokens is not None:
            rows, device = len(tokens), tokens.device
            cache = PrefixCache(self.config.text_config, batch_size=rows, device=device)
        if cache is None:
            return None
        layers = self.language_model.layers
        if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise ValueError(
                "a cache stays empty in training mode with gradient checkpointing: call model.eval() before"
            )
        return cache

    def captured(self, others: OtherArguments) -> dict[str, bool]:
        """What the language model shall return besides; its library is not bothered with what nobody asked
        for.
        """
        found: dict[str, bool] = {}
        for name in ("output_attentions", "output_hidden_states"):
            asked = others.get(name)
            if getattr(self.config, name, None) if asked is None else asked:
                found[name] = True
        return found


def _dtype_of_weights(folder: Path, asked: Any, device: torch.device) -> torch.dtype:
    """The number format of a model's weights, see `from_pretrained`."""
    saved = saved_format(folder) if asked in (None, "auto") else ""
    chosen = model_format(asked, saved, device)
    if chosen.remark:
        logger.warning("%s", f"{folder.name}: {chosen.remark}" if saved else chosen.remark)
    return getattr(torch, chosen.name)


def register_model(model_class: type[MMInterleavedPreTrainedModel]) -> None:
    """Make transformers' Auto classes build a model of ours; `registration` adds the processor."""
    AutoConfig.register(MMInterleavedConfig.model_type, MMInterleavedConfig, exist_ok=True)
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(MMInterleavedConfig, model_class, exist_ok=True)
