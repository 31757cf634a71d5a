"""The benches of single ops: a row per implementation with its lower bound, compiled or timed, and refusals in one line."""

import json

import numpy as np
import pytest

from hybridvlm.bench import op_bench as candidates
from hybridvlm.bench import roofline as floors
from hybridvlm.bench.__main__ import main
from hybridvlm.hardware import of_chip
from hybridvlm.ops.attention.arg_specs import SPECS, AttentionSpec

needs_libtpu = pytest.mark.aot("tpu")
SMALL = AttentionSpec(1, 40, 40, 4, 2, 8, segments=(30, 6), rows=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A small shape under a name of its own, and a device whose peaks need no measuring: 1 MFLOP/s, 1 MB/s."""
    monkeypatch.setitem(SPECS, "small", SMALL)
    monkeypatch.setattr(floors, "peaks", lambda kind: floors.Peaks({"float32": 1e6}, 1e6))


def rows_of(options, tmp_path):
    assert main([*options, "--json", str(tmp_path / "rows.json")]) == 0
    return json.loads((tmp_path / "rows.json").read_text())


def test_attention_and_its_floor(tmp_path):
    rows = rows_of(["attention", "--shapes", "small", "--rounds", "1"], tmp_path)
    assert [(row["implementation"], row["default"]) for row in rows] == [("xla", True), ("reference", False)]
    pairs = 30 * 31 / 2 + 6 * 7 / 2  # four rows of padding see nothing
    moved = 4 * (2 * 40 * 4 * 8 + 2 * 40 * 2 * 8) + 4 * 40 * 4
    for row in rows:
        assert row["flops_ms"] == pytest.approx(1e3 * 4 * 8 * 4 * pairs / 1e6)
        assert row["bytes_ms"] == pytest.approx(1e3 * moved / 1e6)
        assert row["of_floor"] == pytest.approx(max(row["flops_ms"], row["bytes_ms"]) / row["ms"])
    assert min(row["x_fastest"] for row in rows) == 1.0


def test_what_cannot_do_a_shape_is_left_out_with_its_reason(tmp_path, capsys):
    options = ["attention", "--shapes", "small", "--rounds", "1", "--gradient", "--implementations", "xla", "cudnn"]
    assert [row["implementation"] for row in rows_of(options, tmp_path)] == ["xla"]
    assert "small: attention: implementation 'cudnn' runs on gpu" in capsys.readouterr().err


def test_score(tmp_path):
    rows = rows_of(["score", "--shapes", "small", "--rounds", "1"], tmp_path)
    assert [row["implementation"] for row in rows] == ["xla", "reference"]
    assert rows[0]["flops_ms"] == pytest.approx(1e3 * 2 * 8 * 4 * 3 * 40 / 1e6) and rows[0]["rows"] == 3


def test_compact(tmp_path):
    rows = rows_of(["compact", "--shapes", "2,64,24", "--width", "4", "--rounds", "1"], tmp_path)
    assert [(row["implementation"], row["default"]) for row in rows] == [("sort", True), ("threshold", False)]
    assert rows[0]["bytes_ms"] == pytest.approx(1e3 * 2 * (64 * 9 + 24 * 5 + 2 * 24 * 4 * 4) / 1e6)


@needs_libtpu
def test_compiled_for_a_tpu(tmp_path):
    rows = rows_of(["score", "--shapes", "small", "--aot", "v5e:2x2"], tmp_path)
    assert [(row["implementation"], row["default"]) for row in rows] == [
        ("xla", True),
        ("pallas_tpu", False),
    ]  # of 3 rows
    assert all(row["gb"] > 0 and row["cost_ms"] > 0 and row["target"] == "v5e:2x2" for row in rows)


def test_a_kernel_that_declares_nothing_is_counted_by_its_grid():
    from hybridvlm.bench.attention import splash_work

    spec = AttentionSpec(1, 2048, 2048, 4, 2, 128)
    work = splash_work(spec, "bfloat16", gradient=False)
    block = 512 * 128 * 2
    assert work.moved == 4 * (10 * 2 * block + 4 * 2 * block)
    assert work.flops == 2 * 2 * 4 * 10 * 512 * 512 * 128


def test_floors_by_chip():
    v5p, h200 = of_chip("v5p"), of_chip("H200")
    assert v5p.floor_seconds(459e12, 0, "bfloat16") == pytest.approx(1) and h200.bandwidth == 4.8e12
    assert v5p.flops["float32"] == pytest.approx(459e12 / 6)


def test_work_without_a_floor(monkeypatch, capsys):
    monkeypatch.setattr(floors, "peaks", lambda kind: None)
    assert candidates.floor(candidates.Work(1.0, 1.0), "float32") == {}
    assert "no peaks for float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["attention", "--shapes", "13b"], "invalid choice: '13b'"),
        (["score", "--rounds", "0"], "at least 1, got '0'"),
        (["compact", "--shapes", "1,8,9"], "a capacity C of at most L"),
        (["compact", "--aot", "v9:1"], "target: expected one of"),
    ],
)
def test_refusals(argv, message, capsys):
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_agreement_about_what_to_keep():
    """Two drops of one video of ten tokens: alike; then one of four taken otherwise, so that two tokens are treated otherwise."""
    from hybridvlm.bench.dtype import _agreement

    ours, theirs = [[{1, 2, 3, 4, 5}], [{1, 2, 3, 4}]], [[{1, 2, 3, 4, 5}], [{1, 2, 3, 9}]]
    np.testing.assert_allclose(_agreement(ours, theirs, np.array([10]))[:, 0], [[1, 1, 0.5], [0.8, 0.75, 0.4]])


@pytest.mark.slow
def test_dtypes_on_the_embedded_model(tmp_path):
    rows = rows_of(["dtype", "--limit", "4", "--batch-size", "4", "--frames", "16"], tmp_path)
    *layers, dense, reduced = rows
    assert layers and all(row["agree"] > 0.9 and 0 < row["kept"] < 1 for row in layers)
    assert layers[-1]["kept"] < layers[0]["kept"]
    assert dense["questions"] == reduced["questions"] == 4 and dense["float32"] == dense["bfloat16"] == 1.0
