"""Questions about videos and images: conversations, what they say of themselves, and the command line."""

import copy
import dataclasses
import types

import jax
import numpy as np
import pytest
from PIL import Image

from hybridvlm import ask
from hybridvlm.checkpoints import samples, save_folder
from hybridvlm.checkpoints.describe import describe
from hybridvlm.config import Buckets, Reduction, Schedule
from hybridvlm.eval import __main__ as evaluation
from hybridvlm.inference.conversation import Conversation
from hybridvlm.inference.model import Model, load
from hybridvlm.models.family import family_for
from hybridvlm.models.media import Clip, cut_tiles, image_grid, tile_count, tile_grid, video_grid
from hybridvlm.models.nemotron_vl.model import STYLES
from hybridvlm.models.prompt import Pieces, render, video_pieces
from hybridvlm.reduction.methods import named_reduction
from hybridvlm.reduction.scores import spread_score
from hybridvlm.tokenizers.published import PublishedTokenizer
from hybridvlm.train import __main__ as training
from hybridvlm.video.sheet import contact_sheet

BUCKETS = Buckets(frames=(2, 4, 8), text=(64, 256, 512), max_new=6)
STR = Reduction("str", 0.25, schedule=Schedule(floor=0.02))
FRAMES = np.random.default_rng(3).integers(0, 256, (4, 40, 56, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return load(samples.write_sample("nemotron_nano_vl", tmp_path_factory.mktemp("nano") / "nano"), buckets=BUCKETS)


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    return load(samples.write_sample("nemotron_omni", tmp_path_factory.mktemp("omni") / "omni"), buckets=BUCKETS)


def test_dense_and_reduced(nano):
    shown = []
    dense = nano.ask(FRAMES, "What is this?", max_new=6, show=shown.append)
    assert (dense.frames, dense.stages, dense.plan) == (4, [(0, 5, 64)], None)
    assert "".join(shown) == dense.text == nano.tokenizer.decode(dense.tokens)
    assert dense.survivors.shape == (4, 4, 4)
    assert dense.survivors.all()
    assert {"video", "compile", "encode", "prefill", "decode"} <= dense.seconds.keys()
    less = nano.ask(FRAMES, "What is this?", max_new=6, reduction=STR)
    assert [stage[0] for stage in less.stages] == [0, *(site + 1 for site in less.plan.drops)]
    assert [stage[2] for stage in less.stages] == [less.plan.keep(stage[0], 64) for stage in less.stages]
    assert less.survivors.sum() == less.stages[-1][2] < 16


@pytest.mark.slow
def test_survivors_are_those_of_the_prompt(nano):
    """Under a rule that needs no model, the picture shows what the rule keeps."""
    answer = nano.ask(FRAMES, "?", max_new=1, reduction=Reduction("uniform-input", 0.25))
    ranks = np.asarray(spread_score(np.arange(64)[None]))[0]
    assert set(np.flatnonzero(answer.survivors.reshape(-1))) == set(np.argsort(-ranks, kind="stable")[:16])
    pooled = nano.ask(FRAMES, "?", max_new=1, reduction=Reduction("avgpool", 0.25))
    assert pooled.stages[0][2] == 16
    assert pooled.survivors.shape == (4, 4, 4)
    assert pooled.survivors.all()


@pytest.mark.slow
def test_next_turn_from_the_caches_and_from_the_start(nano):
    """A turn that goes on from the caches says what a prefill of the whole conversation says."""
    # so that an answer comes back as it was given
    template = "{%- for m in messages -%}{{ m.content }}|{%- endfor -%}"
    tokenizer = copy.copy(nano.tokenizer)
    tokenizer.template = template
    nano, first = dataclasses.replace(nano, tokenizer=tokenizer), "What is this? /no_think"
    going = Conversation(nano, FRAMES, decode_capacity=512)
    fresh = Conversation(nano, FRAMES)
    for conversation in (going, fresh):
        conversation.ask(first, max_new=2)
    # bytes of a noisy answer need not come back from its text; the turn then starts anew, and says so
    one, other = going.ask("And now?", max_new=3), fresh.ask("And now?", max_new=3)
    assert not other.continued
    assert "video" not in one.seconds
    assert "encode" not in other.seconds
    assert one.tokens == other.tokens
    asked = Conversation(nano, FRAMES, reduction=STR, decode_capacity=512)
    asked.ask(first, max_new=2)
    assert not asked.ask("And now?", max_new=2).continued


class Digits(PublishedTokenizer):
    def __init__(self):
        super().__init__(None, "{% for m in messages %}{{ m.content }}{% endfor %}")

    def encode(self, text):
        return [int(word) for word in text.split() if word.isdigit()]

    def decode(self, ids, skip_special=True):
        return "".join(f" {i}" for i in ids)


@pytest.mark.slow
def test_caches_go_on(nano):
    """The extension itself, with a tokenizer whose ids always come back."""
    model = dataclasses.replace(nano, tokenizer=Digits(), style=type(nano.style)())
    going, fresh = Conversation(model, FRAMES, decode_capacity=400), Conversation(model, FRAMES)
    for question in ("5 6 7", " 8 9"):
        one, other = going.ask(question, max_new=4), fresh.ask(question, max_new=4)
        assert one.tokens == other.tokens
        assert not other.continued
    assert one.continued


@pytest.mark.slow
def test_caches_go_on_under_a_plan_that_no_question_has_a_say_in(nano):
    model = dataclasses.replace(nano, tokenizer=Digits(), style=type(nano.style)())
    query_free = Conversation(model, FRAMES, reduction=Reduction("uniform", 0.5), decode_capacity=400)
    query_free.ask("5 6 7", max_new=4)
    assert query_free.ask(" 8 9", max_new=4).continued
    bound = Conversation(model, FRAMES, reduction=STR, decode_capacity=400)
    bound.ask("5 6 7", max_new=4)
    assert not bound.ask(" 8 9", max_new=4).continued


@pytest.mark.slow
def test_images_and_text(nano, omni, tmp_path):
    Image.fromarray(FRAMES[0]).save(tmp_path / "picture.png")
    tiled = nano.ask(tmp_path / "picture.png", "?", max_new=1)
    count = tile_count(40, 56, (32, 32), 6)
    assert tiled.stages[0][2] == 16 * count
    assert tiled.conversation.shown().shape == (count, 32, 32, 3)
    assert tiled.survivors.shape[0] == count
    whole = omni.ask(tmp_path / "picture.png", "?", max_new=1)
    rows, cols = image_grid(40, 56, 4, 2, 16, 64)
    assert whole.stages[0][2] == rows * cols // 4
    alone = nano.ask(None, "Just words.", max_new=2)
    assert (alone.frames, alone.stages, len(alone.tokens) <= 2) == (0, [(0, 5, 0)], True)


@pytest.mark.slow
def test_two_frame_patches(omni):
    """Five frames are three pairs, in the shape that keeps their aspect; the text names both frames of a pair."""
    frames = np.concatenate([FRAMES, FRAMES[:1]])
    answer = omni.ask(frames, "?", max_new=1)
    rows, cols = video_grid(40, 56, 2, 64)
    assert answer.conversation.clips[0].frames.shape[1:3] == (4 * rows, 4 * cols)
    assert answer.stages[0][2] == 3 * rows * cols // 4
    pieces = Pieces(omni.tokenizer)
    video_pieces(pieces, (0.0, 0.5, 1.0), 2, omni.style, patch=2)
    text = omni.tokenizer.decode(
        [i for i, f in zip(pieces.ids, pieces.frame, strict=True) if f < 0], skip_special=False
    )
    assert text == (
        "Frame 1 sampled at 0.00 seconds and frame 2 sampled at 0.50 seconds: <img></img>\n"
        "Frame 3 sampled at 1.00 seconds: <img></img>"
    )


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (
            "training",
            "This is a video:\nFrame 1 sampled at 0.00 seconds: <img>#</img>\nFrame 2 sampled at 0.25 seconds: <img>#</img>\n",
        ),
        (
            "tensorrt",
            "This is a video:\nFrame 1 sampled at 0.00 seconds: <img>#</img>Frame 2 sampled at 0.25 seconds: <img>#</img>",
        ),
        ("vllm", "Frame 1 sampled at 0.00 seconds: <img>#</img>\nFrame 2 sampled at 0.25 seconds: <img>#</img>"),
    ],
)
def test_video_prompts_of_the_engines(nano, style, text):
    pieces = Pieces(nano.tokenizer)
    video_pieces(pieces, (0.0, 0.25), 1, STYLES[style])
    ids = [i if f < 0 else nano.tokenizer.encode("#")[0] for i, f in zip(pieces.ids, pieces.frame, strict=True)]
    assert nano.tokenizer.decode(ids, skip_special=False) == text


