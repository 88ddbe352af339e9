"""Tables and figures of :mod:`asymkv.analysis.asymmetry`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from asymkv.analysis.asymmetry import Asymmetry, Row
from asymkv.analysis.attention_states import ATTENTION, KEYS, KEYS_PRE_ROPE, VALUES
from asymkv.analysis.rank_correlation import ROW_BLOCK
from asymkv.files import csv_text, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Average Spearman of neighbours' attention, Llama-2-7b-chat on ShareGPT (arXiv 2506.05410).
PUBLISHED_ATTENTION = 0.727
LABELS = {
    ATTENTION: "attention weights",
    KEYS: "keys as cached, cosine",
    KEYS_PRE_ROPE: "keys before RoPE, cosine",
    VALUES: "values, cosine",
}
# Evans (1996): the size from which a correlation is called so.
STRENGTHS = ((0.8, "very strong"), (0.6, "strong"), (0.4, "moderate"), (0.2, "weak"), (0.0, "very weak"))
VERY_WEAK = 0.2
CONTROLS = {
    "row_shuffled": "shuffled, row kept",
    "distance_shuffled": "shuffled, distance kept",
    "both_shuffled": "shuffled, both kept",
}
LAG = "cosine_lag_"

DEFINITIONS = f"""\
Spearman: rank correlation over a head's causal triangle (query i, key j) of m[i, j] and m[i, j + 1]. For attention
m = a, the weights, and j + 1 <= i; for keys and values m[i, j] = cos(x_i, x_j), and j + 1 < i, as x_i with itself is
always 1. Ties take their mean rank; 0 where all entries are equal. Attention is per query head, keys and values per KV
head; keys as cached are after RoPE. Shuffled, what remains is the work of what is kept: "row kept", the entries of each
row i trade places, the rows' scale remains (more keys, less weight each); "distance kept", the entries of each distance
i - j trade places, the profile over distance remains (recency); "both kept", those of each distance within {ROW_BLOCK}
rows do, and only which of {ROW_BLOCK} neighbouring tokens is which is lost, so likeness over longer stretches stays
too. Cosines of neighbours: cos(x_j, x_{{j+1}}), mean and variance over j; "of any two" is their mean in a shuffled
order; the local share is (neighbours - any two) / (1 - any two): 0 = neighbours are no more alike than any two tokens,
1 = they are equal."""


def strength(correlation: float) -> str:
    """Evans' word for the size of a correlation, with its sign where negative."""
    word = next(word for least, word in STRENGTHS if abs(correlation) >= least)
    return f"{word}, negative" if correlation <= -VERY_WEAK else word


def local_share(result: Asymmetry, state: str, name: str = "adjacent_cosine", left_out: int | None = None) -> Tensor:
    """How much of the way from any two tokens to equality a cosine has gone: ``[layers, heads]``, at most 1."""
    any_two = result.table(state, "any_pair_cosine", left_out)
    # Equal vectors are as alike as any two of them.
    return (result.table(state, name, left_out) - any_two) / (1 - any_two).clamp(min=1e-6)


def summarise(result: Asymmetry) -> list[Row]:
    """Numbers over all heads of each state, with and without sinks."""
    out = []
    for state in result.states:
        for left_out in sorted({0, result.sink_size}):
            rows = result.of(state, left_out)
            found = result.table(state, "spearman", left_out)
            found = found[~found.isnan()]
            row: Row = {"state": state, "left_out": left_out, "heads": len(rows), "mean": found.mean().item(),
                        "sd": found.std(correction=0).item(), "min": found.min().item(), "max": found.max().item(),
                        "below_0.2": int((found < VERY_WEAK).sum())}  # fmt: skip
            above = [r["spearman"] > max(r[c] for c in CONTROLS) for r in rows]
            row["above_controls"] = sum(above)
            names = ["pearson_of_ranks", *CONTROLS, "spearman_window_sd"]
            if state != ATTENTION:
                names += ["adjacent_cosine", "adjacent_cosine_variance", "any_pair_cosine"]
                row["local_share"] = local_share(result, state, left_out=left_out).nanmean().item()
            out.append(row | {name: result.table(state, name, left_out).nanmean().item() for name in names})
    return out


def findings(summary: Sequence[Row], sink_size: int) -> str:
    """One line a state, from its numbers without sinks."""
    lines = []
    for row in (row for row in summary if row["left_out"] == sink_size):
        control = max(row[name] for name in CONTROLS)
        lines.append(
            f"- **{LABELS[row['state']]}**: {strength(row['mean'])} (mean {row['mean']:.3f} over {row['heads']} heads, "
            f"from {row['min']:.2f} to {row['max']:.2f}; the strongest control has {control:.3f}); "
            f"{row['above_controls']} heads lie above all controls, {row['below_0.2']} below {VERY_WEAK:g}."
        )
    return "\n".join(lines)


