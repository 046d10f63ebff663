"""A transformers model behind `contracts.Module`: packed documents become padded rows, logits come back packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm_core.contracts import IGNORE, Batch, Ops, RowState
from nanovllm_core.errors import ModelError

WASTE = 8  # documents of a group differ in length by at most an eighth of the longest, or 8 tokens


class Foreign(nn.Module):
    """Shares its parameters, buffers and children with the model; `names` gives each parameter's name in a folder."""

    roles: Mapping[str, str] = {}

    def __init__(self, model: nn.Module, ops: Ops, names: Mapping[str, str], path: str) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._inner = (model,)  # a tuple: not a child, which would give every name a prefix
        self.ops, self._names, self._path, self._causal = ops, names, path, False

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield self._names.get(name, name), parameter

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The longest list of equal layers."""
        lists = [m for m in self.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
        return max(lists, key=len, default=nn.ModuleList())

    def train(self, mode: bool = True) -> Foreign:
        self._inner[0].train(mode)
        self.training = mode
        return self

    def forward(
        self, tokens: Tensor, batch: Batch, kv: Sequence[RowState] | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """tokens [T] int64. With targets [T]: the summed loss, fp32 scalar. Else fp32 logits [n, V] of `batch.select`."""
        if not self._causal:
            self._refuse_two_way(tokens.device)
        starts = batch.cu_seqlens.tolist()
        loss = tokens.new_zeros((), dtype=torch.float32)
        parts: list[tuple[int, Tensor]] = []  # first token of a document, its logits
        for group in _groups(batch.lengths):
            rows = nn.utils.rnn.pad_sequence([tokens[starts[d] : starts[d + 1]] for d in group], batch_first=True)
            lengths = torch.tensor([batch.lengths[d] for d in group], device=tokens.device)
            real_BL = torch.arange(rows.shape[1], device=tokens.device) < lengths[:, None]
            logits_BLV = self._logits(rows, real_BL)
            if targets is None:
                parts += [(starts[d], logits_BLV[row, : batch.lengths[d]]) for row, d in enumerate(group)]
            else:
                wanted = torch.cat([targets[starts[d] : starts[d + 1]] for d in group])
                loss = loss + F.cross_entropy(logits_BLV[real_BL], wanted, ignore_index=IGNORE, reduction="sum")
        if targets is not None:
            return loss
        logits_TV = torch.cat([logits for _, logits in sorted(parts, key=lambda part: part[0])])
        return logits_TV if batch.select is None else logits_TV[batch.select]

    def _logits(self, rows: Tensor, real_BL: Tensor) -> Tensor:
        with self._compute(rows.device.type):
            out: Any = self._inner[0](input_ids=rows, attention_mask=real_BL.long(), use_cache=False)
        logits: Tensor = out.logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _compute(self, device: str) -> AbstractContextManager[Any]:
        """Master weights are fp32; the model's own layers do not cast them."""
        if self.ops.dtype == "float32" or next(self.parameters()).dtype != torch.float32:
            return nullcontext()
        return torch.autocast(device, dtype=getattr(torch, self.ops.dtype))

    def _refuse_two_way(self, device: torch.device) -> None:
        """Some classes listed as causal (BERT's) are so by configuration only: a later token must not change a logit."""
        training, pair = self.training, torch.tensor([[1, 2], [1, 3]], device=device)
        self.train(False)
        with torch.no_grad():
            first, second = self._logits(pair, torch.ones_like(pair).bool())[:, 0]
        self.train(training)
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-4):
            raise ModelError(
                f"{self._path}: this model sees later tokens, so it is no causal language model (an encoder? some take "
                "is_decoder: true in config.json)"
            )
        self._causal = True


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Documents of like length together, so that little of a group's rows is padding."""
    group: list[int] = []
    for d in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        longest = lengths[group[0]] if group else 0
        if group and longest - lengths[d] > max(WASTE, longest // WASTE):
            yield group
            group = []
        group.append(d)
    if group:
        yield group
