"""config.json as transformers reads it: every default, what hides what, what is refused by name, and heads that differ."""

import copy
import dataclasses
import json
import math
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hybridvlm.bench import parity
from hybridvlm.checkpoints import CheckpointError, TensorFolder, samples
from hybridvlm.config import ModelConfig, VisionConfig
from hybridvlm.inference.model import load
from hybridvlm.models import config_defaults
from hybridvlm.models.family import family_of


def config_of(raw, shapes=None):
    return family_of(raw).config_from_hf(raw, shapes)


def fields(config, **expected):
    assert {name: getattr(config, name) for name in expected} == expected


# -- defaults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", config_defaults.CLASSES)
def test_every_default_is_that_of_the_class(name):
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    cls, table = getattr(transformers, name), config_defaults.CLASSES[name]
    held = {field.name: field.default for field in dataclasses.fields(cls)}
    assert {key: held[key] for key in table} == table
    about_classes = {
        *("model_type", "base_config_key", "attribute_map", "sub_configs_defaults", "default_theta"),
        *("default_rope_type", "_legacy_field_names", "base_model_tp_plan", "base_model_ep_plan"),
    }
    assert set(cls.__annotations__) - about_classes - set(table) == set()


def test_rotary_defaults_are_those_of_the_classes():
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    for generation, name in ((2, "Qwen2VL"), (3, "Qwen3VL")):
        assert (
            getattr(transformers, f"{name}TextConfig").default_theta == config_defaults.ROPE[generation]["rope_theta"]
        )
    pytest.importorskip("torch", reason="needs the [parity] extra")
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    for generation, cls, config in (
        (2, Qwen2VLRotaryEmbedding, transformers.Qwen2VLTextConfig()),
        (3, Qwen3VLTextRotaryEmbedding, transformers.Qwen3VLTextConfig()),
    ):
        assert tuple(cls(config).mrope_section) == config_defaults.ROPE[generation]["mrope_section"]


def test_sparse_qwen2():
    """As transformers 4.45 saves a finetuned model: flat, and of the tower what is not default."""
    raw = {
        "model_type": "qwen2_vl",
        "vision_config": {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
    }
    for shape in ({}, {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2}):
        config = config_of(raw | shape)
        fields(
            config.vision,
            **{"width": 1280, "layers": 32, "heads": 16, "patch_size": 14, "downsample": 2, "mlp_width": 5120},
            **{"temporal_patch": 2, "activation": "quick_gelu"},
        )
        fields(config, rope_theta=1e6, rope_sections=(16, 24, 24), rope_interleaved=False, norm_eps=1e-5, pad_id=151643)
        fields(config, mlp_width=29568, vocab_size=152064, eos_ids=(151645,), tie_embeddings=False, pattern="*-" * 80)
    fields(config, head_dim=128, kv_heads=2, width=1536)
    fields(config_of(raw), head_dim=128, kv_heads=8, width=8192)
    assert config_of(raw | {"num_key_value_heads": None}).kv_heads == 64  # null is not left out: every head its own
    other = copy.deepcopy(raw)
    other["vision_config"] |= {"depth": 4, "mlp_ratio": 2, "patch_size": [16, 16]}
    fields(config_of(other).vision, layers=4, mlp_width=2560, patch_size=16)


def test_sparse_qwen3():
    raw = {"model_type": "qwen3_vl", "text_config": {}, "vision_config": {"model_type": "qwen3_vl"}}
    config = config_of(raw)
    fields(config, rope_theta=5e5, rope_sections=(24, 20, 20), rope_interleaved=True, norm_eps=1e-6, head_dim=128)
    fields(config, width=4096, kv_heads=32, mlp_width=22016, vocab_size=151936, eos_ids=(), attention_bias=False)
    fields(config.vision, width=1152, layers=27, mlp_width=4304, position_rows=48, deepstack=(8, 16, 24), patch_size=16)
    # left out or false, its axes take turns; no further than a head reaches
    for rope in ({"rope_theta": 1e6}, {"mrope_interleaved": False}):
        text = {"head_dim": 32, "rope_parameters": {"rope_type": "default", **rope}}
        fields(config_of(raw | {"text_config": text}), rope_interleaved=True, rope_sections=(6, 5, 5))
    assert config_of(raw | {"text_config": {"rope_theta": 7e5}}).rope_theta == 7e5


def test_sparse_nemotron():
    for raw in ({"model_type": "nemotron_h"}, {"architectures": ["NemotronHForCausalLM"]}):
        config = config_of(raw)
        fields(config, pattern="ME*-", width=4096, mamba_heads=128, ssm_groups=8, ssm_state=128, experts=8)
        fields(config, kv_heads=8, head_dim=128, mlp_width=21504, shared_width=7688, eos_ids=(2,), norm_eps=1e-5)
    alias = {"mamba_n_groups": 4, "mamba_d_conv": 2, "num_local_experts": 6, "layer_types": ["mamba", "moe"]}
    fields(config_of(raw | alias), ssm_groups=4, conv_kernel=2, experts=6, pattern="ME")
    raw = {"model_type": "nemotron_h_omni", "text_config": {"hidden_size": 64}}
    for own in ({}, {"vision_config": {"hidden_size": 1280}}):
        config = config_of(raw | own)
        fields(config.vision, temporal_patch=2, layers=32, heads=16, mlp_width=5120, projector_width=4096, downsample=2)
        fields(config.vision, position_rows=128, prefix_tokens=10, patch_size=16)
    raw = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "num_hidden_layers": 3}
    fields(config_of(raw), pattern="MMM", vocab_size=32768, mamba_heads=128, mamba_head_dim=64, ssm_groups=8, pad_id=1)


