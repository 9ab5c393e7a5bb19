"""Which memory tensors have, and which operators are called."""

from torch.utils._python_dispatch import TorchDispatchMode


def addresses(leaves):
    """Where the memory of tensors begins, of those that have any."""
    return {leaf.untyped_storage().data_ptr() for leaf in leaves if leaf.untyped_storage().nbytes()}


def storages(*tensordicts):
    return addresses(leaf for data in tensordicts for leaf in data.values(True, True))


class Calls(TorchDispatchMode):
    """The names of the operators that are called under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def waits(self):
        """Those for which the host would wait for a GPU."""
        return [name for name in self.names if "local_scalar_dense" in name or "nonzero" in name]
