"""Rows of one call that get different things: a prompt here, one generated token or none there."""

import pytest
import torch
from contract_runs import BUDGET, SETTINGS, sized
from tiny_models import assert_close, assert_same_rows, prompt, tiny_model

import asymkv
from asymkv.observations import QueryRing

# New tokens of each row, call by call: prompts beside generated tokens, masked columns, compactions in between.
CALLS = [(90, 71), (1, 1), (1, 0), (0, 1), (1, 1), (9, 1), (1, 1), (1, 8), (1, 0), (1, 1), (0, 1), (1, 1)]


def columns(ids, at, counts):
    """Left-padded new tokens of each row, and where one is."""
    new = torch.zeros(len(counts), max(counts), dtype=torch.long)
    valid = torch.zeros_like(new)
    for row, count in enumerate(counts):
        new[row, max(counts) - count :] = ids[row, at[row] : at[row] + count]
        valid[row, max(counts) - count :] = 1
    return new, valid


# More than the 32 queries that are remembered, in one row; turns after that.
LONG = [(90, 71), *[(0, 1)] * 27, *[(1, 1)] * 5, (9, 1), (1, 1), (30, 9)]
FULL_RINGS = [(90, 5), *[(1, 1)] * 64, (9, 9), (1, 1)]
NO_QUERIES = [(53, 60), (1, 1), (0, 1), (1, 1), (1, 11), (0, 16), (0, 11), (1, 31)]
MANY = [(47, 55), (1, 1), (1, 0), (1, 16), (1, 1), (35, 1), (30, 1), (1, 24), (1, 1), (1, 0), (1, 1), (33, 25), (1, 1),
        (0, 1), (4, 1), (1, 0), (1, 20)]  # fmt: skip


def check_rows(config, calls):
    """Runs the calls in a batch and each row alone, in fp64; negative numbers crop."""
    model, ids = tiny_model(dtype=torch.float64), prompt(260, batch=2)
    with asymkv.replace("llama", config, model=model), torch.no_grad():
        both, alone, at = None, [None, None], [0, 0]
        mask = torch.zeros(2, 0, dtype=torch.long)
        for call, counts in enumerate(calls):
            if min(counts) < 0:
                taken = mask[:, -1].tolist()
                both.crop(-1)
                mask = mask[:, :-1]
                for row in range(2):
                    if taken[row]:
                        alone[row].crop(-1)
                    at[row] -= taken[row]
                continue
            new, valid = columns(ids, at, counts)
            mask = torch.cat([mask, valid], 1)
            out = model(new, attention_mask=mask, past_key_values=both)
            both = out.past_key_values
            for row, count in enumerate(counts):
                if not count:
                    continue
                own = model(ids[row : row + 1, at[row] : at[row] + count], past_key_values=alone[row])
                alone[row] = own.past_key_values
                at[row] += count
                assert_close(f"logits of row {row}, call {call}", own.logits[0], out.logits[row, -count:], 1e-6)
    for row in range(2):
        assert alone[row].stats()["tokens_seen"] == both.stats()["tokens_seen"][row : row + 1] == [at[row]]
        assert_same_rows(alone[row], both, row_b=row)
    assert both.stats()["tokens_seen"][0] > BUDGET


def interval(config, steps):
    return config.replace(decode_interval=steps) if config.decode_interval else config


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_do_not_depend_on_what_others_get(name):
    check_rows(interval(sized(name), 4), CALLS)


@pytest.mark.parametrize("name", ["h2o", "d2o_layers", "d2o_counts", "cam", "headkv", "asymkv", "tova"])
@pytest.mark.parametrize(("steps", "calls"), [(100, LONG), (40, FULL_RINGS), (3, NO_QUERIES), (5, MANY)],
                         ids=["long", "full-rings", "no-queries", "many"])  # fmt: skip
def test_rows_that_remember_differently_stay_apart(name, steps, calls):
    check_rows(interval(sized(name), steps), calls)


@pytest.mark.parametrize("name", ["h2o", "asymkv", "snapkv", "tova", "d2o", "cam"])
def test_a_row_that_loses_no_token_to_crop_keeps_its_queries(name):
    check_rows(interval(sized(name), 100), [(90, 71), *[(1, 1)] * 5, (1, 0), (-1, -1), (9, 9), (1, 1)])


def test_a_turn_after_a_full_ring_stays_within_budget_and_chunk():
    model, ids = tiny_model(), prompt(200)
    with asymkv.replace("llama", model=model, method="h2o", budget=64, chunk_size=24, decode_interval=100):
        cache = model(ids[:, :100]).past_key_values
        for token in range(100, 132):
            model(ids[:, token : token + 1], past_key_values=cache)
        decoded = cache.stats()["peak_rows"]
        model(ids[:, 132:192], past_key_values=cache)
    assert cache.stats()["peak_rows"] == decoded == 64 + 32


def test_a_larger_batch_is_refused_by_name():
    model = tiny_model()
    with asymkv.replace("llama", model=model, method="h2o", budget=40, window_size=8):
        cache = model(prompt(60, batch=2)).past_key_values
        with pytest.raises(ValueError, match="holds a batch of 2; found one of 3"):
            model(prompt(5, batch=3), past_key_values=cache)


def test_queries_remembered_under_inference_mode_serve_outside():
    model, ids = tiny_model(), prompt(70, batch=2)
    with asymkv.replace("llama", model=model, method="snapkv", budget=40, window_size=8, decode_interval=100):
        with torch.inference_mode():
            cache = model(ids[:, :60]).past_key_values
            model(ids[:, 60:61], past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
        with torch.no_grad():
            model(ids[:, 61:62], past_key_values=cache)
    assert cache.layers[0].ring.cursor == [2, 2]


@pytest.mark.parametrize("counts", [[1, 1], [0, 1]])
def test_a_ring_takes_queries_of_another_dtype(counts):
    """A step under autocast may bring them."""
    query = torch.randn(2, 4, 1, 8)
    ring = QueryRing(query, 3)
    ring.push(query.bfloat16(), torch.tensor([[5], [7]]), counts)
    assert ring.positions[:, 0].tolist() == [5 if counts[0] else -1, 7] and ring.cursor == counts
    assert torch.equal(ring.queries[1, :, 0], query[1, :, 0].bfloat16().float())
