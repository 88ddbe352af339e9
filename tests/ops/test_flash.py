"""Segments of equal cardinality through a variable-length attention, against fp64."""

import pytest
import torch
from ragged import HEAD_LENS, SPARE, Ragged, attention64, make_ragged, plain_varlen
from tiny_models import assert_close, assert_lse

from asymkv.ops import flash

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: str(t).removeprefix("torch."))


def cuda_varlen(request):
    found = flash.find_varlen()
    if found is None:
        pytest.skip("no FlashAttention can be called here")
    return found


@pytest.fixture(params=["plain", pytest.param("flash", marks=pytest.mark.gpu)])
def varlen(request):
    return plain_varlen if request.param == "plain" else cuda_varlen(request)


@pytest.fixture
def device(varlen):
    return torch.device("cpu" if varlen is plain_varlen else "cuda")


def in_class_order(x: Ragged) -> Ragged:
    """The same rows with those of each head in class order."""
    for begin, n in zip(x.start, x.length, strict=True):
        own = slice(begin, begin + n)
        order = flash.class_order(x.cardinality[None, own], torch.ones(1, n, dtype=torch.bool, device=x.keys.device))[0]
        for column in (x.keys, x.values, x.cardinality, x.position):
            column[own] = column[own][order]
    return x


def segments_of(x: Ragged) -> flash.Segments:
    return flash.build_segments(x.cardinality, x.start, x.length, x.keys.device)


def check(expected, found, dtype, columns=slice(None)):
    (ref, ref_lse), (out, lse) = expected, (y.cpu() for y in found)
    # FlashAttention's own lse comes from approximate exponentials.
    lse_rtol = 1e-5 if found[0].is_cuda else 2e-6
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.isfinite(out).all() and not lse.isnan().any()
    assert_close("out", ref[:, :, columns], out[:, :, columns], TOLERANCE[dtype])
    ref_lse, lse = ref_lse[:, :, columns], lse[:, :, columns]
    assert torch.equal(torch.isneginf(ref_lse), torch.isneginf(lse))
    assert_lse(ref_lse, lse, lse_rtol)


def test_class_order_is_stable_with_single_tokens_last():
    n = torch.tensor([[1, 7, 2, 1, 2, 9, 1]])
    valid = torch.tensor([[1, 1, 1, 1, 1, 0, 1]]).bool()
    assert flash.class_order(n, valid).tolist() == [[2, 4, 1, 0, 3, 6, 5]]


def test_segments_list_classes_and_grow_in_place():
    n = torch.tensor([2, 2, 5, 1, 0, 0, 0, 3, 0, 0])
    found = flash.build_segments(n, [0, 5, 7], [4, 0, 1], torch.device("cpu"))
    assert found.head.tolist() == [0, 0, 0, 1, 2, 2] and found.used.tolist() == [2, 1, 1, 0, 1, 0]
    assert found.start.tolist() == [0, 2, 3, 5, 7, 8, 10] and found.last.tolist() == [2, 3, 5]
    assert_close("log n", torch.tensor([2, 5, 1, 1, 3, 1]).log(), found.log_n, 1e-7)
    used = found.used
    found.grow([1, 1, 1])
    found.grow([0, 2, 0])
    assert used.tolist() == [2, 1, 2, 3, 1, 1] and found.host_last == [2, 3, 1] and found.max_rows == 3
    with pytest.raises(ValueError, match="one entry for each of 3 heads; found 2"):
        found.grow([1, 1])


@pytest.mark.parametrize("n", [[1, 2], [3, 2, 1], [2, 1, 2], [0, 1]], ids=str)
def test_rows_out_of_class_order_are_refused(n):
    with pytest.raises(ValueError, match="class_order"):
        flash.build_segments(torch.tensor(n), [0], [len(n)], torch.device("cpu"))


@each_dtype
@pytest.mark.parametrize("most", [1, 4, 10_000])
@pytest.mark.parametrize("head_lens", HEAD_LENS, ids=str)
def test_decode_matches_fp64(head_lens, most, dtype, varlen, device):
    if varlen is not plain_varlen and dtype == torch.float32:
        pytest.skip("FlashAttention has no fp32")
    x = in_class_order(make_ragged(head_lens, 64, dtype, most=most, device=device))
    check(attention64(x), flash.attend(x.query, x.keys, x.values, segments_of(x), None, x.scale, varlen), dtype)


@pytest.mark.parametrize("dim", [80, 96, 128, 256])
def test_decode_in_every_head_dimension(dim, varlen, device):
    x = in_class_order(make_ragged([5, 130], dim, torch.bfloat16, most=5, group=3, device=device))
    found = flash.attend(x.query, x.keys, x.values, segments_of(x), None, x.scale, varlen)
    check(attention64(x), found, torch.bfloat16)