def test_sparse_vamba():
    raw = {"model_type": "qwen2_vl", "hidden_size": 3584, "num_attention_heads": 28}
    raw |= {"num_key_value_heads": 4, "vision_mamba_mixer_config": {}}
    config = config_of(raw)
    fields(config, mamba_heads=112, ssm_state=128, alpha_balancing=True, norm_eps=1e-5, rope_sections=(16, 24, 24))
    fields(config.vision, width=1280, layers=32, mlp_width=5120)
    raw["vision_mamba_mixer_config"] = {"expand": 1, "headdim": 128, "d_state": 64}
    fields(config_of(raw), mamba_heads=28, mamba_head_dim=128, ssm_state=64)


def test_a_null_hides_nothing():
    raw = samples.raw_config("qwen2_vl")
    rope = raw["text_config"].pop("rope_parameters")
    raw |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 1]}, "rope_theta": 5e4, "hidden_size": 32}
    raw["text_config"] |= {"rope_scaling": None, "rope_parameters": None, "rope_theta": None, "hidden_size": None}
    fields(config_of(raw), rope_sections=(1, 2, 1), rope_theta=5e4, width=32)
    raw["rope_scaling"] = None
    with pytest.raises(
        ValueError, match="mrope_section must add up"
    ):  # the class's own sections are those of wide heads
        config_of(raw)
    raw["text_config"]["rope_parameters"] = rope
    fields(config_of(raw), rope_sections=(2, 1, 1), rope_theta=1e4)
    raw = samples.raw_config("nemotron_omni")
    raw["text_config"] |= {"eos_token_id": None, "layer_norm_epsilon": None}
    fields(config_of(raw | {"eos_token_id": 7, "layer_norm_epsilon": 1e-3}), eos_ids=(7,), norm_eps=1e-3)
    fields(config_of(raw), eos_ids=(), norm_eps=1e-5)
    raw["vision_config"] |= {"num_hidden_layers": None, "norm_mean": None}
    fields(config_of(raw | {"norm_mean": [0.1, 0.2, 0.3]}).vision, layers=32, pixel_mean=(0.1, 0.2, 0.3))
    raw = samples.raw_config("vamba")
    raw["vision_mamba_mixer_config"] |= {"d_conv": None, "hidden_dim": None}
    fields(config_of(raw), conv_kernel=4)


