"""What a step was like: its record for the log, the checks on it, and the line for people."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from hybridvlm.console import LogProgress, duration
from hybridvlm.reduction import PlanMismatch
from hybridvlm.reduction.vamba import counted
from hybridvlm.train.log import memory_bytes
from hybridvlm.train.schedule import TEACH, step_kind


class Meter:
    """Turns a step's results into its record, and checks them."""

    def __init__(self, run: Any, peak: tuple[float, str], done: int = 0):
        self.run, self.peak = run, peak
        self.progress = LogProgress(run.config.steps, "step", done=done) if run.log.active else None
        self.last, self.recent = time.perf_counter(), []  # type: tuple[float, list[dict[str, Any]]]

    def __call__(self, step: int, plan: Any, metrics: Any, waited: float, compiled: bool) -> None:
        run, m = self.run, {k: np.asarray(v) for k, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        answers, number = float(m["answers"]), step + 1
        for name in ("loss", "grad_norm"):
            if not np.isfinite(m[name]):
                raise FloatingPointError(
                    f"the {name.replace('_', ' of the ')} is {float(m[name])} at step {number}; nothing of that step is kept"
                )
        if m.get("wrong", 0):
            raise PlanMismatch(
                f"step {number}: {int(m['wrong'])} counts of kept tokens are not the plan's ({plan.method})"
            )
        tokens, flops = run.step_work(plan)
        record = {
            "step": number,
            "kind": step_kind(plan),
            "loss": float(m["loss"]),
            "answer_loss": float(m["entropy"]) / answers,
            "accuracy": float(m["correct"]) / answers,
            "grad_norm": float(m["grad_norm"]),
            "rate": float(run.trainer.rate(step)),
            "answers": int(answers),
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / (self.peak[0] * jax.device_count()),
            "waited": min(waited / seconds, 1.0),
            "memory_gib": memory_bytes() / 2**30,
        }
        record |= {name: float(m[name]) / (answers if name == "kl" else 1) for name in ("kl", "scores") if name in m}
        if isinstance(plan, type(None)) or plan == TEACH:
            record["retention"] = [1.0] * len(counted(run.model.config, run.shape.text).pattern)
        else:
            share = m["kept"] / max(float(m["given"]), 1.0)
            entering = np.searchsorted(np.asarray(plan.drops), np.arange(plan.layers), side="left")
            record["retention"] = np.round(share[entering], 5).tolist()
        if compiled:
            record["compiled"] = True
        record["skipped"] = len(run.reader.bad)
        run.log.step(record)
        self.recent.append(record)
        if self.progress is not None:
            self.progress.set_postfix_str(f"loss {record['answer_loss']:.4f}")
            self.progress.update()
        if number % run.config.logging.every == 0 or number == run.config.steps:
            run.log.say(self.line())
            self.recent = []

    def line(self) -> str:
        """What the steps since the last line were like."""
        steady = [r for r in self.recent if "compiled" not in r] or self.recent
        mean = lambda name, over: float(np.mean([r[name] for r in over]))  # noqa: E731
        seconds = sum(r["seconds"] for r in steady)
        waited = sum(r["waited"] * r["seconds"] for r in steady) / seconds
        last = self.recent[-1]
        left = self.run.config.steps - last["step"]
        parts = []
        for kind in dict.fromkeys(r["kind"] for r in self.recent):
            own = [r for r in self.recent if r["kind"] == kind]
            extra = "".join(f", {name} {mean(name, own):.3f}" for name in ("kl", "scores") if name in own[0])
            kept = own[-1]["retention"]
            keeps = f", keeps {np.mean(kept):.1%} (last layer {kept[-1]:.1%})" if kept[-1] < 1 else ""
            parts.append(
                f"{kind}: loss {mean('answer_loss', own):.4f}, accuracy {mean('accuracy', own):.1%}{extra}{keeps}"
            )
        return (
            f"{last['step']}/{self.run.config.steps} {' | '.join(parts)} | grad {last['grad_norm']:.2f}, rate {last['rate']:.2e}, "
            f"{seconds / len(steady):.2f} s/step, about {duration(seconds / len(steady) * left)} left, "
            f"{mean('tokens_per_s', steady):,.0f} tok/s, "
            f"mfu {mean('mfu', steady):.1%} ({self.peak[1]} peak), waited {waited:.1%}, {last['memory_gib']:.1f} GiB"
        )
