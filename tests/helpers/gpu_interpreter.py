"""Mosaic GPU kernels run on the CPU: jax's interpreter for them, with what it lacks and our kernels use (jax 0.10 to 0.12).

Its own: grids, warpgroups as threads, barriers (a wrong number of arrivals hangs or raises), TMA copies, scoped memory that
starts as NaN, `wgmma` of two matrices in shared memory, loops and conditions. Added here: slices that start at a computed
place, `wgmma` with a left operand in registers or a transposed one, and, of jax 0.10, layout casts and `plgpu.load`.
Beyond both: copies happen at once (a missing wait or fence is not seen), layouts, swizzles, registers and the rounding
of approximate functions. Those are for the compiler, and for a real card.
"""

import contextlib
from unittest import mock

import jax
import numpy as np
from jax._src import callback, core
from jax._src.pallas.mosaic.interpret import thread_map, utils
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax._src.state import primitives as state_primitives
from jax._src.state import types as state_types

from hybridvlm.ops.platforms import compiling_for

_interpreter_interpret = jaxpr_interpret.JaxprInterpreter.interpret
JAX_0_10 = jax.__version_info__ < (0, 11)


@contextlib.contextmanager
def interpreted():
    """Kernels traced inside run on the CPU. The functions that call them must not have been traced before."""
    interpreter = jaxpr_interpret.JaxprInterpreter
    with (
        mock.patch.object(thread_map, "_run_jaxpr", _run_jaxpr),
        mock.patch.object(thread_map, "thread_map", _thread_map),
        mock.patch.object(interpreter, "interpret", _interpret if JAX_0_10 else _interpreter_interpret),
        mock.patch.object(interpreter, "_interpret_wgmma_ref_p", _wgmma_0_10)
        if JAX_0_10
        else mock.patch.object(gpu_callbacks, "wgmma", gpu_callbacks.fail_on_exception(_wgmma)),
        mock.patch.object(gpu_callbacks, "_validate_transforms", lambda transforms: None),
        compiling_for("gpu"),
        force_gpu_interpret_mode(InterpretGPUParams()),
    ):
        try:
            yield
        finally:
            reset_gpu_interpret_mode_state()


def _thread_map(f, num_threads, token, *args, use_ordered_callback, on_exception=lambda *args, **kwargs: None):
    """As jax's, for a single warpgroup too: `_run_jaxpr` is to run them all."""
    traced = jax.make_jaxpr(lambda thread, *args: f(thread, jax.numpy.int32(0), *args))(jax.numpy.int32(0), *args)
    return thread_map._call_threadmap_callback(
        token, None, traced.jaxpr, num_threads, traced.consts, args, use_ordered_callback, on_exception
    )


