"""The documents: links lead somewhere, commands are ones that the programs take, code prints what stands below it."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import pathlib
import re
import shlex
import subprocess

import pytest

from hybridvlm.checkpoints.names import PACKAGED
from hybridvlm.config_files import config_names
from hybridvlm.reduction import parse_method
from hybridvlm.tiny import figure
from hybridvlm.train import config_files

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "notebooks" / "README.md",
        *(ROOT / "hybridvlm").glob("*/README.md"),
        *(ROOT / ".github").glob("*.md"),
    ],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
# Every command of a document in the shell's own words, with loops and variables expanded, and none of them run.
STUBS = """
python() { printf '%s\\x1f' "$@"; printf '\\n'; }
for name in pip pytest pre-commit ruff lint-imports; do eval "$name() { :; }"; done
"""


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The names by which a page's headings can be linked."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """Arguments of every `python …` in the shell blocks."""
    found = []
    for block in blocks(text, "bash"):
        run = subprocess.run(["bash", "-c", STUBS + block], capture_output=True, text=True, cwd="/")
        found += [line.split("\x1f")[:-1] for line in run.stdout.splitlines()]
    return found


def test_every_folder_that_the_front_page_promises_has_a_readme():
    assert {"README.md", ".github/CONTRIBUTING.md", ".github/CHANGELOG.md"} < set(NAMES)
    assert len([name for name in NAMES if name.startswith("hybridvlm/")]) >= 9


def test_the_front_page_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 110] == []
    assert (ROOT / ".github/front_page.png").stat().st_size <= 250_000


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text()
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", plain)
    links += re.findall(r"^\[[^\]]+\]: (\S+)$", plain, re.MULTILINE)
    defined = set(re.findall(r"^\[([^\]]+)\]: ", plain, re.MULTILINE))
    if name == "README.md":
        assert len(links) > 15
        # a reference in brackets without a definition would stand there as it is
        assert set(re.findall(r"(?:\]|(?<=[\s|]))\[(\w+)\](?![(:\w\[])", plain)) <= defined
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name}: {link}"


def test_files_and_modules_that_are_named_exist():
    for name in NAMES:
        text = (ROOT / name).read_text()
        for module in set(re.findall(r"python -m (hybridvlm[\w.]*\w)", text)) - {"hybridvlm.NAME"}:
            assert importlib.util.find_spec(module), f"{name}: {module}"
        for path in set(re.findall(r"`((?:hybridvlm|tests|configs|notebooks)/[\w./-]+)`", text)):
            assert (ROOT / path).exists(), f"{name}: {path}"


class Parsed(Exception):
    """A command line was taken; its argument is what the parser made of it, and nothing runs."""


def parsed(monkeypatch, words: list[str]) -> argparse.Namespace | None:
    """What a program's own parser makes of ["module", *arguments]; None where the program answered without one."""
    real = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        raise Parsed(real(self, *args, **kwargs))

    package = importlib.util.find_spec(words[0]).submodule_search_locations is not None
    module = importlib.import_module(f"{words[0]}.__main__" if package else words[0])
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        try:
            assert module.main(words[1:]) == 0, f"refused: {words}"
        except Parsed as taken:
            return taken.args[0]
    return None