def test_frames_that_vamba_leaves_out_are_not_counted(tmp_path):
    """The last of an odd number of frames fills no tubelet; what is said and shown leaves it out, too."""
    model = load(samples.write_sample("vamba", tmp_path / "vamba"), buckets=BUCKETS)
    for given, taken in ((3, 2), (4, 4), (1, 1)):
        conversation = Conversation(model, FRAMES[:given])
        assert (len(conversation.clips[0].seconds), len(conversation.shown())) == (taken, taken)
    assert Conversation(model, FRAMES[0]).shown().shape == (
        1,
        *model.family.frame_size(model.config, 40, 56, 1, "image"),
        3,
    )


def test_what_cannot_be_asked(nano, tmp_path):
    with pytest.raises(ValueError, match="sound is not read"):
        render(nano.tokenizer, [{"role": "user", "content": [{"type": "audio"}]}], "x")
    with pytest.raises(ValueError, match="no such file"):
        nano.ask(tmp_path / "none.mp4", "?")
    with pytest.raises(ValueError, match=r"frames must lie in 1\.\.8"):
        nano.ask(FRAMES, "?", frames=9)
    with pytest.raises(ValueError, match="max_new"):
        nano.ask(FRAMES, "?", max_new=7)
    with pytest.raises(ValueError, match="clock"):
        nano.ask(FRAMES, "?", clock="sundial")
    with pytest.raises(TypeError, match="colour"):
        nano.ask(FRAMES, "?", colour="red")
    with pytest.raises(ValueError, match=r"the question: .* half a surrogate pair"):
        nano.ask(FRAMES, "what \ud800?")
    with pytest.raises(ValueError, match=r"system: .* half a surrogate pair"):
        nano.ask(FRAMES, "what?", system="\udc00")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ValueError, match=r"broken\.png: cannot be read as an image"):
        nano.ask(tmp_path / "broken.png", "?")


