"""Prompts byte for byte, of two options and a short question."""

import pytest
from helpers.benchmark_tasks import task

from hybridvlm.eval.benchmarks import MODULES, prompts, published
from hybridvlm.eval.benchmarks.definition import Question
from hybridvlm.eval.benchmarks.frames import known
from hybridvlm.eval.benchmarks.parity import PARSERS
from hybridvlm.models.prompt import PromptStyle

SELECT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option."
)
LETTER = "Answer with the option's letter from the given choices directly."
ONLY = "Only give the best option."
Q = Question("1", "v", None, "Which?", ("red", "green"), "A", published="Which?\n(A) red\n(B) green\n")


@pytest.mark.parametrize(
    ("name", "protocol", "wanted"),
    [
        ("videomme", "official", f"{SELECT}\nWhich?\nA. red\nB. green\nThe best answer is:"),
        (
            "videomme",
            "lmms-eval",
            f"{SELECT.replace('video.', 'video and the subtitles.')}\nWhich?\nA. red\nB. green\n\n{LETTER}",
        ),
        (
            "videomme",
            "vlmevalkit",
            f"\nThese are the frames of a video. {SELECT}\nQuestion: Which?\nA. red\nB. green\nAnswer: ",
        ),
        ("videomme", "qwen", f"{SELECT}\nQuestion: Which?\nA. red\nB. green\nThe best answer is:"),
        ("videomme", "vamba", f"{SELECT.replace('. Resp', '.' + chr(10) + 'Resp')}\nWhich?\nA. red B. green"),
        ("longvideobench", "official", f"Question: Which?\nA. red\nB. green\n{LETTER}"),
        ("longvideobench", "lmms-eval", f"Which?\nA. red\nB. green\n{LETTER}\n"),
        ("longvideobench", "vlmevalkit", f"Which?\nA. red\nB. green\n{LETTER}"),
        ("longvideobench", "vamba", f"{SELECT}\nWhich?\nA. red\nB. green"),
        ("lvbench", "lmms-eval", "Which?\n(A) red\n(B) green\n\nAnswer the question with the option letter"),
        ("mlvu", "official", f"Question: Which?\nOptions:\n(A) red\n(B) green{ONLY}"),
        ("mlvu-test", "official", f"Question: Which?\nOptions:\n(A) red\n(B) green\n{ONLY}"),
        ("mlvu", "lmms-eval", f"Which?\n(A) red\n(B) green\n\n{ONLY}\nBest option: ("),
        ("mlvu-test", "lmms-eval", "Which?\n(A) red\n(B) green\n"),
        ("egoschema", "lmms-eval", f"Which?\nA. red\nB. green\n{LETTER}"),
        ("nextqa", "lmms-eval", "Which?\nA. red\nB. green"),
        ("nextqa", "vamba", f"{SELECT.replace('C, or D', 'C, D, or E')}\nWhich?\nA. red\nB. green"),
        ("mvbench", "official", f"Question: Which?\nOptions:\n(A) red\n(B) green\n{ONLY}"),
        ("mvbench", "lmms-eval", f"Question:Which?\nOption:\n(A) red\n(B) green\n{ONLY}\n"),
        ("mvbench", "vamba", f"Question: Which?\nA. red\nB. green\n{LETTER}"),
        ("tempcompass", "official", "Which?\n(A) red\n(B) green\n\nPlease directly give the best option:"),
        ("perceptiontest", "lmms-eval", f"Which?\nA. red\nB. green\n{LETTER}"),
    ],
)
def test_prompts(name, protocol, wanted):
    assert published(name).protocol(protocol).prompt(Q, "") == wanted


def test_prompts_with_subtitles():
    head = "This video's subtitles are listed below:"
    ask = "Which?\nA. red\nB. green\nThe best answer is:"
    own = published("videomme-subs").protocol
    assert own("official").prompt(Q, "one\ntwo") == f"{head}\none\ntwo\n{SELECT}\n{ask}"
    assert own("official").prompt(Q, "") == f"{SELECT}\n{ask}"
    changed = SELECT.replace("video.", "video and the subtitles.")
    assert own("lmms-eval").prompt(Q, "one") == f"{head} \none\n{changed}\n{ask}"
    start = "\nThese are the frames of a video. "
    assert own("vlmevalkit").prompt(Q, "one").startswith(f"{start}{head}\none\n{SELECT}\nQuestion: Which?")


