"""Attention as ONNX defines it, for every form of heads, masks and caches; rotary positions; linear attention.

These are references: the fused kernels of text encoders are in ops/attention.py. Specification: ONNX opsets 24 to 27.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from gristmill.ops.axes import at, first
from gristmill.ops.dtypes import INT64, is_float, narrow, wide
from gristmill.ops.normalization import softmax
from gristmill.ops.op import Dim, Node, Op, TensorType, fresh_dim, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


def split(x: Array, heads: int) -> Array:
    """[batch, length, heads * size] to [batch, heads, length, size]."""
    batch, length, _ = x.shape
    return x.reshape(batch, length, heads, -1).swapaxes(1, 2)


def joined(x: Array) -> Array:
    """[batch, heads, length, size] to [batch, length, heads * size]."""
    batch, heads, length, size = x.shape
    return x.swapaxes(1, 2).reshape(batch, length, heads * size)


def per_head(node: Node, x: TensorType, heads: int, name: str) -> tuple[Dim, Dim, Dim, Dim]:
    """The shape [batch, heads, length, size] of a value that may have its heads in the last dimension."""
    if len(x.shape) == 4:
        batch, count, length, size = x.shape
        return batch, count, length, size
    need(len(x.shape) == 3 and heads > 0, node, f"{name} is {x}; three dimensions need the number of heads, four have it")
    batch, length, hidden = x.shape
    need(isinstance(hidden, str) or hidden % heads == 0, node, f"{name} is {x}, which does not divide into {heads} heads")
    return batch, heads, length, fresh_dim(node, 3) if isinstance(hidden, str) else hidden // heads


class Attention(Op):
    """softmax(softcap(Q K' scale) + mask) V for each head; several heads of Q may share one of K and V.

    Inputs Q, K, V, each [batch, heads, length, size] or [batch, length, heads * size], and, optional, a mask (truth values or
    what is added), the keys and values of earlier steps, and how many keys of each batch entry count. Outputs Y, keys and values
    with those before, and the scores at the stage that `qk_matmul_output_mode` names. A query that may see no key gives zeros.
    """

    name = "Attention"
    arity = (3, 7)
    attributes = {
        "is_causal": int, "kv_num_heads": int, "left_window_size": int, "q_num_heads": int, "qk_matmul_output_mode": int,
        "right_window_size": int, "scale": float, "softcap": float, "softmax_precision": str,
    }  # fmt: skip

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        q, k, v = types[:3]
        assert q is not None
        assert k is not None
        assert v is not None
        own, shared = node.attributes.get("q_num_heads", 0), node.attributes.get("kv_num_heads", 0)
        batch, heads, length, size = per_head(node, q, own, "Q")
        kb, kv_heads, keys, ks = per_head(node, k, shared, "K")
        vb, vh, values, vs = per_head(node, v, shared, "V")
        told = f"Q is {q}, K is {k}, V is {v}"
        pairs = ((batch, kb), (kb, vb), (kv_heads, vh), (keys, values), (size, ks))
        need(all(same_dim(a, b) for a, b in pairs) and is_float(q.dtype) and q.dtype == k.dtype, node, f"{told}: they do not fit")
        whole = isinstance(heads, str) or isinstance(kv_heads, str) or (kv_heads > 0 and heads % kv_heads == 0)
        need(whole, node, f"{told}: {heads} heads cannot share {kv_heads}")
        past, past_v = at(types, 4), at(types, 5)
        need((past is None) == (past_v is None), node, "takes the keys and the values of earlier steps together")
        total = keys
        if past is not None:
            need(len(past.shape) == 4, node, f"the earlier keys are {past}")
            total = past.shape[2] + keys if isinstance(past.shape[2], int) and isinstance(keys, int) else fresh_dim(node, 2)
        if len(q.shape) == 4:
            y: tuple[Dim, ...] = (batch, heads, length, vs)
        else:
            y = (batch, length, heads * vs if isinstance(heads, int) and isinstance(vs, int) else fresh_dim(node, 2))
        made = [
            TensorType(q.dtype, y),
            TensorType(k.dtype, (batch, kv_heads, total, size)),
            TensorType(v.dtype, (batch, kv_heads, total, vs)),
            TensorType(q.dtype, (batch, heads, length, total)),
        ]
        return made[: len(node.outputs)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        q, k, v, mask, past_k, past_v, valid = (*inputs, None, None, None, None)[:7]
        flat = q.ndim == 3
        if flat:
            shared = node.attributes["kv_num_heads"]
            q, k, v = split(q, node.attributes["q_num_heads"]), split(k, shared), split(v, shared)
        before = 0 if past_k is None else past_k.shape[2]
        if past_k is not None:
            k, v = np.concatenate([past_k, k], axis=2), np.concatenate([past_v, v], axis=2)
        group = q.shape[1] // max(k.shape[1], 1)
        keys, values = np.repeat(wide(k), group, axis=1), np.repeat(wide(v), group, axis=1)
        stages = self._stages(node, wide(q), keys, self._bias(node, q, k, mask, valid, before))
        y = narrow(stages[3] @ values, q.dtype)
        scores = narrow(stages[node.attributes.get("qk_matmul_output_mode", 0)], q.dtype)
        return [joined(y) if flat else y, k, v, scores][: len(node.outputs)]

    def _stages(self, node: Node, q: Array, keys: Array, bias: Array) -> list[Array]:
        """The scores as they are, capped, with the mask, and as probabilities."""
        root = sqrt(node.attributes.get("scale") or 1 / sqrt(max(q.shape[-1], 1)))
        raw = (q * np.asarray(root, q.dtype)) @ (keys.swapaxes(-1, -2) * np.asarray(root, q.dtype))
        cap = node.attributes.get("softcap", 0.0)
        capped = cap * np.tanh(raw / cap) if cap else raw
        biased = capped + bias
        blind = (biased == -np.inf).all(axis=-1, keepdims=True)
        share = np.where(blind, 0.0, softmax(np.where(blind, 0.0, biased))).astype(q.dtype)
        return [raw, capped, biased, share]

    def _bias(self, node: Node, q: Array, k: Array, mask: Any, valid: Any, before: int) -> Array:
        """What is added to the scores: the mask, and -inf where a query may not look."""
        batch, length, total = q.shape[0], q.shape[2], k.shape[2]
        offset = np.full(batch, before) if valid is None or before else valid - length
        distance = np.arange(total) - (np.arange(length)[:, None] + offset[:, None, None])  # of a key from a query
        seen = np.ones((batch, length, total), np.bool_)
        left, right = (node.attributes.get(f"{side}_window_size", -1) for side in ("left", "right"))
        if node.attributes.get("is_causal", 0):
            seen &= distance <= 0
        if left >= 0:
            seen &= distance >= -left
        if right >= 0:
            seen &= distance <= right
        if valid is not None:
            seen &= np.arange(total) < valid[:, None, None]
        bias = np.where(seen, np.float32(0), -np.float32(np.inf))[:, None]
        if mask is None:
            return bias
        added = np.where(mask, np.float32(0), -np.float32(np.inf)) if mask.dtype == np.bool_ else wide(mask)
        short = [(0, 0)] * (added.ndim - 1) + [(0, total - added.shape[-1] if added.shape[-1] != 1 else 0)]
        return bias + np.pad(added, short, constant_values=-np.inf)


class RotaryEmbedding(Op):
    """Pairs of elements of each head rotated by the angles of the position; elements past `rotary_embedding_dim` stay.

    Inputs X [batch, heads, length, size] or [batch, length, heads * size], the cosines and sines, for each token or, with the
    positions as a fourth input, for each position. Pairs are neighbours if `interleaved`, else half a head apart.
    """

    name = "RotaryEmbedding"
    arity = (3, 4)
    attributes = {"interleaved": int, "num_heads": int, "rotary_embedding_dim": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, cosines, sines, positions = first(types), types[1], types[2], at(types, 3)
        assert cosines is not None
        assert sines is not None
        per_head(node, x, node.attributes.get("num_heads", 0), "X")
        rank = 3 if positions is None else 2
        need(len(cosines.shape) == len(sines.shape) == rank, node, f"the cosines are {cosines}, the sines {sines}")
        need(positions is None or positions.dtype == INT64, node, f"the positions are {positions}")
        return [x]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, cosine, sine, positions = (*inputs, None)[:4]
        heads = split(x, node.attributes["num_heads"]) if x.ndim == 3 else x
        if positions is not None:
            cosine, sine = cosine[positions], sine[positions]
        cosine, sine = wide(cosine)[:, None], wide(sine)[:, None]
        turned = node.attributes.get("rotary_embedding_dim", 0) or heads.shape[-1]
        half, y = turned // 2, np.array(wide(heads))
        pairs = (slice(0, turned, 2), slice(1, turned, 2)) if node.attributes.get("interleaved", 0) else (
            slice(0, half), slice(half, turned)
        )  # fmt: skip
        a, b = (wide(heads)[..., part] for part in pairs)
        y[..., pairs[0]], y[..., pairs[1]] = a * cosine - b * sine, a * sine + b * cosine
        return [narrow(joined(y) if x.ndim == 3 else y, x.dtype)]


class LinearAttention(Op):
    """A state [size of keys, size of values] for each head of keys that every token updates and every query reads.

    S = exp(decay) S; S += k (beta (v - S' k))' for the delta rules, S += k v' for the others; y = scale S' q. Inputs query, key,
    value [batch, length, heads * size] and, optional, the first state, the decay and beta; outputs Y and the last state.
    """

    name = "LinearAttention"
    arity = (3, 6)
    attributes = {"chunk_size": int, "kv_num_heads": int, "q_num_heads": int, "scale": float, "update_rule": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        q, k, v, past = first(types), types[1], types[2], at(types, 3)
        assert k is not None
        assert v is not None
        heads, shared = node.attributes["q_num_heads"], node.attributes["kv_num_heads"]
        rule = node.attributes.get("update_rule", "gated_delta")
        need(rule in ("linear", "gated", "delta", "gated_delta"), node, f"unknown rule {rule!r}")
        need("gated" not in rule or at(types, 4) is not None, node, f"the rule {rule!r} needs a decay")
        need("delta" not in rule or at(types, 5) is not None, node, f"the rule {rule!r} needs beta")
        need(shared > 0 and heads % shared == 0, node, f"{heads} heads cannot share {shared}")
        batch, _, _, size = per_head(node, k, shared, "the key")
        width = per_head(node, v, shared, "the value")[3]
        need(len(q.shape) == len(k.shape) == len(v.shape) == 3, node, f"takes three dimensions, got {q}, {k} and {v}")
        last = heads * width if isinstance(width, int) else fresh_dim(node, 2)
        state = TensorType(q.dtype if past is None else past.dtype, (batch, shared, size, width))
        return [TensorType(q.dtype, (*q.shape[:2], last)), state][: len(node.outputs)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        heads, shared = node.attributes["q_num_heads"], node.attributes["kv_num_heads"]
        past, decay, beta = (*inputs[3:], None, None, None)[:3]
        q, k, v = split(wide(inputs[0]), heads), *(split(wide(x), shared) for x in inputs[1:3])
        batch, _, length, size = k.shape
        rule = node.attributes.get("update_rule", "gated_delta")
        state = np.zeros((batch, shared, size, v.shape[-1]), np.float32) if past is None else np.array(wide(past), np.float32)
        fades = split(np.exp(wide(decay)), shared) if "gated" in rule else None  # [batch, heads, length, 1 or size]
        rates = None
        if "delta" in rule:
            rates = np.broadcast_to(wide(beta).swapaxes(1, 2)[..., None], (batch, shared, length, 1))
        scale = node.attributes.get("scale", 0.0) or 1 / sqrt(size)
        y = np.zeros((batch, heads, length, v.shape[-1]), np.float32)
        for step in range(length):
            key, new = k[:, :, step], v[:, :, step]
            if fades is not None:
                state = state * fades[:, :, step, :, None]
            if rates is not None:
                new = rates[:, :, step] * (new - np.einsum("bhk,bhkv->bhv", key, state))
            state = state + key[..., None] * new[..., None, :]
            seen = np.repeat(state, heads // shared, axis=1)
            y[:, :, step] = scale * np.einsum("bhk,bhkv->bhv", q[:, :, step], seen)
        made = [narrow(joined(y), inputs[0].dtype), narrow(state, (inputs[0] if past is None else past).dtype)]
        return made[: len(node.outputs)]


OPERATORS = (Attention, RotaryEmbedding, LinearAttention)
