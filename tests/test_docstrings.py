"""Every public name has an example in its docstring that prints what it says; its methods and properties have words."""

import doctest
import inspect
import warnings

import pytest

import multistep_triton
from multistep_triton.arguments import Argument

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torchrl's own, on import
    import multistep_triton.configs

MODULES = [multistep_triton, multistep_triton.configs]
PUBLIC = {name: getattr(module, name) for module in MODULES for name in module.__all__}


def members():
    """Public methods and properties, by the class of ours that defines them."""
    found = {}
    for owner in {each for one in PUBLIC.values() if inspect.isclass(one) for each in one.__mro__}:
        if owner.__module__.startswith("multistep_triton"):
            for name, member in vars(owner).items():
                if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property | Argument)):
                    found[f"{owner.__name__}.{name}"] = member
    return found


MEMBERS = members()


def test_methods_and_properties_are_found():
    names = {"Arguments.gamma", "MultiStepTransform.flush", "NStepReplayBuffer.n_steps", "MultiStep.forward"}
    assert {*names, "OrderedReplayBuffer.set_storage"} <= MEMBERS.keys()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_example(name):
    example = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__, dict(PUBLIC), name, None, None)
    assert example.examples, "no example"
    assert example.examples[-1].want, "the example ends without an output"
    printed = []
    results = doctest.DocTestRunner().run(example, out=printed.append)
    assert not results.failed, "".join(printed)


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_words(name):
    assert MEMBERS[name].__doc__
