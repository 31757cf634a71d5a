"""One training step: a program per plan, and one for dense steps that teach.

Master weights are float32; the forward pass takes them in the run's dtype. Gradients of microbatches add up to that of the whole
batch: every loss on answer tokens is a sum over the batch's answer tokens by their number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybridvlm import sharding
from hybridvlm.inference.model import Model
from hybridvlm.models.nemotron_vl.model import head
from hybridvlm.models.weights import flatten, unflatten
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.reduction.plan_functions import layer_score_fn
from hybridvlm.train import lora as adapters
from hybridvlm.train import optimizer as optimizers
from hybridvlm.train.config import TrainConfig
from hybridvlm.train.distill import mixers, row_mask, shared_pass
from hybridvlm.train.features import visual
from hybridvlm.train.loss import answers, cross_entropy, divergence, first_answers, rank_loss
from hybridvlm.train.rows import TrainBatch
from hybridvlm.train.schedule import TEACH, StepPlan
from hybridvlm.train.straight_through import straight_through

Flat = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes: trained parameters (flat, float32; LoRA factors, if there are any), optimizer state, average ({}: none)."""

    train: Flat
    optimizer: Any
    ema: Flat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenParams:
    """What no step changes.

    Attributes:
        frozen: parameters that are not trained, by path.
        teacher: the teacher's, by path; {}: it has none of its own.
        table: visual tokens of every picture that a batch refers to by number, None where a batch holds them itself.
    """

    frozen: Flat
    teacher: Flat
    table: jax.Array | None


def check_streams(config: TrainConfig, model: Model) -> None:
    """ValueError for what a model of one stream, or of two, cannot be trained with."""
    d, t, name = config.data, config.distill, model.family.NAME
    if model.family.split_rows is None:
        if d.questions > 1:
            raise ValueError(
                f"Data.questions {d.questions}: video and text of family {name!r} are one row, which several questions cannot "
                "share; set it to 1, or train a VAMBA"
            )
        return
    if t.scores:
        raise ValueError(
            f"Distill.scores teaches Mamba layers that read the question, and family {name!r} has none; set it to 0"
        )
    if t.questions > 1:
        raise ValueError(
            f"Distill.questions is for models of one stream; family {name!r} shares a video by Data.questions"
        )