def test_a_model_without_tokenizer_says_what_it_lacks(nano, tmp_path, capsys):
    mute = Model(nano.config, nano.params, None, name="mute", family=nano.family, style=nano.style, buckets=BUCKETS)
    for asked in (lambda: mute.ask(FRAMES, "?"), lambda: Conversation(mute, None), lambda: mute.ask(None, "?")):
        with pytest.raises(ValueError, match=r"mute has no tokenizer\.json"):
            asked()
    save_folder(tmp_path / "mute", mute)
    (tmp_path / "train.yaml").write_text(f"model: {tmp_path / 'mute'}\noutput: {tmp_path / 'run'}\nsteps: 1\n")
    asking, evaluating = (
        ["--model", str(tmp_path / "mute"), *rest] for rest in (["v.mp4", "?"], ["--tasks", "q.jsonl"])
    )
    for command, options in ((ask, asking), (evaluation, evaluating), (training, [str(tmp_path / "train.yaml")])):
        assert command.main(options) in (1, 2)
        assert "mute has no tokenizer.json" in capsys.readouterr().err


def test_contact_sheet(tmp_path):
    survivors = np.zeros((4, 2, 2), bool)
    survivors[1, 0, 1] = True
    white = np.full((4, 40, 56, 3), 255, np.uint8)
    contact_sheet(white, survivors, tmp_path / "kept.png", (0.0, 1.0, 2.0, 3.0))
    sheet = np.asarray(Image.open(tmp_path / "kept.png").convert("L"), int)
    assert (sheet > 250).mean() > 0.04  # a quarter of one frame of four, and the letters
    assert (sheet > 250).mean() < 0.12
    with pytest.raises(ValueError, match="4 frames in groups of 2"):
        contact_sheet(white, survivors, tmp_path / "kept.png", patch=2)


