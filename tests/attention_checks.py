"""What the Triton kernel of attention must compute, on whatever device runs it: Triton's interpreter, or a GPU."""

import dataclasses

import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qcompile.lowering.attention_cuda import combine

ROWS = {torch.float32: "attention/float32", torch.bfloat16: "attention/bfloat16", torch.float16: "attention/float16"}
MASKS = ("none", "bool", "float", "heads", "nothing", "holes", "finite")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: B sequences, G key heads with `shares` query heads each, S keys, D and E channels."""

    batch: int = 2
    groups: int = 2
    shares: int = 3
    keys: int = 70
    channels: int = 16
    value_channels: int = 0  # 0: as many
    mask: str = "none"
    dtype: torch.dtype = torch.float32
    parts: int = 2
    scale: float = 0.3

    def operands(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        random = torch.Generator().manual_seed(self.keys)
        shape = self.batch, self.groups, self.keys
        value_channels = self.value_channels or self.channels
        query = torch.randn(self.batch, self.groups * self.shares, 1, self.channels, generator=random)
        key = torch.randn(*shape, self.channels, generator=random)
        value = torch.randn(*shape, value_channels, generator=random)
        mask = self._mask(random)
        query, key, value = (x.to(device, self.dtype) for x in (query, key, value))
        if mask is not None:
            mask = mask.to(device) if mask.dtype == torch.bool else mask.to(device, self.dtype)
        return query, key, value, mask

    def _mask(self, random: torch.Generator) -> Tensor | None:
        if self.mask == "none":
            return None
        if self.mask == "heads":  # a bias per head, as ALiBi's
            return torch.randn(1, self.groups * self.shares, 1, self.keys, generator=random)
        seen = torch.arange(self.keys) <= torch.arange(self.batch)[:, None] + self.keys // 2
        if self.mask == "holes":
            seen = torch.rand(self.batch, self.keys, generator=random) > 0.9
        if self.mask == "nothing":  # one sequence sees no key at all
            seen[-1] = False
        seen = seen[:, None, None]
        if self.mask == "finite":  # as older models write it
            return torch.where(seen, 0.0, torch.finfo(self.dtype).min)
        return torch.where(seen, 0.0, -torch.inf) if self.mask == "float" else seen


def check(case: Case, device: str = "cpu") -> None:
    """The kernel and the sum of its parts, against attention in float64; what is hidden holds NaN."""
    query, key, value, mask = case.operands(device)
    exact = scaled_dot_product_attention(
        query.double(), *(x.double().repeat_interleave(case.shares, 1) for x in (key, value)),
        attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.double(), scale=case.scale,
    )  # fmt: skip
    if mask is not None and mask.dtype == torch.bool:  # neither key nor value of a hidden place may be read
        hidden = ~mask.any(1, keepdim=True).squeeze(2).unsqueeze(-1).expand(case.batch, case.groups, case.keys, 1)
        key, value = key.masked_fill(hidden, torch.nan), value.masked_fill(hidden, torch.nan)
    actual = run(query, key, value, mask, case.scale, case.parts)
    assert actual.isfinite().all()
    assert_close(ROWS[case.dtype], actual=actual.double(), expected=exact.nan_to_num(0.0))


def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, parts: int) -> Tensor:
    from qcompile.lowering.attention_kernel import attention_op

    y = combine(*attention_op(query, key, value, mask, scale, parts))
    return y.unsqueeze(2).to(query.dtype)
