"""The methods that people compare with, a file each: what its source does exactly, its defaults, and what is
changed here and why.

Common to all: ties go to the earlier token, survivors keep their order and their positions, a merged token stands
where its anchor stood, and the count is the plan's, whatever the video. Randomness, data-dependent counts and
renumbered positions of the released codes are left out.
"""

from hybridvlm.reduction.rivals import dart as dart
from hybridvlm.reduction.rivals import divprune as divprune
from hybridvlm.reduction.rivals import dycoke as dycoke
from hybridvlm.reduction.rivals import evs_pixels as evs_pixels
from hybridvlm.reduction.rivals import fastvid as fastvid
from hybridvlm.reduction.rivals import flashvid as flashvid
from hybridvlm.reduction.rivals import framefusion as framefusion
from hybridvlm.reduction.rivals import frames as frames
from hybridvlm.reduction.rivals import holitom as holitom
from hybridvlm.reduction.rivals import oneshot as oneshot
from hybridvlm.reduction.rivals import prunevid as prunevid
from hybridvlm.reduction.rivals import resolution as resolution
from hybridvlm.reduction.rivals import sparsevlm as sparsevlm
from hybridvlm.reduction.rivals import tome as tome
from hybridvlm.reduction.rivals import utrc as utrc
from hybridvlm.reduction.rivals import vidcom2 as vidcom2
from hybridvlm.reduction.rivals import visionzip as visionzip

# after the stages that they are made of
from hybridvlm.reduction.rivals import pairs as pairs  # isort: skip