def test_command_line(nano, tmp_path, capsys, monkeypatch):
    """Tiny random checkpoint, 25%, a follow-up from standard input, and the picture."""
    import io

    path = samples.write_sample("nemotron_nano_vl", tmp_path / "nano")
    monkeypatch.setattr("hybridvlm.inference.model.load", lambda *a, **k: nano)
    monkeypatch.setattr("sys.stdin", io.StringIO("And?\n\n"))
    for number, frame in enumerate(FRAMES):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    arguments = [str(tmp_path / "0.png"), "What is this?", "--model", str(path), "--reduction", "str", "--max-new", "4"]
    assert ask.main([*arguments, "--follow-up", "--show-kept", str(tmp_path / "kept.png")]) == 0
    said = capsys.readouterr()
    assert said.err.count("visual tokens, ") == 2
    assert "predicted decoder FLOPs" in said.err
    assert "layers   0 to" in said.err
    assert (tmp_path / "kept.png").is_file()
    assert ask.main([str(tmp_path / "missing.mp4"), "?", "--model", str(path)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert ask.main([str(tmp_path / "0.png"), "?", "--budget", "0.5"]) == 2
    assert "--budget, --kind, --first-drop and --drop-text go with --reduction" in capsys.readouterr().err
    assert ask.main(["--grammar"]) == 0
    assert "<colour>@t<frame>" in capsys.readouterr().out


def test_a_slip_does_not_end_the_conversation(nano, tmp_path, capsys, monkeypatch):
    """A further question that cannot be asked is refused, and the next one is answered from what was read."""
    import io

    monkeypatch.setattr("hybridvlm.inference.model.load", lambda *a, **k: nano)
    monkeypatch.setattr("sys.stdin", io.StringIO("\ud800\nAnd?\n"))
    Image.fromarray(FRAMES[0]).save(tmp_path / "0.png")
    options = ["--reduction", "str", "--max-new", "4", "--follow-up"]
    assert ask.main([str(tmp_path / "0.png"), "What is this?", *options]) == 0
    said = capsys.readouterr().err
    assert said.count("tokens answered") == 2
    assert "hybridvlm.ask: the question: " in said and "half a surrogate pair" in said


def test_further_questions_put_the_first_drop_late_only_where_that_shares_layers():
    """Plans alone: of a method that looks at the question, of a family that shares its layers, in all buckets that it can meet."""

    def start(name, method, budget, kind=None):
        found = describe(name)
        config, family = found.config, family_for(found.config)
        make = lambda reduction, frames, text: family.make_plan(config, reduction, frames, text)  # noqa: E731
        model = types.SimpleNamespace(config=config, buckets=found.buckets, family=family, plan=make)
        return ask.for_many_questions(model, named_reduction(None, method, budget, kind)).schedule.start

    assert start("nemotron_nano_12b_v2_vl", "str", 0.25) == 10
    assert start("nemotron_nano_12b_v2_vl", "uniform", 0.25) == 0
    # one frame beside 64 text tokens: 0.383 at least with a late drop
    assert start("nemotron_nano_12b_v2_vl", "str", 0.35, "flops") == 0
    assert start("vamba_qwen2_vl_7b", "str-attention", 0.25) == 0


def test_stages_of_one_length_are_one_line():
    assert ask.merged([(0, 1, 9), (2, 2, 4), (3, 5, 4), (6, 6, 3)]) == [(0, 1, 9), (2, 5, 4), (6, 6, 3)]


def test_the_embedded_model_explains_its_grammar(tmp_path, capsys):
    Image.fromarray(FRAMES[0]).save(tmp_path / "a.png")
    assert ask.main([str(tmp_path / "a.png"), "What is this?"]) == 2
    assert "--grammar explains" in capsys.readouterr().err


def test_tiles():
    """Against InternVL's rule, worked out by hand: (rows, columns) of nearest aspect, ties to the larger one if filled."""
    side = (512, 512)
    assert tile_grid(1080, 1920, side, 12) == (
        2,
        4,
    )  # 16:9 is nearest to 2:1 of 1x2, 2x4; the larger is more than half filled
    assert tile_grid(400, 400, side, 12) == (1, 1)
    assert tile_grid(900, 900, side, 12) == (2, 2)
    assert tile_grid(3000, 1000, side, 12) == (6, 2)
    assert tile_count(900, 900, side, 12) == 5
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    tiles = cut_tiles(image, (32, 32), 6)
    assert tiles.shape == (7, 32, 32, 3)
    np.testing.assert_array_equal(tiles[4], image[32:, 32:64])


def test_clips_are_checked():
    with pytest.raises(ValueError, match="kind"):
        Clip((0.0,), kind="sound")
    with pytest.raises(ValueError, match="at least one frame"):
        Clip(())
    with pytest.raises(ValueError, match="F = 2"):
        Clip((0.0, 1.0), FRAMES)


def test_grids_that_keep_the_aspect():
    """As NemotronH_Omni_Reasoning_V3's processors of transformers 5.23 choose them."""
    for size, image, video in (
        ((1080, 1920), (68, 120), (24, 42)),
        ((333, 77), (66, 16), (66, 14)),
        ((4000, 3000), (132, 100), (36, 28)),
        ((40, 56), (28, 38), (26, 38)),
        ((512, 512), (32, 32), (32, 32)),
    ):
        assert image_grid(*size, 16, 2, 1024, 13312) == image
        assert video_grid(*size, 2, 1024) == video
    assert image_grid(3, 500, 4, 2, 16, 64) == (2, 32)  # a strip is one cell high, and cut to the limit


def test_jit_is_shared_between_turns(nano):
    """A second video of the same bucket compiles nothing."""
    nano.ask(FRAMES, "What is this?", max_new=6)
    before = nano.programs.compile_seconds
    nano.ask(FRAMES[:3][::-1].copy(), "Who is that?", max_new=6)
    assert nano.programs.compile_seconds == before
    assert jax.default_backend() == "cpu"
