"""`python -m hybridvlm.train --help` lists what a config can say, as `--set` takes it."""

import dataclasses
import re

import pytest

from hybridvlm.options import attribute_docs, field_help
from hybridvlm.train import __main__ as command
from hybridvlm.train import config as configs
from hybridvlm.train import config_files

FIELDS = [field for group in field_help(configs.TrainConfig()).values() for field in group]


def leaves(config, prefix=""):
    """Dotted names of all fields that hold no config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_help_lists_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0 and max(map(len, shown.splitlines())) <= 140
    listed = re.findall(r"^    ([a-z][\w.]*)=", shown, re.MULTILINE)
    assert listed == sorted(set(listed), key=listed.index) and set(listed) == set(leaves(configs.TrainConfig()))
    assert re.search(r"^    data\.text=8 +int: text tokens that a row holds", shown, re.MULTILINE)
    assert '    optimizer.frozen=["^vision/", "^projector/"]  list of str: ' in shown
    assert re.search(r"^    export\.reduction=null +Reduction: ", shown, re.MULTILINE)


def test_a_default_of_the_help_can_be_set(tmp_path):
    path = tmp_path / "empty.json"
    path.write_text("{}")
    assert config_files.read(path, [f"{field.key}={field.default}" for field in FIELDS]) == configs.TrainConfig()


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.key)
def test_every_field_is_documented(field):
    assert field.text and field.type != "Any"


def test_an_entry_may_take_several_lines_and_no_entry_is_an_error():
    @dataclasses.dataclass
    class Config:
        """Words.

        Attributes:
            one: first
                and second line.
            two: another: with a colon.
        """

        one: int = 1
        two: tuple[int, ...] = (1, 2)

    assert attribute_docs(Config) == {"one": "first and second line.", "two": "another: with a colon."}
    assert [(f.key, f.type, f.default) for f in field_help(Config())[""]] == [
        ("one", "int", "1"),
        ("two", "list of int", "[1, 2]"),
    ]
    Config.__doc__ = "Words."
    with pytest.raises(KeyError):
        field_help(Config())
