"""Triton kernels against fp64: attention over ragged rows, attention mass, curvature sums."""

import sys
from types import SimpleNamespace

import pytest
import torch
from ragged import HEAD_LENS, attention64, make_ragged
from tiny_models import assert_close, assert_lse

from asymkv import observations
from asymkv.ops import triton_attention, triton_launch
from asymkv.ops.triton_attention import attend, choose_splits, choose_tile, most_splits
from asymkv.ops.triton_statistics import attention_mass, key_curvature
from asymkv.view import RowView

DIMS = triton_launch.DIMS
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: str(t).removeprefix("torch."))


def run(x, *, with_n=True, at=None, splits=None, max_rows=None):
    tables = (x.log_n if with_n else None, x.position, x.table("start"), x.table("length"))
    return attend(x.query, x.keys, x.values, *tables, at, x.scale, max_rows or max(x.length), splits=splits)


def check(expected, found, dtype):
    (ref, ref_lse), (out, lse) = expected, (y.cpu() for y in found)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close("out", ref, out, TOLERANCE[dtype])
    assert torch.equal(torch.isneginf(ref_lse), torch.isneginf(lse))
    assert_lse(ref_lse, lse, 2e-6)


@each_dtype
@pytest.mark.parametrize("dim", DIMS)
def test_attention_matches_fp64(dim, dtype, device):
    x = make_ragged([5, 1, 130, 7], dim, dtype, device=device)
    check(attention64(x), run(x, splits=2), dtype)


@pytest.mark.parametrize("with_n", [True, False], ids=["n", "n = 1"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("head_lens", HEAD_LENS, ids=str)
def test_ragged_shapes_with_and_without_cardinality(head_lens, queries, with_n, device):
    x = make_ragged(head_lens, 64, torch.float32, queries=queries, device=device)
    check(attention64(x, with_n=with_n), run(x, with_n=with_n, splits=2), torch.float32)


@pytest.mark.parametrize("splits", [1, 3, 5])
def test_queries_see_rows_up_to_their_position(splits, device):
    x = make_ragged([5, 0, 130, 7], 64, torch.float32, queries=4, batch=2, group=3, device=device)
    at = torch.tensor([[3, 150, -1, 0], [-1, 200, 9, 100]])
    seen = [x.position[b : b + n].cpu() <= at[h // 2][:, None]
            for h, (b, n) in enumerate(zip(x.start, x.length, strict=True))]  # fmt: skip
    out, lse = run(x, at=at.to(device), splits=splits)
    check(attention64(x, seen=seen), (out, lse), torch.float32)
    assert (out[0, :, 2] == 0).all() and torch.isneginf(lse[0, :, 2]).all()


@each_dtype
def test_chunk_of_new_tokens(dtype, device):
    x = make_ragged([150, 70], 64, dtype, queries=33, device=device)
    assert choose_tile(66, 64, dtype).block_m >= 32
    at = torch.arange(33)[None] * 9
    at[0, 30:] = -1
    seen = [x.position[b : b + n].cpu() <= at[0][:, None] for b, n in zip(x.start, x.length, strict=True)]
    check(attention64(x, seen=seen), run(x, at=at.to(device), splits=1), dtype)


@each_dtype
def test_finite_for_logits_of_ten_thousand(dtype, device):
    x = make_ragged([5, 130], 64, dtype, device=device)
    x.query, x.keys, x.scale = x.query * 100, x.keys * 25, 1.0
    out, lse = run(x, splits=3)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all() and lse.abs().max() > 5e3


def test_a_loose_bound_of_rows_and_spare_heads_change_nothing(device):
    x = make_ragged([0, 40, 0], 64, torch.float32, device=device)
    check(attention64(x), run(x, splits=4, max_rows=300), torch.float32)


def test_splits_are_chosen_if_not_given(device):
    x = make_ragged([5, 130], 64, torch.bfloat16, device=device)
    check(attention64(x), run(x), torch.bfloat16)


def test_the_parts_of_many_queries_stay_within_the_scratch_memory():
    """fp32 parts ``[B, H, Q, splits, D]``, where more splits than one are taken at all."""
    decode, chunk, prompt = (8 * 32 * queries * 128 for queries in (1, 16, 131_072))
    assert most_splits(decode) >= triton_attention.MAX_SPLITS and most_splits(prompt) == 1
    assert 4 * chunk * most_splits(chunk) == triton_attention.SCRATCH_BYTES


def test_splits_fill_the_processors_and_no_more():
    slots = 3 * 132
    assert choose_splits(8, 100, slots) == 1, "too few rows to split"
    assert 8 * choose_splits(8, 1 << 20, slots) >= 0.9 * slots
    assert choose_splits(4 * slots, 8192, slots) * 512 <= 8192, "enough heads: splits only even them out"
    assert choose_splits(65_536, 131_072, slots) == 1, "a padded batch of prompts fills them many times over"
    for heads in (1, 7, 64, 500):
        assert 1 <= choose_splits(heads, 8192, slots) <= triton_attention.MAX_SPLITS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(9, 65)}, r"equal shape; found \[9, 65\]"),
        ({"values": torch.zeros(11, 64).double()}, "values must have query's dtype torch.float32 .* torch.float64"),
        ({"log_n": torch.zeros(11).half()}, r"log_n must be torch.float32 \[11\] on cpu; found torch.float16"),
        ({"position": torch.zeros(11).long()}, r"position must be torch.int32 \[11\]"),
        ({"start": torch.zeros(3).long()}, r"start must be \[B \* H_kv\] with H = 4 .* found \[3\]"),
        ({"length": torch.zeros(2).int()}, r"length must be torch.int64 \[2\]"),
        ({"at": torch.zeros(2, 1).long()}, r"query_positions must be torch.int64 \[1, 1\]"),
        ({"query": torch.zeros(1, 4, 1, 72)}, r"head dimension in \(64, 80, 96, 128, 256\); found 72"),
        ({"query": torch.zeros(4, 1, 64)}, r"query must be \[B, H, Q, D\]; found \[4, 1, 64\]"),
        ({"splits": 65}, r"splits must be from 1 to 64; found 65"),
        ({"query": torch.zeros(1, 4, 1, 64, requires_grad=True)}, "no backward"),
    ],
)
def test_bad_input_is_named(change, message):
    x = make_ragged([2, 3], 64, torch.float32)
    given = {"query": x.query, "keys": x.keys, "values": x.values, "log_n": x.log_n, "position": x.position,
             "start": x.table("start"), "length": x.table("length"), "at": None, "splits": 1, **change}  # fmt: skip
    names = ("query", "keys", "values", "log_n", "position", "start", "length", "at")
    with pytest.raises(ValueError, match=message):
        attend(*(given[name] for name in names), x.scale, 3, splits=given["splits"])


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "asymkv.ops.triton_kernels", raising=False)
    assert "cannot be imported" in triton_attention.available()


