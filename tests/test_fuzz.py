"""Small valid inputs, harmed at random with fixed seeds, through the public doors: an error that the door documents, or a result.

No crash, no other exception, no case that takes long, nothing read outside the folder of a case, no other numbers without a word. A
minute in all: every kind stops when its share is used up.
"""

import json
import os
import pathlib
import random
import signal
import sys
import sysconfig
import time
import warnings

import numpy as np
import pytest

import hybridvlm as hv
from hybridvlm.checkpoints import CheckpointError, samples
from hybridvlm.eval.tasks.jsonl import read_samples
from hybridvlm.models.weights import flatten
from hybridvlm.tokenizers.published import PublishedTokenizer
from hybridvlm.video import VideoError, read_clip

pytestmark = pytest.mark.slow
SHARE = 10.0  # seconds of a kind
LONGEST = 15  # seconds of a case
SECRET = "the file that nobody may read"

_watched: dict[str, pathlib.Path | None] = {"folder": None}
_outside: list[str] = []
# What Python and libraries read of their own accord: modules, time zones, what the kernel tells of the machine.
_THEIRS = tuple(
    {str(pathlib.Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())}
    | {str(pathlib.Path(hv.__file__).parent), "/proc", "/sys", "/dev", "/usr", "/etc"}
    | {os.environ.get("JAX_COMPILATION_CACHE_DIR", "/nowhere")}
)


def _hook(event: str, args: tuple) -> None:
    folder = _watched["folder"]
    if event != "open" or folder is None or not isinstance(args[0], str | bytes | os.PathLike):
        return
    path = os.path.realpath(os.fsdecode(args[0]))
    if not path.startswith((str(folder), *_THEIRS)):
        _outside.append(path)


sys.addaudithook(_hook)


class Slow(BaseException):
    """A case that takes longer than it may."""


def _alarm(*_) -> None:
    raise Slow


def attempt(folder: pathlib.Path, allowed: tuple[type[Exception], ...], door):
    """door()'s result, or None where it refuses in one of the allowed ways; fails for anything else."""
    _outside.clear()
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(LONGEST)
    _watched["folder"] = folder.resolve()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = door()
    except allowed as error:
        assert str(error), f"{type(error).__name__} without a word"
        assert SECRET not in str(error)
        result, said = None, []
    finally:
        _watched["folder"] = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not _outside, f"read outside of {folder}: {_outside}"
    return result, said


def harmed(data: bytes, r: random.Random) -> bytes:
    """Some bits flipped, a piece cut out, put in twice, zeroed or taken from elsewhere, or the end cut off."""
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 5))):
        at, n = r.randrange(len(out)), r.choice((1, 2, 8, 64, 500))
        kind = r.choice(("flip", "flip", "cut", "twice", "zero", "splice", "end"))
        if kind == "flip":
            out[at] ^= 1 << r.randrange(8)
        elif kind == "cut":
            del out[at : at + n]
        elif kind == "twice":
            out[at:at] = out[at : at + n]
        elif kind == "zero":
            out[at : at + n] = bytes(len(out[at : at + n]))
        elif kind == "splice":
            other = r.randrange(len(out))
            out[at : at + n] = out[other : other + n]
        else:
            del out[max(1, at) :]
        if len(out) < 2:
            break
    return bytes(out) or b"\0"


STRANGE = (None, True, 0, -1, 10**7, 1e308, float("nan"), "", "x", [], [[]], {}, {"a": []}, "\ud83d", "../secret.txt")


def edited(tree, r: random.Random):
    """A JSON value with one field anywhere in it replaced, renamed, removed or doubled."""
    tree = json.loads(json.dumps(tree))
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = r.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and r.random() < 0.7:
            node = node[key]
            continue
        kind = r.choice(("replace", "replace", "remove", "rename"))
        if kind == "replace" or (kind == "rename" and not isinstance(node, dict)):
            node[key] = r.choice(STRANGE)
        elif kind == "remove":
            del node[key]
        else:
            node[key + "_"] = node.pop(key)
        return tree


def cases(kind: str):
    """A source of chance for every case, the same in every run, until the time of the kind is used up."""
    began, number = time.monotonic(), 0
    while time.monotonic() - began < SHARE:
        yield random.Random(f"{kind} {number}")
        number += 1
    assert number > 3, f"only {number} cases of {kind} in {SHARE} s"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret.txt").write_text(SECRET)
    inside = tmp_path / "inside"
    inside.mkdir()
    return inside