# family, its table, fields outside, fields that are left out inside, and what the decoder then has
OUTSIDE = [
    ("qwen2_vl", "text_config", {"rms_norm_eps": 1e-3}, {"rms_norm_eps": None}, {"norm_eps": 1e-5}),
    ("qwen3_vl", "text_config", {"rms_norm_eps": 1e-3}, {"rms_norm_eps": None}, {"norm_eps": 1e-6}),
    (
        "qwen3_vl",
        "text_config",
        {"head_dim": 32, "hidden_size": 64},
        {"head_dim": None},
        {"head_dim": 128, "width": 32},
    ),
    (
        "qwen3_vl",
        "text_config",
        {"num_key_value_heads": 1},
        {"num_key_value_heads": None, "num_attention_heads": None},
        {"kv_heads": 32},
    ),
    ("qwen3_vl", "text_config", {"attention_bias": True}, {"attention_bias": None}, {"attention_bias": False}),
    ("qwen3_vl", "text_config", {"rope_theta": 5.0}, {"rope_parameters": None}, {"rope_theta": 5e5}),
    (
        "qwen2_vl",
        "text_config",
        {"intermediate_size": 16, "hidden_act": "gelu"},
        {"intermediate_size": None, "hidden_act": None},
        {"mlp_width": 29568},
    ),
    ("nemotron_omni", "text_config", {"layer_norm_epsilon": 1e-3}, {"layer_norm_epsilon": None}, {"norm_eps": 1e-5}),
    ("nemotron_omni", "text_config", {"mamba_d_conv": 2}, {"conv_kernel": None}, {"conv_kernel": 4}),
    (
        "nemotron_omni",
        "text_config",
        {"routed_scaling_factor": 9.0},
        {"routed_scaling_factor": None},
        {"router_scale": 1.0},
    ),
    (
        "nemotron_nano_vl",
        "llm_config",
        {"layer_norm_epsilon": 1e-3, "use_bias": True},
        {"layer_norm_epsilon": None, "use_bias": None},
        {"norm_eps": 1e-5, "mamba_bias": False},
    ),
]


