"""Laws of Locally Merged Attention, for the public dense op and every backend."""

import math

import pytest
import torch
from tiny_models import assert_close, assert_lse, tiny_model

from asymkv import lma_attention
from asymkv.layer import CompressedLayer
from asymkv.ops import ragged_attention, reference, row_bias, sdpa
from asymkv.ops.backends import MIN_CHUNK_APART
from asymkv.ops.reference import causal_tail_bias
from asymkv.plan import CompactionPlan, contract_pairs, keep_rows
from asymkv.rope import Rope


def make(batch=2, heads=4, kv_heads=2, queries=3, rows=17, dim=16, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, dim, generator=g, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(batch, kv_heads, rows, dim, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    n = torch.randint(1, 9, (batch, kv_heads, rows), generator=g)
    return q, k, v, n


def sum_form(q, k, v, n, scale):
    k, v, n = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v, n))
    weights = torch.exp(scale * q @ k.transpose(-1, -2)) * n[:, :, None]
    return weights @ v / weights.sum(-1, keepdim=True), weights.sum(-1).log()


def test_matches_the_sum_form():
    q, k, v, n = make()
    out, lse = lma_attention(q, k, v, n)
    ref, ref_lse = sum_form(q, k, v, n, q.shape[-1] ** -0.5)
    assert_close("out", ref, out, 1e-13)
    assert_lse(ref_lse, lse, 1e-13)


@pytest.mark.parametrize("tail", [0, 3, 17])
def test_cardinality_one_is_ordinary_attention(tail):
    q, k, v, n = make()
    out, _ = lma_attention(q, k, v, torch.ones_like(n), causal_tail=tail)
    mask = causal_tail_bias(3, 17, tail, q.device).double() if tail else None
    ref = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert_close("out", ref, out, 1e-13)


def test_merging_equal_keys_is_lossless():
    q, k, v, n = make()
    k[:, :, 5] = k[:, :, 4]
    full, full_lse = lma_attention(q, k, v, n)
    weight = n[:, :, 4:6, None].double()
    v[:, :, 4] = (weight * v[:, :, 4:6]).sum(2) / weight.sum(2)
    n[:, :, 4] += n[:, :, 5]
    keep = [i for i in range(17) if i != 5]
    out, lse = lma_attention(q, k[:, :, keep], v[:, :, keep], n[:, :, keep])
    assert (out - full).abs().max() < 1e-12 and (lse - full_lse).abs().max() < 1e-12


def test_zero_cardinality_is_an_absent_row():
    q, k, v, n = make()
    n[:, :, 3] = 0
    keep = [i for i in range(17) if i != 3]
    for a, b in zip(lma_attention(q, k, v, n), lma_attention(q, k[:, :, keep], v[:, :, keep], n[:, :, keep]),
                    strict=True):  # fmt: skip
        assert_close("absent", b, a, 1e-14)


def test_no_row_at_all_gives_zero_and_minus_infinity():
    q, k, v, n = make()
    n[1] = 0
    out, lse = lma_attention(q, k, v, n)
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all() and out[0].abs().min() > 0
    out, lse = lma_attention(q, k[:, :, :0], v[:, :, :0], n[:, :, :0])
    assert (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("attend", [sdpa.biased_attention, reference.biased_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_for_logits_of_ten_thousand(attend, dtype):
    q, k, v, n = make(dtype=dtype)
    bias = row_bias(n.float().log().flatten(0, 1), None, torch.arange(17).expand(2, 2, -1), None, 2)
    out, lse = attend(q * 100, k * 25, v, bias, 1.0)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all() and lse.abs().max() > 5e3


@pytest.mark.parametrize("attend", [sdpa.biased_attention, reference.biased_attention])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 4e-3),
                                             (torch.float16, 1e-3)])  # fmt: skip
