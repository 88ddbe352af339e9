"""The observation behind AsymKV (arXiv 2506.05410, figure 1), per layer and head of any decoder and any text.

Neighbouring keys are said to be alike and neighbouring values not. The paper measures the former by attention: the rank
correlation of ``a[i, j]`` and ``a[i, j + 1]`` (query i, keys j and j + 1) over a head's lower triangle; and the latter
by cosines: of ``cos(v_i, v_j)`` and ``cos(v_i, v_{j+1})``. Those are two different readings, so here keys and values
are read in both ways that are open to them, and each correlation stands beside what shuffled orders leave of it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asymkv.analysis.attention_states import ATTENTION, KEYS, KEYS_PRE_ROPE, VALUES, watch_states
from asymkv.analysis.rank_correlation import Triangle
from asymkv.checks import check_integer

STATES = (ATTENTION, KEYS, KEYS_PRE_ROPE, VALUES)
SINK_SIZE = 4
MAX_LAG = 16
# Cosines closer than this are equal: so far the sums of equal vectors differ by the order of summation.
COSINE_DECIMALS = 6

Row = dict[str, Any]
Numbers = dict[str, float]


@dataclass(frozen=True)
class Asymmetry:
    """What was measured, means over windows.

    Args:
        rows: one per state, layer, head (query heads for attention, KV heads for keys and values) and ``left_out`` (how
            many leading tokens were left out), with the numbers of :func:`correlations` and, but for attention, of
            :func:`cosines`; ``spearman_window_sd`` is the standard deviation over windows.
        lengths: tokens of each window.
        sink_size: leading tokens that the second reading of each head leaves out.
    """

    rows: list[Row]
    lengths: list[int]
    sink_size: int

    @property
    def states(self) -> list[str]:
        """Which of ``STATES`` there are: models without rotary embedding have no keys before it."""
        return [state for state in STATES if any(row["state"] == state for row in self.rows)]

    def of(self, state: str, left_out: int | None = None) -> list[Row]:
        """A state's rows by layer and head, without the first ``left_out`` tokens (None: without the sinks).

        Raises:
            ValueError: where there are none.
        """
        left_out = self.sink_size if left_out is None else left_out
        found = [row for row in self.rows if (row["state"], row["left_out"]) == (state, left_out)]
        if not found:
            raise ValueError(
                f"no rows of {state!r} with {left_out} tokens left out; measured: {', '.join(self.states)}, "
                f"with {sorted({row['left_out'] for row in self.rows})} left out"
            )
        return sorted(found, key=lambda row: (row["layer"], row["head"]))

    def table(self, state: str, name: str, left_out: int | None = None) -> Tensor:
        """One number ``[layers, heads]`` fp64, layers without attention skipped; NaN where a layer has fewer heads."""
        rows = self.of(state, left_out)
        if name not in rows[0]:
            raise ValueError(f"{state} has no {name!r}; allowed: {', '.join(rows[0])}")
        layers = sorted({row["layer"] for row in rows})
        table = torch.full((len(layers), 1 + max(row["head"] for row in rows)), torch.nan, dtype=torch.double)
        for row in rows:
            table[layers.index(row["layer"]), row["head"]] = row[name]
        return table


def correlations(matrix: Tensor, *, first: int, diagonal: bool) -> Numbers:
    """Rank correlations of neighbours in the rows of one head's ``matrix [T, T]``, ``i >= j >= first``.

    Returns:
        ``spearman``, ``pearson_of_ranks`` and three controls: the fields of
        :class:`asymkv.analysis.rank_correlation.Adjacent`.
    """
    return asdict(_triangle(len(matrix), first, diagonal).adjacent(matrix.cpu().numpy()))


@lru_cache(maxsize=8)
def _triangle(size: int, first: int, diagonal: bool) -> Triangle:
    return Triangle(size, first=first, diagonal=diagonal)


def cosine_matrix(rows: Tensor) -> Tensor:
    """Cosines ``[T, T]`` fp64 of ``rows [T, D]``, rounded to ``COSINE_DECIMALS``; a row of zeros has cosine 0."""
    unit = _unit(rows)
    return (unit @ unit.T).round(decimals=COSINE_DECIMALS)


def cosines(rows: Tensor, *, max_lag: int = MAX_LAG) -> Numbers:
    """Plain cosines of neighbours among ``rows [T, D]``, by distance, and of any two.

    Returns:
        ``adjacent_cosine`` and its variance ``adjacent_cosine_variance``; ``any_pair_cosine``: the mean over all pairs,
        which is what neighbours have on average in a shuffled order; ``cosine_lag_1`` ... by distance in tokens.
    """
    unit = _unit(rows)
    adjacent = (unit[:-1] * unit[1:]).sum(-1)
    # |sum of unit vectors|^2 holds every pair twice and the vectors with themselves.
    count = len(unit)
    any_pair = (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))
    lags = {f"cosine_lag_{n}": (unit[:-n] * unit[n:]).sum(-1).mean().item() for n in range(1, max_lag + 1)}
    return {"adjacent_cosine": adjacent.mean().item(), "adjacent_cosine_variance": adjacent.var(correction=0).item(),
            "any_pair_cosine": any_pair.item(), **lags}  # fmt: skip


def _unit(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.double).tiny)


def head_numbers(state: str, seen: Tensor, *, left_out: int = 0, max_lag: int = MAX_LAG) -> Numbers:
    """All numbers of one head.

    Args:
        state: one of ``STATES``.
        seen: attention weights ``[T, T]``, or keys or values ``[T, D]``.
        left_out: leading tokens that do not count as keys, nor their values.
        max_lag: largest distance of :func:`cosines`.
    """
    if state == ATTENTION:
        return correlations(seen, first=left_out, diagonal=True)
    # A vector's cosine with itself is 1 whatever it is: the diagonal would correlate nothing but that.
    numbers = correlations(cosine_matrix(seen), first=left_out, diagonal=False)
    return {**numbers, **cosines(seen[left_out:], max_lag=max_lag)}


def measure_asymmetry(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    *,
    sink_size: int = SINK_SIZE,
    max_lag: int = MAX_LAG,
    progress: Callable[[int], object] | None = None,
) -> Asymmetry:
    """Measures every head on windows of a text, each read by itself; numbers are averaged over windows.

    Args:
        model: any decoder that uses transformers' attention interface.
        windows: token ids ``[T]`` each. One head's ``[T, T]`` is in memory at a time, with index tables that take
            24 MB at 512 tokens and grow with the square.
        sink_size: leading tokens of a window that a second reading leaves out: the first ones draw attention whatever
            they are. 0 = one reading only.
        max_lag: largest distance of plain cosines, in tokens.
        progress: called with the index of each layer that begins.

    Raises:
        ValueError: for settings below their least, without a window, for one that is too short, and for models that
            cannot be observed.
    """
    check_integer("sink_size", sink_size, 0)
    check_integer("max_lag", max_lag, 1)
    least = sink_size + max_lag + 2
    if not windows or min(map(len, windows)) < least:
        raise ValueError(f"windows must have at least {least} tokens; found lengths {[len(w) for w in windows]}")
    found: dict[tuple[str, int, int, int], list[Numbers]] = defaultdict(list)

    def look(state: str, layer: int, head: int, seen: Tensor) -> None:
        if progress is not None and (state, head) == (ATTENTION, 0):
            progress(layer)
        for left_out in sorted({0, sink_size}):
            numbers = head_numbers(state, seen, left_out=left_out, max_lag=max_lag)
            found[state, layer, head, left_out].append(numbers)

    for ids in windows:
        watch_states(model, ids, look)
    rows = [
        {"state": state, "layer": layer, "head": head, "left_out": left_out, **_mean(numbers)}
        for (state, layer, head, left_out), numbers in found.items()
    ]
    return Asymmetry(rows, [len(w) for w in windows], sink_size)


def _mean(numbers: Sequence[Numbers]) -> Numbers:
    """Means over windows, and how far Spearman varies over them."""
    means = {name: statistics.fmean(n[name] for n in numbers) for name in numbers[0]}
    return {**means, "spearman_window_sd": statistics.pstdev(n["spearman"] for n in numbers)}


def text_windows(tokenizer: Any, text: str, *, tokens: int, windows: int) -> list[Tensor]:
    """The first windows of a text, ``[tokens]`` ids each; each begins as the tokenizer begins a text.

    Args:
        tokenizer: of the model.
        text: any text.
        tokens: of a window, beginning-of-text included where the tokenizer adds one.
        windows: at most so many.

    Raises:
        ValueError: for a text that does not fill one window.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    empty = tokenizer("", verbose=False)["input_ids"]
    begin = [token for token in empty[:1] if token == tokenizer.bos_token_id]
    step = tokens - len(begin)
    if step < 1 or len(ids) < step:
        raise ValueError(f"a window takes {step} tokens of the text; it has {len(ids)}: use fewer tokens or more text")
    starts = range(0, min(windows * step, len(ids) - step + 1), step)
    return [torch.tensor(begin + ids[start : start + step]) for start in starts]
