"""`bench device`: rows as they come whatever fails, models cut to the memory, and nothing imported that need not be installed."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from hybridvlm.bench import device, device_models, device_ops
from hybridvlm.bench.__main__ import main
from hybridvlm.estimates import MeshSizes, Workload
from hybridvlm.estimates.memory import memory
from hybridvlm.ops.attention import reference

# what the package needs and this command must not: it runs beside jax, flax, optax, orbax, chex and einops, and what they bring
ABSENT = "grain tensorflow_datasets av PIL tqdm safetensors tokenizers huggingface_hub jinja2 pyarrow matplotlib torch transformers"
WITHOUT = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT.split()!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
"""


def rows_of(steps, tmp_path, monkeypatch, minutes=1.0):
    """The rows of one part with these steps, as they stand in the file."""
    monkeypatch.setattr(device_ops, "parity", lambda full, rounds: steps)
    lines = tmp_path / "lines.jsonl"
    assert main(["device", "--parts", "parity", "--lines", str(lines), "--minutes", str(minutes)]) == 0
    return [json.loads(line) for line in lines.read_text().splitlines()]


def test_what_fails_is_a_row_and_the_next_step_runs(tmp_path, monkeypatch, capsys):
    def broken():
        raise RuntimeError("illegal address\nand a long trace")

    def refused():
        raise NotImplementedError("no tensor cores")

    steps = iter([({"op": "a"}, broken), ({"op": "b"}, refused), ({"op": "c"}, lambda: {"ok": True})])
    first, *rows = rows_of(steps, tmp_path, monkeypatch)
    assert first["part"] == "device" and first["kind"] == jax.devices()[0].device_kind and first["size"] == "small"
    assert [(row["part"], row["op"]) for row in rows] == [("parity", "a"), ("parity", "b"), ("parity", "c")]
    assert rows[0]["failed"] == "RuntimeError: illegal address" and rows[2]["ok"] is True
    assert rows[1]["refused"] == "NotImplementedError: no tensor cores"
    assert "illegal address" in capsys.readouterr().err


def test_a_row_is_in_the_file_before_the_next_step(tmp_path, monkeypatch):
    lines = tmp_path / "lines.jsonl"
    steps = iter([({"n": n}, lambda n=n: {"before": len(lines.read_text().splitlines())}) for n in range(3)])
    assert [row["before"] for row in rows_of(steps, tmp_path, monkeypatch)[1:]] == [1, 2, 3]


def test_nothing_begins_after_the_minutes(tmp_path, monkeypatch):
    clock = itertools.count(0, 20)
    monkeypatch.setattr(device.time, "monotonic", lambda: next(clock))
    steps = (({"n": n}, lambda: {}) for n in itertools.count())
    rows = rows_of(steps, tmp_path, monkeypatch)
    assert rows[-1]["left_out"] == "out of time" and 2 <= len(rows) < 10


def test_a_part_that_cannot_begin_is_a_row(tmp_path, monkeypatch):
    def steps():
        raise MemoryError("not one layer fits")
        yield

    assert rows_of(steps(), tmp_path, monkeypatch)[-1]["failed"] == "MemoryError: not one layer fits"


def test_wrong_options(capsys, tmp_path):
    for options, reason in ((["--parts", "parity,none"], "--parts takes"), (["--minutes", "0"], "above 0")):
        assert main(["device", "--lines", str(tmp_path / "x"), *options]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("gigabytes", [80, 16, None])
def test_a_model_is_cut_to_the_memory(monkeypatch, gigabytes):
    """The 12B fits an H100 whole; a T4 holds as many layers as leave a tenth of its memory free, and not one more."""
    limit = gigabytes and gigabytes * 10**9
    monkeypatch.setattr(device_models, "memory_limit", lambda device: limit)
    monkeypatch.setattr(device_models, "platform", lambda: "gpu")
    work = Workload(device_models.load_model_config("nemotron_nano_12b_v2_vl"), 128, max_new=64)
    found = device_models._fitting(work)
    layers = len(found.config.pattern)
    if gigabytes != 16:
        assert layers == 62
        return
    more = dataclasses.replace(found.config, pattern=work.config.pattern[: layers + 1])
    least, beyond = (memory(dataclasses.replace(found, config=c), MeshSizes()) for c in (found.config, more))
    needs = [max(held.program(name) for name in ("prefill", "decode")) for held in (least, beyond)]
    assert 4 < layers < 40 and needs[0] <= 0.9 * limit < needs[1]


def test_a_wrong_kernel_is_seen(monkeypatch):
    args = ("attention", "xla", "12b", "float32", 24, False)
    assert device_ops._compare(*args)["ok"]
    right = reference.attention
    wrong = lambda *arrays, **options: (right(*arrays, **options)[0] * 1.01, right(*arrays, **options)[1])  # noqa: E731
    monkeypatch.setattr(reference, "attention", wrong)
    assert not device_ops._compare(*args)["ok"]
    assert device_ops._error(jnp.array([1.0, jnp.nan]), jnp.ones(2)) == float("inf")


def test_weights_have_their_size():
    params = device_models.random_weights(device_models.SMALL, "float32")
    up = params["decoder"]["mlp"]["up_proj"]
    assert set(params) == {"embed", "decoder", "lm_head"}
    assert (
        float(jnp.std(up)) == pytest.approx(device_models.SMALL.width**-0.5, rel=0.1)
        and abs(float(jnp.mean(up))) < 0.05
    )


@pytest.mark.slow
def test_all_of_it_where_little_is_installed(tmp_path):
    """In its smallest form: every part has its rows, and every kernel agrees."""
    lines = tmp_path / "lines.jsonl"
    command = f"{WITHOUT}\nfrom hybridvlm.bench.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    options = ["device", "--minutes", "30", "--rounds", "1", "--lines", str(lines)]
    done = subprocess.run([sys.executable, "-c", command, *options], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert not [row for row in rows if "failed" in row or "left_out" in row or row.get("ok") is False]
    assert [part for part, _ in itertools.groupby(rows, lambda row: row["part"])] == ["device", *device.PARTS]
    for part in ("decoder", "vamba"):
        of_part = [(row["method"], row["program"]) for row in rows if row["part"] == part]
        assert of_part == [
            *((method, program) for method in ("dense", "str at 25%") for program in ("prefill", "decode")),
            ("dense / str", "prefill"),
        ]


def test_it_imports_nothing_else():
    command = f"{WITHOUT}\nfrom hybridvlm.bench import __main__, device, device_models, device_ops"
    subprocess.run([sys.executable, "-c", command], check=True, timeout=300)
