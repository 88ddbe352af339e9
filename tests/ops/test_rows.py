"""Ops over flattened rows: the extension against the reference, on one table of ragged shapes."""

import os
from pathlib import Path

import pytest
import torch
from rows import DIMS, DTYPES, HEAD_LENS, RTOL, columns, make_rows
from tiny_models import assert_close, assert_lse, prompt, tiny_model

import asymkv
from asymkv.ops import extension, reference

if os.environ.get("ASYMKV_REQUIRE_EXT") != "1":
    pytestmark = pytest.mark.skipif(not extension.loaded(), reason="the C++ extension is not built")


@pytest.fixture(params=["cpu", "cuda_on_cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request):
    """Whose ops run, and on which device: the CUDA kernels also run on the CPU, thread after thread."""
    if request.param == "cuda_on_cpu":
        request.getfixturevalue("cuda_on_cpu")
        return torch.ops.asymkv_cuda_on_cpu, "cpu"
    if request.param == "cuda" and not extension.serves(torch.device("cuda")):
        required = os.environ.get("ASYMKV_REQUIRE_EXT") == "1"
        (pytest.fail if required else pytest.skip)("the extension was built without CUDA, or there is no device")
    return torch.ops.asymkv, request.param


def native(name):
    return getattr(torch.ops.asymkv, name)


def fresh_rows(rows, t, *, contiguous, seed=1):
    """New rows [N, t, ...] whose heads, if not contiguous, interleave as after a projection."""
    g = torch.Generator().manual_seed(seed)
    heads, dim = len(rows.length), rows.keys.shape[1]
    shape = (heads, t, dim) if contiguous else (t, heads, dim)
    new = [torch.randn(shape, generator=g).to(rows.keys.dtype) for _ in range(2)]
    position = torch.arange(t, dtype=torch.int32).expand(heads, t) + 1000
    return [x if contiguous else x.transpose(0, 1) for x in new] + [position]


@pytest.mark.parametrize("head_lens", HEAD_LENS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("t", "contiguous"), [(1, True), (3, False)])
def test_append_matches_reference(head_lens, dim, dtype, t, contiguous, target):
    ops, device = target
    rows = make_rows(head_lens, dim, dtype)
    expected, found = rows.clone(), rows.to(device)
    new = fresh_rows(rows, t, contiguous=contiguous)
    counts = torch.tensor([t - (h + t) % 2 for h in range(len(head_lens))]) if t > 1 else None
    n = torch.randint(1, 9, (len(head_lens), t), dtype=torch.int32) if t > 1 else None
    reference.ragged_append_(*vars(expected).values(), *new, n, counts)
    on_device = [None if x is None else x.to(device) for x in (*new, n, counts)]
    ops.ragged_append_(*vars(found).values(), *on_device)
    for name, want, have in zip(vars(rows), vars(expected).values(), vars(found.to("cpu")).values(), strict=True):
        assert_close(name, want, have, 1e-7) if name == "log_n" else assert_equal(name, want, have)
    assert all(torch.equal(x[rows.outside()], y[rows.outside()]) for x, y in zip(
        rows.columns(), found.to("cpu").columns(), strict=True))  # fmt: skip


def assert_equal(name, want, have):
    assert torch.equal(want, have), f"{name} differs"


@pytest.mark.parametrize("t", [1, 3])
def test_reference_append_is_concatenation(t):
    rows = make_rows([5, 1, 30, 7], 8, torch.float32)
    old = [rows.keys[s : s + n].clone() for s, n in zip(rows.start.tolist(), rows.length.tolist(), strict=True)]
    new = fresh_rows(rows, t, contiguous=False)
    reference.ragged_append_(*vars(rows).values(), *new)
    for h, (first, n) in enumerate(zip(rows.start.tolist(), rows.length.tolist(), strict=True)):
        assert torch.equal(rows.keys[first : first + n], torch.cat([old[h], new[0][h]]))
        assert rows.cardinality[first + n - t : first + n].tolist() == [1] * t


def random_plan(head_lens, *, drop=0.3, merge=0.3, seed=0):
    """A plan with drops, neighbours that merge, and groups scattered over the head."""
    g = torch.Generator().manual_seed(seed)
    width = max(head_lens, default=0)
    destination = torch.full((len(head_lens), width), -1, dtype=torch.int64)
    for h, n in enumerate(head_lens):
        leaders = torch.arange(n)
        chosen = torch.rand(n, generator=g)
        for i in range(n):
            if chosen[i] < drop:
                leaders[i] = -1
            elif chosen[i] < drop + merge and i:
                kept = [j for j in range(i) if leaders[j] == j]
                if kept:
                    leaders[i] = kept[int(torch.randint(len(kept), (), generator=g))]
        destination[h, :n] = leaders
    return destination, torch.tensor(head_lens, dtype=torch.int64)


@pytest.mark.parametrize("head_lens", [*HEAD_LENS, [], [0], [64, 64]], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_layout_matches_reference(head_lens, seed):
    plan = random_plan(head_lens, seed=seed)
    for want, have in zip(reference.compaction_layout(*plan), native("compaction_layout")(*plan), strict=True):
        assert torch.equal(want, have)


def compaction(head_lens, dim, dtype, *, weights, policy, seed=0):
    """Arguments of ragged_compact and empty buffers for its result."""
    g = torch.Generator().manual_seed(seed)
    heads, width = len(head_lens), max(head_lens)
    compute = torch.promote_types(dtype, torch.float32)
    buffer = torch.randn(2, heads, width + 3, dim, generator=g, dtype=torch.float64).to(dtype)
    keys, values = buffer[:, :, :width].unbind(0)  # a cut of wider buffers, as storage hands them out
    n = torch.randint(1, 50, (heads, width), generator=g, dtype=torch.int32)
    position = torch.arange(width, dtype=torch.int32).expand(heads, -1) * 2 + 5
    rotary = position.long() if policy == "original" else torch.arange(width).expand(heads, -1).contiguous()
    statistics = [torch.rand(heads, width, generator=g), torch.rand(heads, width, dim, generator=g).to(dtype)]
    weight = None
    if weights:
        weight = torch.rand(heads, width, dim if weights == "dim" else 1, generator=g, dtype=torch.float64).to(compute)
        weight[:, ::3] = 0
        weight *= 1e-30
    order, offset, count = reference.compaction_layout(*random_plan(head_lens, seed=seed))
    inv_freq = 10000.0 ** -(torch.arange(dim // 2) / (dim // 2)).float()
    target = torch.arange(width).expand(heads, -1).contiguous() if policy == "compact" else None
    capacity = count + 3
    start = torch.nn.functional.pad(capacity.cumsum(0)[:-1], (1, 0))
    total = int(capacity.sum())
    out = [torch.full((total, dim), 7.0).to(dtype) for _ in range(2)]
    out += [torch.full((total,), 7, dtype=torch.int32), torch.full((total,), 7.0), torch.full((total,), 7).int()]
    out_statistics = [torch.full((total, *x.shape[2:]), 7.0).to(x.dtype) for x in statistics]
    args = [keys, values, n, position, rotary, statistics, weight, order, offset, inv_freq, target, start]
    return args, [*out, out_statistics], count


def move(x, device):
    if isinstance(x, list):
        return [move(y, device) for y in x]
    return x if x is None else x.to(device)


@pytest.mark.parametrize("head_lens", HEAD_LENS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("weights", "policy"), [(None, "original"), ("row", "compact"), ("dim", "original")])
def test_compact_matches_reference(head_lens, dim, dtype, weights, policy, target):
    ops, device = target
    args, want, _ = compaction(head_lens, dim, dtype, weights=weights, policy=policy)
    have = move([x.clone() if not isinstance(x, list) else [y.clone() for y in x] for x in want], device)
    reference.ragged_compact(*args, *want)
    ops.ragged_compact(*move(args, device), *have)
    have = move(have, "cpu")
    names = ["keys", "values", "cardinality", "log_n", "position", "mass", "fisher"]
    for name, x, y in zip(names, [*want[:5], *want[5]], [*have[:5], *have[5]], strict=True):
        exact = x.dtype == torch.int32
        assert torch.equal(x, y) if exact else assert_close(name, x, y, RTOL[x.dtype]) is None, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compact_keeps_bits_of_single_rows_and_writes_nothing_else(dtype):
    args, out, count = compaction([40, 9], 64, dtype, weights="dim", policy="original")
    native("ragged_compact")(*args, *out)
    keys, order, offset, start = args[0], args[7], args[8], args[11]
    written = torch.zeros(len(out[0]), dtype=torch.bool)
    for h in range(2):
        for s in range(int(count[h])):
            written[start[h] + s] = True
            if offset[h, s + 1] - offset[h, s] == 1:
                assert torch.equal(out[0][start[h] + s], keys[h, order[h, offset[h, s]]])
    assert all((x[~written] == 7).all() for x in [*out[:5], *out[5]])


@pytest.mark.parametrize("head_lens", HEAD_LENS, ids=str)
@pytest.mark.parametrize("dim", [*DIMS, 8, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "positions", "counted"), [(1, False, True), (4, False, False), (7, True, True)])
def test_decode_matches_fp64_reference(head_lens, dim, dtype, queries, positions, counted):
    rows = make_rows(head_lens, dim, dtype)
    query = torch.randn(len(head_lens), queries, dim).to(dtype)
    at = torch.randint(-1, 400, (len(head_lens), queries)) if positions else None
    log_n, position = rows.log_n if counted else None, rows.position if positions else None
    args = [log_n, rows.start, rows.length, dim**-0.5, position, at]
    want = reference.lma_decode(query.double(), rows.keys.double(), rows.values.double(), *args)
    have = native("lma_decode")(query, rows.keys, rows.values, *args)
    assert have[0].dtype == dtype and have[1].dtype == torch.float32
    assert_close("out", want[0], have[0], RTOL[dtype])
    assert_lse(want[1], have[1], 1e-6)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 24), (16, 104), (8, 8), (40, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_takes_values_of_another_size(dim, value_dim, dtype):
    rows, query = make_rows([5, 0, 130, 700], dim, dtype), torch.randn(4, 5, dim).to(dtype)
    values = torch.randn(len(rows.keys), value_dim).to(dtype)
    args = [rows.log_n, rows.start, rows.length, dim**-0.5]
    want = reference.lma_decode(query.double(), rows.keys.double(), values.double(), *args)
    have = native("lma_decode")(query, rows.keys, values, *args)
    assert have[0].shape == (4, 5, value_dim)
    assert_close("out", want[0], have[0], RTOL[dtype])
    assert_lse(want[1], have[1], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_is_finite_for_logits_of_ten_thousand(dtype):
    rows = make_rows([70, 3], 64, dtype)
    query = torch.randn(2, 4, 64).to(dtype) * 100
    out, lse = native("lma_decode")(query, rows.keys * 16, rows.values, rows.log_n, rows.start, rows.length, 1.0)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all() and lse.abs().max() > 1e4


@pytest.mark.parametrize("threads", [2, 3])
def test_decode_does_not_depend_on_threads(threads):
    rows = make_rows([5000, 3, 0, 700], 64, torch.float32)
    args = [torch.randn(4, 4, 64), rows.keys, rows.values, rows.log_n, rows.start, rows.length, 0.125]
    want = native("lma_decode")(*args)
    torch.set_num_threads(threads)
    try:
        have = native("lma_decode")(*args)
    finally:
        torch.set_num_threads(1)
    assert_close("out", want[0], have[0], 2e-6)
    assert_lse(want[1], have[1], 1e-6)


@pytest.mark.parametrize(("rows", "group", "queries"), [(1, 1, 1), (70, 4, 33), (130, 3, 70)])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums_match_fp64_reference(rows, group, queries, dim, dtype):
    args = columns(rows, group, queries, dim, dtype)
    wide = [x.double() if torch.is_tensor(x) and x.dtype == dtype and x.ndim > 2 else x for x in args]
    query, k, v, log_n, position, at, lse, out, scale = args
    wide[7] = out.double()
    want = reference.attention_mass(wide[0], wide[1], log_n, position, at, lse.double(), scale)
    have = native("attention_mass")(query, k, log_n, position, at, lse, scale)
    assert_close("mass", want, have, 4e-6)
    for name, x, y in zip(["square", "product"], reference.key_curvature(*wide[:6], lse.double(), wide[7], scale),
                          native("key_curvature")(*args), strict=True):  # fmt: skip
        # A row that is all there is equals the output: what is left of |v - o|^2 is rounding.
        assert (y.abs().max() < 0.05) if rows == 1 else (assert_close(name, x, y, 2e-5) is None), name


def samples():
    """Small arguments of every op."""
    rows = make_rows([3, 5], 64, torch.float32)
    append = [*vars(rows).values(), *fresh_rows(rows, 2, contiguous=True)]
    args, out, _ = compaction([5, 3], 64, torch.float32, weights="dim", policy="compact")
    decode = [torch.randn(2, 4, 64), rows.keys, rows.values, rows.log_n, rows.start, rows.length, 0.125]
    sums = columns(9, 2, 3, 64, torch.float32)
    mass = [*sums[:2], *sums[3:7], sums[8]]
    return {"ragged_append_": append, "compaction_layout": random_plan([4, 6]), "ragged_compact": [*args, *out],
            "lma_decode": decode, "attention_mass": mass, "key_curvature": sums}  # fmt: skip


@pytest.mark.parametrize("name", ["ragged_append_", "compaction_layout", "ragged_compact", "lma_decode",
                                  "attention_mass", "key_curvature"])  # fmt: skip
def test_opcheck(name):
    torch.library.opcheck(native(name).default, tuple(samples()[name]))


def test_opcheck_of_values_of_another_size():
    query, keys, values, *rest = samples()["lma_decode"]
    torch.library.opcheck(native("lma_decode").default, (query, keys, values[:, :24].contiguous(), *rest))


def test_decode_step_compiles_without_a_graph_break():
    rows = make_rows([3, 5], 64, torch.float32)
    step = fresh_rows(rows, 1, contiguous=True)
    query = torch.randn(2, 4, 64)

    def decode(query, new_keys, new_values, position, *columns):
        torch.ops.asymkv.ragged_append_(*columns, new_keys, new_values, position)
        keys, values, _, log_n, _, length, start, _ = columns
        return torch.ops.asymkv.lma_decode(query, keys, values, log_n, start, length, 0.125)

    eager_rows, compiled_rows = rows.clone(), rows.clone()
    want = decode(query, *step, *vars(eager_rows).values())
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    have = compiled(query, *step, *vars(compiled_rows).values())
    assert all(torch.equal(x, y) for x, y in zip(want, have, strict=True))
    assert compiled_rows.length.tolist() == [4, 6] and torch.equal(eager_rows.keys, compiled_rows.keys)


def test_compaction_step_compiles_without_a_graph_break():
    """Attention mass, from it a plan's layout, and the compaction into given buffers."""
    args, out, _ = compaction([5, 3], 64, torch.float32, weights="dim", policy="compact")
    sums = columns(9, 2, 3, 64, torch.float32)
    destination, length = random_plan([5, 3])

    def compact(sums, destination, length, args, out):
        mass = torch.ops.asymkv.attention_mass(*sums[:2], *sums[3:7], sums[8])
        order, offset, count = torch.ops.asymkv.compaction_layout(destination, length)
        torch.ops.asymkv.ragged_compact(*args[:7], order, offset, *args[9:], *out)
        return mass, count

    eager_out, compiled_out = ([[y.clone() for y in x] if isinstance(x, list) else x.clone() for x in out]
                               for _ in range(2))  # fmt: skip
    want = compact(sums, destination, length, args, eager_out)
    have = torch.compile(compact, fullgraph=True, backend="aot_eager")(sums, destination, length, args, compiled_out)
    assert all(torch.equal(x, y) for x, y in zip(want, have, strict=True))
    pairs = zip([*eager_out[:5], *eager_out[5]], [*compiled_out[:5], *compiled_out[5]], strict=True)
    assert all(torch.equal(x, y) for x, y in pairs) and not torch.equal(eager_out[0], out[0])


def test_no_op_breaks_the_graph_of_a_patched_models_decode_step():
    """The cache's bookkeeping in Python breaks it; the ops, and what chooses among them, are captured."""
    model = tiny_model()
    with asymkv.replace("llama", budget=48, chunk_size=32, backend="cpp"), torch.no_grad():
        cache = model(prompt(100)).past_key_values
        torch._dynamo.reset()
        found = torch._dynamo.explain(model)(prompt(1), past_key_values=cache, logits_to_keep=1)
    torch._dynamo.reset()
    captured = {str(node.target) for graph in found.graphs for node in graph.graph.nodes}
    assert {"asymkv.ragged_append_", "asymkv.lma_decode"} <= {name.removesuffix(".default") for name in captured}
    named = [r.reason for r in found.break_reasons if any(name in r.reason for name in samples())]
    at = {Path(r.user_stack[-1].filename).parent for r in found.break_reasons if r.user_stack}
    assert not named and Path(asymkv.ops.__file__).parent not in at


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31_elements():
    total, dim = 2**31 // 64 + 100, 64
    keys, values = (torch.zeros(total, dim, dtype=torch.float16) for _ in range(2))
    small = [torch.ones(total, dtype=torch.int32), torch.zeros(total), torch.zeros(total, dtype=torch.int32)]
    tables = [torch.tensor([0]), torch.tensor([total - 10]), torch.tensor([10])]
    new = [torch.full((1, 1, dim), 3.0, dtype=torch.float16) for _ in range(2)]
    native("ragged_append_")(keys, values, *small, *tables, *new, torch.zeros(1, 1, dtype=torch.int32))
    assert keys[total - 10].eq(3).all() and keys.count_nonzero() == dim
    out, _ = native("lma_decode")(new[0], keys, values, None, tables[1], tables[0], 0.125)
    assert out.eq(3).all()
