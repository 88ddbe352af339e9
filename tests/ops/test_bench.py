"""The benchmark of the ops writes its tables, and does not time a row twice."""

import pytest

from scripts import bench_ops


@pytest.mark.parametrize("table", ["append", "decode", "compaction"])
def test_tables_are_written_once(table, tmp_path, capsys):
    command = ["--out", str(tmp_path), "--tables", table, "--rows", "64", "--repeats", "1", "--dtypes", "float32"]
    bench_ops.main(command)
    first = (tmp_path / f"{table}.csv").read_text()
    bench_ops.main(command)
    assert (tmp_path / f"{table}.csv").read_text() == first and first.count("\n") > 3
    assert (tmp_path / "ops.png").exists() and "| float32 |" in capsys.readouterr().out
