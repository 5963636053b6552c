"""transformers' `generate` for prompts with images: what is read before it, and what it is given.

    ids, table, pixels, cache -> images into the cache, embeddings of what is unread -> transformers' search

Letters: B rows, T tokens, N images a row, I images of all rows in row-major order, D hidden channels.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from mm_interleaved.models.evaluation_mode import evaluation_mode
from mm_interleaved.models.image_placement import (
    check_ids,
    check_prompt,
    image_table,
    shifted,
    unread_images,
)
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.transformers_versions import CACHE, one_cache


class PromptGenerationMixin(GenerationMixin):
    """Mix-in for the whole model. (transformers knows by "GenerationMixin" in the name that it generates.)"""

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: Tensor | None = None,
        *,
        cache: Any = None,
        past_key_values: Any = None,
        pixel_values: Tensor | None = None,
        image_start: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """transformers' `generate`, with images in the prompt: text only, any of its arguments.

        For documents, with images also in what is generated, see `InterleavedGenerator`. A model in training
        mode generates as one in evaluation mode does.

        Args:
            inputs: (B, T) prompt ids (also as `input_ids`), images as their start token and slots; padded on
                the left.
            cache: a `PrefixCache` that an earlier call returned (also as `past_key_values`); what it has read
                is not read again.
            pixel_values: (I, 3, H, W) RGB in [0, 1], all rows' images in row-major order; encoded once. With
                a cache, those of all images of the ids or of those that it has not read.
            image_start: (B, N), see `forward`; default: read off the ids.
            arguments: also a batch of `MMInterleavedProcessor`; what a loss alone needs of it is left out.

        Raises:
            ValueError: no prompt ids, ids, table and pixels that do not agree, rows padded on the right, or a
                `cache_implementation` other than "dynamic" and "static".
        """
        with evaluation_mode(self):
            cache = one_cache(cache, past_key_values)
            input_ids = arguments.pop("input_ids", None) if inputs is None else inputs
            check_prompt(arguments)
            self._always_cache(arguments)
            named = self._named_cache(arguments)
            if cache is None:
                cache = self._new_cache(input_ids, named, arguments)
            if arguments.get("inputs_embeds") is None:
                self._check_cache(cache, input_ids, arguments)
                prompt = self._embedded_prompt(input_ids, image_start, pixel_values, cache)
                if prompt is not None:
                    self._check_chunks(prompt, arguments)
                    arguments["inputs_embeds"] = prompt
            self._repeat_for_beams(cache, input_ids, arguments)
            # Of the cache, which is there.
            arguments.pop("max_cache_len", None)
            return super().generate(input_ids, **{CACHE: cache}, **arguments)

    def _always_cache(self: Any, arguments: dict[str, Any]) -> None:
        """Images are attended to through a cache; it changes no token, so `use_cache=False` has one too."""
        arguments.pop("use_cache", None)
        given = arguments.get("generation_config")
        # False is a choice, None is left to transformers, which then has a cache.
        if (given or self.generation_config).use_cache is False:
            if given is None:
                arguments["use_cache"] = True
            else:  # transformers will refuse a configuration beside single arguments
                arguments["generation_config"] = copy(given)
                arguments["generation_config"].use_cache = True

    def _named_cache(self: Any, arguments: dict[str, Any]) -> str | None:
        """The `cache_implementation` that is asked for; taken out of the arguments."""
        config = arguments.get("generation_config") or self.generation_config
        named = arguments.pop("cache_implementation", None) or config.cache_implementation
        if named is not None or self.generation_config.cache_implementation is not None:
            # transformers takes either a cache or the name of one.
            arguments["cache_implementation"] = None
        if named not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation: expected 'dynamic' or 'static', found {named!r}")
        return named

    def _new_cache(
        self: Any, input_ids: Tensor | None, named: str | None, arguments: dict[str, Any]
    ) -> PrefixCache:
        if input_ids is None or arguments.get("inputs_embeds") is not None:
            found = "nothing" if input_ids is None else "inputs_embeds"
            raise ValueError(f"generate needs prompt ids of shape (rows, tokens) as input_ids, found {found}")
        config = arguments.get("generation_config") or self.generation_config
        return PrefixCache(
            self.config.text_config,
            batch_size=len(input_ids),
            device=input_ids.device,
            max_cache_len=None if named != "static" else _longest(input_ids.shape[1], config, arguments),
        )

    def _check_cache(self: Any, cache: Any, input_ids: Tensor, arguments: dict[str, Any]) -> None:
        """What an earlier call has read is the beginning of the ids, as far as can be told, and what is to be
        written has room behind it.
        """
        check_ids(input_ids)
        num_read, (rows, num_tokens) = int(cache.get_seq_length()), input_ids.shape
        if isinstance(cache, PrefixCache) and cache.num_rows != rows:
            raise ValueError(
                f"cache: found {cache.num_rows} rows, expected the {rows} of input_ids (each beam leaves a "
                "row behind: begin with a new cache)"
            )
        if num_read >= num_tokens:
            raise ValueError(
                f"cache: found {num_read} tokens, expected fewer than the {num_tokens} of input_ids, whose "
                "beginning it is"
            )
        config = arguments.get("generation_config") or self.generation_config
        needed = _longest(num_tokens, config, arguments)
        # The last token is not read.
        if isinstance(cache, PrefixCache) and cache.room is not None and cache.room < needed - 1:
            raise ValueError(
                f"cache: found room for {cache.room} tokens, expected room for {needed - 1}: give "
                "max_cache_len to the call that makes it"
            )

    def _check_chunks(self: Any, prompt: Tensor, arguments: dict[str, Any]) -> None:
        """transformers cuts ids into chunks, and forgets embeddings on the way. One token is no chunk."""
        config = arguments.get("generation_config") or self.generation_config
        chunk = arguments.get("prefill_chunk_size") or config.prefill_chunk_size
        if chunk and prompt.shape[1] > 1:
            raise ValueError(
                f"prefill_chunk_size: found {chunk}, expected none: a prompt is read at once, with its images"
            )

    def _embedded_prompt(
        self: Any, input_ids: Tensor, image_start: Tensor | None, pixel_values: Tensor | None, cache: Any
    ) -> Tensor | None:
        """Embeddings (B, T, D) of a prompt whose images the cache has not seen; it remembers them.

        None where ids alone say all that is to be read.
        """
        num_read = int(cache.get_seq_length())
        if num_read and input_ids.shape[1] - num_read < 2 and pixel_values is None:
            return None
        table = image_table(input_ids, image_start, self.image_tokens)
        table, pixel_values = unread_images(table, pixel_values, num_read, self.image_tokens)
        has_images = pixel_values is not None and len(pixel_values) > 0
        if num_read and not has_images:
            return None
        slots = None
        if has_images:
            if not isinstance(cache, PrefixCache):
                raise ValueError(f"cache: images need a PrefixCache, found {type(cache).__name__}")
            features = self.encode_images(pixel_values)
            slots = features.slots
            cache.append_images(table, self.values_by_row(features.pyramid, table))
        unread = self._embed(input_ids[:, num_read:], shifted(table, -num_read), slots)
        # transformers cuts off as many as the cache holds.
        return torch.cat([unread.new_zeros(len(unread), num_read, unread.shape[2]), unread], dim=1)

    def _repeat_for_beams(self: Any, cache: Any, input_ids: Tensor | None, arguments: dict[str, Any]) -> None:
        """`generate` repeats its tensors for beams and samples, but leaves a cache to whoever gave it."""
        config = arguments.get("generation_config") or self.generation_config
        repeats = max(
            arguments.get(name) or getattr(config, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        )
        if repeats == 1 or not isinstance(cache, PrefixCache) or input_ids is None:
            return
        if cache.num_rows == len(input_ids):
            cache.batch_repeat_interleave(repeats)

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        past_key_values: Any = None,
        **kwargs: Any,  # by this name transformers knows that what `forward` takes is welcome
    ) -> dict[str, Any]:
        """As transformers does. Also for the first pass of assisted decoding, which asks neither what the
        cache holds already nor how the tokens that it has guessed are embedded.
        """
        cache = one_cache(cache, past_key_values)
        # Of stop strings and assistants; `generate` hands on what its search has taken.
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        if is_first_iteration and next_sequence_length is None and isinstance(cache, PrefixCache):
            if inputs_embeds is not None and input_ids.shape[1] > inputs_embeds.shape[1]:
                guessed = self.embed_words(input_ids[:, inputs_embeds.shape[1] :]).to(inputs_embeds.dtype)
                inputs_embeds = torch.cat([inputs_embeds, guessed], dim=1)
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            # Of a prompt that is read in pieces, only what is new is given.
            unread = length - cache.num_tokens
            next_sequence_length = unread if unread > 0 else None
        if isinstance(cache, PrefixCache) and cache.is_static:
            cache.keep_addresses()
        given = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        if isinstance(cache, PrefixCache) and _has_several(given.get("input_ids")):
            # Guessed tokens, or what follows in a conversation: no images, whatever their ids.
            given["inputs_embeds"] = self.embed_words(given["input_ids"])
            given["input_ids"] = None
        if given.get("position_ids") is not None:
            # A part of a longer tensor has other strides, for which compiled code would be made once more.
            given["position_ids"] = given["position_ids"].clone(memory_format=torch.contiguous_format)
        return given


def _has_several(input_ids: Tensor | None) -> bool:
    return input_ids is not None and input_ids.shape[1] > 1


def _longest(prompt: int, config: GenerationConfig, arguments: dict[str, Any]) -> int:
    """Tokens that one call of `generate` can reach, by its arguments or its configuration."""
    new_tokens = arguments.get("max_new_tokens") or config.max_new_tokens
    longest = arguments.get("max_length") or config.max_length or prompt
    room = arguments.get("max_cache_len") or config.max_cache_len or 0
    return max(prompt + new_tokens if new_tokens else longest, room)
