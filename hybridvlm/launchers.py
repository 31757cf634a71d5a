"""Who started this process, and with how many others: read from the environment, before JAX asks for a device.

JAX itself finds out under Slurm, Open MPI, and on Google's TPUs (a TPU VM by the metadata server, GKE and multislice by their
variables); what starts JAX by variables of its own is read here: XPK, Kubernetes' indexed jobs and JobSets, torchrun-like launchers.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import urllib.request
from collections.abc import Callable, Mapping

ADDRESS, PORT = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"
COUNTS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT", "NNODES")
INDICES = ("JAX_PROCESS_ID", "NODE_RANK")
DEFAULT_PORT = 1234  # where an address comes without one, as launchers of MaxText have it
METADATA = "http://{host}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
METADATA_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Launch:
    """A run of several processes.

    Attributes:
        how: what started it, for people.
        address: host:port of process 0; None: JAX finds all three by itself.
        count: of processes, where it is known before.
        index: of this one.
    """

    how: str
    address: str | None = None
    count: int | None = None
    index: int | None = None


def find(environment: Mapping[str, str], workers: Callable[[], int] | None = None) -> Launch | None:
    """The run that this process belongs to; None: it is alone.

    Args:
        environment: variables, such as os.environ.
        workers: how many hosts the TPU slice of this machine has (default: its metadata server is asked, if it has TPUs).

    Raises:
        ValueError: for variables that only half name a run, or are no numbers.
    """
    named = _named(environment)
    if named is not None:
        return named if named.count is None or named.count > 1 else None
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return Launch("Open MPI")
    # a Slurm allocation alone starts nothing: its steps do
    if "SLURM_STEP_NODELIST" in environment and _number(environment, "SLURM_NTASKS") > 1:
        return Launch("Slurm")
    if _number(environment, "MEGASCALE_NUM_SLICES") > 1:
        return Launch(f"{environment['MEGASCALE_NUM_SLICES']} TPU slices")
    if "," in (environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""):
        return Launch("a TPU slice on GKE")
    found = (functools.partial(tpu_hosts, environment) if workers is None else workers)()
    return Launch(f"a TPU slice of {found} hosts") if found > 1 else None


def _named(environment: Mapping[str, str]) -> Launch | None:
    """The run that variables name in full, or None where there are none of them."""
    address = environment.get(ADDRESS, "")
    counts = {name: environment[name] for name in COUNTS if environment.get(name)}
    ranks = {name: environment[name] for name in INDICES if environment.get(name)}
    if environment.get("JOB_COMPLETION_INDEX") and address and not ranks:
        ranks["JOB_COMPLETION_INDEX"] = environment["JOB_COMPLETION_INDEX"]
    own = any(name in counts or name in ranks for name in (COUNTS[0], INDICES[0]))
    if not address and not own:
        return None  # NNODES and NODE_RANK alone may be anybody's
    if not (address and counts and ranks):
        given = sorted([*counts, *ranks, *([ADDRESS] if address else [])])
        raise ValueError(
            f"{ADDRESS}, one of {', '.join(COUNTS)} and one of {', '.join(INDICES)} go together, got only {given}"
        )
    (count_name, count), (rank_name, rank) = next(iter(counts.items())), next(iter(ranks.items()))
    try:
        total, index = int(count), int(rank)
        if rank_name == "JOB_COMPLETION_INDEX":
            index += int(environment.get("JOB_INDEX") or 0) * int(environment.get("PROCESSES_IN_JOB") or 0)
    except ValueError:
        raise ValueError(f"{count_name} and {rank_name} must be whole numbers, got {count!r} and {rank!r}") from None
    if not 0 <= index < total:
        raise ValueError(f"{rank_name} must lie in 0..{count_name}-1 = 0..{total - 1}, got {index}")
    how = "JAX's variables" if own else "NNODES and NODE_RANK" if "NNODES" in counts else "a job's variables"
    return Launch(how, _with_port(address, environment.get(PORT)), total, index)


def _with_port(address: str, port: str | None) -> str:
    """host:port, of an address with or without one. An IPv6 address is in brackets."""
    host, colon, own = address.rpartition(":")
    if colon and own.isdigit() and (host.endswith("]") or ":" not in host):
        return address
    return f"{address}:{port or DEFAULT_PORT}"


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name) or "1"
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {text!r}") from None


def tpu_hosts(environment: Mapping[str, str]) -> int:
    """Hosts of the TPU slice that this machine belongs to, by its metadata server; 1 where there is no such slice."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if environment.get("TPU_SKIP_MDS_QUERY") or (platforms and "tpu" not in platforms) or not _has_tpus():
        return 1
    host = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    asked = urllib.request.Request(METADATA.format(host=host), headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(asked, timeout=METADATA_SECONDS) as answer:
            text = answer.read().decode()
    except (OSError, ValueError):
        return 1
    return len([worker for worker in text.split(",") if worker.strip()]) or 1


def _has_tpus(devices: str | os.PathLike[str] = "/dev") -> bool:
    """Whether this machine has the device files of TPU chips."""
    folder = pathlib.Path(devices)
    return any(folder.glob("accel[0-9]*")) or any((folder / "vfio").glob("[0-9]*"))
