"""Multi-head attention step by step, for any number of heads: torch itself takes a head's size from embed_dim."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

Mask = Float[Tensor, "..."] | Bool[Tensor, "..."]


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None, static_k: Tensor | None = None, static_v: Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`F.multi_head_attention_forward`, its arguments and results; heads are as wide as the weights make them.

    Positions come first, then the batch, if there is one. `is_causal` is only a hint and needs a mask.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batched = query.dim() == 3
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    keys = key_padding_mask if batched or key_padding_mask is None else key_padding_mask[None]
    mask = _mask(attn_mask, keys, num_heads, query)
    q, k, v = (x.transpose(0, 1) if batched else x[None] for x in _projected(query, key, value, weights, in_proj_bias))
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, bias_k), (v, bias_v)))
    size = out_proj_weight.shape[1] // num_heads
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k, v))
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    if mask is not None:  # what was appended is always seen
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
    dropout, attention = dropout_p if training else 0.0, None
    if need_weights:
        scores = (q * size**-0.5) @ k.transpose(-2, -1)
        attention = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        out = attention @ v
        attention = attention.mean(1) if average_attn_weights else attention
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = F.linear(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    if batched:
        return out.transpose(0, 1), attention
    return out[0], None if attention is None else attention[0]


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """What an nn.MultiheadAttention becomes when heads go: parameters, arguments and results are the same.

    Without torch's fused inference kernels and nested tensors.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Keeps the fused kernels of nn.TransformerEncoderLayer away."""
        return False

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `nn.MultiheadAttention.forward`."""
        turned = self.batch_first and query.dim() == 3
        if turned and query is key and key is value:
            query = key = value = query.transpose(0, 1)
        elif turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out, attention = multi_head_attention(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k,
            self.bias_v, self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias, self.training,
            key_padding_mask, need_weights, attn_mask, self.in_proj_weight is None, self.q_proj_weight,
            self.k_proj_weight, self.v_proj_weight, average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        return out.transpose(0, 1) if turned else out, attention


def is_narrow(module: nn.Module) -> bool:
    """Has it lost heads, so that torch's own forward() can't run?"""
    return isinstance(module, nn.MultiheadAttention) and module.out_proj.weight.shape[1] != module.embed_dim


def _projected(query: Tensor, key: Tensor, value: Tensor, weights: Any, bias: Tensor | None) -> Sequence[Tensor]:
    """Queries, keys and values; `weights`: one for all, or three."""
    if isinstance(weights, Tensor) and query is key and key is value:
        return F.linear(query, weights, bias).chunk(3, -1)
    separate = weights.chunk(3) if isinstance(weights, Tensor) else weights
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip((query, key, value), separate, biases, strict=True)]


def _mask(
    scores: Mask | None, keys: Mask | None, heads: int, like: Tensor
) -> Float[Tensor, "#batch #heads #targets sources"] | None:
    """What is added to the scores: masks of (targets, sources) or (batch heads, targets, sources); (batch, sources)."""
    if scores is not None:
        scores = scores.unflatten(0, (-1, heads)) if scores.dim() == 3 else scores[None, None]
    masks = [mask for mask in (scores, None if keys is None else keys[:, None, None]) if mask is not None]
    numbers = [
        torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]  # True: not seen
    return sum(numbers[1:], numbers[0]) if numbers else None
