"""Gates: how their passages are collected, and how they are fitted."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import assert_close, prompt, tiny_model, tiny_tokenizer

import asymkv
from asymkv.gates import collect, fit, gate
from asymkv.head_scores import model_of
from asymkv.longbench.models import load_model, load_tokenizer, resolve_spec
from asymkv.longbench.sample import sample_sha256
from asymkv.paths import config_path
from scripts.train_gate import main as train_gate

WORDS = " ".join(f"w{i}" for i in prompt(400, seed=5)[0].tolist())


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def planted_rows(name, count=400, tokens=2048):
    """Scores that follow from the features, by another rule in every head; in long contexts lower in some heads."""
    rule = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) / 3
    x = torch.randn(4, count, 12).bfloat16()
    by_length = math.log(tokens / 2048) * torch.tensor([[0.0], [-0.5], [-1.0], [-2.0]])
    log_score = (x.float() * rule[:, None]).sum(-1) * 2 + x[..., 0].float().abs() - 5 + by_length
    return fit.Rows(name, x, log_score.clamp(max=0).exp(), (2, 2), tokens)


def test_a_fit_finds_what_was_planted():
    """On rows that it has not seen."""
    seen = []
    train, test = [planted_rows(f"p{i}") for i in range(4)], [planted_rows("held out")]
    settings = fit.Fit(hidden=16, steps=200, batch=128, rate=1e-2)
    weights, found = fit.fit(train, test, settings, report_every=80, progress=lambda *step: seen.append(step))
    assert found["error"] < 0.2 * found["error_of_means"]
    assert found["overlap"]["0.25"] > 0.8 and found["mass"]["0.25"] > 0.9
    assert (found["passages"], found["rows_per_head"], found["held_out"]) == (4, 1600, 1)
    assert len(seen) == 200 and [step for step, measured in seen if measured] == [80, 160, 200]
    short = fit.Fit(hidden=4, steps=5, seed=1)
    (one, _), (two, _) = (fit.fit(train, test, short) for _ in range(2))
    assert all(torch.equal(x, two[name]) for name, x in one.items()), "a seed gives one gate"
    assert weights["weight_in"].shape == (2, 2, 12, 16) and weights["bias_out"].shape == (2, 2)


def test_a_fit_learns_how_long_contexts_are():
    """Of two lengths; one length alone teaches nothing of lengths."""
    settings = fit.Fit(hidden=16, steps=300, batch=128, rate=1e-2)
    lengths, fitted = (700, 2048, 4000), {}
    for taught in (lengths, (2048,)):
        train = [planted_rows(f"{tokens} {i}", 800, tokens) for tokens in taught for i in range(6 // len(taught))]
        fitted[taught], _ = fit.fit(train, [planted_rows("held out")], settings)
    errors = {taught: [fit.measure(weights, [planted_rows("p", tokens=n)])["error"] for n in (700, 4000)]
              for taught, weights in fitted.items()}  # fmt: skip
    assert max(errors[lengths]) < 0.5 < 3 * max(errors[lengths]) < min(errors[2048,]), errors
    assert fitted[lengths]["lengths"][1, 1].tolist() == [700, 4000]
    assert not fitted[2048,]["weight_length"].any()


def test_agreement_of_a_perfect_and_of_a_blind_gate():
    rows = planted_rows("p")
    x = fit.target_of(rows.score)[..., None].bfloat16()
    exact = fit.Rows("p", x, x[..., 0].float().exp(), (2, 2), 99)
    line = {"mean": torch.zeros(2, 2, 1), "scale": torch.ones(2, 2, 1), "bias_in": torch.full((2, 2, 1), 60.0),
            "weight_in": torch.ones(2, 2, 1, 1), "weight_out": torch.ones(2, 2, 1),
            "bias_out": torch.full((2, 2), -60.0)}  # fmt: skip
    best = fit.measure(line, [exact], ratios=(0.25,))
    assert best["error"] < 1e-6 and best["overlap"]["0.25"] > 0.99 and best["mass"]["0.25"] > 0.999
    blind = fit.measure({**line, "weight_out": -line["weight_out"]}, [exact], ratios=(0.25,))
    assert blind["overlap"]["0.25"] < 0.01


def test_a_collection_holds_what_kvzip_says(model, tmp_path):
    """A share of the rows of a window, with KVzip's own scores; done work is not done again, nor mixed with other."""
    tokenizer, recipe = tiny_tokenizer(), collect.Recipe(max_tokens=120, share=0.5)
    passage, folder = collect.Passage("kind", WORDS), collect.Folder(tmp_path)
    folder.claim(model, recipe)
    folder.add(model, tokenizer, passage, recipe)
    (path,) = folder.files()
    written = path.stat().st_mtime_ns
    folder.add(model, tokenizer, passage, recipe)
    assert path.stat().st_mtime_ns == written
    found = collect.score_rows(model, tokenizer, passage, recipe)
    kept = found["positions"]
    assert 30 < len(kept) < 90 and int(kept.max()) < 130 and found["scores"].min() >= 0
    rows = fit.read_rows(path)
    judged = (found["scores"] > 0).flatten(0, 1).any(0)
    use = (kept >= fit.SINKS) & judged
    assert_close("scores", found["scores"][:, :, use].flatten(0, 1), rows.score, 0)
    assert rows.x.shape == (4, int(use.sum()), 32) and rows.score.max() > 0
    assert rows.tokens == int(found["tokens"]) >= int(kept.max()) + 1
    with pytest.raises(ValueError, match="collected otherwise; take another folder"):
        folder.claim(model, collect.Recipe(max_tokens=120, share=1.0))
    for other in ({"half": "tune"}, {"left_out": collect.digest({"a context"})}, {"min_tokens": 100}):
        with pytest.raises(ValueError, match=f"take another folder.*{next(iter(other))}"):
            folder.claim(model, collect.Recipe(max_tokens=120, share=0.5, **other))
    assert collect.digest(["a", "b"]) == collect.digest({"b", "a"}) != collect.digest(["ab"]) and not collect.digest([])
    with pytest.raises(ValueError, match="was collected for .*weights_sha256"):
        folder.claim(tiny_model(seed=1), recipe)
    with pytest.raises(ValueError, match="at most max_tokens; found min_tokens = 200, max_tokens = 120"):
        collect.Recipe(max_tokens=120, min_tokens=200)
    with pytest.raises(ValueError, match="at least 64 are needed"):
        folder.add(model, tokenizer, collect.Passage("kind", "w1 w2"), recipe)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="delete it, and the collection makes it again"):
        fit.read_rows(path)


