"""The search for a schedule: its two rules on examples worked out by hand, and the command on a tiny model."""

import json

import pytest
from helpers.micro_checkpoint import micro_model

from hybridvlm.analyze import __main__ as command
from hybridvlm.analyze.search import best_steepness, greedy_shares, list_reduction, spread_sites
from hybridvlm.checkpoints.folder import save_folder
from hybridvlm.config import Reduction
from hybridvlm.reduction.schedules import schedule_curve, shape_curve


def test_the_greedy_search_finds_what_every_site_needs():
    needs, tried = (1, 0.5, 0.5, 0.25), []

    def good(shares):
        tried.append(shares)
        return all(share >= need for share, need in zip(shares, needs, strict=True))

    assert greedy_shares(4, (1, 0.5, 0.25), good) == needs
    assert len(tried) == 5 and all(list(shares) == sorted(shares, reverse=True) for shares in tried)
    assert greedy_shares(3, (1, 0.5), lambda shares: True) == (0.5, 0.5, 0.5)


def test_shares_become_a_list_that_is_taken_as_written():
    reduction = list_reduction(Reduction("str"), (1, 4), (0.5, 0.25), 7)
    assert reduction.schedule.values == (1, 1, 0.5, 0.5, 0.5, 0.25, 0.25) and reduction.budget == 1
    curve = schedule_curve(reduction.schedule, 7)
    assert [curve(layer, 1, 0.5) for layer in range(7)] == list(reduction.schedule.values)
    assert spread_sites("M-M*-M-M-", 2) == (0, 3) and spread_sites("M*-M-", 9) == (0, 1, 3)


def test_the_steepness_of_least_divergence_is_taken():
    base = Reduction("str", 0.25)
    found = best_steepness(base, (2, 8, 32), lambda r: abs(r.schedule.steepness - 9))
    assert found.schedule.steepness == 8 and found.budget == 0.25


def test_the_papers_sigmoid_is_a_schedule():
    """r = 1 / (1 + exp(l - 3.5)) over eight layers, of mean .5."""
    schedule = Reduction("str").schedule
    curve = shape_curve(type(schedule)(steepness=7.0, floor=0.0), 8)
    reach = 12 / 7
    p = (0.5 + reach) / (1 + 2 * reach)
    shares = [curve(layer, 0, p) for layer in range(8)]
    assert shares == pytest.approx([0.9707, 0.9241, 0.8176, 0.6225, 0.3775, 0.1824, 0.0759, 0.0293], abs=1e-4)
    assert sum(shares) / 8 == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["p-sigmoid", "g-search"])
def test_the_command_writes_a_schedule_that_eval_takes(tmp_path, capsys, rule):
    from hybridvlm.tiny.export import write_video

    save_folder(tmp_path / "micro", micro_model())
    import numpy as np

    write_video(tmp_path / "v.mp4", np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8))
    more = ["--video", str(tmp_path / "v.mp4"), "--question", "red", "--rule", rule, "--sites", "2", "--budget", "0.5"]
    assert command.main(["search", "--model", str(tmp_path / "micro"), "--output", str(tmp_path / "out"), *more]) == 0
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert found["tried"] and all(row["divergence, nats"] >= -1e-6 for row in found["tried"])
    assert "--schedule shape=" in capsys.readouterr().out
