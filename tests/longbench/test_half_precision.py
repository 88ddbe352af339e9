"""Half-precision linear layers that multiply in float32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from asymkv.longbench import half_precision, models


def layer(dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    return half_precision.widen_products(nn.Sequential(nn.Linear(96, 64, bias=bias, dtype=dtype)))[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4, 200])
@pytest.mark.parametrize("dtype", half_precision.HALF)
def test_products_are_those_of_float64_rounded_once(dtype: torch.dtype, rows: int, bias: bool) -> None:
    linear = layer(dtype, bias=bias)
    states = torch.randn(rows, 96, dtype=dtype)
    exact = F.linear(states.double(), linear.weight.double(), linear.bias.double() if bias else None)
    out = linear(states)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps


def test_gradients_flow_to_states_and_weights() -> None:
    linear, stock = layer(torch.bfloat16), nn.Linear(96, 64, dtype=torch.bfloat16)
    stock.load_state_dict(linear.state_dict())
    found = torch.randn(8, 96, dtype=torch.bfloat16).requires_grad_()
    expected = found.detach().clone().requires_grad_()
    linear(found).float().square().sum().backward()
    stock(expected).float().square().sum().backward()
    for mine, theirs in ((found.grad, expected.grad), (linear.weight.grad, stock.weight.grad)):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def test_float32_layers_and_replaced_forwards_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16))
    model[1].forward = replaced = lambda states: states
    assert not half_precision.is_widened(half_precision.widen_products(model))
    assert "forward" not in vars(model[0]) and model[1].forward is replaced


def test_a_copy_uses_its_own_weights() -> None:
    linear = layer(torch.bfloat16, bias=False)
    copied = copy.deepcopy(linear)
    with torch.no_grad():
        copied.weight.zero_()
    states = torch.randn(8, 96, dtype=torch.bfloat16)
    assert copied(states).count_nonzero() == 0 and linear(states).count_nonzero() > 0


@pytest.mark.parametrize("lacks", [True, False])
def test_load_model_widens_where_the_processor_needs_it(
    lacks: bool, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_precision, "processor_lacks_half", lambda: lacks)
    spec = models.ModelSpec("tiny", str(tiny_folder), 2048)
    assert half_precision.is_widened(models.load_model(spec, dtype=torch.bfloat16)) == lacks
    assert not half_precision.is_widened(models.load_model(spec, dtype=torch.float32))