def film(path: pathlib.Path, codec: str) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(24):
            picture = np.full((48, 64, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def clip_of(path: pathlib.Path):
    return read_clip(path, lambda height, width, count, kind: (24, 32), frames=8)


def test_films(folder):
    originals = []
    for name, codec in (("a.mp4", "h264"), ("b.mkv", "h264"), ("c.avi", "mpeg4")):
        film(folder / name, codec)
        originals.append(((folder / name).read_bytes(), folder / name, clip_of(folder / name)))
    for r in cases("film"):
        data, path, whole = r.choice(originals)
        path.write_bytes(harmed(data, r))
        clip, said = attempt(folder, (VideoError,), lambda path=path: clip_of(path))
        if clip is not None:
            assert clip.frames.ndim == 4 and len(clip.frames) == len(clip.seconds) and np.isfinite(clip.seconds).all()
            if data.startswith(path.read_bytes()) and len(path.read_bytes()) < 0.5 * len(data):
                assert said or len(clip.frames) == len(whole.frames), f"{path.name}: cut off without a word"


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile ../secret.txt\n", "#EXTM3U\n#EXTINF:1,\n../secret.txt\n"])
@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.ts"])
def test_a_list_of_other_files_is_no_film(folder, text, name):
    film(folder.parent / "other.mp4", "h264")
    (folder / name).write_text(text.replace("../secret.txt", str(folder.parent / "other.mp4")))
    assert attempt(folder, (VideoError,), lambda: clip_of(folder / name))[0] is None


def test_images(folder):
    from PIL import Image

    originals = []
    for name in ("a.png", "b.jpg", "c.webp", "d.bmp", "e.gif"):
        picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
        Image.fromarray(picture).save(folder / name)
        originals.append(((folder / name).read_bytes(), folder / name))
    for r in cases("image"):
        data, path = r.choice(originals)
        path.write_bytes(harmed(data, r))
        clip, _ = attempt(folder, (VideoError,), lambda path=path: clip_of(path))
        assert clip is None or clip.frames.dtype == np.uint8


def test_jsonl(folder):
    entry = {"video": "a.mp4", "question": "What?", "options": ["x", "y"], "answer": "B"}
    lines = [json.dumps({"id": str(i)} | entry) for i in range(4)]
    path = folder / "q.jsonl"
    path.write_text("\n".join(lines) + "\n")
    data, whole = path.read_bytes(), read_samples(path)
    for r in cases("jsonl"):
        if r.random() < 0.5:
            path.write_bytes(harmed(data, r))
        else:
            changed = [json.dumps(edited(json.loads(line), r)) if r.random() < 0.4 else line for line in lines]
            path.write_text("\n".join(changed) + "\n", errors="surrogatepass")
        found, _ = attempt(folder, (ValueError,), lambda: read_samples(path))
        if found is not None and data.startswith(path.read_bytes()):
            assert found == whole[: len(found)]


@pytest.fixture
def checkpoint(folder):
    return samples.write_sample("qwen2_vl", folder / "model")


def test_safetensors(folder, checkpoint):
    """Headers: what is flipped in the data itself nobody can see."""
    files = sorted(checkpoint.glob("*.safetensors"))
    originals = {path: path.read_bytes() for path in files}
    want = flatten(hv.load(checkpoint).params)
    for r in cases("safetensors"):
        path = r.choice(files)
        data = originals[path]
        begin = 8 + int.from_bytes(data[:8], "little")
        if r.random() < 0.5:
            header = harmed(data[8:begin], r)
        else:
            header = json.dumps(edited(json.loads(data[8:begin]), r)).encode()
        size = len(header).to_bytes(8, "little") if r.random() < 0.8 else harmed(data[:8], r)[:8].ljust(8, b"\0")
        path.write_bytes(size + header + data[begin:])
        model, _ = attempt(folder, (CheckpointError,), lambda: hv.load(checkpoint))
        if model is not None:
            for name, array in flatten(model.params).items():
                np.testing.assert_array_equal(np.asarray(array), np.asarray(want[name]), err_msg=f"{path.name}: {name}")
        path.write_bytes(data)


def test_configs_and_tokenizers(folder, checkpoint):
    files = [p for p in sorted(checkpoint.glob("*.json")) if "index" not in p.name]
    originals = {path: path.read_bytes() for path in files}
    for r in cases("config"):
        path = r.choice(files)
        data = originals[path]
        if r.random() < 0.3:
            path.write_bytes(harmed(data, r))
        else:
            path.write_bytes(json.dumps(edited(json.loads(data), r)).encode("utf-8", "surrogatepass"))
        attempt(folder, (CheckpointError, ValueError, OSError), lambda: hv.load(checkpoint))
        path.write_bytes(data)


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECES = (
    *("{% include '../secret.txt' %}", "{% extends '/etc/passwd' %}", "{{ ''.__class__ }}", "{{ messages.__init__ }}"),
    *(
        "{{ 1 / 0 }}",
        "{{ messages[9] }}",
        "{% for x in range(9) %}{{ x }}",
        "{% endfor %}",
        "{{ raise_exception('no') }}",
    ),
    *(
        "{{ x.y.z }}",
        "{{ 'a' * 1000 }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set x = namespace(a=1) %}",
        "{{",
        "%}",
    ),
)


def test_templates(folder, checkpoint):
    tokenizer = PublishedTokenizer.from_folder(checkpoint)
    messages = [{"role": "user", "content": "What?"}]
    for r in cases("template"):
        text = TEMPLATE
        if r.random() < 0.6:
            at = r.randrange(len(text))
            text = text[:at] + r.choice(PIECES) + text[at:]
        else:
            text = harmed(text.encode(), r).decode(errors="replace")
        tokenizer.template = text
        out, _ = attempt(folder, (ValueError,), lambda: tokenizer.chat(messages))
        assert out is None or (isinstance(out, str) and SECRET not in out)
