"""Every public name has an example in its docstring, and it prints what it says."""

import doctest
import inspect
import warnings

import pytest

import multistep_triton

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torchrl's own, on import
    import multistep_triton.configs

MODULES = [multistep_triton, multistep_triton.configs]
PUBLIC = {name: getattr(module, name) for module in MODULES for name in module.__all__}


def documented():
    """Public names, and the methods and properties with a docstring of our own, by the class that defines them."""
    named = dict(PUBLIC)
    for owner in {each for one in PUBLIC.values() if inspect.isclass(one) for each in one.__mro__}:
        if owner.__module__.startswith("multistep_triton"):
            for name, member in vars(owner).items():
                is_code = inspect.isfunction(member) or isinstance(member, property)
                if is_code and not name.startswith("_") and member.__doc__:
                    named[f"{owner.__name__}.{name}"] = member
    return named


DOCUMENTED = documented()


def test_functions_methods_and_properties_are_found():
    names = {"gather_future", "Arguments.gamma", "MultiStepTransform.flush", "NStepReplayBuffer.n_steps"}
    names.add("OrderedReplayBuffer.set_storage")
    assert names <= DOCUMENTED.keys()


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_example(name):
    example = doctest.DocTestParser().get_doctest(DOCUMENTED[name].__doc__, dict(PUBLIC), name, None, None)
    assert example.examples, "no example"
    assert example.examples[-1].want, "the example ends without an output"
    printed = []
    results = doctest.DocTestRunner().run(example, out=printed.append)
    assert not results.failed, "".join(printed)
