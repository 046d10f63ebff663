"""What is asked of the next tokens: how each is drawn (`contracts.Draws`), penalties before that, log-probabilities after.

A token's two random numbers follow from its answer's seed and its position alone, so a seed gives the same text alone and in a
batch, on any device, as far as the logits are the same: their last digits are not.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from nanovllm_core.contracts import Draws
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.sent import sent
from nanovllm_core.inference.sequence import Sequence


class NotFinite(GenerationError):
    """Nothing can be drawn from these logits."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not finite: its weights are damaged, or its training diverged")


def draws_of(sequences: Many[Sequence], vocabulary: int, device: str, after: Many[int] | None = None) -> Draws:
    """How the next token of each is drawn, or the one `after` so many others."""
    params = [s.params for s in sequences]
    filtered = [row for row, p in enumerate(params) if p.temperature > 0 and p.filters(vocabulary)]
    drawn = any(p.temperature > 0 for p in params)
    later = after or [0] * len(params)
    u_B2 = np.zeros((len(params), 2))
    if drawn:
        u_B2 = np.stack([s.uniform(more) for s, more in zip(sequences, later, strict=True)])
    return Draws(
        temperature_B=sent([p.temperature for p in params], torch.float32, device),
        top_k_B=sent([min(p.top_k or vocabulary, vocabulary) for p in params], torch.int64, device),
        top_p_B=sent([p.top_p for p in params], torch.float64, device),
        min_p_B=sent([p.min_p for p in params], torch.float32, device),
        u_B2=sent(u_B2, torch.float64, device),
        drawn=drawn,
        filtered_R=sent(filtered, torch.int64, device) if filtered else None,
    )


def penalised(logits_BV: Tensor, sequences: Many[Sequence]) -> Tensor:
    """Logits of tokens that a sequence has, made less likely where it asks for that."""
    rows = [row for row, s in enumerate(sequences) if s.met is not None]
    if rows:
        logits_BV = logits_BV.to(torch.float32, copy=True)
    for row in rows:
        s = sequences[row]
        ids = torch.tensor(list(s.met or ()), device=logits_BV.device)
        met, by = logits_BV[row, ids], s.params.repetition_penalty
        logits_BV[row, ids] = torch.where(met > 0, met / by, met * by)
    return logits_BV


def note(logits_BV: Tensor, sequences: Many[Sequence], chosen: Many[int]) -> None:
    """Keep the log-probabilities that are asked for, of the model's own distribution: before temperature, penalty and filters."""
    rows = [row for row, s in enumerate(sequences) if s.params.logprobs is not None]
    if not rows:
        return
    asked = [sequences[row] for row in rows]
    logprobs_RV = logits_BV[rows].float().log_softmax(dim=-1)
    most = min(max(s.params.logprobs or 0 for s in asked), logprobs_RV.shape[-1])
    values, ids = (x.tolist() for x in logprobs_RV.topk(most))
    tokens_R1 = torch.tensor([[max(0, chosen[row])] for row in rows], device=logits_BV.device)
    own = logprobs_RV.gather(-1, tokens_R1)[:, 0].tolist()
    for row, s in enumerate(asked):
        likeliest = zip(ids[row][: s.params.logprobs], values[row][: s.params.logprobs], strict=True)
        top = [{"token_id": i, "logprob": v} for i, v in likeliest]
        s.logprobs.append({"token_id": chosen[rows[row]], "logprob": own[row], "top": top})
