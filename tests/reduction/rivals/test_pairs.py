"""Methods of two stages: how a budget is split between them."""

import pytest
from helpers.plans import model, plan

from hybridvlm.config import Reduction, VisionConfig
from hybridvlm.reduction import BudgetError, get_method, parse_method
from hybridvlm.reduction.methods import AttentionMethods, needs_attention, no_first_drop, takes_first_drop

TOWER = VisionConfig(image_size=(128, 128), width=64, layers=2, heads=4, mlp_width=64)
CONFIG = model(vision=TOWER)
# 28 Transformer layers, in halves as patterns here have them: layers and drops are where the releases have them
PUBLISHED = model("*-" * 28, vision=TOWER)


@pytest.mark.parametrize(("name", "inner", "kept", "share"), [
    ("holitom", "holitom-inner", 0.5, 0.82), ("flashvid", "oneshot-last@0.71", 0.3, 0.80),
    ("prunevid", "oneshot-max@0.31", 0.4, 0.59),
])  # fmt: skip
def test_the_inner_stage_keeps_what_is_published_and_the_outer_one_makes_up_the_rest(name, inner, kept, share):
    p = plan(name, 0.25, config=PUBLISHED)
    assert (p.method, p.input_method, p.decoder_method) == (name, f"{name}-outer", inner)
    assert p.retention_mean == pytest.approx(0.25, abs=0.002)
    assert p.retention_final == pytest.approx(kept * p.retention_input, rel=0.01)
    assert p.retention_mean / p.retention_input == pytest.approx(share, abs=0.02)
    assert type(p).from_dict(p.to_dict()) == p


@pytest.mark.parametrize("name", ["holitom", "flashvid", "prunevid"])
def test_every_kind_of_budget_is_met(name):
    assert plan(f"{name}:0.25", 1.0, config=CONFIG).capacities == plan(name, 0.25, config=CONFIG).capacities
    assert plan(name, 0.25, "final", CONFIG).retention_final == pytest.approx(0.25, abs=0.002)
    for kind, field, goal in (("flops", "flop_ratio", 0.3), ("total-flops", "total_flop_ratio", 0.9)):
        p = plan(name, goal, kind, CONFIG)
        assert getattr(p, field) == pytest.approx(goal, abs=0.005) and (p.kind, p.budget) == (kind, goal)
        assert p.retention_final == pytest.approx(get_method(name).pair.kept * p.retention_input, rel=0.05)
    dense = plan(name, 1.0, "flops", CONFIG)
    assert dense.retention_final == 1.0 and not dense.drops and not dense.drops_input


def test_what_a_pair_cannot_meet_is_said():
    with pytest.raises(
        BudgetError, match=r"prunevid can meet mean budgets up to 0\.568 .* keeps 0\.4 after layer 6, or 1; got 0\.6"
    ):
        plan("prunevid", 0.6, config=CONFIG)
    with pytest.raises(
        BudgetError, match=r"holitom can meet total-flops budgets from 0\.\d+ to 0\.\d+ .* or 1; got 0\.2"
    ):
        plan("holitom", 0.2, "total-flops", CONFIG)
    with pytest.raises(BudgetError, match=r"holitom-inner drops after .* have no such site"):
        plan("holitom", 0.5, config=model("M-M-", vision=TOWER))
    for text in ("holitom+str", "evs+holitom"):
        with pytest.raises(ValueError, match="a composition is one method before the decoder"):
            parse_method(text)
    assert needs_attention(Reduction("holitom", 0.5)) and not needs_attention(Reduction("prunevid", 0.5))
    assert not takes_first_drop("holitom") and "drops after the *" in no_first_drop("holitom")
    assert "holitom" not in AttentionMethods() and "prunevid" in AttentionMethods()