class Trainer:
    """The programs of a run, one per plan and one for teaching.

    Args:
        config: of the run.
        model: what is trained.
        mesh: the devices, None for one.
        teacher: another model, whose dense pass teaches the answers; None where the config names none.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        mesh: jax.sharding.Mesh | None = None,
        teacher: Model | None = None,
    ):
        self.config, self.model, self.teacher = config, model, teacher
        self.mesh = None if mesh is None else sharding.auto_mesh(mesh)
        self.family, self.dtype = model.family, jnp.dtype(config.dtype)
        check_streams(config, model)
        self.optimizer = optimizers.make(config.optimizer, config.steps, adapters.target)
        self.rate = optimizers.schedule(config.optimizer, config.steps)
        self.answer = config.data.answer or config.data.text
        self.programs: dict[Any, Callable[..., tuple[State, Sums]]] = {}

    # -- the start --------------------------------------------------------------------------------------------------

    def check(self, params: Mapping[str, Any]) -> None:
        """ValueError for patterns of the config that find no parameter of the model, or none that they may."""
        c, flat = self.config, dict(flatten(params))
        optimizers.check_decay_free(flat, c.optimizer.decay_free)
        if c.lora.rank:
            tower = [p for p in adapters.paths(c.lora, flat) if p.startswith(("vision/", "projector/"))]
            if tower and c.data.features == "cached":
                raise ValueError(f"Data.features 'cached' needs a frozen tower; Lora.targets finds {', '.join(tower)}")
        else:
            optimizers.split(flat, c.optimizer.frozen)

    def start(self, params: Mapping[str, Any], table: jax.Array | None = None) -> tuple[State, FrozenParams]:
        """State and constants before the first step, of the model's parameters (on a mesh, if there is one, wherever they lie)."""
        state, fixed = self._begin(params)
        if self.mesh is not None and table is not None:
            table = jax.device_put(np.asarray(table), sharding.sharding_of(self.mesh, "", table.shape))
        return self._placed(state), dataclasses.replace(self._placed(fixed), table=table)

    def start_shapes(self, params: Mapping[str, Any]) -> tuple[State, FrozenParams]:
        """`start` of parameters that are shapes (`jax.ShapeDtypeStruct`): shapes with their shardings, for compiling ahead of time."""

        def put(leaf: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return self._placed(jax.eval_shape(self._begin, params), put)

    def _begin(self, params: Mapping[str, Any]) -> tuple[State, FrozenParams]:
        """`start`, wherever the parameters lie."""
        c, flat = self.config, dict(flatten(params))
        cast = optimizers.cast(flat, self.dtype)
        if c.lora.rank:
            train, frozen = adapters.init(c.lora, flat, jax.random.key(c.seed)), cast
        else:
            train, still = optimizers.split(flat, c.optimizer.frozen)
            frozen = {path: cast[path] for path in still}
            # copies: a step gives the memory of its arguments to its results, and these are the model's own
            train = {path: jnp.array(a, jnp.float32, copy=True) for path, a in train.items()}
        teacher: Flat = {}
        if self.teacher is not None:
            teacher = optimizers.cast(dict(flatten(self.teacher.params)), self.dtype)
        elif c.distill.kl and c.distill.teacher == "start" and not c.lora.rank:
            teacher = {path: jnp.array(cast[path], copy=True) for path in train}
        ema = jax.tree.map(lambda a: jnp.array(a, copy=True), train) if c.optimizer.ema else {}
        return State(train, jax.jit(self.optimizer.init)(train), ema), FrozenParams(frozen, teacher, None)

    def _placed(self, tree: Any, put: Callable[..., Any] = jax.device_put) -> Any:
        """A tree over parameters by path (the optimizer's state too), each array put where the rules have the parameter."""
        mesh = self.mesh
        if mesh is None:
            return tree

        def with_sharding(path: tuple, leaf: Any) -> Any:
            keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
            return put(leaf, sharding.sharding_of(mesh, keys[-1] if keys else "", leaf.shape))

        return jax.tree_util.tree_map_with_path(with_sharding, tree)

    def whole(self, train: Flat, frozen: Flat) -> dict[str, Any]:
        """The model's parameters of a state, as the forward pass takes them."""
        if self.config.lora.rank:
            flat = adapters.merge(self.config.lora, frozen, train)
            for number, path in enumerate(sorted({adapters.target(name) for name in train})):
                flat[path] = adapters.rounded(flat[path], frozen[path].dtype, jax.random.key(number))
            return unflatten(flat)
        return unflatten(optimizers.cast(train, self.dtype) | frozen)

    # -- losses -----------------------------------------------------------------------------------------------------

    def _run(
        self,
        params: Any,
        batch: TrainBatch,
        visual_tokens: jax.Array | None,
        plan: ReductionPlan | None,
        model: Model | None = None,
        **options: Any,
    ):
        model = model or self.model
        if self.mesh is not None:
            # columns that several devices need are written down for each here, so that their gradients come together in one weight
            params = sharding.permute_for_tp(params, model.config, sharding.tensor_size(self.mesh))
            options["mesh"] = self.mesh
        if self.config.remat != "none":
            options["remat"] = self.config.remat
        options["caches"] = False
        question, segments = batch.question, self.config.data.segments
        return model.family.decoder_output(
            params, model.config, batch.batch, visual_tokens, plan, question=question, segments=segments, **options
        )

    def answer_logits(
        self, params: Any, out: Any, batch: TrainBatch, model: Model | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [B,A,V] and the tokens [B,A] to be said."""
        d = self.config.data  # a row holds the answers of all its samples and questions, and all of them are text
        x, target = answers(out.tokens, batch.label, min(self.answer * d.segments * d.questions, d.text))
        return head(params, (model or self.model).config, x), target

    def teacher_logits(
        self, params: Any, fixed: FrozenParams, batch: TrainBatch, visual_tokens: jax.Array | None
    ) -> jax.Array:
        """Logits [B,A,V] of the teacher's dense pass, in the order of `answer_logits`."""
        if self.teacher is not None:
            assert batch.teacher is not None  # `loop.Run.batch` makes it
            teacher, taught = unflatten(fixed.teacher), batch.teacher
            visual_tokens = visual(teacher, self.teacher, batch.visual, fixed.table)
        elif self.config.distill.teacher == "self":
            teacher, taught = jax.lax.stop_gradient(params), batch
        else:
            teacher, taught = unflatten(fixed.frozen | fixed.teacher), batch
        dense, _ = self._run(teacher, taught, jax.lax.stop_gradient(visual_tokens), None, self.teacher)
        return self.answer_logits(teacher, dense, taught, self.teacher)[0]

    def plan_loss(
        self, train: Flat, fixed: FrozenParams, batch: TrainBatch, total: jax.Array, plan: ReductionPlan | None
    ):
        """Cross-entropy under a plan and the divergence from the dense teacher: (loss, sums); total: answer tokens of the step."""
        c, d = self.config, self.config.distill
        params = self.whole(train, fixed.frozen)
        visual_tokens = visual(params, self.model, batch.visual, fixed.table)
        options: dict[str, Any] = {}
        if plan and c.reduction.straight_through:
            options["straight_through"] = straight_through(c.reduction.straight_through)
        out, given = self._run(params, batch, visual_tokens, plan, **options)
        logits, target = self.answer_logits(params, out, batch)
        entropy, correct = cross_entropy(logits, target)
        loss, sums = entropy / total, {"entropy": entropy, "correct": correct}
        if d.kl:
            sums["kl"] = divergence(
                logits, self.teacher_logits(params, fixed, batch, visual_tokens), target, d.temperature
            )
            loss += d.kl * sums["kl"] / total
        if plan is not None:
            planned = [plan.keep(0, given), *(plan.keep(site + 1, given) for site in plan.drops)]
            sums["wrong"] = jnp.sum(jnp.stack(planned) != out.kept)
        return loss, sums | {"kept": jnp.sum(out.kept, axis=(1, 2)), "given": jnp.sum(given)}

    def teach_loss(self, train: Flat, fixed: FrozenParams, batch: Any, total: jax.Array):
        """A dense step: cross-entropy, and what attention teaches the Mamba scores."""
        c, config = self.config, self.model.config
        params = self.whole(train, fixed.frozen)
        if isinstance(batch, TrainBatch):
            visual_tokens = visual(params, self.model, batch.visual, fixed.table)
            options: dict[str, Any] = {}
            if c.distill.scores:
                score = layer_score_fn(c.reduction.reduction.score, c.data.segments, c.data.text)
                options = {"collect": mixers(config), "score_fn": score, "query_capacity": c.data.text}
            out, _ = self._run(params, batch, visual_tokens, None, **options)
            logits, target = self.answer_logits(params, out, batch)
            scores = {layer: score[:, None] for layer, score in out.scores.items()}
        else:
            visual_tokens = visual(
                params, self.model, {k.removeprefix("visual_"): a for k, a in batch.items()}, fixed.table
            )
            options = {} if c.remat == "none" else {"remat": c.remat}
            assert visual_tokens is not None  # shared batches are of videos
            hidden, scores, mask = shared_pass(self.family, params, config, batch, visual_tokens, **options)
            x, target = first_answers(hidden, batch["label"].reshape(hidden.shape[:2]), self.answer)
            logits = head(params, config, x)
        entropy, correct = cross_entropy(logits, target)
        loss, sums = entropy / total, {"entropy": entropy, "correct": correct}
        if c.distill.scores:
            if isinstance(batch, TrainBatch):
                mask = row_mask(batch.batch, c.data.segments)
            ranked, weight = rank_loss(config.pattern, scores, mask)
            # its weights depend on the teacher: microbatches average, by their answer tokens
            taught = ranked / jnp.maximum(weight, 1e-6) * (jnp.sum(target >= 0) / total)
            sums["scores"] = taught
            loss += c.distill.scores * taught
        return loss, sums

    # -- the step ---------------------------------------------------------------------------------------------------

    def program(self, plan: StepPlan) -> Callable[..., tuple[State, Sums]]:
        """The compiled update (state, fixed, batch) -> (state, metrics); it donates `state`.

        plan: what is dropped, None (dense), or TEACH for a dense step that teaches. ValueError for any other text.
        """
        if isinstance(plan, str) and plan != TEACH:
            raise ValueError(f"plan must be a ReductionPlan, None or {TEACH!r}, got {plan!r}")
        if plan not in self.programs:
            self.programs[plan] = jax.jit(
                lambda state, fixed, batch: self.update(state, fixed, batch, plan), donate_argnums=0
            )
        return self.programs[plan]

    def update(self, state: State, fixed: FrozenParams, batch: Any, plan: StepPlan) -> tuple[State, Sums]:
        """One step: see `program`."""
        label = batch.label if isinstance(batch, TrainBatch) else batch["label"]
        total = jnp.maximum(jnp.sum(label > 0), 1).astype(jnp.float32)

        def loss(train: Flat, part: Any) -> tuple[jax.Array, Sums]:
            if plan == TEACH:
                return self.teach_loss(train, fixed, part, total)
            return self.plan_loss(train, fixed, part, total, plan)

        gradient = jax.value_and_grad(loss, has_aux=True)
        n = self.config.optimizer.accumulate
        if n == 1:
            (value, sums), grads = gradient(state.train, batch)
        else:
            # row i goes to microbatch i mod n: rows of a device stay on it
            parts = jax.tree.map(lambda a: a.reshape(a.shape[0] // n, n, *a.shape[1:]).swapaxes(0, 1), batch)

            def add(carry: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, gradient(state.train, part)), None

            shapes = jax.eval_shape(gradient, state.train, jax.tree.map(lambda a: a[0], parts))
            empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            ((value, sums), grads), _ = jax.lax.scan(add, empty, parts)
        # gradients and what comes of them lie as the parameters do, whatever the partitioner would choose
        grads = self._placed(grads, jax.lax.with_sharding_constraint)
        updates, inner = self.optimizer.update(grads, state.optimizer, state.train)
        train = dict(optax.apply_updates(state.train, updates))
        for path, (least, most) in self.family.BOUNDS.items():
            if path in train:
                train[path] = jnp.clip(train[path], least, most)
        ema = optimizers.average(state.ema, train, self.config.optimizer.ema) if state.ema else {}
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "answers": total} | sums
        return self._placed(State(train, inner, ema), jax.lax.with_sharding_constraint), metrics