def against_values(result: Asymmetry) -> str:
    """In how many KV heads keys have the higher Spearman, without sinks."""
    values = result.table(VALUES, "spearman")
    counts = [
        f"{LABELS[state]}: {int((result.table(state, 'spearman') > values).sum())}"
        for state in (KEYS, KEYS_PRE_ROPE)
        if state in result.states
    ]
    heads = int((~values.isnan()).sum())
    return f"- Of {heads} KV heads, keys correlate more than values in: " + "; ".join(counts) + "."


def depth_table(result: Asymmetry) -> str:
    """Mean Spearman of the first, middle and last third of the layers, without sinks."""
    tables = {state: result.table(state, "spearman") for state in result.states}
    header = ["Spearman by depth", "first third of the layers", "middle", "last"]
    body = [
        [LABELS[state], *(f"{part.nanmean().item():.3f}" if len(part) else "" for part in table.tensor_split(3))]
        for state, table in tables.items()
    ]
    return _markdown_table(header, body)


def _markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body])


def correlation_table(summary: Sequence[Row]) -> str:
    """Spearman of every state over heads, and its controls."""
    header = ["Spearman of neighbours", "tokens left out", "heads", "mean", "sd", "min", "max", "heads below 0.2"]
    header += ["Pearson of whole-triangle ranks", *CONTROLS.values(), "heads above all three", "sd over windows"]
    body = [
        [LABELS[r["state"]], str(r["left_out"]), str(r["heads"])]
        + [f"{r[name]:.3f}" for name in ("mean", "sd", "min", "max")]
        + [str(r["below_0.2"]), *(f"{r[name]:.3f}" for name in ("pearson_of_ranks", *CONTROLS))]
        + [str(r["above_controls"]), f"{r['spearman_window_sd']:.3f}"]
        for r in summary
    ]
    return _markdown_table(header, body)


def cosine_table(summary: Sequence[Row]) -> str:
    """Plain cosines of neighbours."""
    header = ["cosine of neighbours", "tokens left out", "mean", "variance", "of any two", "local share"]
    names = ("adjacent_cosine", "adjacent_cosine_variance", "any_pair_cosine", "local_share")
    body = [
        [LABELS[r["state"]].removesuffix(", cosine"), str(r["left_out"]), *(f"{r[name]:.3f}" for name in names)]
        for r in summary
        if r["state"] != ATTENTION
    ]
    return _markdown_table(header, body)


def lag_names(result: Asymmetry) -> list[str]:
    """Columns of cosines by distance, nearest first."""
    return [name for name in result.of(KEYS)[0] if name.startswith(LAG)]


def lag_table(result: Asymmetry) -> str:
    """Cosines by distance, mean over heads, without sinks."""
    names = [n for n in lag_names(result) if int(n.removeprefix(LAG)).bit_count() == 1]
    header = ["cosine at distance", *(n.removeprefix(LAG) for n in names), "any two"]
    body = [
        [LABELS[state].removesuffix(", cosine")]
        + [f"{result.table(state, n).nanmean().item():.3f}" for n in [*names, "any_pair_cosine"]]
        for state in result.states
        if state != ATTENTION
    ]
    return _markdown_table(header, body)


def markdown(result: Asymmetry, conditions: Mapping[str, Any]) -> str:
    """The whole report."""
    summary = summarise(result)
    lines = [f"- {name}: {value}" for name, value in conditions.items()]
    published = f"Published for attention (Llama-2-7b-chat, ShareGPT): {PUBLISHED_ATTENTION}. The rest is measured."
    title = f"# Are neighbours alike? {conditions.get('model', '')} on {conditions.get('text', 'a text')}"
    found = findings(summary, result.sink_size) + "\n" + against_values(result)
    parts = [title, "\n".join(lines), "## Findings", found, published]
    parts += ["## Rank correlation of neighbours", correlation_table(summary), depth_table(result)]
    parts += ["## Plain cosines", cosine_table(summary), lag_table(result), "## Definitions", DEFINITIONS]
    return "\n\n".join(parts) + "\n"


