"""Attention whose dropout is drawn from counters: in one draw, all rows of a batch share the mask.

torch's own attention draws its mask inside one fused call, which neither `vmap` nor vbdl's seed controls; these are the
same formulas (Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762) with an explicit mask.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vbdl.calling.stacking import is_of_a_trace
from vbdl.nn.drawn import Drawn
from vbdl.nn.masks import Masks


def scaled_dot_product_attention(
    masks: Masks,
    func: Callable[..., Tensor],
    query: Tensor,  # (batch, ..., length, head)
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` with one dropout mask per draw, (heads, length, source)."""
    if dropout_p == 0.0:
        return func(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.mT * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        length, source = scores.shape[-2:]
        attn_mask = torch.ones(length, source, dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    weights = masks.drop(_softmax(scores), dropout_p, "scaled_dot_product_attention")
    return weights @ value


def multi_head_attention_forward(
    masks: Masks,
    func: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,  # (length, batch, embedding)
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` with one dropout mask per draw, (heads, length, source).

    query, key and value may have no batch axis, as in torch: a network may attend to what does not depend on the rows.
    """
    if static_k is not None or static_v is not None:
        raise NotImplementedError(
            f"attention in module '{masks.place()}' uses static_k or static_v, which vbdl does not support: pass key "
            f"and value"
        )
    if is_causal and attn_mask is None:
        raise ValueError(
            f"attention in module '{masks.place()}' got is_causal=True without attn_mask: pass the causal mask too"
        )
    alone = query.ndim == 2
    if alone:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    source = key.shape[0] + (bias_k is not None) + add_zero_attn
    keep = None
    if training:
        shape = (num_heads, length, source) if alone else (batch, num_heads, length, source)
        keep = masks.keep("multi_head_attention_forward", shape, dropout_p, query.device, axis=-1)
    masked = attn_mask is not None or key_padding_mask is not None
    plain = not isinstance(out_proj_weight, Drawn) and not any(map(is_of_a_trace, (query, out_proj_weight)))
    if masks.per_row and keep is None and not masked and plain:
        out, weights = func(  # torch's fused kernel, where every member trains alone and no kernel draws the weights
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
            add_zero_attn, 0.0, out_proj_weight, out_proj_bias, False, None, need_weights, None,
            use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight,
            average_attn_weights=average_attn_weights,
        )  # fmt: skip
        return _without_batch(out, weights) if alone else (out, weights)
    if use_separate_proj_weight:
        assert q_proj_weight is not None and k_proj_weight is not None and v_proj_weight is not None
        weights_in = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        weights_in = in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights_in, biases, strict=True))
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, batch, -1)])
        v = torch.cat([v, bias_v.expand(1, batch, -1)])
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(1, batch, t.shape[-1])]) for t in (k, v))
    heads = lambda t: t.reshape(t.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3)
    q, k, v = heads(q), heads(k), heads(v)  # (batch, heads, length | source, head)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if attn_mask is not None:
        mask = attn_mask.view(batch, num_heads, length, -1) if attn_mask.ndim == 3 else attn_mask
        scores = _mask(scores, F.pad(mask, (0, source - mask.shape[-1])))
    if key_padding_mask is not None:
        mask = F.pad(key_padding_mask, (0, source - key_padding_mask.shape[-1]))
        scores = _mask(scores, mask[:, None, None, :])
    attention = _softmax(scores)
    if keep is not None:
        attention = masks.scale(attention, keep)
    out = (attention @ v).permute(2, 0, 1, 3).reshape(length, batch, width)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    weights = None if not need_weights else attention.mean(dim=1) if average_attn_weights else attention
    return _without_batch(out, weights) if alone else (out, weights)


def _without_batch(out: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The output (length, 1, embedding) and the weights (1, ...) of attention without their batch axis of length 1."""
    return out.squeeze(1), None if weights is None else weights.squeeze(0)


def _softmax(scores: Tensor) -> Tensor:
    """The softmax over the sources, with zeros if all sources are masked out, when the formula is 0 / 0."""
    return torch.softmax(scores, dim=-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)


def _mask(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores with a mask applied as torch does in this function: True masks out, a float is added."""
    return scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
