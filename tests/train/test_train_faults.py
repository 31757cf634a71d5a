"""Faults of a training from outside: damaged checkpoints, two runs in one folder, a process that fails, a disk that fills up."""

import errno
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.train_micro import micro, settings

from hybridvlm import distributed
from hybridvlm.checkpoints.folder import save_folder
from hybridvlm.checkpoints.steps import Steps, _text_digest, checksum, digests
from hybridvlm.config import to_dict
from hybridvlm.errors import said
from hybridvlm.files import FolderBusy, folder_lock
from hybridvlm.train import __main__ as command
from hybridvlm.train import loop
from hybridvlm.train.checkpoint import OtherRun, check_run_dir


def arrays(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "train": {"decoder": {"w": normal(60, 40), "scale": normal(7)}, "b": normal(33, 5).astype(jnp.bfloat16)},
        "optimizer": {"00000": jnp.asarray(seed, jnp.int32), "00001": normal(60, 40)},
    }


def like(step: int) -> dict:
    return jax.tree.map(jnp.zeros_like, arrays(0))


def about(step: int) -> dict:
    return {"processes": [{"rows": f"position {step}"}]}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A folder with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("held")
    steps = Steps(folder)
    for step in (1, 2):
        steps.save(step, arrays(step), about(step))
    steps.close()
    return folder


def restored(folder: pathlib.Path) -> tuple[int, list[str]]:
    """(the step that came back, what was said); what came back is what was saved, to the bit."""
    told: list[str] = []
    steps = Steps(folder)
    step, tree, note = steps.restore(like, told.append)
    steps.close()
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(arrays(step)), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes() if isinstance(a, np.ndarray) else (a == b).all()
    assert note == about(step)
    return step, told


# -- checksums --------------------------------------------------------------------------------------------------------


def test_a_checksum_hears_of_every_bit_and_of_places():
    tree = {
        "a": jnp.arange(12, dtype=jnp.float32).reshape(3, 4),
        "b": jnp.ones(5, jnp.bfloat16),
        "c": jnp.zeros((), bool),
    }
    own = digests(tree)
    assert own == digests(jax.tree.map(np.asarray, tree)) and len(set(own.values())) == 3
    raw = np.asarray(tree["a"])
    for bit in range(0, raw.nbytes * 8, 7):
        other = raw.copy()
        other.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
        assert digests({"a": other}) != {"a": own["a"]}, bit
    assert digests({"a": raw[::-1]})["a"] != own["a"]  # the same numbers at other places
    assert digests({"a": raw.reshape(4, 3)})["a"] != own["a"]
    assert digests({"b": tree["b"].astype(jnp.float32)})["b"] != own["b"]
    assert checksum(tree) != checksum(tree | {"c": jnp.ones((), bool)})


def test_a_checksum_is_that_of_any_layout():
    code = (
        "import jax, numpy as np, json, sys; from hybridvlm.checkpoints.steps import digests\n"
        "a = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)\n"
        "mesh = jax.make_mesh((2, 2), ('x', 'y')); P = jax.sharding.PartitionSpec\n"
        "for spec in (P(), P('x'), P('y', 'x'), P(None, ('x', 'y'))):\n"
        "    assert digests({'a': jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))}) == digests({'a': a}), spec\n"
    )
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


# -- damaged checkpoints ----------------------------------------------------------------------------------------------


def harmed(file: pathlib.Path, how: str, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
        return
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "zeroed":
        data = bytearray(len(data))
    elif how == "emptied":
        data = bytearray()
    elif how == "block":
        at = rng.randrange(len(data))
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))


HARMS = ("removed", "cut", "zeroed", "emptied", "block", "flipped")


@pytest.mark.slow  # TensorStore's threads crashed once in reading damaged files, on a machine that was overloaded
@pytest.mark.parametrize("how", HARMS)
def test_no_damage_of_a_file_stops_or_changes_a_run(held, tmp_path, how):
    """Whatever happens to a file of the newest step: that step whole, or the one before with a word, never other numbers."""
    rng = random.Random(how)
    files = sorted(f for f in (held / "checkpoints" / "2").rglob("*") if f.is_file())
    largest = max(files, key=lambda f: f.stat().st_size)
    seen = set()
    for number, file in enumerate([largest, *rng.sample(files, 3)]):
        folder = tmp_path / str(number)
        shutil.copytree(held, folder)
        harmed(folder / file.relative_to(held), how, rng)
        step, told = restored(folder)
        seen.add(step)
        aside = folder / "checkpoints-damaged" / "2"
        assert aside.is_dir() == bool(told) == (step == 1), (file, told)
        if told:
            assert "step 2 is damaged" in told[0] and str(aside) in told[0] and "going on after step 1" in told[0]
            assert "\n" not in told[0]
    assert 1 in seen  # of the file with most of the values at least


