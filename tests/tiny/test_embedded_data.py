"""What a clean install has: all splits of the images, the configs by name, and a clear word where tensorflow-datasets fails."""

import hashlib
import importlib.abc
import pathlib
import re
import sys
import tomllib

import numpy as np
import pytest

from hybridvlm.config_files import config_folder
from hybridvlm.tiny import assets, tiles
from hybridvlm.train import config_files

ROOT = pathlib.Path(__file__).parents[2]
# of the images and of where each class starts, as every source of Fashion-MNIST gives them
DIGESTS = {
    "train": "f6be4ec3c9871f213ced5c55647a4123514ac26b440cf0461d9bae18830783a7",
    "val": "d683fbb9673f3f8bc8ab4446197ab64aaf530b3d42219fe752099f8ab0cb4512",
    "test": "8e5f3a1c2e069d2c12335029ae9d93a3fa7449f82da8e4068ce9abe58f7e73b7",
}


@pytest.mark.parametrize("split", assets.SPLITS)
def test_the_packaged_images_are_the_source_s(split):
    """Numbers of images are what training and the benchmark are made of: neither a pixel nor the order may change."""
    bank = assets._read_packaged(split)
    assert hashlib.sha256(bank.images.tobytes() + bank.start.astype("<i8").tobytes()).hexdigest() == DIGESTS[split]
    keys = [hashlib.sha256(image.tobytes()).digest() for image in bank.images]
    for k in range(tiles.CLASSES):
        own = keys[bank.start[k] : bank.start[k + 1]]
        assert own == sorted(own)


def test_training_needs_no_source(tmp_path, monkeypatch):
    """Neither the Debian package, nor tensorflow-datasets, nor a network."""
    monkeypatch.setattr(assets, "DEBIAN", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assets.load_bank.cache_clear()
    try:
        assert len(assets.load_bank("train").label) == 26966
        with pytest.raises(assets.ImagesMissing):
            assets.read_source("train")
    finally:
        assets.load_bank.cache_clear()


def test_the_packaged_images_can_be_made_again(tmp_path, monkeypatch):
    banks = {split: assets.load_bank(split) for split in assets.SPLITS}
    monkeypatch.setattr(assets, "read_source", lambda split, directory=None: banks[split])
    monkeypatch.setattr(assets, "PATH", tmp_path / "again.npz")
    size = assets.write(tmp_path / "again.npz")
    assert size == (tmp_path / "again.npz").stat().st_size < 25e6
    for split in assets.SPLITS:
        again = assets._read_packaged(split)
        assert all(
            np.array_equal(getattr(again, name), getattr(banks[split], name)) for name in ("images", "label", "start")
        )


@pytest.mark.parametrize("given", ["train_tiny_reduced", "configs/train_tiny_reduced.yaml", "train_tiny_reduced.yaml"])
def test_packaged_configs_are_found_in_an_empty_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.read(given, ["steps=3"]).steps == 3
    # a file that is there comes first
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train_tiny_reduced.yaml").write_text("steps: 7\n")
    assert config_files.read("configs/train_tiny_reduced.yaml").steps == 7


@pytest.mark.parametrize(
    "given", ["train_tiny_redcued", "other/train_tiny_reduced.yaml", "train_tiny_reduced.json", "tiny"]
)
def test_what_is_no_config_is_told_with_those_there_are(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no training config at {re.escape(given)}.*train_tiny_reduced"):
        config_files.read(given)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", '{"steps": 3, "seed": 1, "steps": 4}'),
        ("c.json", '{"data": {"batch": 4, "batch": 8}}'),
        ("c.yaml", "steps: 3\nseed: 1\nsteps: 4\n"),
        ("c.yml", "data: {batch: 4, frames: 2, batch: 8}\n"),
    ],
)
def test_a_key_that_stands_twice_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"the key '(steps|batch)' stands twice") as error:
        config_files.read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


class Lacking(importlib.abc.MetaPathFinder):
    """tensorflow-datasets as it is where a package that it imports is missing."""

    def __init__(self, missing: str):
        self.missing = missing

    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow_datasets":
            raise ModuleNotFoundError(f"No module named {self.missing!r}", name=self.missing)
        return None


@pytest.mark.parametrize("missing", ["importlib_resources", "etils"])
def test_a_package_that_tensorflow_datasets_lacks_is_named(missing, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorflow_datasets"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Lacking(missing), *sys.meta_path])
    with pytest.raises(ImportError, match=f"needs the package '{missing}' .*pip install {missing}"):
        assets.import_tfds()
    with pytest.raises(assets.ImagesMissing, match=f"cannot be used: it needs the package '{missing}'"):
        assets.read_source("train", tmp_path)


def test_the_wheel_declares_and_carries_what_it_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needs = [re.split(r"[<>=\[ ]", need)[0] for need in project["project"]["dependencies"]]
    assert {"tensorflow-datasets", "importlib_resources"} <= set(needs)
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"configs": "hybridvlm/_configs"}
    assert (config_folder() / "train_tiny_reduced.yaml").is_file()
