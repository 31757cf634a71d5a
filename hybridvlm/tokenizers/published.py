"""Tokenizer and chat template out of a checkpoint's own files. Templates run in a bounded sandbox, nothing else is executed."""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybridvlm.errors import CheckpointError
from hybridvlm.tokenizers.messages import ROLES, Part, parts_of
from hybridvlm.tokenizers.special_tokens import (
    ADDED,
    CONFIG,
    MAP,
    NAMES,
    TOKENIZER,
    PlainText,
    control_tokens,
    read_object,
    read_tokenizer,
)
from hybridvlm.tokenizers.template_limits import TooMuch
from hybridvlm.tokenizers.text import TRUSTED, Text, concatenate, media_in, medium, origin_of, person, plain, trusted
from hybridvlm.tokenizers.word_level import library_faults

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
FILES = (TOKENIZER, CONFIG, TEMPLATE, "chat_template.json", MAP, ADDED)
# What a template writes for a medium when it is given content parts. The families put their own marks around a medium's tokens
_MEDIUM = re.compile(
    r"(?:<\|vision_start\|>)?<\|(?:image|video)_pad\|>(?:<\|vision_end\|>)?|(?:<img>)?<(?:image|video)>(?:</img>)?"
)
_MARKS = ("<|image_pad|>", "<|video_pad|>", "<image>", "<video>")
_PROBE, _END = "probe{}x{}x", "end{}x{}x"
_DUMPED = re.compile(r"""['"]text['"]: *['"]probe\d+x\d+x""")