on_device = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@on_device
def test_a_captured_graph_follows_lengths_on_the_device(device):
    x = make_ragged([200, 130], 128, torch.bfloat16, device=device)
    length = x.table("length")
    args = (x.query, x.keys, x.values, x.log_n, x.position, x.table("start"), length, None, x.scale, 256)
    attend(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(*args)
    for x.length in ([200, 130], [150, 0]):
        length.copy_(x.table("length"))
        graph.replay()
        check(attention64(x), (out, lse), torch.bfloat16)


@on_device
@pytest.mark.slow
def test_offsets_beyond_32_bits(device):
    x = make_ragged([5, 130], 64, torch.bfloat16, device=device)
    shift = 2**31 // 64
    for name in ("keys", "values", "position", "cardinality"):
        rows = getattr(x, name)
        far = rows.new_zeros(shift + len(rows), *rows.shape[1:])
        far[shift:] = rows
        setattr(x, name, far)
    x.start = [shift + begin for begin in x.start]
    check(attention64(x), run(x, splits=2), torch.bfloat16)


def make_queries(dim, dtype, *, heads=2, group=2, queries=21, rows=70, seed=0, device="cpu"):
    """Tables and probabilities in fp64: rows cut from longer buffers, absent rows, queries that are none."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, queries, group, dim, generator=g).transpose(1, 2).to(dtype)
    k, v = (torch.randn(heads, rows + 9, dim, generator=g).to(dtype)[:, :rows] for _ in range(2))
    n = (10_000 ** torch.rand(heads, rows + 9, generator=g)).round()[:, :rows]
    n[:, 5] = 0
    position = torch.arange(0, 2 * rows, 2).int().expand(heads, rows)
    at = torch.randint(0, 2 * rows, (heads, queries), generator=g)
    at[:, 3] = -1
    scale = dim**-0.5
    s = q.double() @ k.double()[:, None].transpose(-1, -2) * scale + n.double().log()[:, None, None]
    s = s.masked_fill(position[:, None, None] > at[:, None, :, None], -torch.inf)
    lse = s.logsumexp(-1)
    p = torch.exp(s - torch.where(lse.isinf(), torch.inf, lse)[..., None])
    out = (p @ v.double()[:, None]).to(dtype)
    tables = {"query": q, "keys": k, "values": v, "log_n": n.log(), "position": position, "query_position": at,
              "lse": lse.float(), "out": out}  # fmt: skip
    return {**{name: t.to(device) for name, t in tables.items()}, "scale": scale}, p


def curvature64(x, p):
    v, o, q = (x[name].cpu().double() for name in ("values", "out", "query"))
    energy = p.square() * (v[:, None, None] - o[..., None, :]).square().sum(-1)
    half = q.shape[-1] // 2
    pairs = (q.square(), q[..., :half] * q[..., half:])
    return [torch.einsum("ngqt,ngqd->ntd", energy, y) for y in pairs]


def mass_of(x):
    return attention_mass(**{name: y for name, y in x.items() if name not in ("values", "out")}).cpu()


@each_dtype
@pytest.mark.parametrize("dim", DIMS)
def test_mass_and_curvature_match_fp64(dim, dtype, device):
    x, p = make_queries(dim, dtype, device=device)
    assert_close("mass", p.sum(2), mass_of(x), 2e-6)
    for name, ref, found in zip(("square", "product"), curvature64(x, p), key_curvature(**x), strict=True):
        assert_close(name, ref, found.cpu(), 2e-6)


def test_many_blocks_of_queries_and_rows(device):
    x, p = make_queries(64, torch.float32, heads=1, group=3, queries=67, rows=150, device=device)
    assert_close("mass", p.sum(2), mass_of(x), 2e-6)
    for ref, found in zip(curvature64(x, p), key_curvature(**x), strict=True):
        assert_close("curvature", ref, found.cpu(), 2e-6)


def test_silent_queries_contribute_nothing_whatever_they_hold(device):
    x, _ = make_queries(64, torch.float32, heads=1, queries=4, rows=20, device=device)
    mass, curvature = mass_of(x), key_curvature(**x)
    x["query"] = x["query"].clone()
    for name in ("query", "out"):
        x[name][:, :, 3] = torch.nan
    assert torch.equal(mass, mass_of(x))
    assert all(torch.equal(a, b) for a, b in zip(curvature, key_curvature(**x), strict=True))
    x["lse"] = torch.full_like(x["lse"], -torch.inf)
    assert (mass_of(x) == 0).all() and all((y == 0).all() for y in key_curvature(**x))


@pytest.mark.parametrize(("queries", "rows"), [(0, 20), (4, 0)])
def test_statistics_of_nothing_are_zero(queries, rows, device):
    x, _ = make_queries(64, torch.float32, queries=4, rows=20, device=device)
    for name in ("query", "lse", "out"):
        x[name] = x[name][:, :, :queries]
    x["query_position"] = x["query_position"][:, :queries]
    for name in ("keys", "values", "log_n", "position"):
        x[name] = x[name][:, :rows]
    assert mass_of(x).shape == (2, 2, rows) and (mass_of(x) == 0).all()
    square, product = key_curvature(**x)
    assert square.shape == (2, rows, 64) and product.shape == (2, rows, 32) and (square == 0).all()


def test_statistics_match_those_of_observations(device):
    """Rotary positions of 0: the curvature in pre-RoPE coordinates is the sum of squares itself, times scale^2."""
    x, _ = make_queries(64, torch.float32, device=device)
    fold = {name: x[name].cpu() for name in ("query", "keys", "values", "log_n", "position", "query_position", "lse")}
    n = fold["log_n"].exp().round().int()[None]
    # One batch row whose KV heads share positions of queries.
    at = fold["query_position"][:1].expand(2, -1)
    lengths = torch.full((1, 2), n.shape[-1])
    view = RowView(
        keys=fold["keys"][None], values=fold["values"][None], cardinality=n.clamp(min=1),
        positions=fold["position"][None], rotary_positions=torch.zeros_like(n, dtype=torch.long), valid=n > 0,
        lengths=lengths, budget=lengths, tokens=torch.tensor([200]), prompt=True, scale=x["scale"],
        rope=SimpleNamespace(rotate=lambda rows, _: rows), queries=fold["query"].flatten(0, 1)[None],
        query_positions=at[:1],
    )  # fmt: skip
    blocks = [block.probs.view(2, 2, -1, n.shape[-1]) for block in observations.QueryBlocks(view)]
    p = torch.cat(blocks, dim=2)
    s = (fold["query"] @ fold["keys"][:, None].mT * x["scale"] + fold["log_n"][:, None, None]).masked_fill(
        fold["position"][:, None, None] > at[:, None, :, None], -torch.inf
    )
    x.update(query_position=at.to(device), lse=s.logsumexp(-1).to(device), out=(p @ fold["values"][:, None]).to(device))
    assert_close("mass", observations.attention_mass(view, per_query_head=True)[0], mass_of(x), 2e-6)
    square, _ = key_curvature(**x)
    assert_close("curvature", observations.key_curvature(view)[0], square.cpu() * x["scale"] ** 2, 4e-6)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("values", torch.zeros(2, 70, 32), r"values must be \[2, 70, 64\]; found \[2, 70, 32\]"),
        ("out", torch.zeros(2, 2, 21, 64).half(), "out must have query's dtype"),
        ("log_n", torch.zeros(2, 71), r"log_n must be torch.float32 \[2, 70\]"),
        ("query_position", torch.zeros(2, 21), r"query_position must be torch.int64 \[2, 21\]"),
        ("lse", torch.zeros(2, 21, 2), r"lse must be torch.float32 \[2, 2, 21\]"),
        ("keys", torch.zeros(2, 64, 70).mT, r"keys must be contiguous in its last dimension"),
    ],
)
def test_bad_statistics_input_is_named(name, given, message):
    x, _ = make_queries(64, torch.float32)
    with pytest.raises(ValueError, match=message):
        key_curvature(**{**x, name: given})
