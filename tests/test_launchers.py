"""What starts several processes is recognised by its variables: fake environments of every launcher, and what only half names a run."""

import http.server
import threading
from typing import ClassVar

import pytest

from hybridvlm import distributed, launchers
from hybridvlm.launchers import DEFAULT_PORT, Launch, find

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "job-0.svc:6002"}
XPK_GPU = {"JAX_COORDINATOR_ADDRESS": "job-0.svc", "JAX_COORDINATOR_PORT": "6002", "NNODES": "4", "NODE_RANK": "3"}
XPK_CPU = {
    "JAX_COORDINATOR_ADDRESS": "job-0.svc",
    "JAX_PROCESS_COUNT": "6",
    "JOB_INDEX": "1",
    "JOB_COMPLETION_INDEX": "2",
    "PROCESSES_IN_JOB": "3",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    "environment, launch",
    [
        ({}, None),
        (
            ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            Launch("JAX's variables", "job-0.svc:6002", 2, 1),
        ),
        (ADDRESS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (XPK_GPU, Launch("NNODES and NODE_RANK", "job-0.svc:6002", 4, 3)),
        (XPK_GPU | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"}, Launch("NNODES and NODE_RANK", "10.0.0.1:99", 4, 3)),
        (XPK_GPU | {"JAX_COORDINATOR_ADDRESS": "[fd00::1]"}, Launch("NNODES and NODE_RANK", "[fd00::1]:6002", 4, 3)),
        (XPK_CPU, Launch("a job's variables", f"job-0.svc:{DEFAULT_PORT}", 6, 5)),
        ({"NNODES": "4", "NODE_RANK": "3"}, None),  # anybody's
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, None),  # a job of single pods
        (SLURM, Launch("Slurm")),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "8"}, None),  # a batch script that starts its steps elsewhere
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, Launch("Open MPI")),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}, Launch("a TPU slice on GKE")),
        ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_ID": "0"}, Launch("a TPU slice on GKE")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (
            {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "TPU_WORKER_HOSTNAMES": "localhost"},
            Launch("2 TPU slices"),
        ),
    ],
)
def test_launchers_are_recognised(environment, launch):
    assert find(environment, workers=lambda: 1) == launch


def test_what_is_named_by_hand_comes_first():
    named = ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert find(SLURM | XPK_CPU | named, workers=lambda: 9).how == "JAX's variables"


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "go together"),
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"}, "go together"),
        (ADDRESS, "go together"),
        (ADDRESS | {"NNODES": "2"}, "go together, got only .*NNODES"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "whole numbers"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, r"0\.\.JAX_NUM_PROCESSES-1 = 0\.\.1, got 2"),
        (XPK_GPU | {"NODE_RANK": "-1"}, r"NODE_RANK must lie in 0\.\.NNODES-1"),
        (SLURM | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS must be a whole number"),
    ],
)
def test_half_a_run_is_refused(environment, reason):
    with pytest.raises(ValueError, match=reason):
        find(environment, workers=lambda: 1)


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of a TPU VM: one of four hosts."""

    workers = "10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4"
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Metadata-Flavor")))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.workers.encode())

    def log_message(self, *args):
        pass


def test_a_tpu_vm_asks_its_metadata_server(monkeypatch, tmp_path):
    server = http.server.HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"GCE_METADATA_IP": f"localhost:{server.server_port}"}
    assert find(environment) is None and not Metadata.asked  # no TPU here, and so nobody is asked
    monkeypatch.setattr(launchers, "_has_tpus", lambda: True)
    assert find(environment) == Launch("a TPU slice of 4 hosts")
    assert Metadata.asked == [("/computeMetadata/v1/instance/attributes/worker-network-endpoints", "Google")]
    for changes in ({"TPU_SKIP_MDS_QUERY": "1"}, {"JAX_PLATFORMS": "cpu"}):
        assert find(environment | changes) is None
    monkeypatch.setattr(Metadata, "workers", "one:0:10.0.0.1")  # the older form, of one host
    assert find(environment) is None
    server.shutdown()
    assert find({"GCE_METADATA_IP": "localhost:1"}) is None  # nobody answers


def test_chips_are_seen(tmp_path):
    assert not launchers._has_tpus(tmp_path)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").write_text("")
    assert not launchers._has_tpus(tmp_path)
    (tmp_path / "vfio" / "0").write_text("")
    assert launchers._has_tpus(tmp_path)


def test_modes(monkeypatch):
    alone = distributed.Process(0, 1)
    assert distributed.initialize({}, "auto") == alone
    # told to stay alone, nothing is read
    assert distributed.initialize({"JAX_NUM_PROCESSES": "2"}, "off") == alone
    with pytest.raises(ValueError, match="expected one of"):
        distributed.initialize({}, "yes")
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *args, **options: calls.append(args))
    with pytest.raises(ValueError, match="found one process alone"):
        distributed.initialize({}, "on")
    distributed.initialize(SLURM, "auto")
    distributed.initialize(XPK_GPU, "auto")
    assert calls == [(), (), ("job-0.svc:6002", 4, 3)]

    def fails(*args, **options):
        raise RuntimeError("Number of processes must be defined.\nand a page more")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", fails)
    with pytest.raises(
        ValueError, match=r"could not join the others \(Slurm\): Number of processes must be defined\.; start"
    ):
        distributed.initialize(SLURM, "auto")


def test_one_of_several_does_not_write_for_itself_into_a_shared_folder(monkeypatch, tmp_path):
    distributed.refuse_alone(tmp_path, SLURM)  # a disk of its own
    monkeypatch.setattr(distributed.storage, "is_shared", lambda folder: True)
    distributed.refuse_alone(tmp_path, {})
    with pytest.raises(distributed.Alone, match=r"one of several \(Slurm\) that has not joined"):
        distributed.refuse_alone(tmp_path, SLURM)
