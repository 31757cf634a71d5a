"""Every command that a README shows is one that the program takes: parsed by its own parser, with methods and configs that exist."""

import argparse
import functools
import importlib
import pathlib
import re
import shlex
import string

import pytest

from hybridvlm.config import config_names
from hybridvlm.reduction import parse_method

ROOT = pathlib.Path(__file__).parents[1]
READMES = [path for path in (ROOT / "README.md", *sorted((ROOT / "hybridvlm").rglob("README.md"))) if path.is_file()]
PACKAGED = ("tiny", "tiny-reduced")


@functools.cache
def commands() -> tuple[tuple[str, str], ...]:
    """(README, command) for every `python -m hybridvlm...` in code blocks and in inline code, variables filled in."""
    found = {}
    for path in READMES:
        text, variables = path.read_text(), {}
        blocks = re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", text, re.M | re.S)
        outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        inline = re.findall(r"(?<!`)`([^`]*python -m hybridvlm[^`]*)`", outside)
        for block in (*blocks, *inline):
            for line in block.replace("\\\n", " ").splitlines() if block in blocks else [" ".join(block.split())]:
                line = string.Template(line.replace("$(", "$$(")).safe_substitute(variables)
                for part in re.split(r"&&|;", line):
                    words = shlex.split(part, comments=True)
                    while words and re.fullmatch(r"\w+=.*", words[0]):
                        name, value = words.pop(0).split("=", 1)
                        variables[name] = shlex.join(shlex.split(value))
                    if words[:2] == ["python", "-m"] and words[2].startswith("hybridvlm"):
                        found[str(path.relative_to(ROOT)), shlex.join(words)] = None
    return tuple(found)


class Parsed(Exception):
    """What a parser made of a command; nothing behind it runs."""


def parse(monkeypatch, words: list[str]) -> argparse.Namespace | None:
    """None where the command only names a program, or a list of programs."""
    original = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    module = importlib.import_module(words[0])
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{words[0]}.__main__")
    try:
        code = module.main(words[1:])
    except Parsed as parsed:
        return parsed.args[0]
    assert code == 0, "refused before anything was parsed"
    return None


def test_there_are_commands_to_look_at():
    assert len(commands()) > 25
    assert any("hybridvlm.eval --model tiny-reduced" in command for _, command in commands())


@pytest.mark.parametrize(("readme", "command"), commands())
def test_a_command_is_taken(monkeypatch, capsys, readme, command):
    module, *arguments = shlex.split(command)[2:]
    if not arguments and module != "hybridvlm.eval":  # named, as a program that takes more
        arguments = ["--help"]
    try:
        options = parse(monkeypatch, [module, *arguments])
    except SystemExit as end:
        assert end.code == 0, f"{readme}: {command}\n{capsys.readouterr().err}"
        return
    if options is None:
        return
    for name in ("methods", "reduction", "method"):
        value = getattr(options, name, None)
        for method in value.split(",") if isinstance(value, str) else value or ():
            if isinstance(method, str):
                parse_method(method)
    model = getattr(options, "model", None)
    if isinstance(model, str) and "/" not in model:
        assert model in (*PACKAGED, *config_names()), f"{readme}: {command}"
    config = getattr(options, "config", None)
    if module == "hybridvlm.train" and isinstance(config, str):
        from hybridvlm.train import config as configs

        changes = [change for change in options.changes if not change.startswith("model=")]
        configs.read(config if pathlib.Path(config).suffix == "" else str(ROOT / config), changes)


def test_a_command_that_is_wrong_is_seen(monkeypatch):
    with pytest.raises(SystemExit):
        parse(monkeypatch, ["hybridvlm.eval", "--modle", "tiny"])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unknown reduction method 'fastvv'"):
        parse_method(parse(monkeypatch, ["hybridvlm.eval", "--methods", "fastvv"]).methods)
