"""n-step transitions for replay buffers: a drop-in for torchrl's ``MultiStepTransform``, or when they are sampled.

Importing this package imports no Triton.
"""

from pathlib import Path as _Path

from multistep_triton import operators as operators
from multistep_triton.backends import EquivalenceError
from multistep_triton.functional import NStepReturn, gather_future, n_step_return
from multistep_triton.postproc import MultiStep
from multistep_triton.replay_buffer import NStepReplayBuffer
from multistep_triton.transform import MultiStepTransform

__version__ = "0.1.0"
__all__ = [
    "EquivalenceError",
    "MultiStep",
    "MultiStepTransform",
    "NStepReplayBuffer",
    "NStepReturn",
    "gather_future",
    "n_step_return",
]

# In a checkout the subpackage ``kernels`` lies beside this folder, in an installation inside it.
_here = _Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_here.parent))
