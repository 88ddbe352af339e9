"""The benchmark of the ops writes its tables, does not time a row twice, and says what it left out."""

import csv
import json

import pytest

from asymkv.ops import bench
from scripts import bench_ops

QUICK = ["--rows", "64", "--repeats", "1", "--dtypes", "float32"]


def run(folder, table, *more):
    bench_ops.main(["--out", str(folder), "--tables", table, *QUICK, *more])
    return list(csv.DictReader((folder / f"{table}.csv").open()))


@pytest.mark.parametrize("table", ["append", "decode", "compaction"])
def test_tables_are_written_once(table, tmp_path, capsys):
    first = run(tmp_path, table)
    assert run(tmp_path, table) == first and len(first) > 2
    assert (tmp_path / "ops.png").exists() and "| float32 |" in capsys.readouterr().out


def test_decode_has_batches_and_the_price_of_cardinality(tmp_path):
    rows = run(tmp_path, "decode", "--batches", "1,3")
    assert {row["batch"] for row in rows} == {"1", "3"}
    ways = {row["way"] for row in rows if row["heads"] == "even"}
    assert {"sdpa", "sdpa without cardinality", bench.READING} <= ways
    assert all(float(row["ms"]) > 0 and row["commit"] for row in rows)


def test_cells_over_the_limit_of_bytes_are_named(tmp_path, capsys):
    limit = 64 * bench.KV_HEADS * bench.DIM * 2 * 4
    rows = run(tmp_path, "decode", "--batches", "1,2", "--max-bytes", str(limit))
    assert {row["batch"] for row in rows} == {"1"} and bench.PADDED not in {row["way"] for row in rows}
    skipped = json.loads((tmp_path / "conditions.json").read_text())["skipped"]
    assert any("2, 64, even, sdpa: 0.0 GiB" in line for line in skipped)
    assert all(f"skipped: {line}" in capsys.readouterr().out for line in skipped[:1])


def test_tables_of_an_earlier_version_are_those_of_batch_1(tmp_path):
    (tmp_path / "decode.csv").write_text("dtype,rows,heads,way,ms\nfloat32,64,even,sdpa,123.0\n")
    (tmp_path / "conditions.json").write_text('{"commit": "abc"}')
    rows = run(tmp_path, "decode", "--batches", "1,2")
    old = [row for row in rows if row["batch"] == "1" and (row["heads"], row["way"]) == ("even", "sdpa")]
    assert [(row["ms"], row["commit"]) for row in old] == [("123.0", "abc")]
    assert {row["batch"] for row in rows} == {"1", "2"}
    assert all(row["commit"] != "abc" for row in rows if row not in old)


def test_a_table_that_lacks_a_key_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("dtype,ms\nfloat32,1\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['batch'\]"):
        bench.Table(tmp_path / "t.csv").has({"dtype": "float32", "batch": 1})
