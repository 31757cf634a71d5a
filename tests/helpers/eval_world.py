"""What whole runs of the evaluation command are tested on."""

import json
import pathlib

import numpy as np
from helpers.micro_checkpoint import micro_model

from hybridvlm.checkpoints.folder import save_folder
from hybridvlm.tiny.export import write_video


def build_world(root: pathlib.Path) -> pathlib.Path:
    """A folder with a random model (micro), six 4-frame videos and three questions on each (q.jsonl)."""
    save_folder(root / "micro", micro_model())
    rng = np.random.default_rng(0)
    lines = []
    for number in range(6):
        write_video(root / f"v{number}.mp4", rng.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8))
        for place, word in enumerate(("red", "green", "blue")):
            row = {"video": f"v{number}.mp4", "question": word, "answer": word, "options": ["red", "green", "blue"]}
            lines.append(json.dumps(row | {"type": f"type-{place}", "two_hop": place == 2}))
    (root / "q.jsonl").write_text("\n".join(lines) + "\n")
    return root