class PublishedTokenizer:
    """Text <-> ids by a checkpoint's tokenizer.json (attribute `tokenizer`), and conversations by its chat template.

    allow_special_tokens: whether control tokens (`<|im_end|>`) in what people write are control tokens, instead of plain text.
    source: what messages call the template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        special: Mapping[str, str] | None = None,
        *,
        allow_special_tokens: bool = False,
        source: str = "",
    ):
        self.tokenizer, self.template, self.special = tokenizer, template, dict(special or {})
        self.allow_special_tokens, self.source = allow_special_tokens, source
        self.folder: pathlib.Path | None = None
        self._plain: PlainText | None = None

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> PublishedTokenizer:
        """Read tokenizer.json, and what there is of the files that name special tokens and of chat templates."""
        folder = pathlib.Path(folder)
        tokenizer, special = read_tokenizer(folder)
        template, source = _template(folder)
        found = cls(tokenizer, template, special, source=source)
        found.folder = folder
        return found

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special token is added.

        Special tokens in a plain string, and in the trusted parts of a `Text`, are recognised. In what a person wrote
        (`tokenizers.text.person`) they are plain text, unless `allow_special_tokens` is set.
        """
        with library_faults(self.folder and self.folder / TOKENIZER):
            if self.allow_special_tokens or set(origin_of(text)) <= {TRUSTED} or not isinstance(text, Text):
                return self.tokenizer.encode(plain(text), add_special_tokens=False).ids
            if self._plain is None:
                self._plain = PlainText(self.tokenizer, control_tokens(self.tokenizer, self.template))
            return self._plain.encode(text)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids."""
        with library_faults(self.folder and self.folder / TOKENIZER):
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
    ) -> Text:
        """Messages as the checkpoint's chat template writes them, or `default` where it has none, up to where the answer begins.

        A message's content is text or a list of parts, {"type": "text", "text": ...} or {"type": "video" | "image"}; the positions of
        media are kept in the result (`tokenizers.text.cut_at_media`). The template gets a message's text as one string, or its parts
        where it would leave something out of a string, or the one for some roles and the other for the rest.

        template_options: further variables of the template, such as {"enable_thinking": False}; a template ignores those that it
        does not know. ValueError for a template that leaves out a text or a medium, that fails, or that the sandbox stops, and
        for an option that would replace the messages or of a special token.
        """
        given = {"add_generation_prompt": True, **{name: trusted(token) for name, token in self.special.items()}}
        taken = sorted(set(template_options or ()) & {"messages", *given, *NAMES})
        if taken:
            raise ValueError(f"template_options may not set {', '.join(taken)}: the template is given its own")
        if not self.template and not default:
            raise ValueError("the checkpoint has no chat template, and its family none either")
        given = {"tools": None, "documents": None, **(template_options or {}), **given}
        spoken = parts_of(messages)
        failures: list[ValueError] = []
        lost: list[str] = []
        for forms in _all_forms(spoken):
            try:
                missing: list[str] = []
                for whole in (False, True):  # a word for each text tells most, and soon
                    if not missing:
                        missing = _missing(self._rendered(_probes(spoken, whole), forms, given, default), spoken, whole)
            except ValueError as error:
                if isinstance(error.__cause__, TooMuch):
                    raise
                failures.append(error)
                continue
            if not missing:
                return self._rendered(spoken, forms, given, default)
            lost = min(lost or missing, missing, key=len)
        if not lost:
            raise failures[0]
        raise ValueError(
            f"the chat template leaves out a text or a medium of the messages, or repeats a medium, whether it is given their "
            f"content as text or in parts: {'; '.join(lost[:3])}; it cannot be used (template {self._source()})"
            + (f"; otherwise {failures[0]}" if failures else "")
        )

    def _source(self) -> str:
        return (self.source or "given") if self.template else "of the model's family"

    def _rendered(
        self,
        spoken: list[tuple[str, list[Part]]],
        forms: Callable[[str], Form],
        given: Mapping[str, Any],
        default: str,
    ) -> Text:
        from hybridvlm.tokenizers import template

        shown = [
            {"role": trusted(role) if role in ROLES else person(role), "content": forms(role)(parts)}
            for role, parts in spoken
        ]
        try:
            text = template.render(self.template or default, {**given, "messages": shown})
        except Exception as error:  # whatever a stranger's template may raise
            told = " ".join(str(error).split())[:400]
            raise ValueError(
                f"the chat template failed: {type(error).__name__}: {told} (template {self._source()})"
            ) from error
        return text if all(forms(role) is _as_text for role, _ in spoken) else _with_media(text)

    def save(self, path: str | pathlib.Path) -> None:
        """Write a tokenizer.json, and next to it the other files that it was read with."""
        path = pathlib.Path(path)
        self.tokenizer.save(str(path))
        for name in FILES[1:]:
            if self.folder is not None and (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, path.parent / name)
        if self.folder is not None and (self.folder / TEMPLATES).is_dir():
            shutil.copytree(self.folder / TEMPLATES, path.parent / TEMPLATES, dirs_exist_ok=True)


# -- messages -----------------------------------------------------------------------------------------------------------


def _probes(spoken: list[tuple[str, list[Part]]], whole: bool) -> list[tuple[str, list[Part]]]:
    """The same messages with a word instead of each text, to see whether a template writes it; or with a whole text of the
    same length, to see whether it writes that to its end."""

    def probe(row: int, column: int, kind: str, piece: Text) -> Part:
        if kind != "text" or not piece:
            return kind, piece
        head, end = _words(row, column, len(piece) if whole else 0)
        return kind, person(head + "z" * (len(piece) - len(head) - len(end)) * whole + end)

    return [
        (role, [probe(row, column, kind, piece) for column, (kind, piece) in enumerate(parts)])
        for row, (role, parts) in enumerate(spoken)
    ]


def _words(row: int, column: int, length: int) -> tuple[str, str]:
    """What the probe of a text begins and ends with."""
    head, end = _PROBE.format(row, column), _END.format(row, column)
    return (head, end) if length > 2 * len(head) else (head, "")


def _missing(text: Text, spoken: list[tuple[str, list[Part]]], whole: bool) -> list[str]:
    """What of the messages is not in a text: every word must be there, and every medium once and in order."""
    found, missing = plain(text).casefold(), []
    for row, (role, parts) in enumerate(spoken):
        for column, (kind, piece) in enumerate(parts):
            words = _words(row, column, len(piece) if whole else 0) if kind == "text" and piece else ()
            if not all(word in found for word in words):
                missing.append(f"the text of message {row + 1} ({role}), {plain(piece)[:60]!r}, is not written whole")
    media = [number for _, parts in spoken for _, piece in parts for number in media_in(piece)]
    if media_in(text) != media:
        missing.append(f"media {[one + 1 for one in media_in(text)][:8]} are written where {len(media)} were given")
    # a list of parts that was written as Python or JSON has it
    return missing + ["the content's parts are written as a list" for _ in _DUMPED.findall(found)[:1]]


Form = Callable[[list[Part]], Any]


def _all_forms(spoken: list[tuple[str, list[Part]]]) -> Iterator[Callable[[str], Form]]:
    """The ways to give a template each role's content, one after the other: the same for all of them, and then every mixture of
    text for some and parts for the rest."""
    for form in (_as_text, _as_parts, _as_text_parts):
        yield functools.partial(_same, form)
    # roles that templates do not know share one form, so that there are few mixtures
    known = [role for role in ("system", "assistant", "user") if any(role == own for own, _ in spoken)]
    known += ["other"] if any(own not in known for own, _ in spoken) else []
    for count in range(len(known) - 1, 0, -1):
        for texts in itertools.combinations(known, count):
            yield functools.partial(_mixed, texts, known)


def _same(form: Form, role: str) -> Form:
    return form


def _mixed(texts: Sequence[str], known: Sequence[str], role: str) -> Form:
    """Text for the roles in `texts`, parts for the rest."""
    return _as_text if (role if role in known else "other") in texts else _as_parts


def _as_text(parts: list[Part]) -> Text:
    return concatenate(piece for _, piece in parts)


def _as_parts(parts: list[Part]) -> list[dict[str, Any]]:
    return [{"type": trusted(k)} | ({"text": piece} if k == "text" else {}) for k, piece in parts]


def _as_text_parts(parts: list[Part]) -> list[dict[str, Any]]:
    return [{"type": trusted("text"), "text": piece} for _, piece in parts]


def _with_media(text: Text) -> Text:
    """The positions of media where a template wrote its own marks for them."""
    if not any(mark in text for mark in _MARKS):
        return text
    pieces, at, count = [], 0, 0
    for found in _MEDIUM.finditer(text):
        if set(origin_of(text)[found.start() : found.end()]) == {TRUSTED}:
            pieces += [text[at : found.start()], medium(count)]
            at, count = found.end(), count + 1
    return concatenate([*pieces, text[at:]])


# -- files --------------------------------------------------------------------------------------------------------------


def _template(folder: pathlib.Path) -> tuple[str | None, str]:
    """The chat template and the file that it is of: of a file of its own, or of tokenizer_config.json; of several the one called
    "default", or the only one."""
    file = folder / TEMPLATE
    if file.is_file():
        return _text(file), str(file)
    named = {path.stem: (_text(path), str(path)) for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    for name in ("chat_template.json", CONFIG):
        file = folder / name
        found = read_object(file).get("chat_template")
        if isinstance(found, list):
            if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in found):
                raise CheckpointError(f"{file}: a list of chat templates must hold objects with a name and a template")
            found = {entry["name"]: entry.get("template") for entry in found}
        if isinstance(found, str):
            found = {"default": found}
        if not isinstance(found, dict | None) or not all(isinstance(held, str) for held in (found or {}).values()):
            raise CheckpointError(f"{file}: its chat template is not text but {type(found).__name__}")
        named = {**{key: (held, str(file)) for key, held in (found or {}).items()}, **named}
    if "default" not in named and len(named) > 1:
        told = ", ".join(map(str, named))
        raise CheckpointError(f"{folder} has several chat templates ({told}) and none of them is called default")
    return named.get("default") or next(iter(named.values()), (None, ""))


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 text: {error}") from error
