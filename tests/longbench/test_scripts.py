"""The scripts' own decisions: what a demo refuses, and which datasets a command line names."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from byte_tokenizers import byte_tokenizer
from tiny_models import tiny_model, tiny_tokenizer

from asymkv.longbench.data import load_rows
from asymkv.longbench.measure import Protocol
from asymkv.longbench.sample import first_rows

SCRIPTS = Path(__file__).parents[2] / "scripts"
# What a command line must have, by script.
NEEDED = {
    "pred": ["--out", "x"], "fidelity": ["--out", "x", "--experiment", "methods"],
    "compare": ["--model", "m", "--ratio", "0.5", "--context", "c", "--question", "q"],
    "generate": ["--model", "m", "--prompt", "p"],
}  # fmt: skip
WITH_DTYPE = ("pred", "fidelity", "compare", "generate")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a script by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def demo_scores(*, needle: float = 100.0, share: float = 0.28) -> dict:
    full = {"scores": {"needle": needle}, "stored_share": 1.1}
    return {"full": full, "none": full, "asymkv": {"scores": {"needle": 0.0}, "stored_share": share}}


def test_the_demo_fails_loudly_on_a_broken_model_or_an_uncompressed_arm(script) -> None:
    problems = script("demo").problems
    assert problems(demo_scores(), 0.25) == []
    assert "full cache finds only 40 %" in problems(demo_scores(needle=40.0), 0.25)[0]
    assert "asymkv stores 31.0 %" in problems(demo_scores(share=0.31), 0.25)[0]
    assert problems(demo_scores(share=0.31), 0.5) == []


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny random model and its tokenizer, as a folder."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("protocol", ["prompt", "context"])
def test_compare_prints_both_answers_and_goes_on_where_it_stopped(
    script, tiny_folder, tmp_path, capsys, protocol
) -> None:
    compare = script("compare")
    args = ["--model", str(tiny_folder), "--ratio", "0.3", "--context", " ".join(f"w{i % 97}" for i in range(200)),
            "--question", "w3 w5", "--max-new-tokens", "5", "--device", "cpu", "--protocol", protocol,
            "--out", str(tmp_path / "answers.json"), "--methods"]  # fmt: skip
    assert compare.main([*args, "h2o"]) == 0
    first = json.loads((tmp_path / "answers.json").read_text())["answers"]
    assert compare.main([*args, "h2o,kvpress_knorm,razor"]) == 1
    out = capsys.readouterr()
    assert "not run: razor" in out.err and "find_retrieval_heads" in out.err
    assert "kvpress_knorm" in out.out and "full cache" in out.out
    answers = json.loads((tmp_path / "answers.json").read_text())["answers"]
    assert answers[:2] == first and [a["method"] for a in answers] == ["full", "h2o", "kvpress_knorm"]
    assert answers[0]["kept_ratio"] == 1 and answers[2]["kept_ratio"] == pytest.approx(0.3, abs=0.01)
    with pytest.raises(ValueError, match="other settings.*ratio"):
        compare.main([*args[:2], "--ratio", "0.5", *args[4:], "h2o"])


def compare_arguments(model: Path, out: Path, *more: str) -> list[str]:
    """The command line of scripts/compare.py on a made-up context."""
    context = " ".join(f"w{i % 97}" for i in range(200))
    args = ["--model", str(model), "--ratio", "0.3", "--context", context, "--question", "w3 w5"]
    return [*args, "--max-new-tokens", "5", "--device", "cpu", "--out", str(out), *more]


def test_an_answer_is_not_reused_once_the_methods_settings_have_changed(script, tiny_folder, tmp_path) -> None:
    compare, out, own = script("compare"), tmp_path / "answers.json", tmp_path / "own.yaml"
    args = compare_arguments(tiny_folder, out, "--methods", f"{own}, h2o")

    def answers() -> dict[str, dict]:
        return {a["method"]: a for a in json.loads(out.read_text(encoding="utf-8"))["answers"]}

    own.write_text("{method: h2o, window_size: 8}", encoding="utf-8")
    assert compare.main(args) == 0
    first = answers()
    own.write_text("{method: h2o, window_size: 16}", encoding="utf-8")
    assert compare.main(args) == 0
    second = answers()
    assert [first[str(own)]["config"]["window_size"], second[str(own)]["config"]["window_size"]] == [8, 16]
    assert second["full"] == first["full"] and second["h2o"] == first["h2o"]  # times and all: not measured again


def test_of_all_methods_compare_runs_what_can_be_had(script, tiny_folder, tmp_path, capsys, monkeypatch) -> None:
    """A budget that some methods are too wide for; one of them asked for by name is refused at once."""
    compare = script("compare")
    monkeypatch.setattr(compare, "METHODS", ("full", "snapkv", "h2o"))
    args = compare_arguments(tiny_folder, tmp_path / "answers.json", "--protocol", "context", "--budget", "64")
    del args[args.index("--ratio") : args.index("--ratio") + 2]
    assert compare.main(args) == 1
    out = capsys.readouterr()
    assert "not run: snapkv: budget=64 is smaller than sink_size + window_size + 1 = 65" in out.err and "h2o" in out.out
    with pytest.raises(ValueError, match="budget=64 is smaller"):
        compare.main([*args, "--methods", "h2o,snapkv"])


def test_answers_of_other_weights_or_files_are_not_shown_as_these(script, tiny_folder, tmp_path, monkeypatch) -> None:
    compare, model = script("compare"), tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    args = compare_arguments(model, tmp_path / "answers.json", "--methods", "h2o,knorm")
    assert compare.main(args) == 0
    monkeypatch.setattr(compare, "files_of", lambda config, model: {"gate": "new"} if config.method == "h2o" else {})
    monkeypatch.setattr(compare, "commit", lambda: "later")
    assert compare.main(args) == 0
    answers = {a["method"]: a for a in json.loads((tmp_path / "answers.json").read_text())["answers"]}
    assert [answers[n]["conditions"]["commit"] == "later" for n in ("full", "h2o", "knorm")] == [False, True, False]
    tiny_model(seed=1).save_pretrained(model)
    with pytest.raises(ValueError, match="other settings.*weights_sha256"):
        compare.main(args)


def test_generate_feeds_a_base_model_its_first_token_and_takes_shipped_settings(script) -> None:
    generate = script("generate")
    chat, base = byte_tokenizer(adds_bos=True), byte_tokenizer(adds_bos=True)
    base.chat_template = None
    args = generate.parse_args(["--model", "m", "--method", "kvpress_snapkv", "--ratio", "0.5", "--prompt", "ab"])
    assert generate.encode(args, base, 100)[0].tolist() == base("ab")["input_ids"]
    assert generate.encode(args, base, 100)[0, 0] == base.bos_token_id
    assert generate.encode(args, chat, 100)[0].tolist().count(base.bos_token_id) == chat.apply_chat_template(
        [{"role": "user", "content": "ab"}], tokenize=False, add_generation_prompt=True).count("<s>")  # fmt: skip
    config = generate.settings(args)
    assert (config.method, config.ratio, config.decode_interval) == ("snapkv", 0.5, 0)


def test_without_the_full_cache_compare_tells_the_reason(script, tiny_folder, tmp_path, capsys) -> None:
    args = compare_arguments(tiny_folder, tmp_path / "answers.json", "--methods", "h2o", "--protocol", "context")
    args[args.index("--context") + 1] = ""
    assert script("compare").main(args) == 1
    out = capsys.readouterr()
    assert "not run: full: " in out.err and "not run: h2o: " in out.err and "full cache" not in out.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "answers.json:1 is not JSON"),
        ('{"settings": {}, "answ', "answers.json:1 is not JSON"),
        ("[1]", r"answers.json must hold a JSON object, found list \[1\]"),
        ('{"a": 1}', "answers.json is no file of answers, which has settings and answers with .*KeyError: 'settings'"),
        ('{"settings": {}, "answers": [{"x": 1}]}', "answers.json is no file of answers, .*unexpected .*'x'"),
        (None, "answers.json is a folder; --out takes a json file"),
    ],
)
def test_an_answers_file_that_is_none_is_named(script, tmp_path, content: str | None, message: str) -> None:
    out = tmp_path / "answers.json"
    if content is None:
        out.mkdir()
    else:
        out.write_text(content, encoding="utf-8")
    # Found before the model, which does not exist, is loaded.
    with pytest.raises(ValueError, match=message):
        script("compare").main(compare_arguments(tmp_path / "model", out, "--methods", "h2o"))


def test_answers_that_look_like_markup_are_shown_as_they_are(script, capsys) -> None:
    compare = script("compare")
    said = ["[/INST]", "[bold]x", "x=[i for i in y]", "[link=x]y[/link] :smile:"]
    made = [compare.Answer(f"m{i}[red]", text, 0.3, 1, 1.0, 1.0) for i, text in enumerate(said)]
    full = compare.Answer("full", "[/nothing] said", 1.0, 1, 1.0, 1.0)
    args = compare.parse_args(["--model", "[/m]", "--ratio", "0.3", "--context", "c", "--question", "q"])
    compare.show({each.method: each for each in (full, *made)}, args)
    out = capsys.readouterr().out
    assert all(text in out for text in ("[/m]", "[/nothing] said", "m0[red]", *said))


def test_dataset_groups_expand(script) -> None:
    pred = script("pred")
    names = pred.dataset_names(pred.parse_args(["--out", "x", "--datasets", "needle,english"]))
    assert names[0] == "needle" and len(names) == 17
    assert set(pred.dataset_names(pred.parse_args(["--out", "x"]))) == {
        "needle",
        "passage_retrieval",
        "code_completion",
    }


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("pred", "--max-samples -1", "--max-samples: must be an integer >= 1; found '-1'"),
        ("pred", "--max-samples 0", "--max-samples: must be an integer >= 1; found '0'"),
        ("pred", "--max-new-tokens 0", "--max-new-tokens: must be an integer >= 1; found '0'"),
        ("pred", "--max-new-tokens two", "--max-new-tokens: must be an integer >= 1; found 'two'"),
        ("pred", "--threads -1", "--threads: must be an integer >= 1; found '-1'"),
        ("pred", "--stop-ids a,b", "--stop-ids: must be token ids >= 0 separated by commas, such as 2,99; found 'a,b'"),
        ("pred", "--method full,,none", "must be names separated by commas, none of them empty; found 'full,,none'"),
        ("fidelity", "--max-rows -1", "--max-rows: must be an integer >= 0; found '-1'"),
        ("fidelity", "--threads 0", "--threads: must be an integer >= 1; found '0'"),
        ("fidelity", "--rows-per-task 0", "--rows-per-task: must be an integer >= 1; found '0'"),
        ("compare", "--max-new-tokens -4", "--max-new-tokens: must be an integer >= 1; found '-4'"),
        ("compare", "--threads 0", "--threads: must be an integer >= 1; found '0'"),
        ("generate", "--max-new-tokens 0", "--max-new-tokens: must be an integer >= 1; found '0'"),
        *[(name, "--dtype floaty", "invalid choice: 'floaty' (choose from ") for name in WITH_DTYPE],
    ],
)
def test_a_value_that_cannot_be_is_refused_at_once(script, capsys, name: str, given: str, message: str) -> None:
    with pytest.raises(SystemExit):
        script(name).parse_args([*NEEDED.get(name, []), *given.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("given", "missing"), [([], "--experiment"), (["--experiment", "x"], "--out"),
                                                (["--write-sample", "s.json"], "--data-dir")])  # fmt: skip
def test_fidelity_says_what_it_needs(script, capsys, given: list[str], missing: str) -> None:
    with pytest.raises(SystemExit):
        script("fidelity").parse_args(given)
    assert f"{missing} is required" in capsys.readouterr().err
    assert script("fidelity").parse_args(["--write-sample", "s.json", "--data-dir", "d"]).experiment is None


def test_the_least_that_sizes_may_be_is_taken(script) -> None:
    args = script("pred").parse_args(["--out", "x", "--max-samples", "1", "--stop-ids", "2, 99"])
    assert args.max_samples == 1 and args.stop_ids == [2, 99]
    assert script("fidelity").parse_args([*NEEDED["fidelity"], "--max-rows", "0"]).max_rows == 0


def test_blanks_around_names_are_no_part_of_them(script) -> None:
    pred = script("pred")
    args = pred.parse_args(["--out", "x", "--method", "full, none ,h2o", "--datasets", "needle , qasper"])
    assert args.methods == ["full", "none", "h2o"] and pred.dataset_names(args) == ["needle", "qasper"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method", "asymvk"], r"unknown method 'asymvk' \(did you mean 'asymkv'\?\); methods: .*'tova'.*"
                                 r"shipped settings: .*'kvpress_knorm'"),
        (["--datasets", "qasperr"], r"unknown task 'qasperr' \(did you mean 'qasper'\?\).*known: longbench, .*needle"),
        (["--datasets", "longbnch"], r"unknown task 'longbnch' \(did you mean 'longbench'\?\)"),
    ],
)  # fmt: skip
def test_a_mistyped_name_is_answered_with_the_known_ones(script, tmp_path, given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script("pred").main(["--out", str(tmp_path), "--ratio", "0.5", *given])


@pytest.mark.parametrize("sizes", [{"max_new_tokens": 0}, {"max_new_tokens": -3}, {"max_gold_tokens": 0}])
def test_the_library_takes_no_length_that_would_mean_another(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be an integer >= 1; found"):
        Protocol(**sizes)


def test_the_library_takes_no_number_of_rows_that_would_mean_another() -> None:
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"max_samples must be an integer >= 1; found {wrong}"):
            load_rows("needle", max_samples=wrong)
    with pytest.raises(ValueError, match="max_rows must be an integer >= 0; found -1"):
        first_rows([], -1)
