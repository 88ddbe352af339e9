"""Rows of one call that get different things: a prompt here, one generated token or none there."""

import pytest
import torch
from contract_runs import BUDGET, SETTINGS, sized
from tiny_models import assert_close, assert_same_rows, prompt, tiny_model

import asymkv

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


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_do_not_depend_on_what_others_get(name):
    config = sized(name)
    if config.decode_interval:
        config = config.replace(decode_interval=4)
    model, ids = tiny_model(dtype=torch.float64), prompt(130, batch=2)
    with asymkv.replace("llama", config, model=model), torch.no_grad():
        both, alone, at = None, [None, None], [0, 0]
        mask = torch.zeros(2, 0, dtype=torch.long)
        for call, counts in enumerate(CALLS):
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
