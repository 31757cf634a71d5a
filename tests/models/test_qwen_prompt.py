"""Qwen2-VL and Qwen3-VL on the host side: sizes, prompts, batches and pixels."""

import re

import numpy as np
import pytest

from hybridvlm.config import Buckets, Reduction
from hybridvlm.config_files import load_model_config
from hybridvlm.models import qwen_vl
from hybridvlm.models.media import Clip
from hybridvlm.models.qwen_vl import geometry
from hybridvlm.tokenizers.published import PublishedTokenizer
from hybridvlm.tokenizers.text import plain

QWEN2, QWEN3 = load_model_config("qwen2_vl_7b"), load_model_config("qwen3_vl_8b")
SPECIAL = re.compile(r"(<\|im_start\|>|<\|im_end\|>|<\|vision_start\|>|<\|vision_end\|>)")


class Words(PublishedTokenizer):
    """A tokenizer that keeps what it is given: one id per special token and per other character, and a plain chat."""

    def __init__(self):
        super().__init__(None)

    def encode(self, text):
        ids, text = [], plain(text)
        for piece in SPECIAL.split(text):
            ids += [ord("\ue100") + len(piece)] if SPECIAL.fullmatch(piece) else [ord(letter) for letter in piece]
        return ids


def shown(layout):
    """The prompt as one string: visual tokens as |, special tokens as their lengths in brackets."""
    out = ""
    for place, frame in zip(layout.ids, layout.frame, strict=True):
        out += "|" if frame >= 0 else chr(place) if place < 0xE100 else f"[{place - 0xE100}]"
    return out


def clip(frames, size, kind="video", step=0.5):
    return Clip(tuple(step * i for i in range(frames)), np.zeros((frames, *size, 3), np.uint8), kind, size)


def ask(kind="video", text="why?"):
    return [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}]


START, END = "[12]", "[10]"  # <|im_start|>, <|im_end|>
OPEN, CLOSE = "[16]", "[14]"  # <|vision_start|>, <|vision_end|>
SYSTEM = f"{START}system\nYou are a helpful assistant.{END}\n"


# (height, width, frames) -> Qwen2 video, Qwen3 video, Qwen2 image: what the processors of transformers 5.23 give, with
# cap_pixels_per_frame for videos
@pytest.mark.parametrize(
    ("source", "second", "third", "image"),
    [
        ((360, 640, 64), (364, 644), (352, 640), (364, 644)),
        ((1080, 1920, 768), (336, 644), (128, 224), (1092, 1932)),
        ((720, 480, 8), (728, 476), (704, 480), (728, 476)),
        ((30, 20, 4), (392, 280), (64, 32), (84, 56)),
    ],
)
def test_sizes(source, second, third, image):
    assert geometry.frame_size(QWEN2, *source) == second
    assert geometry.frame_size(QWEN3, *source) == third
    assert geometry.frame_size(QWEN2, *source[:2], 1, "image") == image


def test_extreme_aspects_are_refused():
    with pytest.raises(ValueError, match="more than 200 times"):
        geometry.smart_resize(10, 3000, 28, 1, 10**9)


def test_qwen2_video_prompt():
    layout = qwen_vl.prompt(QWEN2, Words(), ask(), [clip(3, (28, 56))])
    assert shown(layout) == f"{SYSTEM}{START}user\n{OPEN}||||{CLOSE}why?{END}\n{START}assistant\n"
    assert layout.frames == 2
    assert layout.frame[layout.frame >= 0].tolist() == [0, 0, 1, 1]
    assert layout.grid == (1, 2)
    at = int(np.flatnonzero(layout.frame >= 0)[0])
    assert (layout.position[at : at + 4] - at).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert layout.position[at + 4].tolist() == [at + 2] * 3


def test_qwen3_video_prompt_has_times():
    """The mean time of a tubelet's frames; an odd last frame stands for itself twice."""
    layout = qwen_vl.prompt(QWEN3, Words(), ask(), [clip(3, (32, 64))])
    assert shown(layout) == (
        f"{START}user\n<0.2 seconds>{OPEN}||{CLOSE}<1.0 seconds>{OPEN}||{CLOSE}why?{END}\n{START}assistant\n"
    )
    first, second = np.flatnonzero(layout.frame >= 0)[[0, 2]]
    assert layout.position[first].tolist() == [first] * 3
    spoken = second - first - 2  # text between the frames, which begins after the wider side of the first
    assert layout.position[second].tolist() == [first + 2 + spoken] * 3


