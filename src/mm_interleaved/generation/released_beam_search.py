"""The released code's beam search, for numbers that were published with it.

Today's transformers counts a hypothesis' length and its stop token differently; as a callable for
`generate(custom_generate=...)` the old rule needs nothing private.
Letters: B rows, K beams a row, C candidates a row, V vocabulary, T tokens of a sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.transformers_versions import CACHE

NEVER = -1e9
"""Score of beams that do not exist yet: before the first step all beams of a row are the same."""


@dataclass(frozen=True, slots=True)
class ReleasedBeams:
    """What the search found.

    `sequences`: (B * returned, T) ids, padded. `sequences_scores`: (B * returned,), best first within a row.
    `hypothesis_scores`: (B, K), all that were kept, best first.
    """

    sequences: Tensor
    sequences_scores: Tensor
    hypothesis_scores: Tensor


@torch.no_grad()
def released_beam_search(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,  # named, `generate` would take them for options of the search and pass them twice
) -> ReleasedBeams:
    """Beam search by the rule of the released code; called by `generate` with rows already repeated K times.

    A step keeps (1 + number of stop ids) * K candidates a row. A stop id ends a hypothesis only if it is
    among the best K of them; its score is the sum of log-probabilities divided by the length, stop id not
    counted, to the power of `length_penalty`. A row is done when K hypotheses are kept and the best
    candidate, its new token counted here, would not beat the worst of them.
    """
    num_beams, stop_ids = generation_config.num_beams, generation_config.eos_token_id
    num_candidates = max(2, 1 + len(stop_ids)) * num_beams
    rows = [_Row(num_beams, generation_config.length_penalty) for _ in range(len(input_ids) // num_beams)]
    scores_BK = torch.full((len(rows), num_beams), NEVER, dtype=torch.float32, device=input_ids.device)
    scores_BK[:, 0] = 0
    cache: PrefixCache = model_kwargs[CACHE]
    attention_mask, position_ids = model_kwargs["attention_mask"], model_kwargs["position_ids"]
    num_read = cache.get_seq_length()
    step = {
        "inputs_embeds": model_kwargs["inputs_embeds"][:, num_read:],
        "position_ids": position_ids[:, num_read:],
    }

    while True:
        # 1. Score all continuations.
        output = model(**step, attention_mask=attention_mask, cache=cache, logits_to_keep=1)
        log_probs = logits_processor(input_ids, output.logits[:, -1].float().log_softmax(-1))
        total_BKV = scores_BK[..., None] + log_probs.unflatten(0, (-1, num_beams))
        top_BC, index_BC = total_BKV.flatten(1).topk(num_candidates)
        beam_BC, token_BC = index_BC // log_probs.shape[-1], index_BC % log_probs.shape[-1]

        # 2. End some, go on with the best others.
        chosen, tokens, scores = [], [], []
        for index, row in enumerate(rows):
            first_beam = index * num_beams
            candidates = list(
                zip(top_BC[index].tolist(), beam_BC[index].tolist(), token_BC[index].tolist(), strict=True)
            )
            live = row.advance(candidates, input_ids[first_beam : first_beam + num_beams], stop_ids)
            scores.append([score for score, _, _ in live])
            chosen += [first_beam + beam for _, beam, _ in live]
            tokens += [token for _, _, token in live]
        scores_BK = torch.tensor(scores, dtype=torch.float32, device=scores_BK.device)
        chosen_beams = torch.tensor(chosen, device=input_ids.device)
        new_ids = torch.tensor(tokens, device=input_ids.device)[:, None]
        input_ids = torch.cat([input_ids[chosen_beams], new_ids], dim=1)
        if all(row.is_done for row in rows) or input_ids.shape[1] >= generation_config.max_length:
            break

        # 3. Prepare the next step.
        cache.reorder_cache(chosen_beams)
        position_ids = position_ids[:, -1:] + 1
        step = {"input_ids": new_ids, "position_ids": position_ids}
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(new_ids), 1)], dim=1)

    for index, row in enumerate(rows):
        if not row.is_done:
            for beam in range(num_beams):
                row.keep(scores_BK[index, beam].item(), input_ids[index * num_beams + beam])
    return _collect(rows, generation_config, input_ids.device)


class _Row:
    """The best ended hypotheses of one row."""

    def __init__(self, num_beams: int, length_penalty: float):
        self.num_beams, self.length_penalty = num_beams, length_penalty
        self.kept: list[tuple[float, Tensor]] = []
        self.is_done = False

    def keep(self, log_prob: float, ids: Tensor) -> None:
        """Keep an ended hypothesis if it is among the best."""
        self.kept.append((log_prob / len(ids) ** self.length_penalty, ids))
        self.kept.sort(key=lambda hypothesis: hypothesis[0], reverse=True)
        del self.kept[self.num_beams :]

    def advance(
        self, candidates: list[tuple[float, int, int]], beam_ids: Tensor, stop_ids: list[int]
    ) -> list[tuple[float, int, int]]:
        """One step: the K candidates (score, beam, token) to go on with. Ended ones are kept."""
        live = []
        for rank, (score, beam, token) in enumerate(candidates):
            if token not in stop_ids:
                live.append((score, beam, token))
            elif rank < self.num_beams and not self.is_done:
                self.keep(score, beam_ids[beam])
        if len(self.kept) == self.num_beams:
            best_possible = candidates[0][0] / (beam_ids.shape[1] + 1) ** self.length_penalty
            self.is_done = self.is_done or self.kept[-1][0] >= best_possible
        return live[: self.num_beams]


def _collect(rows: list[_Row], config: GenerationConfig, device: torch.device) -> ReleasedBeams:
    returned = [hypothesis for row in rows for hypothesis in row.kept[: config.num_return_sequences]]
    # The released code writes the first stop id behind every hypothesis that leaves room for it.
    length = min(max(len(ids) for _, ids in returned) + 1, config.max_length)
    sequences = torch.full((len(returned), length), config.pad_token_id, dtype=torch.int64, device=device)
    for line, (_, ids) in zip(sequences, returned, strict=True):
        line[: len(ids)] = ids
        if len(ids) < length:
            line[len(ids)] = config.eos_token_id[0]
    return ReleasedBeams(
        sequences=sequences,
        sequences_scores=torch.tensor([score for score, _ in returned], dtype=torch.float32),
        hypothesis_scores=torch.tensor(
            [[score for score, _ in row.kept] for row in rows], dtype=torch.float32
        ),
    )
