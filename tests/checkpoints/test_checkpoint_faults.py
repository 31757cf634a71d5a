"""Checkpoints with faults: headers that lie, stale files, values that are none, names that are no folders."""

import dataclasses
import gc
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

import hybridvlm.checkpoints.folder as folders
from hybridvlm.checkpoints import CheckpointError, TensorFolder, samples, save_folder
from hybridvlm.checkpoints import names as hub_names
from hybridvlm.checkpoints.describe import describe
from hybridvlm.checkpoints.hf import check_finite, read_json
from hybridvlm.checkpoints.names import PACKAGED
from hybridvlm.config import Reduction
from hybridvlm.inference.model import load
from hybridvlm.models.weights import flatten

ROOT = pathlib.Path(__file__).parents[2]
FAMILIES = ("nemotron_h_moe", "nemotron_nano_vl", "nemotron_omni", "qwen2_vl", "qwen3_vl", "vamba")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> the folder of a sample, written once."""
    made = {}

    def source(name):
        if name not in made:
            made[name] = samples.write_sample(name, tmp_path_factory.mktemp("source") / name)
        return made[name]

    return source


@pytest.fixture
def copy(sources, tmp_path):
    """name -> a copy of a sample to do harm to."""
    return lambda name: pathlib.Path(shutil.copytree(sources(name), tmp_path / name))


def in_one_file(path, change=lambda tensors: None):
    """The shards of a folder in one model.safetensors; the index stays."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def same(a, b):
    a, b = flatten(a.params), flatten(b.params)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


# -- headers ------------------------------------------------------------------------------------------------------------

TENSORS = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16), "c": np.zeros((0, 2), np.float32)}
WHOLE = save(TENSORS, metadata={"format": "pt"})
LENGTH = int.from_bytes(WHOLE[:8], "little")
HEADER, BODY = json.loads(WHOLE[8 : 8 + LENGTH]), WHOLE[8 + LENGTH :]


def packed(header, body=BODY):
    text = (
        header
        if isinstance(header, bytes)
        else header.encode()
        if isinstance(header, str)
        else json.dumps(header).encode()
    )
    return len(text).to_bytes(8, "little") + text + body


def with_entry(name, **changes):
    return packed(HEADER | {name: HEADER.get(name, {}) | changes})


def one(shape, offsets, body, kind="F32", **more):
    return packed({"s": {"dtype": kind, "shape": shape, "data_offsets": offsets}, **more}, body)


