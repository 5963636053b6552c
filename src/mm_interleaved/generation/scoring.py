"""How likely texts are as the continuation of a document.

    session, options -> score_options -> log-probabilities
                     -> likelihoods -> those, and whether each is what is written greedily

Letters: T tokens, t tokens and those of the document before them, V vocabulary, O options.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.models.finite import check_finite
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration

TOKENS_AT_ONCE = 256
"""Of options that are scored in one row. Attention between options is computed and masked: with more tokens
it would outweigh what fewer passes save.
"""


class Likelihoods(NamedTuple):
    """Of each of several continuations."""

    log_probabilities: Tensor
    """(O,) float32, summed over its tokens."""
    is_greedy: Tensor
    """(O,) bool: each token is the likeliest at its place. True without any token."""


def score_options(session: InterleavedSession, options: Sequence[Sequence[int]]) -> Tensor:
    """The log-probabilities alone, see `likelihoods`: (O,) float32."""
    return likelihoods(session, options).log_probabilities


@torch.no_grad()
def likelihoods(session: InterleavedSession, options: Sequence[Sequence[int]]) -> Likelihoods:
    """How likely each continuation is.

    The document is read once, whatever the number of options, and is the same afterwards: many options stand
    side by side in one row behind it and do not see each other.

    Raises:
        NumericalError: one is not finite.
    """
    model = session.model
    first_V = model.predict_text(session.read()[:, -1])[0].float().log_softmax(-1)
    groups = [_score_group(session, group, first_V) for group in _option_groups(model, options)]
    none = torch.empty(0, dtype=torch.float32, device=model.device)
    scores = torch.cat([none, *(group.log_probabilities for group in groups)])
    check_finite(scores, "the log-probabilities of texts")
    return Likelihoods(scores, torch.cat([none.bool(), *(group.is_greedy for group in groups)]))


def _option_groups(
    model: MMInterleavedForConditionalGeneration, options: Sequence[Sequence[int]]
) -> Iterator[list[Sequence[int]]]:
    """Options of one pass each: many short ones where attention takes a mask of any form, else one."""
    limit = TOKENS_AT_ONCE if model.config.text_config._attn_implementation == "sdpa" else 0
    group: list[Sequence[int]] = []
    for option in options:
        if group and sum(map(len, group)) + len(option) > limit:
            yield group
            group = []
        group.append(option)
    if group:
        yield group


def _score_group(session: InterleavedSession, group: Sequence[Sequence[int]], first_V: Tensor) -> Likelihoods:
    """Scores of options in one pass.

    Args:
        first_V: log-probabilities of the first token, which are the same for all.
    """
    model, cache = session.model, session.cache
    score_O = torch.stack([first_V[option[0]] if len(option) else first_V.new_zeros(()) for option in group])
    likeliest = int(first_V.argmax())
    starts = [not option or option[0] == likeliest for option in group]
    is_greedy_O = torch.tensor(starts, device=first_V.device)
    # Each token predicts the next one; an option's last predicts nothing. (Option, place in it, id, next id.)
    table = [
        (number, place, option[place], option[place + 1])
        for number, option in enumerate(group)
        for place in range(len(option) - 1)
    ]
    if not table:
        return Likelihoods(score_O, is_greedy_O)
    option_T, place_T, id_T, next_T = torch.tensor(table, dtype=torch.int64, device=model.device).unbind(1)
    num_tokens, num_before = len(table), cache.num_tokens

    # 1. Who sees whom: everyone the document, and of its own option what stands before.
    mask_11Tt = None
    if len(group) > 1:
        own_TT = (option_T[:, None] == option_T[None, :]).tril()
        mask_Tt = torch.cat([own_TT.new_ones(num_tokens, num_before), own_TT], dim=1)
        room = cache.get_mask_sizes(num_tokens, 0)[0] - mask_Tt.shape[1]
        mask_11Tt = F.pad(mask_Tt, (0, room))[None, None]

    # 2. One pass, forgotten afterwards.
    logits_TV = model(
        inputs_embeds=model.embed(id_T[None]).to(model.dtype),
        attention_mask=mask_11Tt,
        position_ids=(num_before + place_T)[None],
        cache=cache,
    ).logits[0]
    cache.crop(-num_tokens)

    log_prob_T = logits_TV.float().log_softmax(-1).gather(1, next_T[:, None])[:, 0]
    missed_O = torch.zeros_like(score_O).index_add(
        0, option_T, (logits_TV.argmax(-1) != next_T).to(score_O.dtype)
    )
    return Likelihoods(score_O.index_add(0, option_T, log_prob_T), is_greedy_O & (missed_O == 0))