@pytest.mark.slow
def test_random_flips(held, tmp_path):
    rng = random.Random(0)
    files = sorted(f for f in (held / "checkpoints" / "2").rglob("*") if f.is_file())
    fell_back = 0
    for number in range(60):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(held, folder)
        harmed(folder / rng.choice(files).relative_to(held), HARMS[number % len(HARMS)], rng)
        fell_back += restored(folder)[0] == 1
    assert fell_back > 10


def test_a_step_of_nothing_or_of_other_arrays_is_passed_over(held, tmp_path):
    shutil.copytree(held, tmp_path / "empty")
    step = tmp_path / "empty" / "checkpoints" / "2"
    shutil.rmtree(step)
    step.mkdir()
    assert restored(tmp_path / "empty")[0] == 1
    # values of another step under this one's name; another type and shape of an array
    other = arrays(2) | {
        "train": {"decoder": {"w": jnp.zeros((40, 60)), "scale": jnp.zeros(7)}, "b": jnp.zeros((33, 5))}
    }
    for name, tree in (("swapped", arrays(1)), ("other", other)):
        folder = tmp_path / name
        shutil.copytree(held, folder)
        maker = Steps(tmp_path / f"{name}-maker")
        maker.save(2, tree, about(2))
        maker.close()
        shutil.rmtree(folder / "checkpoints" / "2" / "state")
        shutil.copytree(
            tmp_path / f"{name}-maker" / "checkpoints" / "2" / "state", folder / "checkpoints" / "2" / "state"
        )
        step, told = restored(folder)
        assert step == 1 and "damaged" in told[0], told