def _five_digits(row: Row) -> Row:
    return {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure((width, height), layout=layout)


def draw_heat_maps(result: Asymmetry) -> Figure:
    """Layers x heads of every state in one colour scale: Spearman with and without sinks, its controls, and cosines."""
    states, sinks = result.states, result.sink_size
    kinds = [("spearman", 0, "all tokens")]
    if sinks:
        kinds.append(("spearman", sinks, f"without the first {sinks}"))
    kinds += [*((name, sinks, label) for name, label in CONTROLS.items()), ("adjacent_cosine", sinks, "plain cosine")]
    # Places by hand: constrained layout takes seconds for so many axes.
    figure = _figure(2.6 * len(states), 2.3 * len(kinds), None)
    figure.subplots_adjust(left=0.05, right=0.87, bottom=0.03, top=0.97, hspace=0.5, wspace=0.25)
    grid = figure.subplots(len(kinds), len(states), squeeze=False)
    images = []
    for axes_row, (name, left_out, label) in zip(grid, kinds, strict=True):
        for axes, state in zip(axes_row, states, strict=True):
            if name not in result.of(state, left_out)[0]:
                axes.axis("off")
                continue
            table = result.table(state, name, left_out)
            images.append(axes.imshow(table.numpy(), aspect="auto", vmin=-1, vmax=1, cmap="RdBu_r"))
            axes.set_title(f"{LABELS[state].removesuffix(', cosine')}\n{label}, mean {table.nanmean():.2f}", fontsize=7)
            axes.set_xlabel("query head" if state == ATTENTION else "KV head", fontsize=7)
            axes.set_ylabel("layer", fontsize=7)
            axes.tick_params(labelsize=6)
            axes.xaxis.get_major_locator().set_params(integer=True)
    scale = figure.add_axes((0.9, 0.35, 0.015, 0.3))
    figure.colorbar(images[0], cax=scale, label="rank correlation, or cosine in the last row")
    return figure


def draw_distributions(result: Asymmetry) -> Figure:
    """Spearman over heads, beside the controls, without sinks."""
    figure = _figure(8, 4)
    axes = figure.add_subplot()
    kinds = {"spearman": "measured", **CONTROLS}
    for k, (name, label) in enumerate(kinds.items()):
        heads = [result.table(state, name).flatten() for state in result.states]
        places = [s + 0.2 * (k - 1.5) for s in range(len(heads))]
        values = [h[~h.isnan()].numpy() for h in heads]
        violins: dict[str, Any] = axes.violinplot(values, places, widths=0.18, showmedians=True)
        for part in [*violins["bodies"], violins["cmedians"], violins["cbars"], violins["cmins"], violins["cmaxes"]]:
            part.set_color(f"C{k}")
        axes.plot([], [], color=f"C{k}", label=label)
    axes.plot([-0.4, 0.4], [PUBLISHED_ATTENTION] * 2, "k:", label="published mean, Llama-2-7b-chat")
    axes.axhline(0, color="grey", linewidth=0.5)
    labels = [LABELS[state].replace(", ", ",\n") for state in result.states]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("Spearman of neighbours, over heads")
    figure.legend(loc="outside upper center", ncols=5, fontsize="x-small")
    return figure


def draw_lags(result: Asymmetry) -> Figure:
    """Cosines by distance, mean and middle 80 % of heads, without sinks; and as a share of the way from any two."""
    figure = _figure(9, 3.6)
    plain, share = figure.subplots(1, 2)
    for k, state in enumerate(s for s in result.states if s != ATTENTION):
        names = lag_names(result)
        label = LABELS[state].removesuffix(", cosine")
        _draw_band(plain, [result.table(state, name) for name in names], f"C{k}", label)
        plain.axhline(result.table(state, "any_pair_cosine").nanmean().item(), color=f"C{k}", linestyle=":")
        _draw_band(share, [local_share(result, state, name) for name in names], f"C{k}", label)
    plain.set_ylabel("cosine (dotted: any two tokens)")
    share.set_ylabel("local share")
    share.axhline(0, color="grey", linewidth=0.5)
    for axes in (plain, share):
        axes.set_xlabel("distance, tokens")
    share.legend(fontsize="small")
    return figure


def _draw_band(axes: Axes, tables: Sequence[Tensor], color: str, label: str) -> None:
    """Mean and 10 to 90 % of heads of ``[layers, heads]`` at distances 1, 2, ..."""
    x = range(1, len(tables) + 1)
    low, high = ([t.nanquantile(q).item() for t in tables] for q in (0.1, 0.9))
    axes.plot(x, [t.nanmean().item() for t in tables], color=color, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def write_report(result: Asymmetry, conditions: Mapping[str, Any], folder: Path, *, figures: bool = True) -> str:
    """Writes ``heads.csv``, ``lags.csv``, ``asymmetry.md``, ``run.json`` and the figures; returns the markdown."""
    text = markdown(result, conditions)
    names = lag_names(result)
    heads = [{name: value for name, value in row.items() if name not in names} for row in result.rows]
    lags = [{name: row[name] for name in ("state", "layer", "head", "left_out", *names)}
            for row in result.rows if names[0] in row and row["left_out"] == result.sink_size]  # fmt: skip
    write_atomic(folder / "heads.csv", csv_text(map(_five_digits, heads)))
    write_atomic(folder / "lags.csv", csv_text(map(_five_digits, lags)))
    write_atomic(folder / "asymmetry.md", text)
    write_atomic(folder / "run.json", json.dumps(dict(conditions), indent=2) + "\n")
    if figures:
        draw = {"heatmaps": draw_heat_maps, "distributions": draw_distributions, "lags": draw_lags}
        for name, make in draw.items():
            make(result).savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
    return text