def _run_jaxpr(jaxpr, consts, *args):
    """What one warpgroup does, operation by operation.

    jax compiles it instead, for every block and warpgroup again, and the programs, waiting for each other at barriers,
    can take all of XLA's threads: then they wait for ever.
    """
    values = dict(zip(jaxpr.constvars + jaxpr.invars, (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        given = [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars]
        values.update(zip(eqn.outvars, _run_equation(eqn, given), strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]


def _run_equation(eqn, given):
    params = eqn.params
    match eqn.primitive.name:
        case "io_callback":
            # scalars as jax.Array: so they come where jax itself calls
            given = [jax.numpy.asarray(v) if np.ndim(v) == 0 else np.asarray(v) for v in given]
            return [np.asarray(v) for v in params["callback"](*given)]
        case "layout_cast":
            return given
        case "jit" | "pjit":
            return _run_jaxpr(params["jaxpr"].jaxpr, params["jaxpr"].consts, *given)
        case "cond":
            branch = params["branches"][int(given[0])]
            return _run_jaxpr(branch.jaxpr, branch.consts, *given[1:])
        case "while":
            test, body = params["cond_jaxpr"], params["body_jaxpr"]
            n, m = params["cond_nconsts"], params["body_nconsts"]
            carry = given[n + m :]
            while _run_jaxpr(test.jaxpr, test.consts, *given[:n], *carry)[0]:
                carry = _run_jaxpr(body.jaxpr, body.consts, *given[n : n + m], *carry)
            return carry
        case "scan":
            body = params["jaxpr"]
            body, constants = (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
            n = params["num_consts"] if JAX_0_10 else len(params["ft_in"].unpack()[0])
            assert len(given) - n == len(body.outvars), "kernels scan over nothing but a count"
            carry = given[n:]
            for _ in range(params["length"]):
                carry = _run_jaxpr(body, constants, *given[:n], *carry)
            return carry
    out = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(params))
    return out if eqn.primitive.multiple_results else [out]


def _interpret(self, jaxpr, token, *args):
    """A load with a layout is a load: what the interpreter knows how to put in order with all else."""
    eqns = [
        e.replace(primitive=state_primitives.get_p, params={"tree": e.params["tree"]})
        if e.primitive is primitives.load_p else e
        for e in jaxpr.eqns
    ]  # fmt: skip
    return _interpreter_interpret(self, jaxpr.replace(eqns=eqns), token, *args)


def _factor(content, transforms):
    """A factor of a product as it is multiplied: in float32, turned around where its reference says so."""
    turned = any(isinstance(t, state_types.TransposeTransform) for t in transforms)
    content = np.asarray(content).astype(np.float32)
    return content.T if turned else content


def _wgmma(*, token, mesh_location, thread, source_info=None, acc_dtype=None, **operands):
    memory = gpu_callbacks._get_shared_memory()
    where = {"logging_info": gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)}

    def place(name):
        """Where an operand lies: its key in memory and the range there, and its transforms."""
        given = tuple(operands[f"{name}_transforms"])
        plain = tuple(t for t in given if not isinstance(t, state_types.TransposeTransform))
        plain = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(plain))
        key = gpu_callbacks.HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
        return key, memory.access(key, plain) if hasattr(memory, "access") else utils.to_range(plain)

    def read(name):
        return memory.get_buffer_content(*place(name), thread, **where)[0]

    left = operands["a_allocation_key_as_array"]  # itself, where it is in registers
    left = _factor(left if np.ndim(left) == 2 else read("a"), operands["a_transforms"])
    right = _factor(read("b"), operands["b_transforms"])
    total = read("acc") + np.asarray(jax.numpy.dot(left, right))
    memory.store_buffer_content(*place("acc"), total, thread, **where)
    return token


def _wgmma_0_10(self, eqn, token, get_invals):
    acc, left, right, *leaves = get_invals()
    trees = [eqn.params[f"{name}_transforms_tree"] for name in ("acc", "a", "b")]
    transforms = []
    for tree in trees:
        count = 0 if tree is None else tree.num_leaves
        transforms.append(() if tree is None else jax.tree.unflatten(tree, leaves[:count]))
        leaves = leaves[count:]
    in_registers = not isinstance(eqn.invars[1].aval, state_types.AbstractRef)
    indices = [tuple(t for t in ts if not isinstance(t, state_types.TransposeTransform)) for ts in transforms]

    def run(token, device_id, thread_id, acc, left, right, indices):
        memory = gpu_callbacks._get_shared_memory()
        thread = memory.get_global_thread_id(int(device_id), int(thread_id))
        ranges = [utils.to_range(jax.tree.map(int, gpu_callbacks._remove_noop_transforms(tuple(ts)))) for ts in indices]

        def read(key, place):
            return memory.get_buffer_content(gpu_callbacks.HostAllocationKey.from_array(key), place, thread)[0]

        factors = left if in_registers else read(left, ranges[1]), read(right, ranges[2])
        factors = [_factor(f, ts) for f, ts in zip(factors, transforms[1:], strict=True)]
        total = read(acc, ranges[0]) + np.asarray(jax.numpy.dot(*factors))
        memory.store_buffer_content(gpu_callbacks.HostAllocationKey.from_array(acc), ranges[0], total, thread)
        return token

    token = callback.io_callback(
        run,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token,
        self.device_info.device_id,
        self.thread_id,
        acc,
        left,
        right,
        indices,
        ordered=True,
    )
    return token, []
