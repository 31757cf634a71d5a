"""Published checkpoints in and out: streamed, refused by name, copied through Orbax, killed half-way."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hybridvlm.checkpoints.folder as folders
from hybridvlm.checkpoints import CheckpointError, TensorFolder, hf, samples, save_published
from hybridvlm.checkpoints.atomic import _host, whole_folder
from hybridvlm.config_files import load_model_config
from hybridvlm.inference.model import load
from hybridvlm.models import nemotron_vl
from hybridvlm.models.qwen_vl import geometry
from hybridvlm.models.weights import flatten
from hybridvlm.tokenizers.published import PublishedTokenizer

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def equal(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return samples.write_sample("nemotron_omni", tmp_path_factory.mktemp("source") / "omni")


@pytest.fixture
def copy(source, tmp_path):
    """A checkpoint to do harm to."""
    return pathlib.Path(shutil.copytree(source, tmp_path / "omni"))


def edit(folder, change):
    """Change the tensors (a dict) of a folder, whatever shard they lie in, leaving its index as it is."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


def test_what_was_written_is_what_is_read(source):
    raw = samples.raw_config("nemotron_omni")
    table = nemotron_vl.weight_map(nemotron_vl.config_from_hf(raw))
    equal(load(source).params, samples.random_params(table))
    found = TensorFolder(source)
    assert found.shapes() == table.shapes()
    assert "vision_model.radio_model.model.blocks.1.attn.qkv.weight" in found
    assert "language_model.backbone.layers.1.mixer.experts.7.up_proj.weight" in found
    assert len(list(source.glob("*.safetensors"))) > 1
    for file in source.glob("*.safetensors"):  # what the format's own library reads
        for name, tensor in load_file(file).items():
            np.testing.assert_array_equal(tensor, found[name])


def test_every_family_loads_from_its_published_layout(tmp_path):
    for name in samples.RAW:
        model = load(samples.write_sample(name, tmp_path / name))
        assert folders.expected_shapes(model.config, model.family) == {
            path: leaf.shape for path, leaf in flatten(model.params).items()
        }
        assert model.tokenizer.decode(model.tokenizer.encode("what? äß")) == "what? äß"


def test_streamed_in_pieces(source, monkeypatch):
    """A few rows at a time into donated buffers, turned, stacked by layer and expert, cut out of fused tensors."""
    whole = load(source).params
    monkeypatch.setattr(hf, "PIECE_BYTES", 3000)
    equal(load(source).params, whole)


def test_dtype(source):
    params = flatten(load(source, dtype="bfloat16").params)
    assert params["decoder/moe/up"].dtype == jnp.bfloat16
    for name in ("decoder/mamba/A_log", "decoder/mamba/dt_bias", "decoder/moe/router_bias"):
        assert params[name].dtype == jnp.float32
    stored = flatten(load(source).params)
    assert {leaf.dtype for leaf in stored.values()} == {jnp.dtype("float32")}


def test_other_spellings_of_names(source, tmp_path):
    """As transformers has them in memory: model. for backbone., q/k/v apart, experts of a layer in one tensor."""
    held = dict(TensorFolder(source))
    renamed = {}
    for name, value in held.items():
        name = name.replace("language_model.backbone.", "language_model.model.")
        name = name.replace("mlp1.0", "multi_modal_projector.layer_norm").replace(
            "mlp1.1", "multi_modal_projector.linear_1"
        )
        name = name.replace("mlp1.3", "multi_modal_projector.linear_2")
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", np.split(value, 3), strict=True):
                short = name.replace("vision_model.radio_model.model.blocks.", "vision_model.encoder.layer.")
                renamed[short.replace("attn.qkv", f"attention.{part}_proj")] = rows.copy()
        elif ".experts." not in name:
            renamed[name] = value
    for layer in (1, 4):
        for part in ("up_proj", "down_proj"):
            old = f"language_model.backbone.layers.{layer}.mixer.experts"
            stack = np.stack([held[f"{old}.{j}.{part}.weight"] for j in range(8)])
            renamed[f"language_model.model.layers.{layer}.mixer.experts.{part}"] = stack
    renamed["sound_encoder.encoder.layers.0.norm.weight"] = np.ones(3, np.float32)  # of which nothing is read
    path = tmp_path / "renamed"
    path.mkdir()
    save_file(renamed, path / "model.safetensors")
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    equal(load(path).params, load(source).params)


