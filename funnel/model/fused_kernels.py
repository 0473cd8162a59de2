"""The Triton kernels of fused_attention.py, which describes the method and the layout of the tables.

The kernels of the scores compute tiles: BM queries by BN keys of one example and head. Names of pointers are uppercase; strides
are in elements, with the letters of the tensor and the dimension (qb: of the queries' examples).

Shapes: b examples, q queries, k keys, h heads, c = d_head, t distances; CP is c rounded up to a power of 2.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(P, stride, index, count, C: tl.constexpr, CP: tl.constexpr):
    """Loads rows of a matrix, [len(index), CP]; zeros beyond `count` rows and `C` columns."""
    c = tl.arange(0, CP)
    return tl.load(P + index[:, None] * stride + c[None, :], mask=(index[:, None] < count) & (c[None, :] < C), other=0.0)


@triton.jit
def _store_rows(P, stride, index, count, values, C: tl.constexpr, CP: tl.constexpr):
    """The inverse of `_rows`."""
    c = tl.arange(0, CP)
    mask = (index[:, None] < count) & (c[None, :] < C)
    tl.store(P + index[:, None] * stride + c[None, :], values.to(P.dtype.element_ty), mask=mask)


@triton.jit
def _content_queries(QUERIES, BIAS, stride, index, count, C: tl.constexpr, CP: tl.constexpr):
    """Queries of the content scores, [len(index), CP]."""
    c = tl.arange(0, CP)
    q = _rows(QUERIES, stride, index, count, C, CP)
    return (q.to(tl.float32) + tl.load(BIAS + c, mask=c < C, other=0.0)[None, :]).to(q.dtype)


@triton.jit
def _table_offsets(i, b, h, B, H, Q, T, STEP: tl.constexpr):
    """Where the scores of queries i and key 0 are in the table (`phases_first`), [BM]: at multiples of 8."""
    rows = tl.cdiv(Q, 8)
    start = (STEP * (Q - 1 - i) + 7) // 8 * 8
    return ((((i % 8) * H + h) * B + b) * rows + i // 8) * T + start


@triton.jit
def _scores(q, segments, keys, key_segments, TABLE, MASK, i, j, Q, K, offsets, SEPARATE_CLS: tl.constexpr, first):
    """Scores of a tile, [BM, BN], times log2(e); -inf beyond the last key.

    Args:
        offsets: from `_table_offsets`.
        first: number of the chunk's first query.
    """
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    scores += tl.dot(segments, tl.trans(key_segments), input_precision="ieee")
    is_inside = (i[:, None] < Q) & (j[None, :] < K)
    position = tl.load(TABLE + offsets[:, None] + j[None, :], mask=is_inside, other=0.0).to(tl.float32)
    if SEPARATE_CLS:
        position = tl.where((i[:, None] + first == 0) | (j[None, :] == 0), 0.0, position)
    scores += position
    is_real = tl.load(MASK + j, mask=j < K, other=0) != 0
    scores = tl.where(is_real[None, :], scores * 1.4426950408889634, -1e30)
    return tl.where(j[None, :] < K, scores, float("-inf"))


@triton.jit
def _is_kept(seed, bh, i, j, K, first, threshold):
    """The dropout mask of a tile, [BM, BN]: true with a probability of 1 - threshold / 2^32.

    A hash of the seed and of the element's place, so that all kernels see the same mask, whatever their tiles.
    """
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32) ^ (bh.to(tl.uint32) * 0x85EBCA6B)
    x = ((i[:, None] + first) * K + j[None, :]).to(tl.uint32) * 0x9E3779B1 + low
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = x ^ high
    x = (x ^ (x >> 15)) * 0x735A2D97
    x = x ^ (x >> 15)
    return x >= threshold


@triton.jit(do_not_specialize=["B", "first", "first_example", "threshold"])
def forward_kernel(
    QUERIES, BIAS, KEYS, VALUES, TABLE, SEGMENTS, KEY_SEGMENTS, MASK, SEED, OUT, LSE,
    qb, qn, qh, kb, kn, kh, vb, vn, vh, ob, on, oh, sb, sn, sh, lb,
    B, H, Q, K, T, first, first_example, threshold, scale,
    STEP: tl.constexpr, SEPARATE_CLS: tl.constexpr, DROPOUT: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output of a tile's queries, and log2 of the sum of their exponentiated scores."""
    tiles = tl.cdiv(Q, BM)
    bh = tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), bh % H
    i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    q = _content_queries(QUERIES + b * qb + h * qh, BIAS + h * C, qn, i, Q, C, CP)
    segments = _rows(SEGMENTS + b * sb + h * sh, sn, i, Q, 4, 16)
    offsets = _table_offsets(i, b, h, B, H, Q, T, STEP)
    seed = tl.load(SEED) if DROPOUT else 0

    largest = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    output = tl.zeros([BM, CP], tl.float32)
    for start in range(0, K, BN):
        j = start + tl.arange(0, BN)
        keys = _rows(KEYS + b * kb + h * kh, kn, j, K, C, CP)
        key_segments = _rows(KEY_SEGMENTS + b * K * 4, 4, j, K, 4, 16)
        scores = _scores(q, segments, keys, key_segments, TABLE, MASK + b * K, i, j, Q, K, offsets, SEPARATE_CLS, first)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(_is_kept(seed, bh + first_example * H, i, j, K, first, threshold), weights * scale, 0.0)
        values = _rows(VALUES + b * vb + h * vh, vn, j, K, C, CP)
        output = output * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        largest = new_largest
    _store_rows(OUT + b * ob + h * oh, on, i, Q, output / total[:, None], C, CP)
    tl.store(LSE + bh * lb + i, largest + tl.log2(total), mask=i < Q)


