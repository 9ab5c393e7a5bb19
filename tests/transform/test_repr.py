"""What the three classes say of themselves, and how many frames a transform holds back."""

import copy
import inspect
import pickle
from typing import get_type_hints

import pytest
import torch
from rollouts import make_rollout
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs.transforms import Compose

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer, gather_future, n_step_return
from multistep_triton.arguments import DoneAt
from multistep_triton.backends import Backend

OTHERS = {"reward_keys": [("agents", "reward")], "done_at": "end", "traj_key": None, "match_reward_shape": True}
SAID = "n_steps=3, gamma=0.9"
SAID_OF_OTHERS = f"{SAID}, reward_keys=[('agents', 'reward')], done_at='end', traj_key=None, match_reward_shape=True"


def make_buffer(**arguments):
    return NStepReplayBuffer(n_steps=3, gamma=0.9, storage=LazyTensorStorage(8), batch_size=4, **arguments)


def test_a_transform_says_what_is_not_its_default_and_what_it_holds():
    transform = MultiStepTransform(3, 0.9, reward_keys=["reward"], done_key="done", mask_key="mask", backend="auto")
    assert repr(transform) == f"MultiStepTransform({SAID}, frames_held=0)"
    transform.inv(make_rollout((), 2))
    transform.done_at, transform.n_steps = "end", 5
    expected = "MultiStepTransform(n_steps=5, gamma=0.9, done_at='end', frames_held=2)"
    assert repr(transform) == repr(pickle.loads(pickle.dumps(transform))) == expected
    assert repr(MultiStepTransform(3, 0.9, **OTHERS)) == f"MultiStepTransform({SAID_OF_OTHERS}, frames_held=0)"


def test_a_postproc_says_what_is_not_its_default():
    mask_key = ("collector", "mask")
    assert repr(MultiStep(0.9, 3, mask_key=mask_key)) == f"MultiStep({SAID})"
    assert repr(MultiStep(0.9, 3, mask_key="mask")) == f"MultiStep({SAID}, mask_key='mask')"
    assert (
        repr(torch.nn.Sequential(MultiStep(0.9, 3, **OTHERS))) == f"Sequential(\n  (0): MultiStep({SAID_OF_OTHERS})\n)"
    )


def test_a_buffer_says_its_arguments_before_torchrls():
    said = repr(make_buffer()).splitlines()
    assert said[:2] == ["NStepReplayBuffer(", f"    {SAID}, "]
    assert said[2:] == ReplayBuffer.__repr__(make_buffer()).splitlines()[1:]
    assert f"\n    {SAID_OF_OTHERS.replace(', done_at=' + repr('end'), '')}, \n" in repr(make_buffer(**OTHERS))
    assert f"\n    {SAID}, done_at='start', \n" in repr(make_buffer(done_at="start"))
    delayed = make_buffer(delayed_init=True)
    assert f"\n    {SAID}, \n    storage=" in repr(delayed)


def test_where_torchrl_prints_a_transform():
    transform = MultiStepTransform(3, 0.9)
    buffer = ReplayBuffer(storage=LazyTensorStorage(8), transform=Compose(transform))
    buffer.extend(make_rollout((), 5))
    said = f"MultiStepTransform({SAID}, frames_held=3)"
    assert said in repr(buffer) and said in repr(buffer.transform)


def test_what_is_half_made_can_be_printed():
    assert repr(MultiStepTransform.__new__(MultiStepTransform)) == "MultiStepTransform(frames_held=0)"
    assert repr(MultiStep.__new__(MultiStep)) == "MultiStep()"
    assert repr(NStepReplayBuffer.__new__(NStepReplayBuffer)).startswith("NStepReplayBuffer(\n")
    transform = MultiStepTransform.__new__(MultiStepTransform)
    with pytest.raises(ValueError, match="gamma"):
        transform.__init__(3, 2.0)
    assert repr(transform) == "MultiStepTransform(n_steps=3, frames_held=0)"


def test_a_subclass_of_other_arguments_has_the_same_defaults():
    class Short(MultiStep):
        def __init__(self, **arguments):
            super().__init__(0.9, 3, **arguments)

    assert repr(Short(done_at="end")) == f"Short({SAID}, done_at='end')"


def test_frames_held():
    transform, rollout = MultiStepTransform(4, 0.9), make_rollout((2, 3), 20)
    assert transform.frames_held == 0
    for frames, held in ((1, 1), (0, 1), (2, 3), (1, 4), (2, 4), (9, 4)):
        transform.inv(rollout[..., :frames])
        assert transform.frames_held == held
    twin, other = copy.deepcopy(transform), MultiStepTransform(2, 0.5)
    other.load_state_dict(transform.state_dict())
    cloned = transform.clone()
    transform.n_steps = 2
    assert transform.frames_held == 4
    transform.inv(rollout[..., :1])
    assert transform.frames_held == 2
    transform.flush()
    assert transform.frames_held == 0
    assert (twin.frames_held, other.frames_held, cloned.frames_held) == (4, 4, 4)
    twin.clear()
    assert (twin.frames_held, cloned.frames_held) == (0, 4)
    with pytest.raises(AttributeError):
        transform.frames_held = 3


@pytest.mark.parametrize("public", [MultiStepTransform, MultiStep, NStepReplayBuffer, n_step_return, gather_future])
def test_an_editor_lists_the_choices(public):
    choices = {"backend": Backend, "done_at": DoneAt} if inspect.isclass(public) else {"backend": Backend}
    hints = get_type_hints(public.__init__ if inspect.isclass(public) else public)
    assert {name: hints[name] for name in ("backend", "done_at") if name in hints} == choices


def test_the_signature_is_that_of_the_constructor():
    """And not torchrl's metaclass's."""
    assert list(inspect.signature(NStepReplayBuffer).parameters)[:2] == ["n_steps", "gamma"]