def inline_commands(text: str) -> list[list[str]]:
    """Arguments of every `python -m hybridvlm.NAME ...` in running text that has any, and no placeholder such as N or DIR."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"(?<!`)`([^`]*python -m hybridvlm\.[^`]*)`", outside)
    whole = [words for words in map(shlex.split, found) if words[0] == "python" and len(words) > 3]
    return [words[1:] for words in whole if not any(re.fullmatch(r"[A-Z]+|…|\.\.\.", word) for word in words[3:])]


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_taken(name, monkeypatch):
    text = (ROOT / name).read_text()
    for words in [*commands(text), *inline_commands(text)]:
        assert words[0] == "-m", words
        shown, errors = f"{name}: {' '.join(words)}", io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                options = parsed(monkeypatch, words[1:])
        except SystemExit as end:
            assert end.code == 0, f"{shown}\n{errors.getvalue()}"
            continue
        if not name.startswith(".github"):  # those show commands with names of the reader's own
            check_names(options, words[1], shown)


def check_names(options: argparse.Namespace | None, module: str, shown: str) -> None:
    """That methods, packaged models and configs which a command names exist."""
    for field in ("methods", "reduction"):
        value = getattr(options, field, None)
        for method in value.split(",") if isinstance(value, str) else ():
            parse_method(method)
    model = getattr(options, "model", None)
    if isinstance(model, str) and "/" not in model:
        assert model in (*PACKAGED, *config_names()), shown
    config = getattr(options, "config", None)
    if module == "hybridvlm.train" and isinstance(config, str):
        changes = [change for change in options.changes if not change.startswith("model=")]
        config_files.read(config if pathlib.Path(config).suffix == "" else str(ROOT / config), changes)


def test_a_wrong_command_would_be_found():
    assert commands("```bash\nfor b in 1 2; do\n  python -m hybridvlm.eval \\\n    --budgets 0.$b\ndone\n```\n") == [
        ["-m", "hybridvlm.eval", "--budgets", "0.1"],
        ["-m", "hybridvlm.eval", "--budgets", "0.2"],
    ]
    assert inline_commands("`python -m hybridvlm.eval` and `python -m hybridvlm.ask a 'b c'`") == [
        ["-m", "hybridvlm.ask", "a", "b c"]
    ]
    assert commands("```bash\npip install . && X=1 python -m a 'b c'  # d\n```\n") == [["-m", "a", "b c"]]


def test_a_command_with_a_wrong_word_is_seen(monkeypatch):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, ["hybridvlm.eval", "--modle", "tiny"])
    options = parsed(monkeypatch, ["hybridvlm.eval", "--methods", "fastvv"])
    with pytest.raises(ValueError, match="unknown reduction method 'fastvv'"):
        check_names(options, "hybridvlm.eval", "")


PRINTED = ("README.md", "hybridvlm/models/README.md", "hybridvlm/plan/README.md", "hybridvlm/reduction/README.md")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_python_prints_what_stands_below_it(name):
    text = (ROOT / name).read_text()
    (code,) = blocks(text, "python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), {})
    expected = blocks(text, "text")
    if expected:
        assert printed.getvalue() == expected[0]
    else:
        assert "3.75x less work" in printed.getvalue()


# -- the picture ----------------------------------------------------------------------------------------------------------


def test_the_picture_shows_the_frames_that_matter():
    assert figure._columns([3 * 16 + 8, 20 * 16 + 8], 64, 6) == sorted(set(figure._columns([3 * 16, 20 * 16], 64, 6)))
    assert {3, 20} < set(figure._columns([3 * 16, 20 * 16], 64, 6))
    assert figure._columns([0], 2, 2) == [0, 1]


def test_the_picture_reads_the_results(tmp_path):
    def row(cell, method, budget, accuracy, flops, group="after"):
        one = {"mean": accuracy, "ci95_seeds": None, "ci95_videos": [accuracy - 0.1, accuracy + 0.1]}
        return {"cell": cell, "method": method, "budget": budget, "accuracy": one, "flops": flops, "group": group}

    rows = [
        row("str", "str", 0.25, 0.75, 0.25),
        row("dense", "none", 1.0, 0.875, 1.0),
        row("str 50%", "str", 0.5, 0.8, 0.5),
        row("decay on", "str", 0.25, 0.5, 0.25),
        row("str", "str", 0.25, 0.1, 0.25, "before"),
    ]
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps({"rows": rows}))
    curve = figure.budget_curve(figure.read_ablations([path]))
    assert [(point["saving"], point["accuracy"]) for point in curve] == [(1.0, 87.5), (2.0, 80.0), (4.0, 75.0)]
    assert (curve[-1]["low"], curve[-1]["high"]) == (65.0, 85.0)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*--ablations"):
        figure.read_ablations([tmp_path / "nowhere.json"])


def test_the_picture_says_what_is_missing_before_it_runs_a_model(tmp_path, capsys):
    output = tmp_path / "picture.png"
    assert figure.main(["--output", str(output), "--ablations", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err and not output.exists()


def test_the_committed_results_have_what_the_picture_draws():
    paths = [ROOT / path for path in figure.ABLATIONS]
    for group in ("before", "after"):
        curve = figure.budget_curve(figure.read_ablations(paths, group))
        assert [point["budget"] for point in curve] == [1.0, 0.75, 0.5, 0.35, 0.25, 0.125, 0.1]
    assert set(figure.RIVALS) <= {row["method"] for row in figure.read_ablations(paths)}