@pytest.mark.parametrize("config", [QWEN2, QWEN3])
def test_image_text_and_turns(config):
    size = geometry.frame_size(config, 56, 84, 1, "image")
    step = config.vision.patch_size * 2
    layout = qwen_vl.prompt(config, Words(), ask("image"), [clip(1, (56, 84), "image")])
    assert f"{OPEN}{'|' * (size[0] * size[1] // step**2)}{CLOSE}why?" in shown(layout)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    spoken = qwen_vl.prompt(config, Words(), turns, [])
    assert shown(spoken).endswith(
        f"{START}user\na{END}\n{START}assistant\nb{END}\n{START}user\nc{END}\n{START}assistant\n"
    )
    assert spoken.position.tolist() == [[i] * 3 for i in range(len(spoken.ids))]
    batch, frames, _ = qwen_vl.make_batch(config, [spoken], Buckets(text=(256,)))
    assert (frames, batch.input_ids.shape) == (0, (1, 256))


def test_clips_and_messages_that_do_not_fit():
    with pytest.raises(ValueError, match="one video or image, got 2"):
        qwen_vl.prompt(QWEN2, Words(), ask(), [clip(2, (28, 28))] * 2)
    with pytest.raises(ValueError, match="name 1 videos or images, but 0 clips"):
        qwen_vl.prompt(QWEN2, Words(), ask(), [])
    with pytest.raises(ValueError, match="not in multiples of 28"):
        qwen_vl.prompt(QWEN2, Words(), ask(), [clip(2, (30, 28))])
    with pytest.raises(ValueError, match="cannot be pooled by 2x1"):
        qwen_vl.prompt(QWEN2, Words(), ask(), [clip(2, (28, 28))], factors=(1, 2, 1))


def test_batch_pads_to_its_bucket_and_wants_one_grid():
    layouts = [qwen_vl.prompt(QWEN3, Words(), ask(text=t), [clip(n, (32, 64))]) for n, t in ((4, "why?"), (2, "a"))]
    batch, frames, text = qwen_vl.make_batch(QWEN3, layouts, Buckets(frames=(3, 8), text=(16, 128)))
    assert (frames, text) == (3, 128)
    assert batch.input_ids.shape == (2, 3 * 2 + 128)
    assert batch.position.shape == (2, 3 * 2 + 128, 3)
    assert batch.frame_count.tolist() == [2, 1]
    for row, layout in enumerate(layouts):
        n = len(layout.ids)
        np.testing.assert_array_equal(batch.position[row, :n], layout.position)
        assert not batch.segment[row, n:].any()
    other = qwen_vl.prompt(QWEN3, Words(), ask(), [clip(2, (64, 64))])
    with pytest.raises(ValueError, match="one grid of visual tokens, got 1x2, 2x2"):
        qwen_vl.make_batch(QWEN3, [layouts[0], other], Buckets(text=(128,)))
    with pytest.raises(ValueError, match="over the largest bucket"):
        qwen_vl.make_batch(QWEN3, layouts, Buckets(text=(16,)))


def test_pooled_prompt_and_batch():
    """Two frames' tokens side by side become one run: half the runs, half the width, and one time instead of two."""
    layout = qwen_vl.prompt(QWEN3, Words(), ask(), [clip(8, (32, 64))], factors=(2, 1, 2))
    assert shown(layout).count("|") == 2
    assert shown(layout).count("seconds") == 2
    assert layout.frames == 4
    batch, _, _ = qwen_vl.make_batch(QWEN3, [layout], Buckets(frames=(4,), text=(128,)), (2, 1, 2))
    assert batch.input_ids.shape == (1, 2 + 128)


def test_pixels_are_tubelets_with_the_last_frame_repeated():
    video = clip(3, (28, 56))
    video.frames[:] = np.arange(1, 4)[:, None, None, None]
    out = qwen_vl.pixels(QWEN2, [video], 4)
    assert out.shape == (1, 4, 2, 28, 56, 3)
    assert out[0, :, :, 0, 0, 0].tolist() == [[1, 2], [3, 3], [0, 0], [0, 0]]
    picture = qwen_vl.pixels(QWEN2, [clip(1, (50, 80), "image")], 1)
    assert picture.shape == (1, 1, 2, *geometry.frame_size(QWEN2, 50, 80, 1, "image"), 3)
    with pytest.raises(ValueError, match="over its bucket"):
        qwen_vl.pixels(QWEN2, [video], 1)
    with pytest.raises(ValueError, match="must be of one size"):
        qwen_vl.pixels(QWEN2, [video, clip(2, (56, 56))], 4)


def test_plans_follow_the_size_of_the_clip():
    config = geometry.at_size(QWEN3, 64, 96)
    plan = qwen_vl.make_plan(config, Reduction("str", 0.5), frames=8, text=32)
    assert plan.visual_tokens == 8 * 2 * 3
    assert {plan.pattern[layer] for layer in plan.drops} == {"*"}
    assert plan.cost.kv_bytes < plan.dense_cost.kv_bytes == 2 * 36 * (48 + 32) * 8 * 128 * 2
    assert qwen_vl.make_plan(config, None, 8, 32) is None
    assert qwen_vl.make_plan(config, Reduction("str", 0.5), 0, 32) is None
