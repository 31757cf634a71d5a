"""The library's own checkpoint folder: what goes in comes out, and what does not fit is refused by name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.micro_checkpoint import WORDS, micro_model
from safetensors.numpy import load_file, save_file

from hybridvlm.checkpoints import folder
from hybridvlm.config import Buckets, Reduction, Schedule
from hybridvlm.inference.model import Model, load
from hybridvlm.tokenizers.word_level import UnknownWord, WordLevel


@pytest.fixture(scope="module")
def model():
    return micro_model(reduction=Reduction("str", 0.5, schedule=Schedule(shape="linear", never=(0,))))


@pytest.fixture
def saved(model, tmp_path):
    return folder.save_folder(tmp_path / "micro", model)


def leaves(params):
    return {name: np.asarray(leaf) for name, leaf in folder.flatten(params).items()}


def edit_config(path, **changes):
    file = path / "config.json"
    data = json.loads(file.read_text())
    data |= changes
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_round_trip_keeps_everything(model, saved):
    again = load(saved)
    assert again.config == model.config
    assert (again.buckets, again.style, again.reduction) == (model.buckets, model.style, model.reduction)
    before, after = leaves(model.params), leaves(again.params)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])
    assert again.tokenizer.encode("Red where ?") == model.tokenizer.encode("red where ?")
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_half_storage_and_half_dtype(model, tmp_path):
    path = folder.save_folder(tmp_path / "half", model, storage="float16")
    full = folder.save_folder(tmp_path / "full", model)
    size = [(p / "model.safetensors").stat().st_size for p in (path, full)]
    assert size[0] < 0.7 * size[1]
    assert {leaf.dtype for leaf in leaves(load(path).params).values()} == {np.dtype("float32")}
    loaded = leaves(load(path, dtype="bfloat16").params)
    assert loaded["embed"].dtype == jnp.bfloat16
    assert loaded["decoder/mamba/A_log"].dtype == np.float32  # decays keep their precision


def test_load_arguments_win(saved):
    buckets, reduction = Buckets(frames=(2,), text=(4,), max_new=1), Reduction("uniform", 0.3)
    again = load(saved, buckets=buckets, reduction=reduction)
    assert (again.buckets, again.reduction) == (buckets, reduction)


def test_saving_replaces_a_checkpoint_and_nothing_else(model, saved, tmp_path):
    other = dataclasses.replace(model.config, name="other")
    folder.save_folder(saved, Model(other, model.params, model.tokenizer))
    assert load(saved).config.name == "other"
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("1")
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        folder.save_folder(precious, model)
    assert (precious / "chapter.txt").read_text() == "1"


def test_a_failed_save_leaves_the_old_one(model, saved):
    broken = jax.tree.map(lambda a: a, model.params)
    broken["embed"] = broken["embed"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="embed is not finite"):
        folder.save_folder(saved, Model(model.config, broken, model.tokenizer))
    huge = dict(model.params, embed=model.params["embed"] + 1e6)
    with pytest.raises(ValueError, match="embed is not finite in float16"):
        folder.save_folder(saved, Model(model.config, huge, model.tokenizer), storage="float16")
    np.testing.assert_array_equal(leaves(load(saved).params)["embed"], np.asarray(model.params["embed"]))
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer" if name.startswith("tok") else name):
        load(saved)


def test_unknown_name_lists_the_packaged_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny, tiny-reduced"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "not a checkpoint of this library"),
        ({"format": ...}, "belong to no family"),
        ({"version": 2}, "version 2"),
        ({"widht": 32}, "did you mean 'width'"),
        ({"pattern": "MX"}, "pattern"),
        ({"pattern": ...}, "pattern"),
        ({"reduction": {"budget": 0}}, "budget"),
        ({"style": {"colour": "red"}}, "colour"),
        ({"vocab_size": 3}, "more than the model's vocab_size"),
    ],
)
def test_wrong_config_is_refused_in_one_line(saved, change, words):
    edit_config(saved, **change)
    with pytest.raises(folder.CheckpointError, match=words) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_config_that_is_not_json(saved):
    (saved / "config.json").write_text('{"format": ')
    with pytest.raises(folder.CheckpointError, match=r"config\.json is not JSON"):
        load(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("decoder/norm_f"), "missing: decoder/norm_f"),
        (lambda t: t.update(spare=np.zeros(2, np.float32)), "not in the model: spare"),
        (lambda t: t.update(lm_head=t["lm_head"].T.copy()), r"shape: lm_head \[8, 32\] instead of \[32, 8\]"),
        (lambda t: t["embed"].__setitem__((0, 0), np.nan), "embed holds values that are not finite"),
        (lambda t: t.update({"decoder/norm_f": np.zeros(32, np.int32)}), "norm_f is stored as int32"),
    ],
)
def test_wrong_tensors_are_named(saved, change, words):
    edit_tensors(saved, change)
    with pytest.raises(folder.CheckpointError, match=words) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_truncated_weights_and_tokenizer(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(folder.CheckpointError, match="not a readable safetensors file"):
        load(saved)
    (saved / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load(saved)


def test_closed_vocabulary():
    tokenizer = WordLevel.from_words(WORDS)
    assert tokenizer.decode(tokenizer.encode("  WHAT red\n?")) == "what red ?"
    with pytest.raises(UnknownWord, match=r"'grean'; near it: green"):
        tokenizer.encode("what grean ?")
    with pytest.raises(UnknownWord, match="not a word of a question"):
        tokenizer.encode("red <pad>")
    with pytest.raises(UnknownWord, match="empty"):
        tokenizer.encode(" ")
    assert tokenizer.decode([0, 1, 99]) == "red <id 99>"
