"""n-step transitions for torchrl's replay buffers, computed when a buffer is extended or when it is sampled.

Importing this package does not import Triton.
"""

from pathlib import Path as _Path

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

# The subpackage ``kernels`` lies beside this folder in a checkout, and inside it in an installation.
_here = _Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_here.parent))
