"""Chat templates of checkpoints, which strangers wrote: Jinja's sandbox with bounded operators, filters and loops.

Every text in a rendering is a `Text` (hybridvlm/tokenizers/text.py): the template's own characters are trusted, whatever comes from
a message is a person's. A template may do what chat templates do, with the filters, functions and methods listed here, and is
ended with a ValueError where it takes more than a few seconds, steps or characters.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, operators
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, SecurityError
from jinja2.utils import Namespace

from hybridvlm.tokenizers.template_filters import (
    JINJA,
    LONGEST,
    OWN,
    bounded_filter,
    bounded_test,
    joined_filter,
    not_offered,
)
from hybridvlm.tokenizers.template_limits import (
    BITS,
    ELEMENTS,
    FILL,
    SOURCE,
    Budget,
    Counted,
    TooMuch,
    admit,
    budget,
    check_values,
    small,
    weigh,
    written,
)
from hybridvlm.tokenizers.text import LIMIT, Text, concatenate, plain, trusted

_METHODS: dict[type | tuple[type, ...], tuple[str, ...]] = {
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


def render(source: str, variables: Mapping[str, Any]) -> Text:
    """What a template makes of variables. Any exception is the template's; those of `TooMuch` are ours."""
    token = budget.set(Budget())
    try:
        rendered = _compiled(source).render(dict(variables))
        assert isinstance(rendered, Text)  # as `_Environment.concat` makes it
        return rendered
    finally:
        budget.reset(token)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > SOURCE:
        raise TooMuch(f"it has {len(source)} characters; at most {SOURCE}")
    return _environment().from_string(source)


# -- the language -------------------------------------------------------------------------------------------------------


class _Generator(CodeGenerator):
    """Puts the environment's bounded functions into the code of a template."""

    def visit_Const(self, node: nodes.Const, frame: Any) -> None:
        if isinstance(node.value, str):
            self.write(f"environment.literal({node.value!r})")
        elif node.value == float("inf"):
            self.write("1e999")  # which Python would write as a name
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        self.write("(environment.checked(")
        self.visit(node.expr, frame)
        self.write(")")
        for operand in node.ops:
            self.write(f" {operators[operand.op]} environment.checked(")
            self.visit(operand.expr, frame)
            self.write(")")
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._admitted(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

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
            spec = spec or ""
            budget.get().spend()
            pieces.append(form[start : start + len(literal)])
            start += len(literal)
            if name is None:
                start += literal.endswith(("{", "}"))  # a doubled brace, of which the literal has one
                continue
            start = str.index(form, "}", start + len(name) + len(spec or "")) + 1
            if not name or name[0] in ".[":
                name, automatic = f"{automatic}{name}", automatic + 1
            if len(spec or "") > FILL or "{" in (spec or ""):
                raise SecurityError("a format within a format" if "{" in spec else "a format that is too long")
            value = admit(self.get_field(name, values, named)[0])
            if conversion not in (None, "s"):
                value = admit(self.convert_field(value, conversion))
            if spec:
                digits = "".join(letter if letter.isdigit() else " " for letter in spec).split()
                small(*map(int, digits))
                pieces.append(format(plain(value) if isinstance(value, str) else value, spec))
            else:
                pieces.append(written(value))
        return concatenate(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    literal = staticmethod(functools.lru_cache(maxsize=1024)(trusted))
    admit, written, counted = staticmethod(admit), staticmethod(written), staticmethod(Counted)

    @staticmethod
    def checked(value: Any) -> Any:
        check_values(value)
        return value

    def joined(self, parts: Iterable[Any]) -> Text:
        """Values one after the other, as `~` has them."""
        return admit(concatenate(map(written, parts)))

    def concat(self, pieces: Iterable[str]) -> Text:
        return admit(concatenate(pieces))

    def call(__self, __context: Any, __function: Any, *args: Any, **kwargs: Any) -> Any:
        check_values(getattr(__function, "__self__", None), *args, *kwargs.values())
        if isinstance(getattr(__function, "__self__", None), str | list | tuple):
            small(*args, *kwargs.values())
            args = tuple(Text(value) if type(value) is str else value for value in args)
        return admit(super().call(__context, __function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_values(left, right)
        left, right = (Text(value) if type(value) is str else value for value in (left, right))
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    if len(many) * times > (LIMIT if isinstance(many, str) else ELEMENTS):
                        raise TooMuch(f"it repeats {len(many)} elements {str(times)[:20]} times")
                    return admit(many * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if abs(left) > 1 and right * left.bit_length() > 2 * BITS:
                raise TooMuch(f"it raises a number to the power of {str(right)[:20]}")
        elif operator == "%" and isinstance(left, str):
            weigh(right)
        return admit(super().call_binop(context, operator, left, right))

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
        Namespace.__setitem__(self, name, admit(value))


def _public(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {str(name)[:40]!r}")


# -- functions ------------------------------------------------------------------------------------------------------------


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
    jinjas = {
        name: bounded_filter(own[name], skip=int(hasattr(own[name], "jinja_pass_arg")), letters=letters)
        for letters, names in JINJA.items()
        for name in names
    }
    environment.filters = {
        **{name: not_offered(name) for name in own},
        **{name: bounded_filter(function, letters=LONGEST.get(name, LIMIT)) for name, function in OWN.items()},
        **jinjas,
        "join": bounded_filter(joined_filter, skip=1),
    }
    # Jinja leaves the values of its tables without a type
    tests: dict[str, Any] = {**environment.tests}
    environment.tests = {
        name: function if hasattr(function, "jinja_pass_arg") else bounded_test(function)
        for name, function in tests.items()
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
