"""Chat templates: what people publish renders, what strangers might send is ended, and nothing of a conversation is left out."""

import json
import subprocess
import sys

import numpy as np
import pytest

from hybridvlm.checkpoints import samples
from hybridvlm.models import qwen_vl
from hybridvlm.models.family import family_of
from hybridvlm.models.media import Clip
from hybridvlm.models.prompt import PromptStyle, render, user_message
from hybridvlm.tokenizers import template
from hybridvlm.tokenizers.published import PublishedTokenizer
from hybridvlm.tokenizers.text import Text, cut_at_media, medium, origin_of, person, plain, trusted


def loop(content):
    """A template that writes `content` for each message m."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        + content
        + "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )


WALKS = {  # templates that read a message's content in parts
    "text alone": loop("{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"),
    "all parts": loop(
        "{% for p in m['content'] %}{% if p['type'] == 'video' or 'video' in p %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% elif p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif 'text' in p %}{{ p['text'] | trim }}{% endif %}{% endfor %}"
    ),
    "either": loop(
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ p.text }}{% endfor %}{% endif %}"
    ),
    "a macro": "{% macro show(content) %}{% for p in content %}{{ p.text if p.text is defined else '<|video_pad|>' }}"
    "{% endfor %}{% endmacro %}" + loop("{{ show(m.content) }}"),
    "first part": loop("{{ m.content[0].text }}"),
}
STRING = loop("{{ m.content }}")
CONTENT = "{{ messages[0].content }}"


def chat(text, content="hi", **options):
    """A template that writes the message after what is looked at, which comes back without it."""
    made = PublishedTokenizer(None, text + "|{{ messages[0].content }}").chat(
        [{"role": "user", "content": content}], **options
    )
    assert made.endswith(f"|{content}")
    return made[: -len(content) - 1]


@pytest.mark.parametrize("name", WALKS)
def test_templates_that_walk_content_parts(name):
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And?"},
    ]
    assert PublishedTokenizer(None, WALKS[name]).chat(messages) == PublishedTokenizer(None, STRING).chat(messages)
    if name == "first part":
        with pytest.raises(ValueError, match="leaves out a text or a medium"):
            render(PublishedTokenizer(None, WALKS[name]), [user_message("Why?", PromptStyle())], "")
        return
    for kind in ("video", "image"):
        asked = [user_message("Why?", PromptStyle(), [kind]), *messages[1:]]
        if name != "a macro" or kind == "video":
            found = render(PublishedTokenizer(None, WALKS[name]), asked, "")
            assert found == render(PublishedTokenizer(None, STRING), asked, "")
            assert [part for part in found if isinstance(part, int)] == [0]


def test_a_template_that_leaves_something_out_is_refused():
    for text in ("{{ bos_token }}", loop(""), loop("{{ m.content[:3] }}"), "{{ messages[-1].content }}"):
        with pytest.raises(ValueError, match="leaves out a text or a medium"):
            PublishedTokenizer(None, text).chat(
                [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why not?"}]
            )
    twice = [user_message("Why?", PromptStyle(), ["video"])]
    with pytest.raises(ValueError, match="repeats a medium"):
        render(PublishedTokenizer(None, loop("{{ m.content }}{{ m.content }}")), twice, "")
    with pytest.raises(ValueError, match="only user"):  # its own words are told
        PublishedTokenizer(None, "{{ raise_exception('only user') }}").chat(twice)


def test_generation_marks_are_written_through():
    marked = loop(
        "{% if m.role == 'assistant' %}{%- generation -%}{{ m.content }}{%- endgeneration -%}"
        "{% else %}{{ m.content }}{% endif %}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert PublishedTokenizer(None, marked).chat(messages) == PublishedTokenizer(None, STRING).chat(messages)
    inner = "{% for m in messages %}{% generation %}{% set x = 1 %}{% if loop.last %}{{ m.content }}{% endif %}"
    inner += "{% endgeneration %}{% endfor %}"
    assert chat(inner + "{{ x is defined }}") == "hiFalse"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ {'b': 'ä<', 'a': [1, none, true]} | tojson }}", '{"b": "ä<", "a": [1, null, true]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        ("{{ tools is none and documents is none and add_generation_prompt }}", "True"),
        (
            "{% set n = namespace(x=[], y='') %}{% for i in 'ab' %}{% set n.x = n.x + [i] %}{% endfor %}{{ n.x | join('-') }}",
            "a-b",
        ),
        (
            "{{ '%s|%5.1f|%-3d|%%' | format('a', 2.25, 7) }}{{ '{0}{x:>3}{{}}'.format('b', x=1) }}",
            "a|  2.2|7  |%b  1{}",
        ),
        ("{{ ('a b'.split() + ['c']) | map('upper') | list | last ~ 1 ~ none }}", "C1None"),
        ("{{ 'x\ny' | indent(2, true) }}|{{ 'abc def ghi' | truncate(7, false, '…', 0) }}", "  x\n  y|abc…"),
        ("{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call f('z') %}!{% endcall %}", "z2!"),
        (
            "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}{{ x }}{% endif %}{% endfor %}",
            "123",
        ),
        ("{% set t %}a{{ 1 + 2 * 3 ** 2 }}{% endset %}{{ t | trim | replace('a', 'b') }}{{ t[::-1] }}", "b1991a"),
        (
            "{{ 7 // 2 }}{{ 7 % 4 }}{{ 'ab' * 2 }}{{ -1 | abs }}{{ 2.5 | round | int }}{{ '3' | int + 1 }}",
            "33abab1" + "2" + "4",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ ({'a': {'b': 2}}).a.get('b') }}", "a12"),
        (
            "{{ messages | map(attribute='content') | join | upper | title }}{{ messages[0]['role'].startswith('us') }}",
            "HiTrue",
        ),
    ],
)
def test_the_language_of_templates(text, want):
    assert chat(text) == want


BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 8) }}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ 'x' | center(10 ** 9) }}{{ 'x'.center(10 ** 9) }}",
    "{{ 'x'.ljust(10 ** 10) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' | format(10 ** 9, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{0:{1}}'.format(1, 10 ** 9) }}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x | replace('a', 'ab' * 99) %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x={}) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x=()) %}{% for i in range(9999) %}{% set n.x = (n.x,) %}{% endfor %}{{ {n.x: 1} }}",
    "{{ range(10 ** 12) | list }}",
    "{{ range(99999) | join('x' * 10 ** 6) }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ('ab' * 10 ** 6).replace('', 'x' * 10 ** 6) }}",
    "{{ '\t'.expandtabs(10 ** 10) }}",
    "{{ 'x' | indent(10 ** 9) }}{{ [1] | tojson(indent=10 ** 9) }}",
    "{{ [1] | batch(10 ** 9, 0) | list }}",
    "{{ [1] | slice(10 ** 9) | list }}",
    "{{ 5 | round(-10 ** 9) }}",
    "{{ 'x' | wordwrap(10 ** 9) }}",
    "{{ ('a' * 10 ** 7) | list | length }}",
    "{{ (10).to_bytes(10 ** 10, 'big') }}",
    "{{ lipsum(10 ** 9) }}",
    "{{ [[1] * 1000] * 100000 }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "x" * 200_000,
    "{{ self.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{% include 'x' %}",
]


@pytest.mark.parametrize("text", BOMBS, ids=lambda text: text[:40])
def test_templates_that_take_too_much_are_ended(text, monkeypatch):
    monkeypatch.setattr("hybridvlm.tokenizers.template_limits.STEPS", 1 << 16)
    tokenizer = PublishedTokenizer(None, text, source="folder/chat_template.jinja")
    with pytest.raises(ValueError, match="the chat template failed") as caught:
        tokenizer.chat([{"role": "user", "content": "hi"}])
    assert "folder/chat_template.jinja" in str(caught.value) and len(str(caught.value)) < 700


def test_long_conversations_are_not_too_much():
    texts = ["word " * 2000] * 200
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    family = family_of(samples.raw_config("nemotron_h"))
    assert PublishedTokenizer(None, family.CHAT).chat(messages).count("word") == 400_000
    assert PublishedTokenizer(None, WALKS["all parts"]).chat(messages).count("word") == 400_000


@pytest.mark.parametrize(
    "chosen",
    ["{{ ''.__class__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ [''] | map(attribute='__class__') | list }}"],
)
def test_nothing_of_python_is_reached(chosen):
    try:
        assert "class '" not in chat(chosen)
    except ValueError as error:
        assert "chat template failed" in str(error)


def test_texts_keep_their_origin():
    text = "{{ ('a' ~ messages[0].content | upper).replace('I', 'ii') | trim }}{{ '%s!' % messages[0].content[1:] }}"
    made = chat(text)
    assert (plain(made), origin_of(made)) == ("aHiii!", "tptt" + "pt")
    for expression in (
        "m.split('h')[1]",
        "(m ~ 'x').split('i')[0]",
        "['x', m] | join",
        "'{}'.format(m)",
        "m | list | first",
    ):
        made = chat("{% set m = messages[0].content %}{{ " + expression + " }}")
        assert all(
            one == ("t" if letter == "x" else "p") for letter, one in zip(plain(made), origin_of(made), strict=True)
        )
    assert cut_at_media(trusted("a") + medium(1) + person("\ufffcb")) == ["a", 1, "\ufffcb"]
    assert origin_of(Text("ß").upper()) == "pp" and isinstance("a" + trusted("b"), Text)


def test_template_options():
    text = "{% if enable_thinking is defined and not enable_thinking %}off{% else %}on{% endif %}"
    for name in ("qwen3_vl", "vamba", "nemotron_nano_vl"):
        raw = samples.raw_config(name)
        family, tokenizer = family_of(raw), PublishedTokenizer(None, text + STRING)
        tokenizer.encode = lambda piece: list(plain(piece).encode())
        config = family.config_from_hf(raw)
        asked = [user_message("hi", family.style_for(config), [])]
        for options, want in (({"enable_thinking": False, "other": 1}, b"off"), (None, b"on"), ({}, b"on")):
            ids = family.prompt(config, tokenizer, asked, [], template_options=options).ids
            assert bytes(ids.tolist()).startswith(want)
    for taken in ("messages", "add_generation_prompt", "eos_token", "bos_token"):
        with pytest.raises(ValueError, match=f"template_options may not set {taken}"):
            chat(text, template_options={taken: "x"})


def test_which_template_of_several(tmp_path):
    samples.write_text_files("qwen2_vl", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()

    def read():
        return (
            PublishedTokenizer.from_folder(tmp_path)
            .chat([{"role": "user", "content": "x"}], "family " + CONTENT)
            .removesuffix(" x")
        )

    assert read() == "family"
    config = {
        "chat_template": [
            {"name": "rag", "template": "r " + CONTENT},
            {"name": "default", "template": "of the config " + CONTENT},
        ]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read() == "of the config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of the json " + CONTENT}))
    assert read() == "of the json" or read() == "of the config"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "default.jinja").write_text("additional " + CONTENT)
    (more / "tool_use.jinja").write_text("tools")
    assert read() == "additional"
    (tmp_path / "chat_template.jinja").write_text("of its file " + CONTENT)
    assert read() == "of its file"
    tokenizer = PublishedTokenizer.from_folder(tmp_path)
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy" / "tokenizer.json")
    assert (tmp_path / "copy" / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    for file in ("chat_template.jinja", "chat_template.json", "additional_chat_templates/default.jinja"):
        (tmp_path / file).unlink()
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "r " + CONTENT}]})
    )
    with pytest.raises(ValueError, match="several chat templates"):
        read()
    (more / "tool_use.jinja").unlink()
    assert read() == "r"


def test_renderings_do_not_share_their_limits():
    for _ in range(3):
        assert len(template.render("{% for i in range(60000) %}x{% endfor %}", {})) == 60_000


def test_a_clip_of_a_parts_template_stands_where_the_string_has_it():
    config = qwen_vl.config_from_hf(samples.raw_config("qwen3_vl"))
    own = PublishedTokenizer(samples.byte_tokenizer("qwen"), WALKS["all parts"])
    other = PublishedTokenizer(samples.byte_tokenizer("qwen"), STRING)
    clip = Clip((0.0, 0.5), np.zeros((2, 32, 32, 3), np.uint8), size=(32, 32))
    asked = [user_message("Why?", qwen_vl.style_for(config), ["video"])]
    one, two = (qwen_vl.prompt(config, t, asked, [clip]) for t in (own, other))
    assert one.ids.tolist() == two.ids.tolist() and one.frame.tolist() == two.frame.tolist()


PARTS = (
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("texts", "kinds"),
    [
        (("system",), []),
        (("system",), ["video"]),
        (("system", "assistant"), ["video"]),
        (("assistant",), ["video", "image"]),
    ],
)
def test_a_template_that_takes_text_of_some_roles_and_parts_of_others(texts, kinds):
    mixed = loop("{% if m.role in " + str(list(texts)) + " %}{{ m.content }}{% else %}" + PARTS + "{% endif %}")
    asked = [
        {"role": "system", "content": "Be brief."},
        user_message("Why?", PromptStyle(), kinds),
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And?"},
    ]
    for messages in (asked, asked[1:2] if "system" not in texts else asked[:2]):
        found = PublishedTokenizer(None, mixed).chat(messages)
        assert found == PublishedTokenizer(None, STRING).chat(messages)
        assert [part for part in cut_at_media(found) if isinstance(part, int)] == list(range(len(kinds)))


def test_user_text_beside_system_parts():
    turned = loop("{% if m.role == 'user' %}{{ m.content }}{% else %}" + PARTS + "{% endif %}")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert PublishedTokenizer(None, turned).chat(messages) == PublishedTokenizer(None, STRING).chat(messages)


def test_what_is_left_out_is_told():
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why " + "so " * 40}]
    with pytest.raises(ValueError, match=r"text of message 1 \(system\), 'Be brief\.'"):
        PublishedTokenizer(None, "{{ messages[-1].content }}").chat(asked)
    with pytest.raises(ValueError, match=r"text of message 2 \(user\), 'Why so"):  # all but its end
        PublishedTokenizer(None, loop("{{ m.content[:100] }}")).chat(asked)
    for text in ("Why?", " "):
        with pytest.raises(ValueError, match=r"text of message 1 \(user\)"):
            PublishedTokenizer(None, loop("{% for p in m.content %}<|video_pad|>{% endfor %}")).chat(
                [{"role": "user", "content": text}]
            )


SILENT_BOMBS = [  # one call of C each, which no count of steps sees
    "{{ ('%' + '0' * 40000) % 1 }}",
    "{{ ('%(' * 10000) % 1 }}",
    "{{ ('%(a).0s' * 200000) % {'a': range(100000) | list} }}",
    "{{ range(20000) | list | tojson(indent='x' * 100000) }}",
    "{{ range(20000) | list | tojson(separators=('x' * 100000, ':')) }}",
    "{{ ('a\n' * 60000) | indent('x' * 50000) | length }}",
    "{{ ('a' * 60000) | wordwrap(1, wrapstring='x' * 10 ** 7) }}",
    "{{ ('!' * 60000) | wordwrap(9) }}",
    "{{ ('ß' * 16000000) | title }}",
    "{{ ('ß' * 16000000) | upper }}",
    "{{ ('ß' * 5000000 ~ messages[0].content).upper() | length }}" * 9,
    "{{ ('a' * 8000000).rfind('b' + 'a' * 4000000) }}",
    "{{ ('a' * 8000000).rsplit('b' + 'a' * 4000000) }}",
    "{{ ('ab' * 8000000).strip('c' * 4000000 ~ 'ab') }}",
    "{{ ('a ' * 8000000).split() }}",
    "{{ ('a\n' * 8000000).splitlines() }}",
    "{{ ('{' * 8000000).format() }}",
    "{{ ('{0!r:.0}' * 100000).format(range(100000) | list) }}",
    "{% set x, y = 'a' * 16000000, 'a' * 16000000 %}" + "{{ x == y }}" * 2000,
    "{% set x = 'a' * 16000000 %}" + "{{ x is lower }}" * 1500,
    "{% set x = 'a' * 16000000 %}" + "{% set y = x[1:] %}" * 1500,
    "{{ (2 ** 4000) ** 4000 }}",
]


def test_one_call_that_takes_too_much_is_ended():
    """In a process of its own, which may take so much time and memory for each of them."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from hybridvlm.tokenizers import template_limits
