"""Score files: bound to a model, checked, found where the script leaves them; DuoAttention's patterns."""

import json

import pytest
import torch
from tiny_models import HEAD_SCORES, prompt, tiny_model

import asymkv
from asymkv import head_scores
from asymkv.head_scores import HeadScores

TABLE = torch.tensor(HEAD_SCORES, dtype=torch.double)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYMKV_CACHE", str(tmp_path / "cache"))


def make(model, kind="induction", scores=HEAD_SCORES):
    return HeadScores(kind, scores, head_scores.model_of(model), {"block": 7})


def test_round_trip(tmp_path):
    model = tiny_model()
    path = make(model).save(tmp_path / "a.json")
    assert head_scores.load(path, model) == make(model)
    assert torch.equal(head_scores.load(path).table, TABLE)


def test_file_of_another_model_is_refused_and_both_are_named(tmp_path):
    path = make(tiny_model()).save(tmp_path / "a.json")
    other = tiny_model(seed=1)
    other.config._name_or_path = "the/other"
    with pytest.raises(ValueError, match=r"a\.json holds head scores of '', not of 'the/other'.*weights_sha256"):
        head_scores.load(path, other)
    with pytest.raises(ValueError, match="weights_sha256"), asymkv.replace("llama", method="razor", head_scores=path):
        other(prompt(20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_hold_for_the_model_in_any_dtype(tmp_path, dtype):
    path = make(tiny_model()).save(tmp_path / "a.json")
    assert torch.equal(head_scores.load(path, tiny_model(dtype=dtype)).table, TABLE)


@pytest.mark.parametrize(("change", "message"), [
    (lambda text: text.replace("0.9", "0.8"), "damaged: its checksum"),
    (lambda text: text[: len(text) // 2], "damaged"),
    (lambda text: text.replace("asymkv-head-scores-1", "other-2"), "unknown format 'other-2'; expected"),
    (lambda text: "[1, 2]", "must hold a json object; found list"),
], ids=["number", "half", "format", "list"])  # fmt: skip
def test_damaged_file_is_refused(tmp_path, change, message):
    path = make(tiny_model()).save(tmp_path / "a.json")
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        head_scores.load(path)


def test_methods_find_what_was_saved_for_their_model():
    model = tiny_model()
    with asymkv.replace("llama", method="duo_attention", budget=48):
        with pytest.raises(ValueError, match=r"no induction scores.*find_retrieval_heads.py --model .*head_scores"):
            model(prompt(100))
        make(model).save()
        with pytest.raises(ValueError, match="no induction scores"):
            tiny_model(seed=1)(prompt(100))
        cache = model(prompt(100)).past_key_values
    assert cache.num_rows(1)[0].tolist() == [48, 48]
    with pytest.raises(ValueError, match="--kind entropy"), asymkv.replace("llama", method="uncomp", budget=48):
        model(prompt(100))


def test_sources():
    model = tiny_model()
    kinds = ("induction", "echo")

    def resolve(source, kinds=kinds):
        return {k: v.tolist() for k, v in head_scores.resolve(source, model, kinds, "head_scores").items()}

    folder = make(model).save().parent
    make(model, "echo", [[0.0, 0.0], [0.0, 1.0]]).save()
    assert resolve(None) == resolve(folder) == resolve(str(folder))
    assert resolve(None)["echo"] == [[0, 0], [0, 1]] and resolve(None)["induction"] == HEAD_SCORES
    assert resolve(folder / "echo.json") == {"induction": [[0, 0], [0, 1]]}
    assert resolve({"induction": HEAD_SCORES, "echo": folder / "echo.json"}) == resolve(None)
    assert resolve(HEAD_SCORES) == {"induction": HEAD_SCORES}
    entropy = make(model, "entropy").save()
    assert resolve(entropy, ("entropy",)) == {"entropy": HEAD_SCORES}


@pytest.mark.parametrize(("source", "message"), [
    ([[1.0, 2.0]], r"head_scores must be \[2\]\[2\].*found 1 rows of \[2\]"),
    ([[1.0, 2.0], [3.0]], r"found 2 rows of \[1, 2\]"),
    ([[1.0, 2.0], [3.0, float("nan")]], "finite numbers; found .nan"),
    ({"echo": HEAD_SCORES}, "needed: 'induction'"),
    ({"induction": HEAD_SCORES, "entropy": HEAD_SCORES}, "allowed: .'induction', 'echo'"),
    ("nowhere.json", "no file nowhere.json"),
], ids=str)  # fmt: skip
def test_bad_sources(source, message):
    with pytest.raises(ValueError, match=message):
        head_scores.resolve(source, tiny_model(), ("induction", "echo"), "head_scores")


def test_entropies_are_no_retrieval_scores():
    model = tiny_model()
    path = make(model, "entropy").save()
    with pytest.raises(ValueError, match="holds entropy scores; head_scores needs induction"):
        head_scores.resolve(path, model, ("induction",), "head_scores")


def test_settings_hold_plain_values(tmp_path):
    """Paths and tensors (what a method measured) can be given, and the settings still go through json."""
    config = asymkv.CompressionConfig("headkv", head_scores=TABLE)
    assert config.options.head_scores == HEAD_SCORES == config.head_budgets["file"]
    scores = {"induction": tmp_path / "a.json", "echo": (tuple(HEAD_SCORES[0]), tuple(HEAD_SCORES[1]))}
    config = asymkv.CompressionConfig("razor", head_scores=scores)
    assert config.options.head_scores == {"induction": str(tmp_path / "a.json"), "echo": HEAD_SCORES}
    direct = asymkv.CompressionConfig("h2o", head_budgets={"kind": "headkv", "file": tmp_path / "a.json"})
    for each in (config, direct):
        assert asymkv.CompressionConfig(**json.loads(json.dumps(each.to_dict()))) == each


def test_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind of head scores 'luck'; allowed.*induction"):
        make(tiny_model(), "luck")


def test_duo_attention_pattern_round_trip(tmp_path):
    head_scores.write_pattern(tmp_path, TABLE, sink_size=64, recent_size=256)
    assert (tmp_path / "full_attention_heads.tsv").read_text() == "0.1\t0.2\n0.9\t0.3\n"
    assert json.loads((tmp_path / "config.json").read_text()) == {"sink_size": 64, "recent_size": 256}
    table, sink, recent = head_scores.read_pattern(tmp_path)
    assert torch.equal(table, TABLE) and (sink, recent) == (64, 256)
    found = head_scores.resolve(tmp_path, tiny_model(), ("induction", "echo"), "head_scores")
    assert torch.equal(found["induction"], TABLE)
    with pytest.raises(ValueError, match=r"must be \[2\]\[4\]"):
        head_scores.resolve(tmp_path, tiny_model(num_key_value_heads=4), ("induction",), "head_scores")
    with pytest.raises(ValueError, match="from 0 to 1; found 0.2 to 1.8"):
        head_scores.write_pattern(tmp_path, TABLE * 2, sink_size=64, recent_size=256)


def test_a_pattern_of_another_model_is_refused_whatever_its_shape(tmp_path):
    """DuoAttention's own files name their model; ours are bound to its weights."""
    model = tiny_model()
    model.config._name_or_path = "hub/Tiny-Model"
    head_scores.write_pattern(tmp_path, TABLE, sink_size=64, recent_size=256, model=head_scores.model_of(model))
    head_scores.read_pattern(tmp_path, model)
    with pytest.raises(ValueError, match=r"pattern of 'hub/Tiny-Model', not of .*weights_sha256"):
        head_scores.resolve(tmp_path, tiny_model(seed=5), ("induction",), "head_scores")
    theirs = {"sink_size": 64, "recent_size": 256, "model_name": "models/Tiny-Model"}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    head_scores.read_pattern(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps({**theirs, "model_name": "models/Other"}))
    with pytest.raises(ValueError, match="pattern of 'models/Other', not of 'hub/Tiny-Model'"):
        head_scores.read_pattern(tmp_path, model)


@pytest.mark.parametrize(("tsv", "config", "message"), [
    (None, "{}", "full_attention_heads.tsv is missing"),
    ("0.5\t0.5\n", None, "no file .*config.json"),
    ("0.5\t0.5\n", '{"sink_size": 4}', "missing: .'recent_size'"),
    ("0.5\thalf\n", '{"sink_size": 4, "recent_size": 8}', "damaged.*half"),
    ("0.5\t1.5\n", '{"sink_size": 4, "recent_size": 8}', "numbers from 0 to 1"),
    ("0.5\n0.5\t1\n", '{"sink_size": 4, "recent_size": 8}', r"found 2 rows of \[1, 2\]"),
], ids=lambda x: str(x)[:12])  # fmt: skip
def test_bad_patterns(tmp_path, tsv, config, message):
    for name, text in (("full_attention_heads.tsv", tsv), ("config.json", config)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        head_scores.read_pattern(tmp_path)
