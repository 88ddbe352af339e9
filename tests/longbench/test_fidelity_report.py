"""What a fidelity run's records become: tables, intervals' rows, and figures."""

import numpy as np
import pytest
import yaml

from asymkv.longbench import fidelity_report, needle_plot
from asymkv.longbench.fidelity_experiment import load_experiment
from asymkv.longbench.fidelity_results import Results

ARMS = [
    {"name": "full", "method": "full"},
    {"name": "window", "method": "streaming_llm"},
    {"name": "merge", "method": "asymkv", "compare": ["window"]},
]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The full cache and two arms at one ratio."""
    file = tmp_path_factory.mktemp("report") / "tiny.yaml"
    file.write_text(yaml.safe_dump({"name": "tiny", "sample": "sample.json", "ratios": [0.5], "arms": ARMS}))
    return load_experiment(file)


def fixture_record(task, item, arm, ratio, nll, nbytes):
    return {
        "kind": "row", "dataset": task, "id": item, "arm": arm, "ratio": ratio, "nll": nll, "tokens_seen": 100,
        "kept_ratio": ratio or 1.0, "rows_max": 100 * (ratio or 1.0), "stored_bytes": nbytes, "full_bytes": 1000,
        "peak_rows": 100, "peak_bytes": nbytes + 100 * (item == "r1"), "prefill_seconds": 0.5,
    }  # fmt: skip


def fixture_results(experiment):
    losses = {"none": (4.0, 3.0), "full": (2.0, 1.0), "window": (3.0, 2.5), "merge": (2.5, 1.5)}
    nbytes = {"none": 10, "full": 1000, "window": 500, "merge": 550}
    records = [
        fixture_record("trec", f"r{i}", arm, 0.5 if arm in ("window", "merge") else None, nll, nbytes[arm])
        for arm, pair in losses.items()
        for i, nll in enumerate(pair)
    ]
    return Results(records, experiment)


def test_report_from_fixture_records(experiment):
    results = fixture_results(experiment)
    summary = {row["arm"]: row for row in fidelity_report.summarise(results)}
    # merge: (1.5 + 1.5) / (2 + 2); window: (1 + 0.5) / 4
    assert summary["full"]["retention"] == 1.0
    assert summary["merge"]["retention"] == pytest.approx(0.75)
    assert summary["window"]["retention"] == pytest.approx(0.375)
    assert summary["merge"]["share_of_stock_bytes"] == pytest.approx(0.55)
    assert summary["merge"]["peak_share_of_stock_bytes"] == pytest.approx(0.60)
    assert summary["merge"]["rows_per_head"] == pytest.approx(50)
    (difference,) = fidelity_report.paired(results)
    assert difference["difference"] == pytest.approx(0.375)
    assert difference["bytes_over_reference"] == pytest.approx(1.1)
    assert summary["merge"]["prefill_over_full"] == 1.0
    results.one_machine = False
    assert "nan" in str(fidelity_report.summarise(results)[0]["prefill_over_full"]), "times of two machines"
    table = fidelity_report.main_table(fidelity_report.summarise(results))
    assert "| merge | 0.5 | 0.750 [0.750, 0.750] | 2 | 0.00 | 55.0 % | 60.0 % | 50.0 |" in table


def test_rows_out_of_view_have_a_column_where_there_are_any(experiment):
    results = fixture_results(experiment)
    assert "share in view" not in fidelity_report.main_table(fidelity_report.summarise(results))
    for record in results.of("row", ("merge", 0.5)).values():
        record |= {"kept_ratio": 1.0, "nominal_ratio": 0.25, "rows_max": 100}
    summary = fidelity_report.summarise(results)
    table = fidelity_report.main_table(summary)
    assert "| rows per head | share in view |" in table
    assert "| merge | 0.5 | 0.750 [0.750, 0.750] | 2 | 0.00 | 55.0 % | 60.0 % | 100.0 | 25.0 % |" in table
    assert "| 50.0 % | 55.0 % | 50.0 | 50.0 % |" in table
    assert "what attention" in fidelity_report.definitions(summary, [])
    for protocol in ("prompt", "context"):
        text = fidelity_report.definitions(summary, [{"settings": {"protocol": protocol}}])
        assert ("first token of an answer comes from the prefill" in text) == (protocol == "prompt")


def test_figure_is_drawn_where_there_is_something_to_draw(experiment, tmp_path):
    summary = fidelity_report.summarise(fixture_results(experiment))
    assert fidelity_report.plot(summary, tmp_path / "retention.png")
    assert (tmp_path / "retention.png").read_bytes().startswith(b"\x89PNG")
    undefined = [{**row, "retention": float("nan")} for row in summary]
    assert not fidelity_report.plot(undefined, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def needle_records(dataset, found):
    """Two depths at two lengths; the compressed arm finds what ``found`` says."""
    cells = [(depth, length) for depth in (0.1, 0.9) for length in (1000, 2000)]
    for arm, ratio in (("none", None), ("full", None), ("window", 0.5)):
        for i, (depth, length) in enumerate(cells):
            record = fixture_record(dataset, f"n{i}", arm, ratio, 4.0 if arm == "none" else 1.0, 10)
            seconds = {"full": 2.0, "window": (2.0, 3.0, 4.0, 40.0)[i]}.get(arm, 0.1)
            right = {"none": False, "full": True}.get(arm, found[i])
            yield record | {"depth": depth, "target_len": length, "found": right, "prefill_seconds": seconds}


def test_needles_of_each_dataset_have_their_own_heat_map(experiment, tmp_path):
    records = [*needle_records("needle", [True] * 4), *needle_records("needle_multikey", [True, False, False, False])]
    results = Results(records, experiment)
    grids = fidelity_report.needle_grids(results)
    assert list(grids) == ["needle", "needle_multikey"] and list(grids["needle"]) == [("full", None), ("window", 0.5)]
    assert grids["needle"]["window", 0.5] == {1000: {0.1: (1, 1), 0.9: (1, 1)}, 2000: {0.1: (1, 1), 0.9: (1, 1)}}
    assert grids["needle_multikey"]["window", 0.5] == {
        1000: {0.1: (1, 1), 0.9: (0, 1)},
        2000: {0.1: (0, 1), 0.9: (0, 1)},
    }
    assert "| needle_multikey | window | 0.5 | 2000 tokens | 0/1 | 0/1 |" in fidelity_report.needle_table(results)
    both, one = tmp_path / "both.png", tmp_path / "one.png"
    assert needle_plot.plot(grids, both) and needle_plot.plot({"needle": grids["needle"]}, one)
    heights = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (both, one)]
    assert heights[0] == 2 * heights[1]  # a block of panels a dataset
    assert not needle_plot.plot({"needle": {("full", None): {}}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_time_of_compression_is_the_median_multiple_of_the_full_caches_prefill(experiment):
    records = list(needle_records("needle", [True] * 4))
    results = Results(records, experiment)
    summary = {row["arm"]: row for row in fidelity_report.summarise(results)}
    assert summary["full"]["prefill_over_full"] == 1.0
    assert summary["window"]["prefill_over_full"] == 1.75  # of 1, 1.5, 2, 20
    others = [{**r, "session": "a" if r["arm"] == "full" or i % 2 else "b"} for i, r in enumerate(records)]
    kept = [r["prefill_seconds"] / 2 for r in others if r["arm"] == "window" and r["session"] == "a"]
    several = fidelity_report.summarise(Results(others, experiment))
    assert 0 < len(kept) < 4 and several[1]["prefill_over_full"] == np.median(kept), "times of one session only"
    header, _, _, row = fidelity_report.main_table(list(summary.values())).splitlines()
    assert header.endswith("| x full's prefill |") and row.endswith("| 1.75 |")


def test_an_unfinished_arm_is_marked(experiment):
    results = fixture_results(experiment)
    del results._by_kind["row"]["merge", 0.5]["trec", "r1"]
    summary = {row["arm"]: row for row in fidelity_report.summarise(results)}
    assert not summary["merge"]["complete"]
    assert "1 (unfinished)" in fidelity_report.main_table(list(summary.values()))
    # Over the first row alone: (4 - 3) / (4 - 2) and (4 - 2.5) / (4 - 2).
    page = fidelity_report.markdown(results, [])
    assert "1 rows." in page and "| window | 0.500 |" in page and "| merge | 0.750 |" in page
