"""Drawing the next tokens from a model's logits.

Each sequence draws with a generator of its own, two uniform numbers a token, through the inverse of the cumulative
distribution; nothing of a row depends on the other rows. So a seed gives the same text alone and in a batch, on any device, as
far as the logits are the same: their last digits are not. One number over the whole vocabulary would fall on another token
wherever the sum of all before it moved; of two, the first chooses a stretch and the second a token of it, so only sums of
some hundred move. Top-k and top-p look at the likeliest 1,024 tokens first and sort the whole vocabulary only where those
do not hold enough probability: 1.3 ms instead of 17 ms a row of 150,000 on one CPU core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.sequence import Sequence

CANDIDATES = 1024  # likeliest tokens looked at before the whole vocabulary is sorted


class NotFinite(GenerationError):
    """Rows of logits cannot be drawn from."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__("the model's logits are not finite: its weights are damaged, or its training diverged")
        self.rows = rows


def draw(logits_BV: Tensor, sequences: Many[Sequence]) -> list[int]:
    """The next token of each sequence; what is asked of its log-probabilities is noted. Raises as `sample`."""
    params = [s.params for s in sequences]
    chosen = sample(_penalised(logits_BV.float(), sequences), params, [s.generator for s in sequences])
    told = [row for row, p in enumerate(params) if p.logprobs is not None]
    if told:
        _note(logits_BV[told].float(), [sequences[row] for row in told], [chosen[row] for row in told])
    return chosen


def _penalised(logits_BV: Tensor, sequences: Many[Sequence]) -> Tensor:
    """Logits of tokens that a sequence has, made less likely where it asks for that."""
    rows = [row for row, s in enumerate(sequences) if s.met is not None]
    if rows:
        logits_BV = logits_BV.clone()
    for row in rows:
        s = sequences[row]
        ids = torch.tensor(list(s.met or ()), device=logits_BV.device)
        met, by = logits_BV[row, ids], s.params.repetition_penalty
        logits_BV[row, ids] = torch.where(met > 0, met / by, met * by)
    return logits_BV


def _note(logits_RV: Tensor, sequences: Many[Sequence], chosen: Many[int]) -> None:
    """Keep log-probabilities, of the model's own distribution: before temperature, penalty and filters."""
    logprobs_RV = logits_RV.log_softmax(dim=-1)
    most = min(max(s.params.logprobs or 0 for s in sequences), logits_RV.shape[-1])
    values, ids = (x.tolist() for x in logprobs_RV.topk(most))
    own = logprobs_RV.gather(-1, torch.tensor(chosen, device=logits_RV.device)[:, None])[:, 0].tolist()
    for row, s in enumerate(sequences):
        likeliest = zip(ids[row][: s.params.logprobs], values[row][: s.params.logprobs], strict=True)
        top = [{"token_id": i, "logprob": v} for i, v in likeliest]
        s.logprobs.append({"token_id": chosen[row], "logprob": own[row], "top": top})


def sample(logits_BV: Tensor, params: Many[SamplingParams], generators: Many[torch.Generator]) -> list[int]:
    """The next token of each row. Raises NotFinite when rows have no finite largest logit.

    A row at temperature 0 takes its largest logit (the first of equals) and leaves its generator alone.
    """
    top_B, choice_B = logits_BV.max(dim=-1)
    finite_B = torch.isfinite(top_B)
    if not bool(finite_B.all()):
        raise NotFinite((~finite_B).nonzero()[:, 0].tolist())
    chosen: list[int] = choice_B.tolist()
    whole: list[int] = []
    cut: list[int] = []
    for row, p in enumerate(params):
        if p.temperature > 0:
            limited = p.top_p < 1 or p.min_p > 0 or (p.top_k is not None and p.top_k < logits_BV.shape[-1])
            (cut if limited else whole).append(row)
    for rows, take in ((whole, _from_all), (cut, _from_likeliest)):
        if rows:
            some = [params[row] for row in rows]
            t_B1 = logits_BV.new_tensor([[p.temperature] for p in some]).clamp_min(torch.finfo(torch.float32).tiny)
            probs_BV = torch.softmax((logits_BV[rows] - top_B[rows, None]) / t_B1, dim=-1)
            u_B2 = torch.stack([torch.rand(2, dtype=torch.float64, generator=generators[row]) for row in rows])
            for row, token in zip(rows, take(probs_BV, u_B2.to(probs_BV.device), some).tolist(), strict=True):
                chosen[row] = token
    return chosen


