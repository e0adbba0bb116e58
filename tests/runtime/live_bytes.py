"""The bytes of tensors that live, as torch's operators make and drop them, on any device."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside this context, ``now`` counts what was made and still lives, and ``peak`` the most.

    What an operator allocates and frees within itself is not seen. On the meta device nothing is
    allocated, and any size can be measured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if DispatchKey.CompositeImplicitAutograd not in func.py_kernels:  # no tracing aid
            with self:  # inference mode hands over whole compounds, whose parts allocate too
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        known = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._key(tensor) not in known:
                self._add(tensor.untyped_storage())
        return result

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size