def test_system_texts_and_how_a_reply_begins():
    mlvu, mvbench = published("mlvu").protocol("official"), published("mvbench").protocol("official")
    assert (mlvu.prefix, mvbench.prefix) == ("Best Option: (", "Best option:(")
    assert mlvu.system.startswith("Carefully watch this video and") and mlvu.system.endswith("addresses the question.")
    assert mvbench.system.startswith("Carefully watch the video and") and mvbench.system.endswith("the question.\n")


def test_what_is_filled_in_is_never_filled_in_again():
    tricky = Question("1", "v", None, "What is {O.} and {S}?", ("{Q}", 'b\tc\n"d"'), "A")
    prompt = prompts.form("{Q}|{O.}⟦|{S}⟧")
    assert prompt(tricky, "") == 'What is {O.} and {S}?|A. {Q}\nB. b\tc\n"d"'
    assert prompt(tricky, "{Q}") == 'What is {O.} and {S}?|A. {Q}\nB. b\tc\n"d"|{Q}'


@pytest.mark.parametrize("name", MODULES)
def test_every_protocol_is_sound(name):
    benchmark = published(name)
    names = [p.name for p in benchmark.protocols]
    assert len(set(names)) == len(names) and benchmark.protocol(None) is benchmark.protocols[0]
    assert "official" not in names or names[0] == "official"
    for protocol in benchmark.protocols:
        assert known(protocol.rule) and protocol.parser in PARSERS and protocol.frames > 0 and protocol.version
    with pytest.raises(ValueError, match=f"{name} has no protocol 'x'; it has {names[0]}"):
        benchmark.protocol("x")


def test_subtitles_in_the_prompt_and_between_frames():
    built = task("videomme-subs", frames=8)
    with_subtitles = built.prompt(next(s for s in built.samples if s.id == "001-1"))
    assert with_subtitles.startswith("This video's subtitles are listed below:\nfirst line\n")
    assert built.prompt(next(s for s in built.samples if s.id == "602-1")).startswith(SELECT)
    assert built.about()["subtitles"] == {"rule": "slicer", "videos_without": 1}
    assert any("1 videos have no subtitles" in line for line in built.notes())
    harness = task("videomme-subs", protocol="lmms-eval")
    told = harness.prompt(next(s for s in harness.samples if s.id == "602-1"))
    assert told.startswith("This video's subtitles are listed below: \nNo subtitles available\nSelect the best")

    built = task("longvideobench", frames=4)
    sample = next(s for s in built.samples if s.id == "86Cxyz_FV9M_0")
    end = "s4, its end a whole number"
    assert built.prompt(sample).split("\n")[:6] == ["<frame>", "<frame>", "s2", "<frame>", "<frame>", end]
    clip, _ = built.clip(sample.video, pixels=False)
    asked = built.asked(sample, clip, PromptStyle())
    content = asked.messages[-1]["content"]
    assert [part["type"] for part in content][:3] == ["video", "text", "video"]
    assert sum(len(piece.seconds) for piece in asked.clips) == len(clip.seconds)
    assert content[-1]["text"].startswith("Question: Which colour") and "s2" in content[1]["text"]


def test_overrides_are_said():
    built = task("videomme", frames=3, sampling="uniform", prompt="{question}\n{options}!")
    assert built.prompt(built.samples[0]).endswith("?\nA. Red.\nB. Green.\nC. Blue.\nD. Yellow.!")
    (line,) = [line for line in built.notes() if "protocol official" in line]
    assert "frames by uniform instead of slicer" in line and "3 frames instead of 64" in line and "--prompt" in line
    plain, changed = task("videomme").about()["prompt_hash"], built.about()["prompt_hash"]
    assert plain != changed and plain == task("videomme").about()["prompt_hash"]
    assert task("videomme", frames=None).about()["changed"] == ["8 frames, the most this model takes, instead of 64"]
    for rule in ("x", "vk.fps", "vk.fps:", "vk.fps:0", "vk.fps:x", "fps:nan", "linspace:2"):
        with pytest.raises(ValueError, match=f"--sampling '{rule}' is no rule.*vk.fps:R.*a rate above 0"):
            task("videomme", sampling=rule)
    assert task("videomme", sampling="vk.fps:0.5").samples