def test_after_a_fall_back_the_step_is_saved_again_and_nothing_is_lost(held, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(held, folder)
    for _ in range(2):  # twice, so that two damaged ones of one number lie aside
        (folder / "checkpoints" / "2" / "about" / "metadata").write_text("{")
        steps = Steps(folder)
        assert steps.restore(like, lambda text: None)[0] == 1
        steps.save(2, arrays(2), about(2))
        steps.close()
        assert restored(folder) == (2, [])
    assert sorted(p.name for p in (folder / "checkpoints-damaged").iterdir()) == ["2", "2-1"]


@pytest.mark.parametrize("number", ["2", "9"])
def test_a_step_under_another_number_is_passed_over(held, tmp_path, number):
    folder = tmp_path / "run"
    shutil.copytree(held, folder)
    shutil.rmtree(folder / "checkpoints" / number, ignore_errors=True)
    shutil.copytree(folder / "checkpoints" / "1", folder / "checkpoints" / number)
    step, told = restored(folder)
    assert step == (1 if number == "2" else 2) and len(told) == 1
    assert f"step {number} is damaged (it is what was saved after 1 steps)" in told[0]


def test_notes_of_earlier_versions_do_not_name_their_step(tmp_path, monkeypatch):
    steps = Steps(tmp_path)
    made = steps._ocp.args.JsonSave

    def without(note):
        old = {name: value for name, value in note.items() if name in ("about", "arrays")}
        return made(old | {"sha256": _text_digest(old)})

    monkeypatch.setattr(steps._ocp.args, "JsonSave", without)
    steps.save(2, arrays(2), about(2))
    steps.close()
    monkeypatch.undo()
    assert restored(tmp_path) == (2, [])


def test_one_damage_is_one_line(tmp_path):
    """Nothing of the reads that were under way next to the one that failed, nor of metadata that nobody needs."""
    code = f"""
import pathlib, time
import numpy as np
from hybridvlm.checkpoints.steps import Steps
rng = np.random.default_rng(0)
folder = pathlib.Path({str(tmp_path)!r})
tree = lambda: {{f"a{{i}}": rng.normal(size=40_000).astype(np.float32) for i in range(24)}}
steps = Steps(folder, keep=3)
for step in (1, 2, 3):
    steps.save(step, tree(), {{}})
steps.close()
for step in (3, 2):
    (folder / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text("{{")
    for file in (folder / "checkpoints" / str(step) / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 5000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
for _ in range(2):
    steps, told = Steps(folder, keep=3), []
    found = steps.restore(lambda step: tree(), told.append)
    steps.close()
    print(found[0], len(told))
time.sleep(0.3)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["1 2", "1 0", ""], done.stdout + done.stderr
    assert done.stderr == "", done.stderr[-2000:]


def test_other_errors_that_nobody_can_catch_are_shown(held, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    shutil.copytree(held, tmp_path / "run")
    assert restored(tmp_path / "run") == (2, [])

    class Broken:
        def __del__(self):
            raise RuntimeError("Event loop is closed")  # of somebody else's

    Broken()
    assert [str(said.exc_value) for said in shown] == ["Event loop is closed"]


def test_where_no_step_is_whole_the_run_starts_anew_and_says_so(held, tmp_path):
    folder, told = tmp_path / "run", []
    shutil.copytree(held, folder)
    for step in ("1", "2"):
        shutil.rmtree(folder / "checkpoints" / step / "state")
    steps = Steps(folder)
    assert steps.restore(like, told.append) is None
    steps.close()
    assert len(told) == 2 and all("starting anew" in text for text in told)
    assert sorted(p.name for p in (folder / "checkpoints-damaged").iterdir()) == ["1", "2"]


def test_want_of_memory_is_no_damage(held, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(held, folder)
    steps = Steps(folder)
    for error in (MemoryError("of 8 GB"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(steps, "_read_alone", fail)
        with pytest.raises(type(error)):
            steps.restore(like)
    steps.close()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["1", "2"]


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return micro()


@pytest.fixture(scope="module")
def straight(tmp_path_factory, model):
    """A run of four steps, checkpoints after each second."""
    run = loop.Run(settings(tmp_path_factory.mktemp("straight") / "run", **PLAIN), model, lambda text: None)
    loop.guarded(run)
    return run


PLAIN = {"steps": 4, "optimizer": {"end": 1.0, "warmup": 2}}


def again(straight, model, folder, say=lambda text: None, **changes):
    """A run in `folder` with the programs and samples of the straight one."""
    run = loop.Run(settings(folder, **(PLAIN | changes)), model, say)
    run.trainer.programs, run.source = dict(straight.trainer.programs), straight.source
    return run


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_goes_on_from_the_newest_whole_checkpoint(straight, model, tmp_path):
    folder, told = tmp_path / "run", []
    shutil.copytree(straight.folder, folder)
    data = folder / "checkpoints" / "4" / "state"
    harmed(max((f for f in data.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size), "block", random.Random(0))
    loop.guarded(again(straight, model, folder, told.append))
    assert "step 4 is damaged" in told[0] and "going on after step 2" in told[0]
    assert losses(folder) == losses(straight.folder) and len(losses(folder)) == 4


@pytest.mark.slow
def test_more_steps_go_on_where_the_rate_allows_and_else_say_the_way_out(straight, model, tmp_path):
    folder, told = tmp_path / "run", []
    shutil.copytree(straight.folder, folder)
    loop.guarded(again(straight, model, folder, told.append, steps=6))
    assert "going on after step 4 of 6" in told[0]
    assert losses(folder)[:4] == losses(straight.folder) and len(losses(folder)) == 6
    with pytest.raises(ValueError, match="at step 6 already"):
        loop.guarded(again(straight, model, folder, steps=5))
    cosine = settings(tmp_path / "cosine", steps=4)
    check_run_dir(tmp_path / "cosine", cosine, {})
    with pytest.raises(OtherRun, match=r"steps = 4, this config says 8.*--set model=.*export output="):
        check_run_dir(tmp_path / "cosine", settings(tmp_path / "cosine", steps=8), {})
    (folder / "run.json").unlink()
    with pytest.raises(OtherRun, match=r"no run\.json"):
        again(straight, model, folder, steps=6)


@pytest.mark.slow
def test_two_trainings_in_one_folder(straight, model, tmp_path):
    run = again(straight, model, tmp_path / "run")
    with folder_lock(tmp_path / "run", "another training"), pytest.raises(FolderBusy, match=f"process {os.getpid()}"):
        loop.guarded(run)
    assert not (tmp_path / "run" / "run.json").exists()
    loop.guarded(run)
    assert losses(run.folder) == losses(straight.folder)


@pytest.mark.slow
def test_an_interrupt_saves_and_a_second_one_stops_at_once(straight, model, tmp_path):
    before, held, told = signal.getsignal(signal.SIGINT), signal.default_int_handler, []
    signal.signal(signal.SIGINT, held)  # a shell's background ignores it
    run = again(straight, model, tmp_path / "run", told.append)
    batch = run.batch

    def first(arrays, shared):
        if not told or "interrupted" not in told[-1]:
            signal.raise_signal(signal.SIGINT)
        return batch(arrays, shared)

    run.batch = first
    with pytest.raises(loop.Stopped, match="after step 1 of 4") as stopped:
        loop.guarded(run)
    assert stopped.value.code == loop.INTERRUPTED == 130 and signal.getsignal(signal.SIGINT) is held
    run = again(straight, model, tmp_path / "run")
    run.batch = lambda arrays, shared: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        loop.guarded(run)
    run = again(straight, model, tmp_path / "run", told.append)
    loop.guarded(run)
    assert losses(run.folder) == losses(straight.folder)
    signal.signal(signal.SIGINT, before)


# -- what a person is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffer 1:\n  size"), "out of memory on the device"),
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room"),
        (ValueError('RESOURCE_EXHAUSTED: Error writing "a" in OCDBT: No space left on device [source=...]'), "make room"),
    ],
)  # fmt: skip
def test_want_of_memory_or_disk_is_one_line_with_the_way_out(error, says, tmp_path, capsys, monkeypatch):
    assert says in said(error) and "\n" not in said(error) and "start again" in said(error)
    (tmp_path / "c.json").write_text("{}")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(loop, "Run", fail)
    assert command.main([str(tmp_path / "c.json")]) == 2
    told = capsys.readouterr()
    assert told.err == f"error: {said(error)}\n" and not told.out


def test_what_orbax_logs_of_a_failed_save_is_no_traceback_beside_the_message(tmp_path, caplog):
    import resource

    steps, (soft, hard) = Steps(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))  # as a full disk, for large files alone
    try:
        steps.save(1, {"a": jnp.asarray(np.random.default_rng(0).normal(size=1 << 18))}, {})
        with pytest.raises(ValueError, match="File too large"):
            steps.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [record for record in caplog.records if record.exc_info]


def test_a_config_in_python_is_said_to_be_a_program(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "run as a program" in " ".join(capsys.readouterr().out.split())


# -- several processes ------------------------------------------------------------------------------------------------

WORKER = """
import sys, time
from hybridvlm import distributed
me = distributed.initialize().index
print("joined", flush=True)
with distributed.together():
    if me == int(sys.argv[1]):
        time.sleep(1)
        raise ValueError("the reason")
    distributed.gather(b"waits for ever")
"""


def joined(commands: list[list[str]], devices: int = 1) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", distributed.ADDRESS: address}
    return [
        subprocess.Popen(
            [sys.executable, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=env | {distributed.COUNT: str(len(commands)), distributed.INDEX: str(index)},
        )
        for index, arguments in enumerate(commands)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen], timeout: float) -> list[str]:
    """Outputs; all are read at once, and no process outlives the test."""
    out = [""] * len(processes)

    def read(index: int) -> None:
        out[index] = processes[index].communicate()[0]

    readers = [threading.Thread(target=read, args=(index,)) for index in range(len(processes))]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout)
    late = [index for index, process in enumerate(processes) if process.poll() is None]
    for process in processes:
        process.kill()
    for reader in readers:
        reader.join()
    assert not late, (late, out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_all_with_its_reason(failing):
    processes = joined([["-c", WORKER, str(failing)]] * 2)
    out = ended(processes, 200)
    assert all(process.returncode not in (0, -signal.SIGKILL) for process in processes)
    assert f"process {failing}: ValueError: the reason" in out[1 - failing], out
    assert "ValueError: the reason" in out[failing]


@pytest.mark.slow
def test_training_processes_end_together(tmp_path, model):
    save_folder(tmp_path / "micro", model)
    files = []
    for index, steps in enumerate((400, 400)):
        changes = {"model": str(tmp_path / "micro"), "mesh": {"data": 2}, "steps": steps, "checkpoints": {"every": 0}}
        # process 1 cannot write its log: it fails before the first step, while process 0 goes on into it
        path = tmp_path / f"{index}.json"
        path.write_text(json.dumps(to_dict(settings(tmp_path / "run", **changes))))
        files.append(path)
    fails = (
        "import sys, hybridvlm.train.loop as loop\n"
        "def no(self, *args): raise OSError(28, 'No space left on device')\n"
        "loop.Run._announce = no\n"
        "from hybridvlm.train.__main__ import main\n"
        "from hybridvlm.distributed import leave\n"
        f"leave(main([{str(files[1])!r}]))\n"
    )
    processes = joined([["-m", "hybridvlm.train", str(files[0])], ["-c", fails]])
    out = ended(processes, 400)
    assert [process.returncode for process in processes] == [1, 1], out
    assert "process 1: OSError" in out[0] and "No space left on device" in out[0]
    assert "make room" in out[1] and "Traceback" not in out[0] + out[1]