@pytest.mark.parametrize(("name", "nested", "outer", "left_out", "expected"), OUTSIDE)
def test_what_a_nested_table_leaves_out_is_not_looked_for_outside(name, nested, outer, left_out, expected):
    raw = samples.raw_config(name)
    raw[nested] = {key: value for key, value in raw[nested].items() if key not in left_out}
    with pytest.warns(UserWarning, match=r"stands outside \w+_config, where it is not read: transformers"):
        config = config_of(raw | outer)
    fields(config, **expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_of(raw) == config
        if name != "nemotron_nano_vl":  # which transformers has no class of
            assert_like_transformers(raw | outer, config)


def assert_like_transformers(raw, config):
    """The fields that a config shares with the class of the reference, where that is installed."""
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    names = {"qwen2_vl": "Qwen2VLConfig", "qwen3_vl": "Qwen3VLConfig"}
    cls = getattr(transformers, names.get(raw["model_type"], "NemotronH_Omni_Reasoning_V3_Config"))
    text = cls(**copy.deepcopy(raw)).text_config
    shared = {
        **{"hidden_size": "width", "num_key_value_heads": "kv_heads", "num_attention_heads": "attention_heads"},
        **{"intermediate_size": "mlp_width", "rms_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps"},
        **{"conv_kernel": "conv_kernel", "routed_scaling_factor": "router_scale", "attention_bias": "attention_bias"},
    }
    for theirs, ours in shared.items():
        if theirs in type(text).__dataclass_fields__ and (ours != "mlp_width" or "-" in config.pattern):
            assert getattr(config, ours) == getattr(text, theirs), theirs
    if raw["model_type"] in names:
        assert config.rope_theta == text.rope_parameters["rope_theta"]


def test_rotary_fields_are_one_thing():
    raw = samples.raw_config("qwen2_vl")
    inner = raw["text_config"]
    inner["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    other = {"rope_theta": 5.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 1]}}
    with pytest.warns(UserWarning, match="rope_theta 5.0 stands outside"):
        config = config_of(raw | other)
    fields(config, rope_theta=1e6, rope_sections=(2, 1, 1))
    assert_like_transformers(raw | other, config)
    # a null inside hides nothing outside; a table inside does
    inner["rope_theta"] = inner["rope_scaling"] = None
    fields(config_of(raw | other), rope_theta=5.0, rope_sections=(2, 1, 1))
    del inner["rope_parameters"], inner["rope_theta"]
    fields(config_of(raw | other), rope_theta=5.0, rope_sections=(1, 2, 1))


def test_flat_configs():
    """As Qwen2-VL and VAMBA were released; Qwen3-VL never was, and transformers reads nothing of such a file."""
    for name in ("qwen2_vl", "qwen3_vl"):
        raw = samples.raw_config(name)
        nested = config_of(raw)
        flat = raw.pop("text_config") | raw
        for more in ({}, {"text_config": None}):
            if name == "qwen2_vl":
                assert config_of(flat | more) == nested
            else:
                with pytest.raises(ValueError, match="stands outside text_config, which is not there"):
                    config_of(flat | more)


def test_colours_of_the_processor():
    for name, usual in (
        ("qwen2_vl", VisionConfig.pixel_mean),
        ("qwen3_vl", (0.5, 0.5, 0.5)),
        ("vamba", VisionConfig.pixel_mean),
    ):
        raw = samples.raw_config(name)
        fields(config_of(raw).vision, pixel_mean=usual)
        raw["preprocessor"] = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
        fields(config_of(raw).vision, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(1.0, 2.0, 3.0))
        raw["preprocessor"] = {"image_mean": 0.5}
        with pytest.raises(ValueError, match=r"^preprocessor_config\.json: image_mean must be a list of 3 numbers"):
            config_of(raw)


# -- what is read, and what is refused by name --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nemotron_h", {"num_nextn_predict_layers": 1}),
        ("nemotron_h", {"sliding_window": 128}),
        ("nemotron_h", {"time_step_limit": [0.0, 0.1]}),
        ("nemotron_h", {"attention_bias": True, "use_bias": True, "mlp_bias": True}),
        ("nemotron_h", {"mamba_proj_bias": True, "hidden_act": "gelu"}),
        ("nemotron_h_moe", {"n_shared_experts": 2}),
        ("nemotron_h_moe", {"mlp_bias": True}),
        ("qwen3_vl", {"text_config": {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4}}),
        ("qwen2_vl", {"text_config": {"use_sliding_window": True, "max_window_layers": 3}}),
        ("qwen2_vl", {"text_config": {"attention_dropout": 0.1, "mlp_bias": True}}),
    ],
)
def test_what_the_reference_reads_past(name, change):
    """Of a checkpoint without the tensors that such a field would bring, the same model as without it."""
    raw = samples.raw_config(name)
    shapes = family_of(raw).weight_map(config_of(raw)).shapes()
    for key, value in change.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    assert config_of(raw, shapes) == config_of(samples.raw_config(name), shapes)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen2_vl", {"text_config": {"use_sliding_window": True, "max_window_layers": 1}}, "use_sliding_window"),
        ("qwen2_vl", {"text_config": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}}, "yarn"),
        ("qwen3_vl", {"text_config": {"rope_parameters": {"type": "linear"}}}, "linear"),
        ("qwen3_vl", {"vision_config": {"rope_parameters": {"rope_theta": 1e5}}}, "rope_theta"),
        ("qwen3_vl", {"vision_config": {"num_position_embeddings": 15}}, "not a square"),
        ("nemotron_omni", {"text_config": {"num_nextn_predict_layers": 1}}, "num_nextn_predict_layers"),
        ("nemotron_omni", {"video_temporal_patch_size": 3}, "must be equal"),
        ("nemotron_omni", {"vision_config": {"use_swiglu_ffn": True}}, "use_swiglu_ffn"),
        ("nemotron_h", {"mlp_hidden_act": "gelu"}, "mlp_hidden_act"),
        ("nemotron_h", {"layers_block_type": ["mamba", "sparse"]}, "sparse"),
        ("vamba", {"vision_mamba_mixer_config": {"dt_limit": [0.0, 0.1]}}, "dt_limit"),
        ("vamba", {"vision_mamba_mixer_config": {"bias": True}}, "vision_mamba_mixer_config.bias"),
    ],
)
def test_another_computation_is_refused_by_name(name, change, words):
    raw = samples.raw_config(name)
    for key, value in change.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=words):
        config_of(raw)


ODD = (
    "32",
    "",
    True,
    None,
    [],
    [1, 2],
    {},
    {"a": {"b": 1}},
    2.5,
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    10**7,
    10**12,
    10**400,
)
KINDS = {**samples.RAW, "mamba2": {"model_type": "mamba2"} | config_defaults.MAMBA2 | {"num_hidden_layers": 2}}