@pytest.mark.parametrize("queries", [1, 5])
def test_dense_form_matches_fp64_reference(attend, dtype, rtol, queries):
    q, k, v, n = make(queries=queries, rows=133, dim=64)
    n = n**4  # up to 4096
    n[0, 1] = 0
    n[1, 0, ::3] = 0
    q, k, v = (x.to(dtype) for x in (q, k, v))
    ref, ref_lse = lma_attention(q.double(), k.double(), v.double(), n)
    bias = n.to(torch.promote_types(dtype, torch.float32)).log()[:, :, None]
    out, lse = attend(q, k, v, bias, 0.125)
    assert out.dtype == dtype and lse.dtype == bias.dtype
    assert_close("out", ref, out, rtol)
    assert_lse(ref_lse, lse, max(rtol / 10, 1e-13))
    assert torch.isneginf(lse[0, 2:]).all() and (out[0, 2:] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("dim", [14, 64, 80])
@pytest.mark.parametrize("queries", [1, 5])
def test_sdpa_on_a_gpu_matches_fp64_in_any_width(dtype, rtol, dim, queries):
    """Log n must not be rounded to the queries' dtype, nor a width refused that the kernel is not built for."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q, k, v, n = make(queries=queries, rows=133, dim=dim)
    n[0, 1] = 0
    q, k, v = (x.to(dtype) for x in (q, k, v))
    ref, ref_lse = lma_attention(q.double(), k.double(), v.double(), n)
    out, lse = sdpa.biased_attention(*(x.cuda() for x in (q, k, v, n.float().log()[:, :, None])), dim**-0.5)
    assert out.dtype == dtype
    assert_close("out", ref, out.cpu(), rtol)
    assert_lse(ref_lse, lse.cpu(), rtol / 10)
    assert torch.isneginf(lse[0, 2:]).all() and (out[0, 2:] == 0).all()
    own = sdpa.causal_attention(*(x.cuda() for x in (q, k[:, :, :queries], v[:, :, :queries])), dim**-0.5)
    want = lma_attention(q.double(), k[:, :, :queries].double(), v[:, :, :queries].double(),
                         torch.ones_like(n[:, :, :queries]), causal_tail=queries)  # fmt: skip
    assert_close("causal", want[0], own[0].cpu(), rtol)


def test_a_mask_in_half_precision_is_taken_only_where_it_is_exact():
    marks = torch.tensor([[0.0, -torch.inf]])
    for dtype in (torch.bfloat16, torch.float16):
        assert not sdpa._rounds(marks, dtype) and sdpa._rounds(marks + math.log(5), dtype)
    assert not sdpa._rounds(marks + math.log(5), torch.float32)


def test_bad_shapes_are_named():
    q, k, v, n = make()
    with pytest.raises(ValueError, match="multiple of H_kv"):
        lma_attention(q[:, :3], k, v, n)
    with pytest.raises(ValueError, match="cardinality must match"):
        lma_attention(q, k, v, n[..., :4])
    with pytest.raises(ValueError, match="causal_tail"):
        lma_attention(q, k, v, n, causal_tail=18)
    n[0, 0, 0] = -1
    with pytest.raises(ValueError, match=">= 0; found -1"):
        lma_attention(q, k, v, n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["even", "ragged", "merged", "one head holds nothing older"])
def test_a_chunk_behind_older_rows_attends_as_the_reference_does(rows, dtype):
    """SDPA takes older rows and the chunk apart; the reference masks one table of queries x rows."""
    torch.manual_seed(3)
    rope, layer = Rope(tiny_model().model.rotary_emb), CompressedLayer()
    k, v = torch.randn(2, 2, 2, 24, 16, dtype=torch.float64).to(dtype)
    layer.append(k, v)
    if rows == "merged":
        plan = CompactionPlan(contract_pairs(torch.rand(2, 2, 23) < 0.5))
    elif rows == "even":
        plan = keep_rows(torch.arange(24).expand(2, 2, -1) % 3 > 0)
    else:
        keep = torch.rand(2, 2, 24) < 0.5
        keep[0, 1] &= rows == "ragged"
        plan = keep_rows(keep)
    layer.carry_out(plan, layer.view(rope, 0.25))
    assert layer.storage.even == (rows == "even") and layer.storage.merged == (rows == "merged")
    chunk = torch.randn(2, 2, 2, MIN_CHUNK_APART, 16, dtype=torch.float64).to(dtype)
    layer.append(*chunk)
    query = (4 * torch.randn(2, 6, MIN_CHUNK_APART, 16, dtype=torch.float64)).to(dtype)
    new = torch.arange(24, 24 + MIN_CHUNK_APART)
    given = {"query_positions": new.expand(2, -1), "counts": [MIN_CHUNK_APART] * 2}
    ref, ref_lse = ragged_attention(query.double(), _in_fp64(layer), backend="reference", **given)
    out, lse = ragged_attention(query, layer, backend="sdpa", **given)
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert out.dtype == dtype
    assert_close("out", ref, out.double(), rtol)
    assert_lse(ref_lse, lse.double(), rtol)
    # What the last token holds does not matter to the queries before it.
    for head, begin in enumerate(layer.storage.start):
        layer.storage.columns["values"][begin + layer.storage.length[head] - 1] += 1000
    later, _ = ragged_attention(query, layer, backend="sdpa", **given)
    assert torch.equal(later[:, :, :-1], out[:, :, :-1]) and not torch.equal(later[:, :, -1], out[:, :, -1])


def _in_fp64(layer):
    """A copy of a layer with keys and values in fp64."""
    out = layer.fork()
    for name in ("keys", "values"):
        out.storage.columns[name] = out.storage.columns[name].double()
    return out


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_absent_row_is_absent_whatever_it_holds(poison):
    q, k, v, n = make()
    n[:, :, 3] = n[:, 1, 7] = 0
    ref = lma_attention(q, k, v, n)
    for row in (3, 7):
        k[:, 1, row] = v[:, 1, row] = poison
    for a, b in zip(ref, lma_attention(q, k, v, n), strict=True):
        assert torch.equal(a, b)


def test_no_queries_and_no_batch_give_empty_results():
    q, k, v, n = make()
    assert [x.shape for x in lma_attention(q[:, :, :0], k, v, n)] == [(2, 4, 0, 16), (2, 4, 0)]
    assert [x.shape for x in lma_attention(q[:0], k[:0], v[:0], n[:0])] == [(0, 4, 3, 16), (0, 4, 3)]
    with pytest.raises(ValueError, match="query.*found"):
        lma_attention(q[..., :8], k, v, n)
