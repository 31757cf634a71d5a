"""The bench command: a row per implementation, JSON, and refusals in one line."""

import json

import pytest

from hybridvlm.bench import roofline as floors
from hybridvlm.bench.__main__ import main, table
from hybridvlm.bench.timing import available_bytes, interleaved, paired_ratio

SMALL = [
    "ssd",
    "--shapes",
    "2,4,1,8",
    "--length",
    "48",
    "--chunk-sizes",
    "16",
    "--rounds",
    "1",
    "--gradient-rounds",
    "1",
]


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A device of 1 MB/s and 1 MFLOP/s, so that no test measures this one."""
    monkeypatch.setattr(floors, "peaks", lambda kind: floors.Peaks({"float32": 1e6}, 1e6))


def test_a_row_per_implementation(tmp_path, capsys):
    assert main([*SMALL, "--implementations", "reference", "sequential", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["implementation"] for row in rows] == ["reference", "sequential"]
    assert min(row["x_fastest"] for row in rows) == 1.0
    for row in rows:
        assert row["forward_ms"] > 0 and row["gradient_ms"] > 0 and row["gradient_speedup"] > 0
        assert row["temp_share"] == pytest.approx(row["temp_mb"] * 1e6 / (48 * 2 * 4 * 8 * 4))
        # x and y [48,2,4], dt [48,2], B and C [48,1,8], a state [2,4,8]; 128 tokens a chunk
        assert row["bytes_ms"] == pytest.approx(4e-3 * (2 * 48 * 8 + 48 * 2 + 2 * 48 * 8 + 64))
        assert row["flops_ms"] == pytest.approx(2e-3 * 48 * (128 * (8 + 8) + 2 * 64))
        assert row["of_floor"] == pytest.approx(row["flops_ms"] / row["forward_ms"])
    assert "x_fastest" in capsys.readouterr().out


def test_an_unknown_device_has_no_floor(monkeypatch, capsys):
    monkeypatch.setattr(floors, "peaks", lambda kind: None)
    assert main([*SMALL, "--implementations", "sequential", "--gradient-rounds", "0"]) == 0
    assert "unknown device: no peaks for float32 on 'cpu'" in capsys.readouterr().err


@pytest.mark.aot("tpu")
def test_compiled_for_a_target(tmp_path):
    argv = [
        "ssd",
        "--aot",
        "v5e:2x2",
        "--shapes",
        "2,64,1,128",
        "--length",
        "300",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    assert main([*argv, "--implementations", "sequential", "pallas_tpu"]) == 0
    rows = {row["implementation"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["pallas_tpu"]["target"] == "v5e:2x2" and rows["pallas_tpu"]["gb"] < rows["sequential"]["gb"]
    assert all(row["gradient_gb"] > row["gb"] > 0 and row["temp_mb"] >= 0 for row in rows.values())


def test_a_gradient_without_room_is_skipped_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr("hybridvlm.bench.timing.available_bytes", lambda: 1)
    assert main([*SMALL, "--implementations", "reference"]) == 0
    assert "gradient of reference at 2,4,1,8 skipped: it needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sdd"], "there is no benchmark 'sdd'; there are: device, ssd"),
        (["ssd", "--shapes", "3,4,2,8"], "a shape is H,P,G,N with G dividing H"),
        (["ssd", "--length", "0"], "at least 1, got '0'"),
        (["ssd", "--json", "nowhere/rows.json"], "nowhere does not exist"),
    ],
)
def test_refusals(argv, message, capsys):
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_timing_takes_turns():
    calls = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, warmup=1)
    assert sorted(calls[:2]) == sorted(calls[2:4]) == ["a", "b"] and calls[2:4] != calls[4:]
    assert all(len(times) == 2 for times in seconds.values())
    assert paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0
    assert available_bytes() is None or available_bytes() > 0


def test_table_shows_missing_values():
    assert table([{"a": 1.5, "b": None}, {"a": True}]).splitlines()[1:] == ["1.5  -", "yes  -"]
