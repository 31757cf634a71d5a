"""A model for tests of the evaluation command that are not about numbers."""

import types

import numpy as np

from hybridvlm.eval import report
from hybridvlm.inference.model import Model


def silent_model(monkeypatch):
    """Make every model compute nothing and say `reply`; `asked` holds how many questions it has heard, `most` how many it hears."""
    told = types.SimpleNamespace(reply="A", asked=0, most=None)

    def generate(self, batch, visual, plan=None, **options):
        rows = len(batch.input_ids)
        if told.most is not None and told.asked >= told.most:
            raise KeyboardInterrupt
        told.asked += rows
        return types.SimpleNamespace(
            text=[told.reply] * rows,
            unfinished=[False] * rows,
            thinking=[""] * rows,
            timing=types.SimpleNamespace(prefill=0.01, decode=0.01),
            plan=None,
            peak_bytes=1,
        )

    monkeypatch.setattr(report, "picture", lambda rows, axis, label: b"")  # tested with the embedded benchmark
    monkeypatch.setattr(Model, "generate", generate)
    monkeypatch.setattr(Model, "verify", lambda self, generation: None)
    monkeypatch.setattr(
        Model, "encode", lambda self, pixels, attention=False: np.zeros((1, pixels.shape[1], 1, 1), np.float32)
    )
    return told