def _invert(weights_BW: Tensor, u_B1: Tensor) -> Tensor:
    """Index [B, 1] that a uniform number falls on, in proportion to the weights; a weight of 0 is never met."""
    sums_BW = weights_BW.double().cumsum(dim=-1)
    total_B1 = sums_BW[:, -1:]
    # u is at most 1 - 2**-53, so the product stays below the total, and the index within the weights
    return torch.searchsorted(sums_BW, u_B1 * total_B1, right=True)


def _pick(weights_BW: Tensor, u_B2: Tensor) -> Tensor:
    """Index [B, 1] in proportion to the weights: first a stretch of them, then one within it."""
    width = weights_BW.shape[-1]
    each = math.isqrt(width - 1) + 1
    stretches = -(-width // each)
    weights_BSE = F.pad(weights_BW.double(), (0, stretches * each - width)).view(-1, stretches, each)
    stretch_B1 = _invert(weights_BSE.sum(dim=2), u_B2[:, :1])
    chosen_BE = weights_BSE.gather(1, stretch_B1.unsqueeze(2).expand(-1, 1, each))[:, 0]
    return stretch_B1 * each + _invert(chosen_BE, u_B2[:, 1:])


def _from_all(probs_BV: Tensor, u_B2: Tensor, params: Many[SamplingParams]) -> Tensor:
    return _pick(probs_BV, u_B2)[:, 0]


def _from_likeliest(probs_BV: Tensor, u_B2: Tensor, params: Many[SamplingParams]) -> Tensor:
    """Top-k first; top-p of what it leaves; of that, min-p."""
    vocabulary = probs_BV.shape[-1]
    k_B1 = torch.tensor([[min(p.top_k or vocabulary, vocabulary)] for p in params], device=probs_BV.device)
    p_B1 = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=probs_BV.device)
    least_B1 = torch.tensor([[p.min_p] for p in params], device=probs_BV.device)
    probs_BW, index_BW = probs_BV.topk(min(CANDIDATES, vocabulary))
    limits_B1 = k_B1, p_B1, least_B1 * probs_BW[:, :1]
    tokens_B = _from_sorted(probs_BW, index_BW, *limits_B1, u_B2, vocabulary)
    whole_B1 = (k_B1 >= vocabulary) & (probs_BW.double().sum(dim=-1, keepdim=True) >= p_B1)  # top-p of all, not of k
    enough_B1 = (k_B1 <= probs_BW.shape[-1]) | whole_B1
    enough_B1 |= (probs_BW[:, -1:] < limits_B1[2]) & (p_B1 >= 1)
    short_R = (~enough_B1[:, 0]).nonzero()[:, 0]
    if len(short_R):
        probs_RV, index_RV = probs_BV[short_R].sort(dim=-1, descending=True, stable=True)
        k_R1, p_R1, least_R1 = (x[short_R] for x in limits_B1)
        tokens_B[short_R] = _from_sorted(probs_RV, index_RV, k_R1, p_R1, least_R1, u_B2[short_R], vocabulary)
    return tokens_B


def _from_sorted(
    probs_BW: Tensor, index_BW: Tensor, k_B1: Tensor, p_B1: Tensor, least_B1: Tensor, u_B2: Tensor, vocabulary: int
) -> Tensor:
    ranks_W = torch.arange(probs_BW.shape[-1], device=probs_BW.device)
    kept_BW = torch.where(ranks_W < k_B1, probs_BW.double(), 0.0)
    total_B1 = torch.where(k_B1 < vocabulary, kept_BW.sum(dim=-1, keepdim=True), 1.0)
    before_BW = (kept_BW.cumsum(dim=-1) - kept_BW) / total_B1  # of the likelier tokens; 0 for the first, always kept
    kept_BW = torch.where((before_BW < p_B1) | (p_B1 >= 1), kept_BW, 0.0)
    kept_BW = torch.where(probs_BW >= least_B1, kept_BW, 0.0)
    # In the vocabulary's order: two neighbours by likelihood may change places with the last digit of a logit.
    index_BW, order_BW = index_BW.sort(dim=-1)
    return index_BW.gather(-1, _pick(kept_BW.gather(-1, order_BW), u_B2))[:, 0]
