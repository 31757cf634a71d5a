"""What a model needs of memory, time and links on devices that need not be there, and which mesh it fits on.

`estimate(config, frames=1024, mesh={"tensor": 4}, topology="v6e:2x2")` counts; `choose_mesh` finds the smallest that fits;
`check_fits` refuses, before anything is loaded, what cannot. `python -m hybridvlm.plan` prints all of it.
"""

from hybridvlm.estimates.choose import DoesNotFit, MeshChoice, check_fits, choose_mesh, first_that_fits
from hybridvlm.estimates.guard import choose_here, mesh_option, refuse_too_large, refuse_training
from hybridvlm.estimates.memory import Memory, training_memory
from hybridvlm.estimates.result import Estimate, estimate
from hybridvlm.estimates.seconds import Phase
from hybridvlm.estimates.workload import MeshSizes, Workload

__all__ = [
    "DoesNotFit",
    "Estimate",
    "Memory",
    "MeshChoice",
    "MeshSizes",
    "Phase",
    "Workload",
    "check_fits",
    "choose_here",
    "choose_mesh",
    "estimate",
    "first_that_fits",
    "mesh_option",
    "refuse_too_large",
    "refuse_training",
    "training_memory",
]
