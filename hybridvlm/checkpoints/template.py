"""Chat templates of checkpoints, which strangers wrote: Jinja's sandbox with bounded operators, filters and loops.

Every text in a rendering is a `Text` (hybridvlm/models/text.py): the template's own characters are trusted, whatever comes from
a message is a person's. A template may do what chat templates do, with the filters, functions and methods listed here, and is
ended with a ValueError where it takes more than a few seconds, steps or characters.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import filters, nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, SecurityError
from jinja2.utils import Namespace

from hybridvlm.models.text import LIMIT, Text, concatenate, person, plain, trusted

SOURCE = 1 << 17  # characters of a template
SECONDS = 5.0  # of processor time, of this thread alone
STEPS = 1 << 21  # passes of loops, calls, operators
CHARACTERS = 1 << 26  # of all texts that are made
WEIGHT, DEPTH = (
    1 << 21,
    64,
)  # elements and characters in a list or mapping, with all that it holds, and how deep it goes
BITS = 4096  # of a whole number
ARGUMENT = 1 << 16  # a number that a filter or a text's method is given

_METHODS = {
    str: (
        *("capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha"),
        *("isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace"),
        *("istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix"),
        *("replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines"),
        *("startswith", "strip", "swapcase", "title", "upper", "zfill"),
    ),
    dict: ("copy", "get", "items", "keys", "values"),
    list: ("copy", "count", "index"),
    tuple: ("count", "index"),
    range: ("count", "index"),
    (int, float, complex, bytes): (),
}


class TooMuch(ValueError):
    """A template takes more than a chat template needs."""


class _Budget:
    """What one rendering may still take."""

    def __init__(self) -> None:
        self.steps, self.characters, self.end = STEPS, CHARACTERS, time.thread_time() + SECONDS

    def spend(self, steps: int = 1, characters: int = 0) -> None:
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0:
            raise TooMuch(f"it takes more than {STEPS} steps")
        if self.characters < 0:
            raise TooMuch(f"it writes more than {CHARACTERS} characters")
        if (not self.steps & 63 or characters > 4096 or steps > 64) and time.thread_time() > self.end:
            raise TooMuch(f"it takes more than {SECONDS:g} seconds")


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


def render(source: str, variables: Mapping[str, Any]) -> Text:
    """What a template makes of variables. Any exception is the template's; those of `TooMuch` are ours."""
    token = _budget.set(_Budget())
    try:
        return _compiled(source).render(dict(variables))
    finally:
        _budget.reset(token)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > SOURCE:
        raise TooMuch(f"it has {len(source)} characters; at most {SOURCE}")
    return _environment().from_string(source)


# -- bounds -------------------------------------------------------------------------------------------------------------


def _admit(value: Any) -> Any:
    """A value that an operation made, if it is not too large; plain strings become a person's text, iterators lists."""
    if isinstance(value, str):
        _budget.get().spend(characters=len(value))
        return value if isinstance(value, Text) else Text(value)
    if isinstance(value, int):
        if value.bit_length() > BITS:
            raise TooMuch(f"it makes a number of {value.bit_length()} bits; at most {BITS}")
    elif isinstance(value, list | tuple | dict | range | Namespace):
        _weigh(value)
    elif isinstance(value, Iterator):
        return _admit(list(_iterate(value)))
    return value


