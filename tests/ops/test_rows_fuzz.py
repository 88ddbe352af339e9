"""Ten thousand random calls: sound ones agree with the reference, malformed ones name what is wrong, in both."""

import random

import pytest
import torch
from rows import make_rows
from test_rows import compaction, fresh_rows, native, random_plan

from asymkv.ops import extension, reference

pytestmark = pytest.mark.skipif(not extension.loaded(), reason="the C++ extension is not built")
APPEND = ["keys", "values", "cardinality", "log_n", "position", "length", "start", "capacity", "new_keys",
          "new_values", "new_position", "new_cardinality", "counts"]  # fmt: skip
DECODE = ["query", "keys", "values", "log_n", "start", "length", "scale", "position", "query_position"]
COMPACT = ["keys", "values", "cardinality", "position", "rotary", "statistics", "key_weight", "order", "offset",
           "inv_freq", "target_rotary", "out_start", "out_keys", "out_values", "out_cardinality", "out_log_n",
           "out_position", "out_statistics"]  # fmt: skip


def lens(rng):
    return [rng.choice([0, 1, 3, 7, 17]) for _ in range(rng.randint(1, 4))]


def append_args(rng):
    head_lens, t = lens(rng), rng.randint(0, 3)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    rows = make_rows(head_lens, rng.choice([8, 16, 40]), dtype, seed=rng.randrange(99))
    n = torch.randint(1, 9, (len(head_lens), t), dtype=torch.int32) if rng.random() < 0.5 else None
    counts = torch.randint(0, t + 1, (len(head_lens),)) if rng.random() < 0.5 else None
    return [*vars(rows).values(), *fresh_rows(rows, t, contiguous=rng.random() < 0.5), n, counts]


def decode_args(rng):
    head_lens = lens(rng)
    rows = make_rows(head_lens, rng.choice([8, 16, 40]), rng.choice([torch.float32, torch.bfloat16]))
    query = torch.randn(len(head_lens), rng.randint(1, 5), rows.keys.shape[1]).to(rows.keys.dtype)
    return [query, rows.keys, rows.values, rows.log_n, rows.start, rows.length, 0.3, rows.position,
            torch.randint(-1, 60, query.shape[:2])]  # fmt: skip


def compact_args(rng):
    head_lens = [n + 1 for n in lens(rng)]
    weights, policy = rng.choice([None, "row", "dim"]), rng.choice(["original", "compact"])
    args, out, _ = compaction(head_lens, rng.choice([8, 16]), torch.float32, weights=weights, policy=policy,
                              seed=rng.randrange(99))  # fmt: skip
    return [*args, *out]


def damage(args, names, rng, lengths):
    """Breaks one argument, and says which one the error must name."""
    at = rng.choice([i for i, x in enumerate(args) if torch.is_tensor(x)])
    x, name, kind = args[at], names[at], rng.choice(["dtype", "dims", "size", "table"])
    if kind == "table" and lengths:
        table = rng.choice([n for n in ("length", "start", "capacity") if n in names])
        at, x = names.index(table), args[names.index(table)].clone()
        x[rng.randrange(len(x))] = -5 if table != "capacity" else 10**6
        args[at] = x
        return ("length", "start", "capacity")
    if kind == "dtype" or kind == "table":
        args[at] = x.to(torch.int16)
    elif kind == "dims":
        args[at] = x[None]
    else:
        args[at] = torch.cat([x, x[:1]]) if len(x) else torch.zeros(3, *x.shape[1:], dtype=x.dtype)
    # One size that does not fit is found at the first argument that it is compared with.
    return (name,) if kind in ("dtype", "table") else None


def clone(args):
    return [[y.clone() for y in x] if isinstance(x, list) else x.clone() if torch.is_tensor(x) else x for x in args]


def outcome(function, args):
    try:
        return function(*args), None
    except (RuntimeError, ValueError) as error:
        return None, str(error).split()[0]


def flat(x):
    """Tensors of nested lists and tuples."""
    if torch.is_tensor(x):
        return [x]
    return [z for y in x for z in flat(y)] if isinstance(x, (list, tuple)) else []


@pytest.mark.parametrize(("op", "make", "names", "calls"), [
    ("ragged_append_", append_args, APPEND, 5000), ("lma_decode", decode_args, DECODE, 2500),
    ("ragged_compact", compact_args, COMPACT, 1500),
])  # fmt: skip
def test_random_calls(op, make, names, calls):
    rng = random.Random(0)
    torch.manual_seed(0)
    refused = 0
    for call in range(calls):
        args = make(rng)
        expected = damage(args, names, rng, op == "ragged_append_") if call % 2 else ()
        ours, theirs = clone(args), clone(args)
        have, error = outcome(native(op), ours)
        want, reference_error = outcome(getattr(reference, op), theirs)
        assert error == reference_error, (call, error, reference_error)
        if expected:
            assert error in expected, (call, error, expected)
        refused += error is not None
        before = args if error else theirs
        for x, y in zip(flat([*before, want]), flat([*ours, have]), strict=True):
            assert x.dtype == y.dtype and torch.allclose(x.double().nan_to_num(neginf=-1e9),
                                                         y.double().nan_to_num(neginf=-1e9), 8e-3, 1e-4)  # fmt: skip
    assert refused > 0.45 * calls


def test_random_plans():
    rng = random.Random(1)
    for call in range(1000):
        destination, length = random_plan([n + 1 for n in lens(rng)], seed=call)
        if call % 2:
            head = rng.randrange(len(length))
            bad = [destination.shape[1] + 3, -2]
            destination[head, rng.randrange(int(length[head]))] = rng.choice(bad)
        have, error = outcome(native("compaction_layout"), (destination, length))
        want, reference_error = outcome(reference.compaction_layout, (destination, length))
        assert error == reference_error == ("destination" if call % 2 else None)
        assert error or all(torch.equal(x, y) for x, y in zip(want, have, strict=True))