def test_a_chat_template_is_not_learnt_as_worthless(model, tmp_path):
    """KVzip keeps what stands before a context, and judges none of it: no score is no low score."""
    tokenizer, recipe = tiny_tokenizer(), collect.Recipe(max_tokens=120, share=1.0)
    tokenizer.chat_template = "{% for m in messages %}" + "w9 " * 20 + "{{ m.content }}{% endfor %}"
    folder, passage = collect.Folder(tmp_path), collect.Passage("kind", WORDS)
    folder.add(model, tokenizer, passage, recipe)
    found = collect.score_rows(model, tokenizer, passage, recipe)
    unjudged = (found["scores"] == 0).flatten(0, 1).all(0)
    assert unjudged[: int(unjudged.sum())].all() and int(unjudged.sum()) >= 20 > fit.SINKS
    (path,) = folder.files()
    assert fit.read_rows(path).score.shape[1] == len(unjudged) - int(unjudged.sum())


def test_a_passage_is_trained_on_or_measured_on(tmp_path):
    """Also where two folders hold it."""
    files = [tmp_path / folder / f"p{i}.safetensors" for folder in "ab" for i in range(8)]
    train, measured = fit.split(files, 4)
    assert len(train) == 12 and len(measured) == 4
    assert not {f.stem for f in train} & {f.stem for f in measured}


class Letters:
    """Tokenizes into characters."""

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(letter) for letter in text]}