@triton.jit(do_not_specialize=["B", "first", "first_example", "threshold"])
def backward_kernel(
    QUERIES, BIAS, KEYS, VALUES, TABLE, SEGMENTS, KEY_SEGMENTS, MASK, SEED, OUT, LSE, DOUT, DK, DV, DTABLE,
    qb, qn, qh, kb, kn, kh, vb, vn, vh, ob, on, oh, sb, sn, sh, lb, gb, gn, gh, db, dn, dh,
    B, H, Q, K, T, first, first_example, threshold, scale,
    STEP: tl.constexpr, SEPARATE_CLS: tl.constexpr, DROPOUT: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores, and of keys and values, added to DK and DV if ADD.

    gb, gn, gh are the strides of DOUT; db, dn, dh those of DK and DV.
    """
    tiles = tl.cdiv(K, BN)
    bh = tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), bh % H
    j = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    keys = _rows(KEYS + b * kb + h * kh, kn, j, K, C, CP)
    values = _rows(VALUES + b * vb + h * vh, vn, j, K, C, CP)
    key_segments = _rows(KEY_SEGMENTS + b * K * 4, 4, j, K, 4, 16)
    seed = tl.load(SEED) if DROPOUT else 0

    d_keys = tl.zeros([BN, CP], tl.float32)
    d_values = tl.zeros([BN, CP], tl.float32)
    for start in range(0, Q, BM):
        i = start + tl.arange(0, BM)
        offsets = _table_offsets(i, b, h, B, H, Q, T, STEP)
        q = _content_queries(QUERIES + b * qb + h * qh, BIAS + h * C, qn, i, Q, C, CP)
        segments = _rows(SEGMENTS + b * sb + h * sh, sn, i, Q, 4, 16)
        d_output = _rows(DOUT + b * gb + h * gh, gn, i, Q, C, CP)
        output = _rows(OUT + b * ob + h * oh, on, i, Q, C, CP)
        delta = tl.sum(output.to(tl.float32) * d_output.to(tl.float32), 1)
        lse = tl.load(LSE + bh * lb + i, mask=i < Q, other=float("inf"))  # weights beyond the last query are 0
        scores = _scores(q, segments, keys, key_segments, TABLE, MASK + b * K, i, j, Q, K, offsets, SEPARATE_CLS, first)
        weights = tl.exp2(scores - lse[:, None])
        d_weights = tl.dot(d_output, tl.trans(values), input_precision="ieee")
        dropped = weights
        if DROPOUT:
            is_kept = _is_kept(seed, bh + first_example * H, i, j, K, first, threshold)
            dropped = tl.where(is_kept, weights * scale, 0.0)
            d_weights = tl.where(is_kept, d_weights * scale, 0.0)
        d_values += tl.dot(tl.trans(dropped.to(values.dtype)), d_output, input_precision="ieee")
        d_scores = tl.where(scores > -1e29, weights * (d_weights - delta[:, None]), 0.0).to(q.dtype)  # 0 at masked keys
        d_keys += tl.dot(tl.trans(d_scores), q, input_precision="ieee")

        tl.store(DTABLE + offsets[:, None] + j[None, :], d_scores, mask=(i[:, None] < Q) & (j[None, :] < K))
    DK += b * db + h * dh
    DV += b * db + h * dh
    if ADD:
        d_keys += _rows(DK, dn, j, K, C, CP)
        d_values += _rows(DV, dn, j, K, C, CP)
    _store_rows(DK, dn, j, K, d_keys, C, CP)
    _store_rows(DV, dn, j, K, d_values, C, CP)


@triton.jit(do_not_specialize=["B", "first"])
def query_kernel(
    KEYS, KEY_SEGMENTS, DTABLE, DQ, DBIAS, DSEGMENTS, kb, kn, kh, qb, qn, qh, sb, sn, sh, B, H, Q, K, T, first,
    STEP: tl.constexpr, SEPARATE_CLS: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries by the content scores and of their segment scores, from the gradients of the scores.

    Writes the sum over the tile's queries to DBIAS, [programs, c]. Turns DTABLE into the gradient of the position scores: zero
    where the table has no score, and for a separate [CLS].
    """
    tiles = tl.cdiv(Q, BM)
    bh = tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), bh % H
    i = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    offsets = _table_offsets(i, b, h, B, H, Q, T, STEP)
    d_queries = tl.zeros([BM, CP], tl.float32)
    d_segments = tl.zeros([BM, 16], tl.float32)
    for start in range(0, K, BN):
        j = start + tl.arange(0, BN)
        is_inside = (i[:, None] < Q) & (j[None, :] < K)
        d_scores = tl.load(DTABLE + offsets[:, None] + j[None, :], mask=is_inside, other=0.0)
        keys = _rows(KEYS + b * kb + h * kh, kn, j, K, C, CP)
        key_segments = _rows(KEY_SEGMENTS + b * K * 4, 4, j, K, 4, 16)
        d_queries += tl.dot(d_scores, keys, input_precision="ieee")
        d_segments += tl.dot(d_scores, key_segments, input_precision="ieee")
        if SEPARATE_CLS:
            is_cls = (i[:, None] + first == 0) | (j[None, :] == 0)
            tl.store(DTABLE + offsets[:, None] + j[None, :], tl.zeros_like(d_scores), mask=is_inside & is_cls)
    _store_rows(DQ + b * qb + h * qh, qn, i, Q, d_queries, C, CP)
    _store_rows(DSEGMENTS + b * sb + h * sh, sn, i, Q, d_segments, 4, 16)
    c = tl.arange(0, CP)
    tl.store(DBIAS + tl.program_id(0) * C + c, tl.sum(d_queries, 0), mask=c < C)

    begin = (STEP * (Q - 1 - i) + 7) // 8 * 8  # the column of key 0
    zeros = tl.zeros([BM, BN], DTABLE.dtype.element_ty)
    is_row = i < tl.cdiv(Q, 8) * 8
    for start in range(0, T, BN):
        t = start + tl.arange(0, BN)
        is_score = (t[None, :] >= begin[:, None]) & (t[None, :] < begin[:, None] + K) & (i[:, None] < Q)
        mask = is_row[:, None] & (t[None, :] < T) & ~is_score
        tl.store(DTABLE + (offsets - begin)[:, None] + t[None, :], zeros, mask=mask)