def _places(table, path=()):
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _places(value, (*path, key))


@pytest.mark.parametrize("name", KINDS)
def test_every_field_with_every_odd_value(name):
    """A config or one line that says what is wrong with which field; nothing of such a size is built."""
    raw = copy.deepcopy(KINDS[name])
    kind = family_of(raw)
    shapes = dict([*kind.weight_map(kind.config_from_hf(raw)).shapes().items()][:6])
    known = {
        "text_config": config_defaults.QWEN2_TEXT | config_defaults.QWEN3_TEXT,
        "vision_config": config_defaults.QWEN2_VISION | config_defaults.QWEN3_VISION,
        "vision_mamba_mixer_config": config_defaults.VAMBA_MIXER,
    }
    if name.startswith("nemotron"):
        known = dict.fromkeys(("text_config", "llm_config"), config_defaults.NEMOTRON_H)
        known["vision_config"] = config_defaults.RADIO
    for part, more in known.items():
        if isinstance(raw.get(part), dict):
            raw[part] = dict.fromkeys(more) | raw[part]
    if name in ("nemotron_h", "nemotron_h_moe"):
        raw = dict.fromkeys(config_defaults.NEMOTRON_H) | raw
    refused = 0
    for place in list(_places(raw)):
        for odd in ODD:
            changed = copy.deepcopy(raw)
            level = changed
            for key in place[:-1]:
                level = level[key]
            level[place[-1]] = odd
            try:
                config = family_of(changed).config_from_hf(changed, shapes)
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 400, (place, odd)
            else:
                assert isinstance(config, ModelConfig) and len(config.pattern) <= 8192
                assert config.vision is None or isinstance(config.vision, VisionConfig)
    assert refused > 100


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"hidden_size": "32"}', r"config\.json: text_config\.hidden_size must be a whole number from 1 .* got '32'"),
        ('{"rms_norm_eps": NaN}', r"text_config\.rms_norm_eps must be a number"),
        ('{"num_hidden_layers": 10000000}', r"text_config\.num_hidden_layers must be a whole number"),
        ('{"vocab_size": 1000000000000}', r"text_config\.vocab_size must be"),
        ('{"tie_word_embeddings": "false"}', r"text_config\.tie_word_embeddings must be true or false"),
        ('{"eos_token_id": [[1]]}', r"text_config\.eos_token_id must be a token's id"),
        ('{"hidden_act": "silu", "hidden_act": "gelu"}', "the key 'hidden_act' stands twice"),
        ("[" * 100000, r"config\.json is not JSON"),
        ('{"hidden_size": ' + "1" * 5000 + "}", r"config\.json is not JSON"),
    ],
)
def test_a_bad_config_is_one_line(sources, tmp_path, text, words):
    folder = tmp_path / "qwen"
    folder.mkdir()
    for file in sources("qwen2_vl").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    raw = samples.raw_config("qwen2_vl")
    if text.startswith("["):
        (folder / "config.json").write_text(text)
    else:
        own = json.dumps(raw["text_config"])
        raw["text_config"] = "HERE"
        merged = (
            text
            if "hidden_act" in text
            else text[:-1]
            + ", "
            + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in json.loads(own).items() if f'"{k}"' not in text)
            + "}"
        )
        (folder / "config.json").write_text(json.dumps(raw).replace('"HERE"', merged))
    with pytest.raises(CheckpointError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


# -- heads --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> the folder of a sample in one file, written once."""
    made = {}

    def source(name):
        if name not in made:
            path = samples.write_sample(name, tmp_path_factory.mktemp("source") / name)
            tensors = {}
            for file in sorted(path.glob("*.safetensors")):
                tensors |= load_file(file)
                file.unlink()
            (path / "model.safetensors.index.json").unlink(missing_ok=True)
            save_file(tensors, path / "model.safetensors")
            made[name] = path
        return made[name]

    return source


def copy_of(source, path, raw, change=lambda tensors: None):
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "config.json").write_text(json.dumps(raw))
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