A_LOG = "language_model.backbone.layers.0.mixer.A_log"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(A_LOG, None), f"index.json promises tensors that its files do not hold: {A_LOG}"),
        (
            lambda t: A_LOG in t and t.update({A_LOG: t[A_LOG][:-1].copy()}),
            rf"wrong shape: {A_LOG} should be \(8,\), is \(7,\)",
        ),
        (lambda t: A_LOG in t and t.update(spare=t[A_LOG]), "no parameter for: spare"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, change, words):
    edit(copy, change)
    with pytest.raises(CheckpointError, match=words):
        load(copy)


def test_all_faults_at_once(copy):
    raw = json.loads((copy / "config.json").read_text())
    raw["text_config"]["n_routed_experts"] = 9
    (copy / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    for words in (
        "experts.8.up_proj",
        "layers.4.mixer.experts.8.down_proj",
        "gate.weight should be (9, 32), is (8, 32)",
    ):
        assert words in str(caught.value)


def test_truncated_shard(copy):
    file = sorted(copy.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    last = max(load_places(file), key=lambda item: item[1])[0]
    with pytest.raises(CheckpointError, match=f"{file.name} is truncated: it ends inside or before {last}"):
        load(copy)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="not a readable safetensors file: its header is cut off"):
        load(copy)


def load_places(file):
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [(name, entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]


def test_files_that_are_missing(copy):
    shard = sorted(copy.glob("*.safetensors"))[1]
    held = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load(copy)
    shard.write_bytes(held)
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors\.index\.json"):
        load(copy)
    for file in copy.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no safetensors checkpoint"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(copy)


def test_an_index_stays_in_its_folder(copy):
    index = copy / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    held["weight_map"][A_LOG] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(copy)


def test_pickles_and_quantised_weights_are_refused(copy):
    for file in copy.glob("*.safetensors"):
        file.unlink()
    (copy / "model.safetensors.index.json").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickles can run code"):
        load(copy)
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match="a is stored as F8_E4M3"):
        load(copy)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
            "the entry of a is not dtype, shape and two offsets",
        ),
        ({"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}, "the entry of a is not"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "cannot fill bytes -4 to 0"),
        ({"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}, "cannot fill"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [1 << 62, (1 << 62) + 4]}, "leaves a hole after the header"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, r"stored as \['F32'\]"),
        ([], "the entry of a is not"),
    ],
)
def test_headers_that_lie(tmp_path, entry, words):
    header = json.dumps({"a": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=words):
        TensorFolder(file)


def test_headers_without_end(tmp_path):
    file = tmp_path / "model.safetensors"
    for length, text in ((1 << 63, b"{}"), (200_000, b"[" * 200_000), (4, b"\xff\xff{}")):
        file.write_bytes(length.to_bytes(8, "little") + text)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            TensorFolder(file)


def test_an_index_that_is_none(copy):
    index = copy / "model.safetensors.index.json"
    for text in ("[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[" * 200_000, '{"weight_map": {"a": ".."}}'):
        index.write_text(text)
        with pytest.raises((CheckpointError, FileNotFoundError), match=r"not an index of tensors|missing .*\.\."):
            load(copy)


def test_one_tensor_in_two_shards(copy):
    first, second, *_ = sorted(copy.glob("*.safetensors"))
    tensors, held = load_file(second), load_file(first)
    name = min(held)
    save_file(tensors | {name: held[name]}, second)
    with pytest.raises(CheckpointError, match=f"{name} is in {first.name} and again in {second.name}"):
        load(copy)


def test_fields_of_another_kind_are_refused(copy):
    raw = json.loads((copy / "config.json").read_text())
    for section, change in (("text_config", {"hidden_size": None}), ("vision_config", {"patch_size": "4"})):
        (copy / "config.json").write_text(json.dumps(raw | {section: raw[section] | change}))
        with pytest.raises(CheckpointError, match="omni"):
            load(copy)
    for dtype in ("int8", "float31"):
        with pytest.raises(ValueError, match="dtype must name floating-point numbers"):
            load(copy, dtype=dtype)


def test_shards_of_several_dtypes(copy):
    """Layers that are stacked get a dtype that holds them all; numbers that do not float are no weights."""
    want = flatten(load(copy).params)
    half, one = "language_model.backbone.layers.0.mixer.in_proj.weight", "language_model.backbone.norm_f.weight"
    edit(copy, lambda t: t.update({name: t[name].astype(np.float16) for name in (half, one) if name in t}))
    found = flatten(load(copy).params)
    assert (found["decoder/mamba/in_proj"].dtype, found["decoder/norm_f"].dtype) == (jnp.float32, jnp.float16)
    np.testing.assert_allclose(found["decoder/mamba/in_proj"][0], want["decoder/mamba/in_proj"][0], atol=1e-3)
    np.testing.assert_array_equal(found["decoder/mamba/in_proj"][1], want["decoder/mamba/in_proj"][1])
    edit(copy, lambda t: one in t and t.update({one: t[one].astype(np.int8)}))
    with pytest.raises(CheckpointError, match=f"no floating-point numbers: {one} is stored as int8"):
        load(copy)


def test_limits_of_the_processors_files(tmp_path):
    """Where transformers looks for them: in processor_config.json, then in the files of their own."""
    path = samples.write_sample("qwen3_vl", tmp_path / "qwen3")
    assert load(path).config.image_pixels == (64, 2048)
    (path / "video_preprocessor_config.json").write_text('{"size": {"shortest_edge": 128, "longest_edge": 8192}}')
    config = load(path).config
    assert (config.frame_pixels, config.video_pixels) == ((128, 8192), 8192)
    assert np.prod(geometry.frame_size(config, 400, 560, 8)) * 8 <= 8192
    nested = {"image_processor": {"min_pixels": 256, "max_pixels": 4096}}
    (path / "processor_config.json").write_text(json.dumps(nested))
    assert load(path).config.image_pixels == (256, 4096)
    (path / "video_preprocessor_config.json").write_text('{"size": {"shortest_edge": 9000, "longest_edge": 8192}}')
    with pytest.raises(CheckpointError, match="at least 9000 pixels and at most 8192"):
        load(path)


def test_no_code_of_a_checkpoint_runs(copy, tmp_path):
    evidence = tmp_path / "ran"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py"):
        (copy / name).write_text(f"open({str(evidence)!r}, 'w').close()\n")
    raw = json.loads((copy / "config.json").read_text())
    raw["auto_map"] = {"AutoModel": "modeling_x.X", "AutoConfig": "configuration_x.X"}
    (copy / "config.json").write_text(json.dumps(raw))
    (copy / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    model = load(copy)
    with pytest.raises(ValueError, match="chat template failed: SecurityError"):
        model.tokenizer.chat([{"role": "user", "content": "x"}])
    assert not evidence.exists()


def test_chat_templates(copy):
    tokenizer = PublishedTokenizer.from_folder(copy)
    messages = [
        {"role": "system", "content": "Be brief. /no_think"},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>hm</think> Two."},
        {"role": "user", "content": "Three?"},
    ]
    want = (
        "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\nOne?\n<SPECIAL_11>Assistant\nTwo.\n<SPECIAL_12>\n"
        "<SPECIAL_11>User\nThree?\n<SPECIAL_11>Assistant\n<think></think>"
    )
    assert tokenizer.chat(messages) == want
    (copy / "chat_template.jinja").unlink()
    assert PublishedTokenizer.from_folder(copy).chat(messages, nemotron_vl.CHAT) == want
    texts = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = {
        "chat_template": [
            {"name": "tool_use", "template": "t"},
            {"name": "default", "template": "{{ bos_token }}d" + texts},
        ]
    }
    config["bos_token"] = {"content": "<s>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert PublishedTokenizer.from_folder(copy).chat(messages).startswith("<s>dBe brief.")
    (copy / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    with pytest.raises(ValueError, match="no system here"):
        PublishedTokenizer.from_folder(copy).chat(messages)
    for text in (
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ messages[9].content.x }}",
        "{% for %}",
        "{{ range(10 ** 9) }}",
    ):
        (copy / "chat_template.jinja").write_text(text)
        with pytest.raises(ValueError, match="chat template failed"):
            PublishedTokenizer.from_folder(copy).chat(messages)
    (copy / "chat_template.jinja").unlink()
    (copy / "tokenizer_config.json").write_text('{"chat_template": 7}')
    with pytest.raises(CheckpointError, match="chat template is not text but int"):
        PublishedTokenizer.from_folder(copy)


def test_cached_copy(source, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load(source, cache=cache, dtype="bfloat16")
    monkeypatch.setattr(folders, "read_params", None)  # it is not converted again
    again = load(source, cache=cache, dtype="bfloat16")
    equal(first.params, again.params)
    assert (again.config, again.style, again.buckets, again.name) == (
        first.config,
        first.style,
        first.buckets,
        first.name,
    )
    direct = load(cache, dtype="float32")
    assert flatten(direct.params)["embed"].dtype == jnp.float32
    assert direct.tokenizer.chat([{"role": "user", "content": "a"}]) == first.tokenizer.chat(
        [{"role": "user", "content": "a"}]
    )
    with pytest.raises(TypeError):  # another dtype is another copy
        load(source, cache=cache)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine exists and is not an Orbax copy"):  # before anything is read
        load(source, cache=tmp_path / "mine")


@pytest.mark.slow
def test_onto_a_mesh_and_onto_another(source, tmp_path):
    """Streamed onto four devices, cached, and restored onto two: in a process of its own, which has that many."""
    code = f"""
import jax, numpy as np
from hybridvlm.checkpoints import hf
from hybridvlm.inference.model import load
from hybridvlm.models.weights import flatten
from hybridvlm.sharding import make_mesh
hf.PIECE_BYTES = 2048
source, cache = {str(source)!r}, {str(tmp_path / "cache")!r}
one = flatten(load({str(source)!r}).params)
four = make_mesh(fsdp=2, tensor=2)
models = load(source, mesh=four, cache=cache), load(source, mesh=make_mesh(tensor=2, devices=jax.devices()[:2]), cache=cache)
here = flatten(models[0].params)
for model in models:
    assert all(leaf.sharding.mesh == model.mesh for leaf in jax.tree.leaves(model.params))
    for name, got in flatten(model.whole_params()).items():
        np.testing.assert_array_equal(np.asarray(one[name]), got, err_msg=name)
assert len(here["decoder/mamba/out_proj"].addressable_shards[0].data.shape) == 3
assert here["lm_head"].addressable_shards[0].data.shape[1] * 2 == one["lm_head"].shape[1]
print("same")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT | flags, capture_output=True, text=True)
    assert done.stdout.endswith("same\n"), done.stderr[-2000:]


@pytest.mark.slow
def test_answers_on_meshes_of_all_kinds(source):
    """Axes left out, and axes as `jax.make_mesh` makes them: the same words as without a mesh."""
    code = f"""
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from hybridvlm.inference.model import load
from hybridvlm.config import Buckets
from hybridvlm.sharding import full_mesh, shard_params
buckets = Buckets(frames=(2,), text=(128,), max_new=2)
devices = np.array(jax.devices())
meshes = [
    None,
    Mesh(devices[:2], ("tensor",)),
    jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2),
]
said = []
for mesh in meshes:
    model = load({str(source)!r}, mesh=mesh, buckets=buckets)
    if mesh is not None:
        held = jax.tree.leaves(model.params)[0].sharding.mesh
        assert set(held.axis_types) == {{AxisType.Auto}} and (held.devices.ravel() == mesh.devices.ravel()).all()
    said.append(model.ask(None, "What is it?").tokens)
assert said[0] and all(answer == said[0] for answer in said), said
whole = load({str(source)!r}).params
cut = shard_params(whole, model.config, meshes[2])
assert jax.tree.leaves(cut)[0].sharding.mesh == full_mesh(meshes[2])
print("same")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"}
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT | flags, capture_output=True, text=True)
    assert done.stdout.endswith("same\n"), done.stderr[-2000:]


def test_a_killed_conversion_leaves_nothing_half_written(source, tmp_path):
    """Killed after its first shard: nothing new, and an older checkpoint as it was; the next one clears up."""
    code = """
import os, signal, sys
from hybridvlm.checkpoints import hf, samples
whole = hf.write_tensors
def write(path, *rest):
    if path.name.startswith("model-00002"):
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, *rest)
hf.write_tensors = write
samples.write_sample("nemotron_h", sys.argv[1], seed=5)
"""
    new, old = tmp_path / "new", samples.write_sample("nemotron_h", tmp_path / "old")
    before = load(old).params
    for path in (new, old):
        done = subprocess.run([sys.executable, "-c", code, str(path)], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
    assert not new.exists()
    equal(load(old).params, before)
    assert len(list(tmp_path.glob(".*"))) == 2
    samples.write_sample("nemotron_h", new, seed=5)
    samples.write_sample("nemotron_h", old, seed=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    equal(load(new).params, load(old).params)


def test_a_killed_copy_leaves_nothing_half_written(source, tmp_path):
    """The Orbax copy, killed after its weights: there is none, and the next load makes it."""
    code = """
import os, signal, sys
from hybridvlm.inference.model import load
from hybridvlm.tokenizers.published import PublishedTokenizer
PublishedTokenizer.save = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)
load(sys.argv[1], cache=sys.argv[2])
"""
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(cache)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    assert not cache.exists()
    equal(load(source, cache=cache).params, load(cache).params)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_others_left_stays(tmp_path):
    """Folders in the making are cleared away for dead processes of this host alone."""
    ours, theirs = tmp_path / f".x.999999999-{_host()}.a", tmp_path / ".x.999999999-other.a"
    for path in (ours, theirs):
        path.mkdir()
    with whole_folder(tmp_path / "x", lambda old: True) as new:
        (new / "a").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [theirs.name, "x"]


def test_the_hub(source, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = {}

    def fetch(name, **options):
        asked.update(name=name, **options)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    load("nvidia/some-model", revision="abc123")
    assert (asked["name"], asked["revision"]) == ("nvidia/some-model", "abc123")
    assert not any(pattern.endswith((".py", ".bin", ".pt")) or pattern == "*" for pattern in asked["allow_patterns"])

    def offline(name, **options):
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"'nvidia/other' .* at revision v2: outgoing traffic"):
        load("nvidia/other", revision="v2")
    with pytest.raises(ValueError, match="goes with an id of the hub"):
        load(source, revision="v2")


def test_save_published_refuses_what_does_not_fit(source, tmp_path):
    model = load(source)
    table = nemotron_vl.weight_map(model.config)
    with pytest.raises(ValueError, match=r"lm_head should be \(32, 288\), is \(288, 32\)"):
        save_published(tmp_path / "x", model.params | {"lm_head": model.params["lm_head"].T}, table, {})
    assert not (tmp_path / "x").exists()


SIZES = {
    # LM 12,320,486,912 + RADIO 651,645,440 + projector 209,720,320
    "nemotron_nano_12b_v2_vl": 13_181_852_672,
}


@pytest.mark.parametrize("name", ["nemotron_nano_12b_v2_vl", "nemotron_3_nano_omni_30b_a3b"])
def test_full_size(name):
    """Every array of the full-size model comes from published tensors, once, and has the shape that the module declares."""
    config = load_model_config(name)
    table = nemotron_vl.weight_map(config)
    expected = folders.expected_shapes(config)
    assert {job[1].target: table.target_shape(job) for job in table.jobs} == expected
    assert len({job[1].target for job in table.jobs}) == len(table.jobs)
    shapes = table.shapes()
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert count == sum(int(np.prod(shape)) for shape in expected.values())
    for stored in shapes:  # the names that are written are the names that are read
        parts = table.canonical(stored)
        assert table.published(parts[0]) in shapes or any(fused.join(parts[0]) for fused in table.fused)
    if name in SIZES:
        assert count == SIZES[name]
        layer = "language_model.backbone.layers."
        assert shapes[f"{layer}0.mixer.in_proj.weight"] == (22656, 5120)
        assert shapes[f"{layer}0.mixer.conv1d.weight"] == (12288, 1, 4)
        assert shapes[f"{layer}1.mixer.up_proj.weight"] == (20480, 5120)
        assert shapes[f"{layer}7.mixer.k_proj.weight"] == (1024, 5120)
        assert shapes["language_model.lm_head.weight"] == (132096, 5120)
        assert shapes["vision_model.radio_model.model.blocks.31.attn.qkv.weight"] == (3840, 1280)
        assert shapes["vision_model.radio_model.model.patch_generator.pos_embed"] == (1, 16384, 1280)
        assert shapes["mlp1.3.weight"] == (5120, 20480)
    else:
        assert (config.count("M"), config.count("E"), config.count("*")) == (23, 23, 6)
        text = sum(int(np.prod(s)) for n, s in shapes.items() if n.startswith("language_model."))
        assert round(text / 1e9, 1) == 31.6
        assert shapes["language_model.backbone.layers.1.mixer.experts.127.down_proj.weight"] == (2688, 1856)
        assert shapes["vision_model.radio_model.model.patch_generator.video_embedder.weight"] == (1280, 1536)


def test_published_config_of_the_12b():
    """Fields as published leave sizes of the tower to its name, and rows to the tensors."""
    config = load_model_config("nemotron_nano_12b_v2_vl")
    shapes = nemotron_vl.weight_map(config).shapes()
    raw = samples.raw_config("nemotron_nano_vl")
    raw["llm_config"] |= {
        "vocab_size": 131072,
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 20480,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 80,
        "n_groups": 8,
        "hybrid_override_pattern": config.pattern,
        "eos_token_id": 12,
    }
    raw |= {"vision_config": {"args": {"model": "vit_huge_patch16_224"}}, "patch_size": 16, "force_image_size": 512}
    raw |= {"projector_hidden_size": 20480, "vit_hidden_size": 1280}
    found = nemotron_vl.config_from_hf(raw, shapes)
    same = dataclasses.replace(
        config,
        name="",
        chunk_size=found.chunk_size,
        vision=dataclasses.replace(config.vision, max_tiles=found.vision.max_tiles),
    )
    assert found == same
    raw["vision_config"]["args"]["model"] = "vit_tiny"
    with pytest.raises(ValueError, match="vit_tiny"):
        nemotron_vl.config_from_hf(raw, shapes)
    jax.eval_shape(lambda key: nemotron_vl.init(found, key), jax.random.key(0))
