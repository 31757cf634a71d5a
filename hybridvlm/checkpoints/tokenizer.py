"""Tokenizer and chat template out of a checkpoint's own files. Templates run in Jinja's sandbox, nothing else is executed."""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybridvlm.checkpoints.tensors import CheckpointError

if TYPE_CHECKING:
    import jinja2
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
FILES = (TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json")


class PublishedTokenizer:
    """Text <-> ids by a checkpoint's tokenizer.json (attribute `tokenizer`), and conversations by its chat template."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, special: Mapping[str, str] | None = None):
        self.tokenizer, self.template, self.special = tokenizer, template, dict(special or {})
        self.folder: pathlib.Path | None = None

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> PublishedTokenizer:
        """Read tokenizer.json, and what there is of tokenizer_config.json and a chat template."""
        from tokenizers import Tokenizer

        folder = pathlib.Path(folder)
        file = folder / TOKENIZER
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {TOKENIZER}")
        try:
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise CheckpointError(f"{file} is not a tokenizer: {error}") from error
        config = _read(folder / "tokenizer_config.json")
        special = {name: _content(config[name]) for name in SPECIAL if config.get(name)}
        found = cls(tokenizer, _template(folder, config), special)
        found.folder = folder
        return found

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are recognised, and none is added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=skip_special)

    def id(self, token: str) -> int:
        """The id of one token; ValueError if there is none."""
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return found

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        default: str = "",
        *,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as the checkpoint's chat template writes them, or `default` where it has none, up to where the answer begins.

        template_options: further variables of the template, such as {"enable_thinking": False}; a template ignores those that it
        does not know. ValueError for a template that fails, or that the sandbox stops, and for an option that would take the
        place of the messages or of a special token.
        """
        import jinja2

        given = {"messages": list(messages), "add_generation_prompt": True, **self.special}
        taken = sorted(set(template_options or ()) & (set(given) | set(SPECIAL)))
        if taken:
            raise ValueError(f"template_options may not set {', '.join(taken)}: the template is given its own")
        text = self.template or default
        if not text:
            raise ValueError("the checkpoint has no chat template, and its family none either")
        try:
            return _compiled(text).render({"tools": None, "documents": None, **(template_options or {}), **given})
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template failed: {type(error).__name__}: {error}") from error

    def save(self, path: str | pathlib.Path) -> None:
        """Write a tokenizer.json, and beside it the other files that it was read with."""
        path = pathlib.Path(path)
        self.tokenizer.save(str(path))
        for name in FILES[1:]:
            if self.folder is not None and (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, path.parent / name)


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _template(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: of a file of its own, or of tokenizer_config.json; of several the one called "default"."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = _read(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template") if named else None
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{folder}: its chat template is not text but {type(found).__name__}")
    return found


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment.from_string(text)
