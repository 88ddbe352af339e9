"""What the README shows is what the code does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_model, tiny_tokenizer

import asymkv
from asymkv.methods import METHODS
from asymkv.methods.scored import HeadScored

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]


def tiny_checkpoint(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_quick_start_runs(tmp_path, capsys):
    code = re.search(r"<!-- quickstart -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 10
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(" ".join(f"w{i % 100}" for i in range(700)))
    names = {"MODEL": str(tiny_checkpoint(tmp_path / "model")), "PROMPT_FILE": str(prompt)}
    exec(compile(code, "README.md", "exec"), names)
    stats = names["out"].past_key_values.stats()
    assert stats["max_rows"] == 512 + 63 and "'kept_ratio'" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["kvpress", "own method"])
def test_code_of_the_guide_runs(part):
    page = PAGES[ROOT / "docs" / "guide.md"]
    code = re.search(rf"<!-- {part} -->\n```python\n(.*?)```", page, re.DOTALL).group(1)
    tokenizer = tiny_tokenizer()
    words = " ".join(f"w{i * i % 100}" for i in range(300))
    names = {"asymkv": asymkv, "model": tiny_model(), "tokenizer": tokenizer, "context": words, "question": "w1 w2",
             "inputs": tokenizer(words, return_tensors="pt", return_token_type_ids=False)}  # fmt: skip
    before = dict(METHODS)
    try:
        exec(compile(code, "guide.md", "exec"), names)
    finally:
        for name in METHODS.keys() - before:
            del METHODS[name]
    assert names["out"].shape[1] == 308
    if part == "kvpress":
        assert isinstance(names["answer"], str) and int(names["cache"].num_rows(0).sum()) == 2 * 75


def test_generated_parts_are_up_to_date():
    done = subprocess.run([sys.executable, "scripts/make_readme.py", "--check"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_everything_that_a_page_names_exists(page):
    names = re.findall(r"(?:scripts|configs|benchmarks/results|notebooks)/[\w/.]+\w", PAGES[page])
    for name in names:
        assert list(ROOT.glob(name + "*")) or (ROOT / name).is_dir(), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page]):
        assert (page.parent / link).exists(), link


def test_every_reproduce_target_that_is_named_runs_a_script_that_is_there():
    """And measures head scores first, where an arm needs them."""
    for name in sorted(set(re.findall(r"make (reproduce-\w+)", "".join(PAGES.values())))):
        steps = subprocess.run(["make", "-n", name, "VENV=/v", "MODEL=none"], cwd=ROOT, capture_output=True, text=True)
        assert steps.returncode == 0, steps.stderr
        command = re.findall(r"/v/bin/python (scripts/\w+\.py)(?: --experiment (.*?) --model)?", steps.stdout)[-1]
        assert (ROOT / command[0]).is_file()
        for experiment in command[1].split():
            settings = yaml.safe_load((ROOT / "configs" / "experiments" / f"{experiment}.yaml").read_text())
            methods = {METHODS.get(arm.get("method")) for arm in settings["arms"]} - {None}
            needs_heads = any(issubclass(method, HeadScored) for method in methods)
            assert needs_heads <= ("find_retrieval_heads.py" in steps.stdout), name


@pytest.mark.parametrize("settings", [["--budget", "64"], ["--ratio", "0.25", "--set", "curvature=loss"],
                                      ["--method", "streaming_llm", "--budget", "300KB"]], ids=" ".join)  # fmt: skip
def test_generate_script(settings):
    command = ["scripts/generate.py", "--model", "tiny", "--random", "--prompt-tokens", "400", "--max-new-tokens", "4"]
    done = subprocess.run([sys.executable, *command, *settings], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "403 tokens seen" in done.stderr and "rows per KV head" in done.stderr


def test_generate_script_refuses_bad_settings_before_loading():
    command = [sys.executable, "scripts/generate.py", "--model", "nowhere/nothing", "--budget", "3", "--prompt", "hi"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "smaller than sink_size + window_size + 1" in done.stderr