from hybridvlm.tokenizers.template import render
template_limits.SECONDS = 0.2
from hybridvlm.tokenizers.text import person
for text in {SILENT_BOMBS!r}:
    try:
        render(text, {{"messages": [{{"content": person("hi")}}]}})
    except ValueError as error:
        assert type(error).__name__ in ("TooMuch", "ValueError"), text[:60]
    else:
        raise SystemExit(f"not ended: {{text[:60]}}")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, repr(text[:60]), flush=True)
"""
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("{{ '{{a}}{}b{{{0}}}'.format('x') if false else '{{a}}{0}b{{{0}}}'.format('x') }}", "{a}xb{x}"),
        (
            "{{ '%(a)s%%%(b)05.1f%-4s|' % {'a': 'x', 'b': 2} if false else '%(a)s%%%(b)05.1f' % {'a': 'x', 'b': 2} }}",
            "x%002.0",
        ),
        ("{{ '%.2s|%5r|%-4d|' | format('abc', 'a', 7) }}", "ab|  'a'|7   |"),
        ("{{ 1e999 }}{{ -1e999 }}", "inf-inf"),
        ("{{ 1 < 2 < 3 and 'a' in 'ab' and 'x' not in ['a'] }}{{ 'abc'[1:] }}{{ [1, 2, 3][:2] }}", "Truebc[1, 2]"),
        ("{{ 'aßb' | upper }}{{ 'x' | wordwrap(9) }}{{ '5' | int }}{{ 'a b' | title }}", "ASSBx5A B"),
    ],
)
def test_what_is_bounded_writes_what_jinja_writes(text, want):
    assert template.render(text, {}) == want


@pytest.mark.parametrize("name", ["pprint", "attr", "urlize"])
def test_filters_that_are_not_offered_are_named(name):
    with pytest.raises(ValueError, match=f"{name}' is not offered here"):
        chat("{{ 'x' | " + name + "('a') }}")