@triton.jit
def shift_kernel(R, SHIFTED, rn, rh, H, Q, COUNT, T, STEP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr):
    """Encodings of the distances for the queries of each phase (`phases_first`), [8, h, t, c], from R, [t, h, c].

    A phase's rows are shifted so that the scores of each of its queries start at a multiple of 8. Other rows are zero.
    """
    tiles = tl.cdiv(T, BN)
    phase, h = (tl.program_id(0) // tiles // H).to(tl.int64), tl.program_id(0) // tiles % H
    t = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    start = STEP * (Q - 1 - phase + 8)  # that of a query of this phase, modulo 8
    source = t - ((start + 7) // 8 * 8 - start)
    c = tl.arange(0, CP)
    mask = (source[:, None] >= 0) & (source[:, None] < COUNT) & (c[None, :] < C)
    values = tl.load(R + source[:, None] * rn + h * rh + c[None, :], mask=mask, other=0.0)
    _store_rows(SHIFTED + (phase * H + h) * T * C, C, t, T, values, C, CP)


@triton.jit
def unshift_kernel(SHIFTED, R, rn, rh, H, Q, COUNT, T, STEP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr):
    """The backward pass of `shift_kernel`: adds the sum over the phases to R, [t, h, c]."""
    tiles = tl.cdiv(COUNT, BN)
    h = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    total = _rows(R + h * rh, rn, t, COUNT, C, CP).to(tl.float32)
    for phase in range(8):
        start = STEP * (Q - 1 - phase + 8)
        shift = (start + 7) // 8 * 8 - start
        is_real = t < COUNT
        total += _rows(SHIFTED + (phase * H + h) * T * C, C, tl.where(is_real, t + shift, T), T, C, CP).to(tl.float32)
    _store_rows(R + h * rh, rn, t, COUNT, total, C, CP)