def test_contexts_of_one_half_and_none_of_a_sample(tmp_path):
    rows = [{"_id": f"{i}", "context": f"text {i:03} " * (9 + i), "input": "q", "answers": ["a"], "length": 9,
             "dataset": "qasper", "language": "en", "all_classes": None} for i in range(30)]  # fmt: skip
    (tmp_path / "qasper.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def passages(count=99, left_out=(), **recipe):
        given = Letters(), collect.Recipe(**recipe), left_out
        return [p.text for p in collect.task_passages("qasper", tmp_path, count, *given)]

    halves = [set(passages(half=half)) for half in ("tune", "report")]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 30
    assert passages(half="tune", left_out=halves[0]) == []
    assert len(passages(3)) == 3
    assert sorted(map(len, passages(min_tokens=9 * 36))) == [9 * n for n in range(36, 39)]
    text = rows[0]["context"]
    again = {**rows[0], "_id": "again", "context": "".join(map(chr, range(400, 700))) + text * 2}
    (tmp_path / "qasper.jsonl").write_text("\n".join(map(json.dumps, [rows[0], again])), encoding="utf-8")
    assert len(passages()) == 2
    assert passages(left_out={text}) == [], "made of a left out context's text"
    groups = [[collect.Passage(kind, str(i)) for i in range(n)] for kind, n in (("a", 1), ("b", 3))]
    assert [p.kind + p.text for p in collect.take_turns(groups)] == ["a0", "b0", "b1", "b2"]


def test_no_passage_shares_text_with_a_sample_of_another_task(tmp_path):
    """A haystack may be the report of another task, or a page of a book."""
    report, other = ("".join(map(chr, range(start, start + 300))) for start in (400, 1000))
    row = {"_id": "0", "input": "q", "answers": ["a"], "length": 9, "language": "en", "all_classes": None}
    for task, contexts in {"gov_report": [report], "needle": [report + "!", other]}.items():
        lines = [json.dumps({**row, "_id": str(i), "context": c, "dataset": task}) for i, c in enumerate(contexts)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sample = tmp_path / "sample.json"
    tasks = {"gov_report": ["0"]}
    content = {"tasks": tasks, "sha256": sample_sha256(tasks), "max_prompt_tokens": 99}
    sample.write_text(json.dumps(content), encoding="utf-8")
    left_out = collect.sample_contexts([sample], tmp_path)
    assert left_out == {report}
    recipe = collect.Recipe(max_tokens=64)
    assert [p.text for p in collect.task_passages("needle", tmp_path, 9, Letters(), recipe, left_out)] == [other]
    book = tmp_path / "book.txt"
    book.write_text(" ".join(["w1"] * 80), encoding="utf-8")
    assert len(collect.file_passages(book, 2, tiny_tokenizer(), recipe)) == 2
    assert collect.file_passages(book, 2, tiny_tokenizer(), recipe, {" ".join(["w1"] * 90)}) == []


def test_the_script_trains_a_gate_that_the_method_takes(model, tmp_path, monkeypatch):
    """Both stages on a text; what is missing is said."""
    text, folder = tmp_path / "text.txt", str(tmp_path / "model")
    text.write_text(WORDS, encoding="utf-8")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path / "cache"))
    given = ["--model", folder, "--work", str(tmp_path / "work"), "--dtype", "float32", "--device", "cpu"]
    with pytest.raises(ValueError, match="holds no collection"):
        train_gate([*given, "--stage", "fit"])
    given += ["--texts", str(text), "--windows", "3", "--max-tokens", "100", "--steps", "30", "--hidden", "4"]
    with pytest.raises(ValueError, match="3 passages are too few to hold out one of 6"):
        train_gate(given)
    assert train_gate([*given, "--held-out", "3"]) == 0
    report = json.loads(gate.default_path(model_of(model)).with_suffix(".json").read_text(encoding="utf-8"))
    assert (report["passages"], report["held_out"], report["kinds"]) == (2, 1, ["text"])
    assert report["error"] < report["error_of_means"] * 1.5
    with asymkv.replace("llama", model=model, method="gate", window_size=8, budget=40), torch.no_grad():
        assert model(prompt(100)).past_key_values.num_rows(0).sum() > 0
    text.write_text("w1 w2", encoding="utf-8")
    with pytest.raises(ValueError, match="text.txt has 2 tokens; a passage takes 100"):
        train_gate(given)


@pytest.mark.smollm2
def test_smollm2_has_a_gate_that_finds_what_kvzip_keeps():
    """On a text that it was not trained on."""
    spec = resolve_spec("smollm2")
    smollm2, tokenizer = load_model(spec, dtype="bfloat16"), load_tokenizer(spec)
    path = gate.find(smollm2)
    assert path == config_path("gates/smollm2.safetensors") and path.stat().st_size < 1_000_000
    shipped = gate.load(path, smollm2)
    text = collect.Passage("license", (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8"))
    found = collect.score_rows(smollm2, tokenizer, text, collect.Recipe(max_tokens=300, share=1.0))
    x = gate.features(found["keys"], found["values"])[:, :, fit.SINKS :]
    score = found["scores"][:, :, fit.SINKS :].flatten(0, 1)
    rows = fit.Rows("license", x.flatten(0, 1), score, (30, 3), int(found["tokens"]))
    measured = fit.measure(shipped.weights, [rows])
    assert measured["overlap"]["0.25"] > 0.65 and measured["mass"]["0.25"] > 0.9
