"""The special tokens of a checkpoint, which up to four files name, and a tokenizer that knows none of them in what people write."""

from __future__ import annotations

import json
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybridvlm.errors import CheckpointError
from hybridvlm.files import parse_json
from hybridvlm.tokenizers.messages import ROLES
from hybridvlm.tokenizers.text import TRUSTED, origin_of, plain
from hybridvlm.tokenizers.word_level import library_faults

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_GAP = 1 << 16  # ids that may lie free before an added token's
_MARKUP = re.compile(r"\s*(<.+>|\[.+\])\s*", re.DOTALL)
_PRIVATE = (0xF0000, 0xFFFFD, 0x100000, 0x10FFFD)  # the two private planes of Unicode


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file's object, {} if there is none; CheckpointError for anything else."""
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, it holds {type(found).__name__}")
    return found


def read_tokenizer(folder: pathlib.Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a folder with every added token that its files name, and the named ones: bos_token and so on.

    CheckpointError where the files contradict each other.
    """
    from tokenizers import AddedToken, Tokenizer

    file = folder / TOKENIZER
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {TOKENIZER}")
    raw = read_object(file)
    special, also = _named(folder)
    try:
        own = [dict(entry) for entry in raw.get("added_tokens") or ()]
        held = {entry["content"]: entry for entry in own}
        added, decoder = _added(folder, {*special.values(), *also}), _decoder(folder)
        for one, other in ((held, added), (held, decoder), (added, decoder)):
            _agree(folder, one, other)
        more = {**added, **decoder}
        missing = {token: entry for token, entry in more.items() if token not in held}
        with library_faults(file):
            probe = Tokenizer.from_str(json.dumps(raw | {"added_tokens": []})) if missing else None
        if probe is not None:
            raw["added_tokens"] = _merged(folder, own, missing, probe.get_vocab(), len(probe.get_vocab()))
        text = json.dumps(raw, ensure_ascii=False) if probe is not None else file.read_text(encoding="utf-8-sig")
        with library_faults(file):
            tokenizer = Tokenizer.from_str(text)
        for entry in raw.get("added_tokens") or ():
            if tokenizer.token_to_id(entry["content"]) != entry["id"]:
                raise CheckpointError(
                    f"{file}: the added token {entry['content']!r} should have the id {entry['id']}, and its position gives it "
                    f"{tokenizer.token_to_id(entry['content'])}; ids of added tokens must follow one another"
                )
    except CheckpointError:
        raise
    except Exception as error:  # whatever a stranger's file may hold
        raise CheckpointError(f"{file} is not a tokenizer: {str(error)[:400] or type(error).__name__}") from error
    # named tokens of the model's own vocabulary, which the file does not list as added: marks, and no ordinary "!" of a text
    listed = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    bare = [token for token in dict.fromkeys([*special.values(), *also]) if token not in listed]
    bare = [token for token in bare if _MARKUP.fullmatch(token) and tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in bare])
    for name, token in special.items():
        if tokenizer.token_to_id(token) is None:
            warnings.warn(
                f"{folder}: its {name} {token!r} is no token of {file.name}; where the chat template writes it, it is "
                f"ordinary text",
                stacklevel=2,
            )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, special


def _agree(folder: pathlib.Path, one: Mapping[str, dict], other: Mapping[str, dict]) -> None:
    """CheckpointError for a token that two files give different ids."""
    for token in one.keys() & other.keys():
        if one[token]["id"] != other[token]["id"]:
            told = (f"{entry['id']} in {entry.get('file', TOKENIZER)}" for entry in (one[token], other[token]))
            raise CheckpointError(f"{folder}: {token!r} has the id {' and '.join(told)}")


def _named(folder: pathlib.Path) -> tuple[dict[str, str], list[str]]:
    """bos_token and so on by their names, of tokenizer_config.json before special_tokens_map.json; and those without a name."""
    special: dict[str, str] = {}
    also: list[str] = []
    for file in (CONFIG, MAP):
        found = read_object(folder / file)
        for name in NAMES:
            if found.get(name) is not None:
                special.setdefault(name, _content(found[name], f"{folder / file}: {name}"))
        for name in LISTS:
            held = found.get(name) or []
            if not isinstance(held, list | dict):
                raise CheckpointError(f"{folder / file}: {name} must be a list of tokens, got {str(held)[:60]!r}")
            for token in held.values() if isinstance(held, dict) else held:
                also.append(_content(token, f"{folder / file}: {name}"))
    return special, also


def _content(token: Any, where: str) -> str:
    found = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(found, str):
        raise CheckpointError(f"{where} must be a text, or an object with a content, got {str(token)[:60]}")
    return found


def _decoder(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """added_tokens_decoder of tokenizer_config.json: content -> entry as tokenizer.json has it."""
    found, out = read_object(folder / CONFIG).get("added_tokens_decoder") or {}, {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / CONFIG}: added_tokens_decoder must map ids to tokens")
    for number, token in found.items():
        content = _content(token, f"{folder / CONFIG}: added_tokens_decoder[{number}]")
        flags = token if isinstance(token, Mapping) else {"special": True}
        out[content] = _entry(folder, number, content, flags, CONFIG)
    return out


def _added(folder: pathlib.Path, special: set[str]) -> dict[str, dict[str, Any]]:
    """added_tokens.json: content -> entry as tokenizer.json has it."""
    return {
        token: _entry(folder, number, token, {"special": token in special}, ADDED)
        for token, number in read_object(folder / ADDED).items()
    }


def _entry(folder: pathlib.Path, number: Any, content: str, flags: Mapping[str, Any], file: str) -> dict[str, Any]:
    if (not isinstance(number, int) and not (isinstance(number, str) and number.isdecimal())) or not content:
        raise CheckpointError(f"{folder / file}: the token {content!r} has the id {str(number)[:40]!r}, not a number")
    return {"id": int(number), "content": content, **{n: bool(flags.get(n, False)) for n in _FLAGS}, "file": file}


def _merged(
    folder: pathlib.Path, own: list[dict], missing: dict[str, dict], vocabulary: Mapping[str, int], size: int
) -> list[dict[str, Any]]:
    """All added tokens by their ids. The library numbers what is not in the model's vocabulary one by one after it, so that
    ids which nothing takes are filled."""
    entries = sorted([*own, *missing.values()], key=lambda entry: entry["id"])
    named: dict[int, str] = {number: token for token, number in vocabulary.items()}
    for entry in entries:
        token, number = entry["content"], entry["id"]
        if vocabulary.get(token, number) != number or named.setdefault(number, token) != token:
            raise CheckpointError(
                f"{folder / entry.get('file', TOKENIZER)} gives {token!r} the id {number}, which "
                + (
                    f"{TOKENIZER} has as {vocabulary[token]}"
                    if token in vocabulary
                    else f"is that of {named[number]!r}"
                )
            )
    out, next_id = [], size
    for entry in entries:
        if entry["content"] not in vocabulary:
            if entry["id"] - next_id > _GAP:
                raise CheckpointError(
                    f"{folder}: {entry['content']!r} has the id {entry['id']}, with nothing from {next_id} on"
                )
            for free in range(next_id, entry["id"]):
                out.append({"id": free, "content": f"\U000f0000{free}\U000f0001", **dict.fromkeys(_FLAGS, False)})
            next_id = entry["id"] + 1
        out.append({name: value for name, value in entry.items() if name != "file"})
    return out


# -- what people write --------------------------------------------------------------------------------------------------


def control_tokens(tokenizer: Tokenizer, template: str | None) -> dict[int, str]:
    """The added tokens that only a template may write: the special ones, and the marks (`<think>`) that the template uses or
    may put together around a role (`'<|' + message.role + '|>'`)."""

    def used(mark: str) -> bool:
        ends = [mark.split(role, 1) for role in ROLES if role in mark]
        return template is None or mark in template or any(a in template and b in template for a, b in ends)

    return {
        number: token.content
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special or (_MARKUP.fullmatch(token.content) and used(token.content.strip()))
    }


class PlainText:
    """Encodes texts of which only the trusted characters can be control tokens.

    In a copy of the tokenizer each control token has the name of a private character, in the vocabulary too; a text's trusted
    control tokens are written with those, and what looks like one elsewhere is ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer, control: Mapping[int, str]):
        self.tokenizer, self.control = tokenizer, dict(control)
        self._unknown = getattr(tokenizer.model, "unk_token", None)
        self._copies: dict[int, Tokenizer] = {}

    def encode(self, text: str) -> list[int]:
        """Ids as the tokenizer itself gives them, where no control token comes of characters that are not trusted."""
        whole, origin = plain(text), origin_of(text)
        encoding = self.tokenizer.encode(whole, add_special_tokens=False)
        found = [at for at, number in enumerate(encoding.ids) if number in self.control]
        if not found or set(origin) <= {TRUSTED}:
            return encoding.ids
        offsets = encoding.offsets
        if not any(self._forged(encoding.ids[at], whole, origin, *offsets[at]) for at in found):
            return encoding.ids
        return self._apart(whole, origin)

    def _forged(self, number: int, whole: str, origin: str, start: int, stop: int) -> bool:
        token = self.control[number]
        at = whole.find(token, start, stop)
        if at < 0 and token == self._unknown:  # an unknown word
            return False
        if at >= 0:
            start, stop = at, at + len(token)
        return set(origin[start:stop]) != {TRUSTED}

    def _apart(self, whole: str, origin: str) -> list[int]:
        base = _base(whole, len(self.control))
        if base not in self._copies:
            self._copies = {base: self._copy(base)}  # texts that hold the usual private characters are rare
        stand_in = {number: chr(base + at) for at, number in enumerate(self.control)}
        pieces, meant = [], []
        for run in re.finditer(rf"{TRUSTED}+|[^{TRUSTED}]+", origin):
            piece = whole[run.start() : run.end()]
            if origin[run.start()] != TRUSTED:
                pieces.append(piece)
                continue
            encoding, at = self.tokenizer.encode(piece, add_special_tokens=False), 0
            for number, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                if number in self.control:
                    own = piece.find(self.control[number], start, stop)
                    if own < 0:
                        continue
                    pieces += [piece[at:own], stand_in[number]]
                    at = own + len(self.control[number])
                    meant.append(number)
            pieces.append(piece[at:])
        ids = self._copies[base].encode("".join(pieces), add_special_tokens=False).ids
        unknown = self.tokenizer.token_to_id(self._unknown) if self._unknown else None
        if [n for n in ids if n in self.control and n != unknown] != [n for n in meant if n != unknown]:
            raise ValueError("a control token in a text cannot be told from ordinary text by this tokenizer")
        return ids

    def _copy(self, base: int) -> Tokenizer:
        from tokenizers import Tokenizer

        raw = json.loads(self.tokenizer.to_str())
        renamed = {token: chr(base + at) for at, token in enumerate(self.control.values())}
        for entry in raw["added_tokens"]:
            if entry["content"] in renamed:
                entry |= {"content": renamed[entry["content"]], "normalized": False, "single_word": False}
        model = raw["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {renamed.get(token, token): number for token, number in model["vocab"].items()}
        else:
            model["vocab"] = [[renamed.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in renamed:
            model["unk_token"] = renamed[model["unk_token"]]
        if model.get("merges"):
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [
                merge
                for merge, pair in zip(model["merges"], pairs, strict=True)
                if not {*pair, "".join(pair)} & renamed.keys()
            ]
        raw["post_processor"] = None
        copy = Tokenizer.from_str(json.dumps(raw, ensure_ascii=False))
        moved = [n for n, token in self.control.items() if copy.token_to_id(renamed[token]) != n]
        if moved:
            raise CheckpointError(f"{TOKENIZER}: the ids {moved[:4]} of its added tokens do not follow one another")
        return copy


def _base(text: str, count: int) -> int:
    """The first of `count` private characters in a row that a text has none of."""
    used = sorted({ord(letter) for letter in text if ord(letter) >= _PRIVATE[0]})
    for first, last in (_PRIVATE[:2], _PRIVATE[2:]):
        start = first + 16  # after those that stand for free ids
        for taken in [*used, last + 1]:
            if start <= taken <= last + 1:
                if taken - start >= count:
                    return start
                start = taken + 1
    raise ValueError("a text holds too many private characters of Unicode to be encoded")
