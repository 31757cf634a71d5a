"""The notebooks: whole, alike in how they open, and running from top to bottom in an empty folder."""

import json
import os
import pathlib
import sys

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NAMES = {"quickstart", "load_checkpoint", "first_method", "finetune", "tpu", "analysis", "benchmarks"}
BYTES = 400_000

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_is_a_notebook_for_everyone():
    assert {path.stem for path in NOTEBOOKS} == NAMES


@each
def test_a_notebook_is_whole(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)  # 4.5 brings ids of cells
    assert path.stat().st_size < BYTES


@each
def test_a_notebook_opens_with_what_it_is_and_the_install_cell(path):
    first, second, *_ = json.loads(path.read_text())["cells"]
    assert first["cell_type"] == "markdown" and "".join(first["source"]).startswith("# ")
    assert second["cell_type"] == "code" and "hybridvlm" in "".join(second["source"])
    shared = {"".join(cells(other, "code")[0]["source"]) for other in NOTEBOOKS}
    assert len(shared) == 1, "the install cell is the same in every notebook"


def test_the_install_cell_leaves_what_is_installed_alone(monkeypatch, capsys):
    import subprocess

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    exec("".join(cells(NOTEBOOKS[0], "code")[0]["source"]), {})
    assert capsys.readouterr().out.startswith("jax ")


def test_the_install_cell_installs_and_keeps_jax(monkeypatch):
    import importlib.util
    import subprocess

    called = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: called.append(command))
    exec("".join(cells(NOTEBOOKS[0], "code")[0]["source"]), {})
    (command,) = called
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and command[-1] == ".."
    # an upgrade of jax would take a runtime's GPU or TPU away
    assert "only-if-needed" in command and not {"-U", "--upgrade", "--force-reinstall"} & set(command)


@each
def test_a_notebook_was_run_and_nothing_failed(path):
    code = cells(path, "code")
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run it from top to bottom and save it"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]


@pytest.mark.slow
@each
def test_a_notebook_runs_in_an_empty_folder(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    root = str(pathlib.Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