# where a family's config says it, and whether transformers makes head and embedding one for it
TIES = [
    ("qwen2_vl", {}, {"tie_word_embeddings": True}, True),
    ("qwen2_vl", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True),
    ("qwen3_vl", {}, {"tie_word_embeddings": True}, False),
    ("qwen3_vl", {"tie_word_embeddings": True}, {}, True),
    ("vamba", {"tie_word_embeddings": True}, None, True),
    ("nemotron_h", {"tie_word_embeddings": True}, None, False),
    ("nemotron_omni", {}, {"tie_word_embeddings": True}, False),
    ("nemotron_nano_vl", {"tie_word_embeddings": True}, {}, False),
]


@pytest.mark.parametrize(("name", "outer", "inner", "tied"), TIES)
def test_a_head_of_its_own_is_never_dropped(name, outer, inner, tied, sources, tmp_path):
    raw = samples.raw_config(name)
    nested = "llm_config" if "llm_config" in raw else "text_config"
    raw |= outer
    if inner is not None:
        raw[nested] |= inner
    elif nested in raw:
        raw[nested].pop("tie_word_embeddings", None)
    head = next(key for key in TensorFolder(sources(name)) if key.endswith("lm_head.weight"))
    embed = next(
        key
        for key in TensorFolder(sources(name))
        if "embed" in key and key.endswith((".weight",)) and "patch" not in key
    )
    own = copy_of(sources(name), tmp_path / "own", raw)
    model = load(own)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(model.params["lm_head"], TensorFolder(own)[head].T)
    same = copy_of(sources(name), tmp_path / "same", raw, lambda t: t.update({head: t[embed].copy()}))
    assert load(same).config.tie_embeddings == tied
    # whoever saved it without a head meant the embedding
    bare = copy_of(sources(name), tmp_path / "bare", raw, lambda t: t.pop(head))
    assert load(bare).config.tie_embeddings and "lm_head" not in load(bare).params


def drop_head(tensors):
    for key in [key for key in tensors if key.endswith("lm_head.weight")]:
        del tensors[key]


def test_no_head_and_no_tie_is_refused(sources, tmp_path):
    for name in ("qwen3_vl", "nemotron_h"):
        raw = samples.raw_config(name)
        bare = copy_of(
            sources(name),
            tmp_path / name,
            raw,
            lambda t: t.pop("lm_head.weight", t.pop("language_model.lm_head.weight", None)),
        )
        with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
            load(bare)


# -- numbers ------------------------------------------------------------------------------------------------------------

REFERENCE = [
    ("qwen3_vl", {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}}),
    ("qwen3_vl", {"text_config": {"rope_parameters": None}}),
    ("qwen3_vl", {"text_config": {"tie_word_embeddings": True, "attention_bias": True}}),
    ("qwen3_vl", {"text_config": {"num_hidden_layers": 1}}),
    ("qwen2_vl", {"text_config": {"rms_norm_eps": None}}),
    ("qwen2_vl", {"text_config": {"tie_word_embeddings": True}}),
    ("nemotron_h", {"tie_word_embeddings": True, "attention_bias": True}),
    ("nemotron_h", {"use_bias": True, "mlp_bias": True, "sliding_window": 2, "time_step_limit": [0.0, 0.05]}),
    ("nemotron_h_moe", {"n_shared_experts": 2, "mlp_bias": True, "moe_latent_size": 12, "num_nextn_predict_layers": 1}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "change"), REFERENCE)
def test_logits_of_the_reference(name, change, tmp_path, monkeypatch):
    """A model of the reference class, saved by it under such a config, against ours (needs the [parity] extra)."""
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    raw = samples.raw_config(name)
    for key, value in change.items():
        raw[key] = {k: v for k, v in (raw[key] | value).items() if v is not None} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    cls = getattr(transformers, raw["architectures"][0])
    config = cls.config_class.from_pretrained(tmp_path)
    if name.startswith("nemotron"):
        config.time_step_min = 0.001  # a class starts dt_bias from its logarithm
    torch.manual_seed(0)
    model = cls(config).eval().float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
            if key.endswith("dt_bias"):
                parameter.copy_(torch.rand_like(parameter) * 3 - 4)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    samples.write_text_files(name, tmp_path)
    reference = cls.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    with jax.default_matmul_precision("highest"):
        found, layout, more = parity.ours(tmp_path, name)
    monkeypatch.setitem(samples.RAW, name, raw)
    theirs = parity.theirs(reference, name, layout, more)
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(found, theirs, atol=parity.TOLERANCE)
