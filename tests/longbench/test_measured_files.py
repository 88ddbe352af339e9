"""What was measured of the model beforehand is part of a folder's settings: it keeps to its gate and head scores."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from gate_files import random_gate
from longbench_files import PROTOCOL, TASK, write_inputs
from test_fidelity_refusals import folder, measured, run, write_experiment  # noqa: F401 - folder is a fixture

from asymkv.config import CompressionConfig
from asymkv.experiments.arms import Sizes, method_arms
from asymkv.experiments.suite import Options, run_suite
from asymkv.head_scores import HeadScores, model_of
from asymkv.longbench import arms, data, models, runner
from asymkv.longbench.models import ModelSpec, load_model
from asymkv.provenance import files_of


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tiny model, with a gate and head scores in the user's cache folder."""
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path / "cache"))
    found = load_model(ModelSpec("tiny", str(tiny_folder), 2048))
    random_gate(found).save()
    save_scores(found, 0.25)
    return found


def save_scores(model, first: float) -> None:
    for kind in ("induction", "echo"):
        HeadScores(kind, [[first, 0.5], [0.75, 1.0]], model_of(model)).save()


def test_what_a_cache_reads_is_told_by_content(model, tmp_path: Path, monkeypatch) -> None:
    gate, razor = CompressionConfig("gate", ratio=0.5), CompressionConfig("razor", ratio=0.5)
    assert set(files_of(gate, model)) == {"gate"} and set(files_of(razor, model)) == {"induction scores", "echo scores"}
    assert files_of(CompressionConfig("h2o", ratio=0.5), model) == {}
    given = CompressionConfig.named("gate", ratio=0.5, file=str(random_gate(model).save(tmp_path / "copy.safetensors")))
    assert files_of(given, model) == files_of(gate, model)
    before = files_of(gate, model), files_of(razor, model)
    random_gate(model, seed=1).save()
    save_scores(model, 0.125)
    assert files_of(gate, model) != before[0] and files_of(razor, model) != before[1]
    of_a_kind = [HeadScores("kvzip", [[x, 0.5], [0.75, 1.0]], model_of(model)).save(tmp_path / f"{x}.json")
                 for x in (0.25, 0.5, 0.75)]  # fmt: skip
    pairs = [CompressionConfig("razor", ratio=0.5, head_scores={"induction": str(a), "echo": str(of_a_kind[2])})
             for a in of_a_kind[:2]]  # fmt: skip
    assert files_of(pairs[0], model) != files_of(pairs[1], model)
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path / "nothing"))
    assert files_of(gate, model) == {}  # the run that wants it tells why it cannot be had


def test_a_fidelity_folder_of_another_gate_is_refused(model, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    write_experiment(folder, [{"name": "full", "method": "full"}, {"name": "gate", "method": "gate"}])
    run(folder, tmp_path / "out")
    before = measured(tmp_path / "out")
    run(folder, tmp_path / "out")
    assert measured(tmp_path / "out") == before and "gate" in before
    random_gate(model, seed=1).save()
    with pytest.raises(ValueError, match=r"results of other settings: files\.gate differ"):
        run(folder, tmp_path / "out")


def test_a_pred_folder_of_other_head_scores_is_refused(model, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    inputs = write_inputs(tmp_path / "data")
    made = arms.make_arms(["razor"], ratio=0.5, settings={"": {"window_size": 8}})
    tasks = data.load_tasks([TASK], inputs, changed_prompts=True)
    work = runner.Work(made, tasks, {TASK: data.load_rows(TASK, data_dir=inputs)}, PROTOCOL)
    subject = runner.load_subject(
        models.resolve_spec(str(tiny_folder), max_length=500), torch.device("cpu"), "float32"
    )
    alone = runner.Ranks(0, 1, torch.device("cpu"))
    runner.run(work, subject, tmp_path / "out", alone)
    runner.run(work, subject, tmp_path / "out", alone)
    save_scores(model, 0.125)
    with pytest.raises(ValueError, match=r"results of other settings: config\.files differ"):
        runner.run(work, subject, tmp_path / "out", alone)


def test_a_suite_folder_of_another_gate_is_refused(model, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four five six seven. " * 12, encoding="utf-8")
    options = Options(model=str(tiny_folder), out=tmp_path / "out", text=str(tmp_path / "text.txt"), lengths=(128,),
                      samples=1, decode_steps=0)  # fmt: skip
    plan = method_arms(["full", "gate"], Sizes(96, 64))
    assert len(run_suite(options, plan)["records"]) == 2
    random_gate(model, seed=1).save()
    with pytest.raises(ValueError, match=r"results of other settings: files\.gate differ"):
        run_suite(options, plan)


def other_weights(model, place: Path) -> None:
    """Another model under the folder's name."""
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(-1)
    model.save_pretrained(place)


def test_folders_of_other_weights_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """The path says nothing of what lies there."""
    write_experiment(folder, [{"name": "full", "method": "full"}])
    run(folder, tmp_path / "out")
    run(folder, tmp_path / "out")
    found = load_model(ModelSpec("tiny", str(folder / "model"), 2048))
    other_weights(found, folder / "model")
    with pytest.raises(ValueError, match=r"results of other settings: weights_sha256 differ"):
        run(folder, tmp_path / "out")


def test_a_pred_folder_of_other_weights_is_refused(model, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "data").mkdir()
    inputs = write_inputs(tmp_path / "data")
    tasks = data.load_tasks([TASK], inputs, changed_prompts=True)
    work = runner.Work(arms.make_arms(["full"]), tasks, {TASK: data.load_rows(TASK, data_dir=inputs)}, PROTOCOL)
    spec, alone = models.resolve_spec(str(tmp_path / "model"), max_length=500), runner.Ranks(0, 1, torch.device("cpu"))
    runner.run(work, runner.load_subject(spec, alone.device, "float32"), tmp_path / "out", alone)
    other_weights(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"results of other settings: weights_sha256 differ"):
        runner.run(work, runner.load_subject(spec, alone.device, "float32"), tmp_path / "out", alone)