def _weigh(value: Any) -> None:
    """Refuse what is too large or too deep when it is written out: a list that holds one list twice counts it twice."""
    weight, seen, stack = 0, 0, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        weight, seen = weight + 1, seen + 1
        if isinstance(item, str | range):
            weight += len(item)
        elif isinstance(item, list | tuple):
            weight += len(item)
            stack += [(inner, depth + 1) for inner in item] if weight <= WEIGHT else []
        elif isinstance(item, dict | Namespace):
            held = item if isinstance(item, dict) else item._Namespace__attrs
            weight += len(held)
            stack += [(inner, depth + 1) for pair in held.items() for inner in pair] if weight <= WEIGHT else []
        if weight > WEIGHT or depth > DEPTH:
            raise TooMuch(
                f"it makes a list or mapping of more than {WEIGHT} elements and characters, or {DEPTH} levels"
            )
    _budget.get().spend(1 + seen // 8)


def _iterate(values: Iterable[Any]) -> Iterator[Any]:
    spend = _budget.get().spend
    for value in values:
        spend()
        yield Text(value) if type(value) is str else value


class _Counted:
    """What a loop goes over, each pass of which is counted."""

    def __init__(self, values: Any):
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return _iterate(self.values)

    def __len__(self) -> int:  # TypeError where the values have none, and Jinja then counts them itself
        return len(self.values)


def _small(*values: Any) -> None:
    for value in values:
        if isinstance(value, int | float) and abs(value) > ARGUMENT:
            raise TooMuch(f"a filter or method is given {str(value)[:20]}; at most {ARGUMENT}")


def _written(value: Any) -> Text:
    """A value as output has it."""
    if isinstance(value, str):
        return value if isinstance(value, Text) else Text(value)
    if isinstance(value, Namespace):
        raise SecurityError("a namespace cannot be written")
    if isinstance(value, list | tuple | dict | range):
        _weigh(value)
    return _admit(str(value))


# -- the language -------------------------------------------------------------------------------------------------------


class _Generator(CodeGenerator):
    """Puts the environment's bounded functions into the code of a template."""

    def visit_Const(self, node: nodes.Const, frame: Any) -> None:
        if isinstance(node.value, str):
            self.write(f"environment.literal({node.value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        counted = nodes.EnvironmentAttribute("counted", lineno=node.lineno)
        node.iter = nodes.Call(counted, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._admitted(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._admitted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._admitted(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _admitted(self, visit: Callable[..., None], node: nodes.Expr, frame: Any) -> None:
        self.write("environment.admit(")
        visit(node, frame)
        self.write(")")

    # The hooks by which Jinja's own NativeEnvironment changes what output is
    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.literal({''.join(map(str, group))!r})"

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible()
        return node.data

    def _output_child_pre(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
        self.write("environment.written(")

    def _output_child_post(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
        self.write(")")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the answers for training; in a prompt its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Formatter(SandboxedFormatter):
    """`str.format` into a Text."""

    def vformat(self, form: str, values: Any, named: Any) -> Text:
        pieces: list[str] = []
        start, automatic = 0, 0
        form = Text(form)
        for literal, name, spec, conversion in self.parse(plain(form)):
            # a literal's doubled braces are one character of it
            for letter in literal:
                start = str.index(form, letter, start)
                pieces.append(form[start : start + 1])
                start += 2 if letter in "{}" else 1
            if name is None:
                continue
            start = str.index(form, "}", start + len(name) + len(spec or "")) + 1
            if not name or name[0] in ".[":
                name, automatic = f"{automatic}{name}", automatic + 1
            if "{" in (spec or ""):
                raise SecurityError("a format within a format")
            value = _admit(self.get_field(name, values, named)[0])
            if conversion not in (None, "s"):
                value = self.convert_field(value, conversion)
            if spec:
                digits = "".join(letter if letter.isdigit() else " " for letter in spec).split()
                _small(*map(int, digits))
                pieces.append(format(plain(value) if isinstance(value, str) else value, spec))
            else:
                pieces.append(_written(value))
        return concatenate(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    literal = staticmethod(functools.lru_cache(maxsize=1024)(trusted))
    admit, written, counted = staticmethod(_admit), staticmethod(_written), staticmethod(_Counted)

    def joined(self, parts: Iterable[Any]) -> Text:
        """Values one after the other, as `~` has them."""
        return _admit(concatenate(map(_written, parts)))

    def concat(self, pieces: Iterable[str]) -> Text:
        return _admit(concatenate(pieces))

    def call(__self, __context: Any, __function: Any, *args: Any, **kwargs: Any) -> Any:
        _budget.get().spend()
        if isinstance(getattr(__function, "__self__", None), str | list | tuple):
            _small(*args, *kwargs.values())
            args = tuple(Text(value) if type(value) is str else value for value in args)
        return _admit(super().call(__context, __function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _budget.get().spend()
        left, right = (Text(value) if type(value) is str else value for value in (left, right))
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    if len(many) * times > (LIMIT if isinstance(many, str) else WEIGHT):
                        raise TooMuch(f"it repeats {len(many)} elements {str(times)[:20]} times")
                    return _admit(many * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if abs(left) > 1 and right > BITS:
                raise TooMuch(f"it raises a number to the power of {str(right)[:20]}")
        elif operator == "%" and isinstance(left, str):
            _weigh(right)
        return _admit(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._given(super().getattr(Text(obj) if type(obj) is str else obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._given(super().getitem(Text(obj) if type(obj) is str else obj, argument))

    @staticmethod
    def _given(value: Any) -> Any:
        return Text(value) if type(value) is str else value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return next((attr in names for kind, names in _METHODS.items() if isinstance(obj, kind)), True)

    def wrap_str_format(self, value: Any) -> Callable[..., Text] | None:
        if getattr(value, "__name__", "") not in ("format", "format_map"):
            return None
        form = getattr(value, "__self__", None)
        if not isinstance(form, str):
            return None
        if value.__name__ == "format_map":
            return lambda mapping: _Formatter(self).vformat(form, (), mapping)
        return lambda *values, **named: _Formatter(self).vformat(form, values, named)


class _Namespace(Namespace):
    """Without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            _public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        Namespace.__setitem__(self, name, _admit(value))


def _public(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {str(name)[:40]!r}")


# -- filters and functions ----------------------------------------------------------------------------------------------


def _bounded(function: Callable[..., Any], *, skip: int = 0) -> Callable[..., Any]:
    """A filter with its arguments and its result bounded; `skip` arguments are Jinja's own."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _budget.get().spend()
        value = args[skip] if len(args) > skip else None
        if isinstance(value, Iterator | range | _Counted):
            value = list(_iterate(value))
        _small(*args[skip + 1 :], *kwargs.values())
        if isinstance(value, str | list | tuple | dict):
            _budget.get().spend(1 + len(value) // 64)
        if len(args) > skip:
            args = (*args[:skip], Text(value) if type(value) is str else value, *args[skip + 1 :])
        return _admit(function(*args, **kwargs))

    return run


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > 300:
        raise TooMuch(f"round to {precision} places")
    return filters.do_round(value, precision, method)


def _join(value: Iterable[Any], d: str = "", attribute: Any = None, *, get: Callable[[Any], Any]) -> Text:
    return _written(d).join([_written(item if attribute is None else get(item)) for item in value])


@jinja2.pass_environment
def _joined(environment: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> Text:
    get = filters.make_attrgetter(environment, attribute) if attribute is not None else lambda item: item
    return _join(value, d, attribute, get=get)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Text:
    space = _written(width) if isinstance(width, str) else trusted(" ") * width
    lines = concatenate((_written(value), trusted("\n"))).splitlines()
    rest = [line if not line and not blank else concatenate((space, line)) for line in lines[1:]]
    head = concatenate((space, lines[0])) if first else lines[0]
    return trusted("\n").join([head, *rest])


def _truncate(value: Any, length: int = 255, killwords: bool = False, end: str = "...", leeway: int = 5) -> Text:
    text, end = _written(value), _written(end)
    if len(text) <= length + leeway:
        return text
    short = text[: max(0, length - len(end))]
    return concatenate((short if killwords else short.rsplit(" ", 1)[0], end))


def _wordwrap(value: Any, width: int = 79, **options: Any) -> str:
    if len(value) > ARGUMENT:
        raise TooMuch(f"wordwrap of {len(value)} characters")
    return filters.do_wordwrap(jinja2.Environment(), plain(_written(value)), width, **options)


def _escape(value: Any) -> Text:
    text = _written(value)
    for old, new in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&#39;"), ('"', "&#34;")):
        text = text.replace(old, new)
    return text


def _sum(value: Iterable[Any], start: Any = 0) -> Any:
    for item in value:
        if not isinstance(item, int | float):
            raise TypeError(f"sum takes numbers, got {type(item).__name__}")
        start = _admit(start + item)
    return start


def _format(value: Any, *args: Any, **kwargs: Any) -> Text:
    _weigh(kwargs or args)
    return _written(value) % (kwargs or args)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > 64:
        raise TooMuch(f"tojson with an indent of {indent}")
    _weigh(value)
    return person(
        json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )


_OWN = {
    "capitalize": lambda value: _written(value).capitalize(),
    "center": lambda value, width=80: _written(value).center(width),
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "indent": _indent,
    "lower": lambda value: _written(value).lower(),
    "replace": lambda value, old, new, count=None: _written(value).replace(
        _written(old), _written(new), -1 if count is None else count
    ),
    "round": _round,
    "safe": lambda value: value,
    "string": _written,
    "sum": _sum,
    "title": lambda value: _written(value)._mapped(filters.do_title),
    "tojson": _tojson,
    "trim": lambda value, chars=None: _written(value).strip(chars),
    "truncate": _truncate,
    "upper": lambda value: _written(value).upper(),
    "wordwrap": _wordwrap,
}
# Jinja's own that do nothing but choose and order
_JINJA = (
    *("abs", "batch", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last"),
    *("length", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "slice"),
    *("sort", "unique", "wordcount"),
)


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(str(message)[:500])


def _strftime(form: str) -> str:
    if len(form) > 200:
        raise TooMuch("strftime_now with a format of more than 200 characters")
    return datetime.datetime.now().strftime(plain(form))


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    own = environment.filters
    jinjas = {name: _bounded(own[name], skip=int(hasattr(own[name], "jinja_pass_arg"))) for name in _JINJA}
    environment.filters = {
        **{name: _bounded(function) for name, function in _OWN.items()},
        **jinjas,
        "join": _bounded(_joined, skip=1),
    }
    ranged = environment.globals["range"]
    environment.globals = {
        "range": ranged,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
        "cycler": environment.globals["cycler"],
        "joiner": environment.globals["joiner"],
        "raise_exception": _refuse,
        "strftime_now": _strftime,
    }
    return environment