@pytest.mark.parametrize("most", [1, 3])
def test_more_segments_than_a_grid_takes_are_attended_in_parts(most, varlen, device, monkeypatch):
    dtype = torch.float32 if varlen is plain_varlen else torch.bfloat16
    x = in_class_order(make_ragged([5, 0, 30, 9], 64, dtype, most=5, device=device))
    segments = segments_of(x)
    assert len(segments.head) > most
    monkeypatch.setattr(flash, "MAX_SEQUENCES", most)
    check(attention64(x), flash.attend(x.query, x.keys, x.values, segments, None, x.scale, varlen), dtype)


def test_segments_made_in_inference_mode_grow_outside_it():
    n = torch.tensor([2, 1, 1, 0])
    with torch.inference_mode():
        segments = flash.build_segments(n.clone(), [0], [3], torch.device("cpu"))
    segments.grow([1])
    assert segments.used.tolist() == [1, 3]


@each_dtype
def test_finite_for_logits_of_ten_thousand(dtype, varlen, device):
    if varlen is not plain_varlen and dtype == torch.float32:
        pytest.skip("FlashAttention has no fp32")
    x = in_class_order(make_ragged([5, 130], 64, dtype, most=9, device=device))
    out, lse = flash.attend(x.query * 100, x.keys * 25, x.values, segments_of(x), None, 1.0, varlen)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all() and lse.abs().max() > 5e3


@pytest.mark.parametrize("counts", [[4, 4], [4, 2], [0, 3]], ids=str)
def test_new_tokens_see_all_earlier_rows_and_are_causal_among_themselves(counts, varlen, device):
    """Two batch rows of two heads; the first counts[b] of four columns are tokens."""
    dtype = torch.float32 if varlen is plain_varlen else torch.bfloat16
    old, queries = [5, 0, 60, 9], 4
    new = [c for c in counts for _ in range(2)]
    total = [a + b for a, b in zip(old, new, strict=True)]
    x = make_ragged(total, 64, dtype, queries=queries, batch=2, most=6, device=device)
    for begin, a, b in zip(x.start, old, new, strict=True):
        x.cardinality[begin + a : begin + a + b] = 1
    x = in_class_order(x)
    # As in use: segments of the rows before, grown by the tokens appended behind.
    segments = flash.build_segments(x.cardinality, x.start, old, device)
    segments.grow(new)
    found = flash.attend(x.query, x.keys, x.values, segments, counts, x.scale, varlen)
    seen = [torch.arange(a + b)[None] <= a + torch.arange(queries)[:, None]
            for a, b in zip(old, new, strict=True)]  # fmt: skip
    ref, ref_lse = attention64(x, seen=seen)
    assert torch.isfinite(found[0]).all(), "columns that are no tokens included"
    for row, count in ((r, c) for r, c in enumerate(counts) if c):
        own = slice(row, row + 1)
        check((ref[own], ref_lse[own]), [y[own] for y in found], dtype, slice(count))


def test_several_queries_without_own_tokens_see_every_row(varlen, device):
    dtype = torch.float32 if varlen is plain_varlen else torch.bfloat16
    x = in_class_order(make_ragged([5, 0, 60, 9], 64, dtype, queries=3, batch=2, most=6, device=device))
    found = flash.attend(x.query, x.keys, x.values, segments_of(x), None, x.scale, varlen)
    check(attention64(x), found, dtype)


def test_spare_rows_are_not_read(varlen, device):
    """They hold NaN in all of these tests; here a token fills the first of them."""
    dtype = torch.float32 if varlen is plain_varlen else torch.bfloat16
    x = in_class_order(make_ragged([5, 7], 64, dtype, most=3, device=device))
    segments = segments_of(x)
    assert SPARE and x.keys.isnan().any()
    for begin, n in zip(x.start, x.length, strict=True):
        for column in (x.keys, x.values):
            column[begin + n] = column[begin]
        x.cardinality[begin + n] = 1
    x.length = [n + 1 for n in x.length]
    segments.grow([1, 1])
    check(attention64(x), flash.attend(x.query, x.keys, x.values, segments, [1], x.scale, varlen), dtype)


def test_without_a_gpu_there_is_no_flash_attention():
    if not torch.cuda.is_available():
        assert flash.find_varlen() is None


def test_bad_shapes_are_named():
    x = in_class_order(make_ragged([5, 7], 64, torch.float32))
    segments = segments_of(x)
    for query, keys, message in [(x.query[0], x.keys, r"\[B, H, Q, D\]"), (x.query[:, :3], x.keys, "multiple"),
                                 (x.query, x.keys[:, :32], r"keys and values must be \[R, 64\]")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            flash.attend(query, keys, x.values, segments, None, 1.0, plain_varlen)