TEXT = json.dumps(HEADER)
LIES = {
    "bytes behind": packed(HEADER, BODY + b"x"),
    "hole before": one([1], [4, 8], bytes(8)),
    "hole between": one([1], [0, 4], bytes(12), t={"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}),
    "overlap": with_entry("b", data_offsets=[16, 24]),
    "same bytes": packed(HEADER | {"d": HEADER["a"]}),
    "name twice": packed(TEXT[:-1] + ', "a": ' + json.dumps(HEADER["a"]) + "}"),
    "field twice": packed(TEXT.replace('"dtype"', '"dtype": "F32", "dtype"', 1)),
    "utf-16": packed(TEXT.encode("utf-16")),
    "byte order mark": packed(b"\xef\xbb\xbf" + TEXT.encode()),
    "half a surrogate": packed(TEXT.replace('"a"', '"\\ud800"')),
    "negative shape": with_entry("a", shape=[-2, -3]),
    "negative offsets": one([1], [-4, 0], bytes(4)),
    "offsets beyond": one([2], [0, 8], bytes(4)),
    "too few bytes for the dtype": one([1], [0, 4], bytes(4), kind="F64"),
    "sizes beyond 64 bits": one([1 << 62, 1 << 62], [0, 4], bytes(4)),
    "metadata with numbers": packed(HEADER | {"__metadata__": {"x": 1}}),
    "not a number": packed(TEXT.replace('"pt"', "NaN")),
    "a list": packed("[1]"),
    "no header": (1 << 60).to_bytes(8, "little") + b"{}",
    "header of a gigabyte": (1 << 30).to_bytes(8, "little") + TEXT.encode(),
    "cut in its length": WHOLE[:5],
    "more axes than a tensor has": one([1] * 33, [0, 4], bytes(4)),
    "as many axes as fit": one([(1 << 63) - 1] * 60_000, [0, 0], b""),
    "shape that is a table": one({}, [0, 4], bytes(4)),
    "shape that is a word": one("", [0, 4], bytes(4)),
    "offsets without end": one([1], [0, 10**4000], bytes(4)),
    "name without end": packed({"n" * 9000: {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
    "field without end": packed('{"' + "k" * 9000 + '": 1, "' + "k" * 9000 + '": 1}'),
    "deep": packed('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
}
# which the library lets pass: the last one counts there; a tensor has as many axes as one likes
STRICTER = ("name twice", "more axes than a tensor has")


def library(file):
    try:
        with safe_open(file, "np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception:
        return None


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie_are_refused(name, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(LIES[name])
    assert library(file) is None or name in STRICTER
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        TensorFolder(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "data", [WHOLE, packed(TEXT + "   "), packed("{}", b""), one([], [0, 4], bytes(4)), with_entry("a", more=1)]
)
def test_headers_that_do_not_lie(data, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    assert TensorFolder(file).shapes() == library(file) is not None


def test_damaged_headers_are_taken_as_the_library_takes_them(tmp_path):
    rng, file = random.Random(0), tmp_path / "model.safetensors"
    taken = 0
    for _ in range(800):
        data = bytearray(WHOLE)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(8 + LENGTH) if rng.random() < 0.9 else rng.randrange(len(data))
            what = rng.randrange(4)
            if what == 0:
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            elif what == 1:
                del data[min(at, len(data) - 1)]
            elif what == 2:
                data.insert(at, rng.randrange(32, 127))
            else:
                data[min(at, len(data) - 1)] = ord(rng.choice('0123456789{}[],:"-. eE'))
        file.write_bytes(data)
        theirs = library(file)
        try:
            ours = TensorFolder(file).shapes()
        except CheckpointError as error:
            stricter = any(word in str(error) for word in ("supported:", "twice", "printable", "does not begin with"))
            assert theirs is None or stricter, (bytes(data), error)
        else:
            assert ours == theirs, bytes(data)
            taken += 1
    assert taken > 10


# -- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_vl", "nemotron_omni"])
def test_a_whole_file_counts_before_a_stale_index(name, copy, sources):
    path = copy(name)
    in_one_file(path)
    same(load(path), load(sources(name)))
    (path / "model-00001-of-00009.safetensors").write_bytes(b"cut off")  # nor does a shard of the past
    same(load(path), load(sources(name)))
    (path / "model.safetensors.index.json").unlink()
    same(load(path), load(sources(name)))


@pytest.mark.parametrize("one_file", [True, False])
def test_an_adapter_beside_is_named_and_not_applied(one_file, copy, sources):
    path = copy("qwen2_vl")
    if one_file:
        in_one_file(path)
        (path / "model.safetensors.index.json").unlink()
    save_file({"base_model.model.q.lora_A.weight": np.ones((2, 2), np.float32)}, path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"adapter_model\.safetensors is an adapter, which is not applied"):
        same(load(path), load(sources("qwen2_vl")))
    for file in path.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds an adapter alone"):
        load(path)


BUFFERS = {
    "qwen2_vl": (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "visual.rotary_pos_emb.inv_freq",
        "rotary_emb.original_inv_freq",
    ),
    "qwen3_vl": ("model.language_model.rotary_emb.inv_freq", "model.visual.rotary_pos_emb.inv_freq"),
    "vamba": ("model.rotary_emb.inv_freq", "model.layers.2.cross_attn.rotary_emb.cos_cached"),
    "nemotron_omni": ("vision_model.radio_model.input_conditioner.norm_mean", "vision_model.radio_model.summary_idxs"),
    "nemotron_h_moe": ("mtp.layers.0.norm.weight", "model.mtp.embed.weight"),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_saved_constants_are_read_past(name, copy, sources):
    path = copy(name)
    constants = dict.fromkeys(BUFFERS[name], np.full(4, np.nan, np.float32))
    in_one_file(path, lambda tensors: tensors.update(constants))
    same(load(path), load(sources(name)))
    in_one_file(path, lambda tensors: tensors.update({"model.layers.0.rotary_gate.weight": np.ones(3, np.float32)}))
    with pytest.raises(CheckpointError, match=r"no parameter for: model\.layers\.0\.rotary_gate\.weight"):
        load(path)


DOUBLES = {
    "qwen2_vl": ("model.rotary_emb.inv_freq", "model.language_model.rotary_emb.inv_freq"),
    "qwen3_vl": ("visual.rotary_pos_emb.inv_freq", "model.visual.rotary_pos_emb.inv_freq"),
    "nemotron_omni": ("vision_model.radio_model.summary_idxs", "radio_model.model.summary_idxs"),
}


@pytest.mark.parametrize("name", DOUBLES)
def test_a_constant_under_two_spellings_is_no_fault(name, copy, sources):
    path = copy(name)
    table = load(path).family.weight_map(load(path).config)
    assert len({table.canonical(one) for one in DOUBLES[name]}) == 1
    in_one_file(path, lambda tensors: tensors.update(dict.fromkeys(DOUBLES[name], np.zeros(4, np.float32))))
    same(load(path), load(sources(name)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the key 'a' stands twice"),
        ('{"weight_map": {}, "weight_map": {}}', "the key 'weight_map' stands twice"),
        ('{"weight_map": {"a": "' + "../" * 200 + 'x"}}', "names files outside its folder"),
        ('{"weight_map": [1]}', "weight_map must give a file's name"),
        ("[]", "is not an index of tensors: not an object"),
        ("[" * 100_000, "is not an index of tensors: nested too deeply"),
        (b"\xff\xfe{}", "is not an index of tensors"),
    ],
)
def test_an_index_that_says_two_things_or_none(text, words, copy):
    path = copy("qwen2_vl")
    (path / "model.safetensors.index.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=words) as caught:
        TensorFolder(path)
    assert "index.json" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_every_reader_finds_the_second_of_many_keys(tmp_path):
    many = ", ".join(f'"k{i}": 1' for i in range(20_000))
    file = tmp_path / "config.json"
    for data in ("{" + many + ', "k19999": 2}', '{"a": {"b": {' + many + ', "k7": 2}}}'):
        file.write_text(data)
        with pytest.raises(CheckpointError, match=r"the key 'k(19999|7)' stands twice"):
            read_json(file)
        file.with_suffix(".safetensors").write_bytes(packed(data, b""))
        with pytest.raises(CheckpointError, match=r"the key 'k(19999|7)' stands twice"):
            TensorFolder(file.with_suffix(".safetensors"))
    file.write_text("{" + many + "}")
    assert len(read_json(file)) == 20_000


# -- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_values_that_are_none_are_named(name, copy):
    """NaN in one and infinity in another kind of tensor, of the decoder and the tower, whatever they are stored as."""
    path = copy(name)
    names = sorted(TensorFolder(path))
    chosen = [names[0], names[-1], next(key for key in names if key.endswith("norm.weight"))]
    whole = {key: np.array(value) for key, value in TensorFolder(path).items()}
    for file in path.glob("model*"):
        file.unlink()
    for key, odd, kind in zip(
        chosen, (np.nan, np.inf, -np.inf), ("float32", "float16", ml_dtypes.bfloat16), strict=True
    ):
        tensors = {k: v.astype(kind) for k, v in whole.items()}
        tensors[key].reshape(-1)[-1] = odd
        save_file(tensors, path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{key} holds values that are not finite"):
            load(path)


def test_a_layer_scale_is_named_for_its_own_values(copy):
    path, block = copy("nemotron_nano_vl"), "vision_model.radio_model.model.blocks.0"
    width = TensorFolder(path)[f"{block}.norm1.weight"].shape
    whole = np.ones(width, np.float32)
    for name, scale, into, words in (
        ("ls1", np.where(np.arange(width[0]) == 1, np.nan, whole), None, rf"{block}\.ls1 holds values that are not"),
        ("ls2", np.inf * whole, None, rf"{block}\.ls2 holds values that are not"),
        ("ls1", whole, np.nan, rf"{block}\.attn\.proj\.weight holds values that are not"),
        ("ls1", 3e38 * whole, 3e38, rf"attn\.proj\.weight times {block}\.ls1 holds values that are not"),
    ):

        def change(tensors, name=name, scale=scale, into=into):
            for other in ("ls1", "ls2"):
                tensors.pop(f"{block}.{other}", None)
            tensors[f"{block}.{name}"] = scale.astype(np.float32)
            tensors[f"{block}.attn.proj.weight"][0, 0] = 1.0 if into is None else into

        in_one_file(path, change)
        with pytest.raises(CheckpointError, match=words):
            load(path)


def test_finite_values_of_every_kind_pass_and_float16_must_have_room():
    for kind in ("float16", "float32", ml_dtypes.bfloat16):
        most = np.asarray([ml_dtypes.finfo(kind).max, -ml_dtypes.finfo(kind).max, 0, ml_dtypes.finfo(kind).tiny], kind)
        check_finite(most, "x")
        check_finite(most[:0], "x")
        with pytest.raises(CheckpointError, match="x holds"):
            check_finite(np.concatenate([most, np.asarray([np.nan], kind)]), "x")
    with pytest.raises(CheckpointError, match="x holds values that float16 has no room for"):
        check_finite(np.asarray([7e4], np.float32), "x", "float16")
    check_finite(np.asarray([6e4], np.float32), "x", "float16")
    with pytest.raises(CheckpointError, match="x holds values that float32 has no room for"):
        check_finite(np.asarray([1e300]), "x")


def test_float16_must_have_room_in_published_and_own_checkpoints(copy, tmp_path):
    path = copy("nemotron_h_moe")
    in_one_file(path, lambda tensors: tensors["backbone.norm_f.weight"].__setitem__(0, 1e6))
    model = load(path)
    own = save_folder(tmp_path / "own", model)
    for folder in (path, own):
        with pytest.raises(CheckpointError, match=r"norm_f\S* holds values that float16 has no room for"):
            load(folder, dtype="float16")
        load(folder, dtype="bfloat16")


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("1 TiB")])
def test_weights_without_room_are_one_line(error, copy, monkeypatch):
    def full(*given, **options):
        raise error

    monkeypatch.setattr(folders, "read_params", full)
    with pytest.raises(CheckpointError, match="qwen2_vl: its weights do not fit in memory"):
        load(copy("qwen2_vl"))


def test_values_of_an_orbax_copy_are_looked_at(copy, tmp_path):
    model = load(copy("nemotron_h_moe"))
    params = model.params | {"embed": jnp.asarray(model.params["embed"]).at[3, 1].set(jnp.inf)}
    about = json.loads(json.dumps({"family": "nemotron_vl", **folders.to_dict(model.config)}))
    folders.save_orbax(tmp_path / "copy", params, {"name": "x", "model": about})
    with pytest.raises(CheckpointError, match="embed holds values that are not finite"):
        load(tmp_path / "copy")


# -- copies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("chat_template.jinja", "NEW {{ messages[0]['content'] }}"),
        ("special_tokens_map.json", "{}"),
        ("preprocessor_config.json", '{"min_pixels": 64, "max_pixels": 4096}'),
        ("generation_config.json", '{"eos_token_id": [7]}'),
        ("tokenizer_config.json", '{"chat_template": "NEW"}'),
    ],
)
def test_a_copy_goes_with_every_file_of_its_source(file, text, copy, tmp_path):
    path = copy("qwen2_vl")
    tensors = TensorFolder(path)
    before = folders._source(path, tensors, None)
    assert folders._source(path, tensors, None) == before  # nothing moved
    times = os.stat(path / file) if (path / file).exists() else None
    (path / file).write_text(text)
    if times is not None:  # a tool that keeps times changes contents all the same
        os.utime(path / file, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = folders._source(path, tensors, None)
    assert changed != before
    (path / file).unlink()
    assert folders._source(path, tensors, None) != changed


def test_a_copy_is_made_anew_for_another_template(copy, tmp_path):
    path = copy("qwen2_vl")
    load(path, cache=tmp_path / "cache")
    (path / "chat_template.jinja").write_text("NEW {{ messages[0]['content'] }}")
    assert load(path, cache=tmp_path / "cache").tokenizer.chat([{"role": "user", "content": "hi"}]) == "NEW hi"


# -- names and folders --------------------------------------------------------------------------------------------------


def test_names_that_are_missing_folders_ask_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_names, "_download", lambda *given: pytest.fail(f"asked for {given}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("")
    names = ["runs/tiny", "checkpoints/qwen", "mine/step_3", "./a/b", "../x", "~/nowhere/x", "/no/where", "a/b/c"]
    names += ["tinny", "out/", "a/.."]
    for name in (*names, pathlib.Path("owner/name"), "owner/na me"):
        with pytest.raises(FileNotFoundError, match="is no folder here") as caught:
            load(name)
        assert str(name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="is a file; give the checkpoint's folder"):
        load("file")


def test_names_of_the_hub_ask_it(monkeypatch, sources):
    asked = []

    def download(name, revision, patterns):
        asked.append((name, "*.safetensors" in patterns))
        return sources("qwen2_vl")

    monkeypatch.setattr(hub_names, "_download", download)
    for name in ("Qwen/Qwen2-VL-7B", "nvidia/a.b_c"):
        load(name)
    assert describe("Qwen/Qwen2-VL-7B").config == load(sources("qwen2_vl")).config
    # a description takes no weights
    assert asked == [("Qwen/Qwen2-VL-7B", True), ("nvidia/a.b_c", True), ("Qwen/Qwen2-VL-7B", False)]


def test_home_is_found(monkeypatch, sources):
    monkeypatch.setenv("HOME", str(sources("qwen2_vl").parent))
    assert folders.resolve("~/qwen2_vl") == sources("qwen2_vl")


def test_files_are_closed(copy, tmp_path):
    path, opened = copy("qwen3_vl"), pathlib.Path("/proc/self/fd")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = load(path)
        load(save_folder(tmp_path / "own", model))
        (tmp_path / "cut.safetensors").write_bytes(b"1234")
        with pytest.raises(CheckpointError):
            TensorFolder(tmp_path / "cut.safetensors")
        tensors = TensorFolder(path)
        name = next(iter(tensors))
        assert tensors[name].shape == tensors.shapes()[name]
        del tensors
        gc.collect()
    assert [str(warning.message) for warning in told if warning.category is ResourceWarning] == []
    if opened.is_dir():
        names = [os.path.realpath(file) for file in list(opened.iterdir())]
        assert not [name for name in names if name.startswith(str(tmp_path.resolve()))]


@pytest.mark.parametrize("name", ["nemotron_h_moe", "qwen3_vl"])
def test_a_model_without_tokenizer_comes_back(name, copy, tmp_path):
    model = load(copy(name))
    model = dataclasses.replace(model, tokenizer=None)
    path = save_folder(tmp_path / "own", model)
    again = load(path)
    assert again.tokenizer is None
    same(again, model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": "32"}, r"config\.json: ModelConfig\.width must be a whole number, got '32'"),
        ({"width": True}, "width must be a whole number"),
        ({"width": 10**15}, "width must be"),
        ({"norm_eps": [1]}, "norm_eps must be a number"),
        ({"norm_eps": None}, "norm_eps must be a number"),
        ({"pattern": "M" * 10**6}, "pattern may hold only"),
        ({"pattern": 7}, "pattern must be a text"),
        ({"eos_ids": {"a": 1}}, "eos_ids must be a list"),
        ({"eos_ids": ["a"]}, "eos_ids must be a whole number"),
        ({"tie_embeddings": "no"}, "tie_embeddings must be true or false"),
        ({"vision": [1]}, "VisionConfig must be a table"),
        ({"vision": {"heads": 0}}, "VisionConfig.heads must be"),
        ({"reduction": "str"}, "Reduction must be a table"),
        ({"buckets": {"frames": 8}}, "Buckets.frames must be a list"),
        ({"family": ["x"]}, "no model family"),
        ({"vocab_size": 1 << 39}, "vocab_size must be a whole number of at least 1"),
        ({"mlp_width": 1 << 30}, "mlp_width must be"),
        ({"vision": {"layers": 1 << 20}}, "layers must be"),
        ({"vision": {"kind": "stem", "max_frames": 1 << 40}}, "max_frames must be"),
        ({"pad_id": -5}, r"ModelConfig\.pad_id must be a whole number of at least 0"),
        ({"pad_id": 1 << 20}, r"ModelConfig\.pad_id must be"),
        ({"eos_ids": [-1]}, r"ModelConfig\.eos_ids must be ids"),
        ({"version": True}, r"config\.json has version True"),
        ({"version": 1.0}, r"config\.json has version 1\.0"),
        ({"version": "1"}, r"config\.json has version '1'"),
        ({"reduction": {"method": "zzz"}}, "unknown reduction method 'zzz'.*pass a reduction of your own"),
        ({"reduction": {"method": "evs:7+str"}}, "reduction.method: .*a share to keep"),
    ],
)
def test_own_configs_are_refused_in_one_line(change, words, tmp_path):
    config = json.loads((PACKAGED["tiny"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=words) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_sizes_are_worked_out_without_memory_or_refused_by_file():
    config = load("tiny").config
    names = ("width", "vocab_size", "mamba_head_dim", "head_dim", "mlp_width", "mamba_heads", "ssm_state")
    most = dataclasses.replace(config, **dict.fromkeys(names, 1 << 24))
    assert folders.expected_shapes(most)["embed"] == (1 << 24, 1 << 24)
    for size in (1 << 31, 1 << 39, 1 << 63):  # which the class itself refuses
        object.__setattr__(most, "vocab_size", size)
        with pytest.raises(CheckpointError, match=r"^x/config\.json has sizes that no model can have") as caught:
            folders.expected_shapes(most, where="x/config.json")
        assert "\n" not in str(caught.value)


def test_a_reduction_of_ones_own_stands_for_an_unknown_one(tmp_path):
    path = pathlib.Path(shutil.copytree(PACKAGED["tiny"], tmp_path / "tiny"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"reduction": {"method": "zzz"}}))
    assert load(path, reduction=Reduction("str", 0.5)).reduction == Reduction("str", 0.5)


def test_an_orbax_copy_is_looked_at_like_its_kin(copy, tmp_path):
    path = tmp_path / "copy"
    load(copy("nemotron_h"), cache=path)
    about = json.loads((path / "model.json").read_text())
    for change, words in (
        ({"version": True}, "version True"),
        ({"model": [1]}, r"model\.json: model must be a table"),
        ({"model": about["model"] | {"reduction": {"method": "zzz"}}}, "unknown reduction method"),
        ({"model": about["model"] | {"pad_id": -5}}, "pad_id must be"),
    ):
        (path / "model.json").write_text(json.dumps(about | change))
        with pytest.raises(CheckpointError, match=words):
            load(path)


@pytest.mark.parametrize("given", [10**6, [258, 288]])
def test_stops_of_another_model_are_refused(given, copy):
    path = copy("qwen2_vl")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id \d+ is beyond .* of 288"):
        load(path)
    (path / "generation_config.json").write_text('{"eos_token_id": [258, 287]}')
    assert load(path).config.eos_ids == (258, 287)


def test_nothing_is_read_more_often_than_it_must(copy, monkeypatch):
    path = copy("qwen2_vl")
    raw = samples.raw_config("qwen2_vl")
    raw["text_config"]["tie_word_embeddings"] = True
    (path / "config.json").write_text(json.dumps(raw))
    names = {}

    def tie(tensors):
        (names["embed"],) = (name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors["lm_head.weight"] = tensors[names["embed"]].copy()

    in_one_file(path, tie)
    tables, tensors = [], []
    rows, read = TensorFolder.rows, folders.read_json
    monkeypatch.setattr(TensorFolder, "rows", lambda self, name, *at: tensors.append(name) or rows(self, name, *at))
    monkeypatch.setattr(folders, "read_json", lambda file: tables.append(file.name) or read(file))
    assert load(path).config.tie_embeddings
    assert tensors.count("lm_head.weight") == 1 and tensors.count(names["embed"]) == 2  # compared, and taken
    assert tables.count("config.json") == 1
    tables.clear()
    load("tiny")
    assert tables.count("config.json") == 1


def test_partial_meshes():
    """Some of the library's axes, one, another order, one that no rule knows: in a process of its own with four devices."""
    code = """
import jax, numpy as np
import hybridvlm as hv
from hybridvlm.models.weights import flatten
from hybridvlm.sharding import full_mesh
one = flatten(hv.load("tiny").params)
for shape, axes in (((2, 2), ("fsdp", "tensor")), ((4,), ("data",)), ((2, 2), ("tensor", "sequence")), ((4,), ("tensor",))):
    mesh = jax.make_mesh(shape, axes)
    model = hv.load("tiny", mesh=mesh)
    there, whole = flatten(model.params), flatten(model.whole_params())
    cut = 0
    for name in one:
        assert there[name].sharding.mesh == full_mesh(mesh), name
        np.testing.assert_array_equal(np.asarray(one[name]), whole[name], err_msg=name)
        cut += not there[name].sharding.is_fully_replicated
    assert (cut > 0) == (axes != ("data",)), (axes, cut)
try:
    hv.load("tiny", mesh=jax.make_mesh((4,), ("model",)))
except ValueError as error:
    assert "expected axes out of" in str(error) and "'model'" in str(error)
    print("told")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | flags, capture_output=True, text=True)
    assert done.stdout == "told\n", done.stderr[-2000:]


def test_a_checkpoint_of_another_model_is_described_briefly(copy, sources):
    path = copy("qwen2_vl")
    raw = samples.raw_config("qwen2_vl")
    raw["text_config"]["num_hidden_layers"] = 4000
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"and more$") as caught, warnings.catch_warnings():
        load(path)
    assert str(caught.value).count("\n") < 250 and "the config the config" not in str(caught.value)
