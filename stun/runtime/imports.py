"""Calls that follow the first import of a module: what prepares a library for STUN need not import it."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_KERNELS = ("causal_conv1d", "fla", "mamba_ssm")


def after_import(name: str, call: Callable[[], None]) -> None:
    """Call `call()` once the module `name` has been imported: now, if it has been already."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _After(name, call))


def hide_kernels() -> None:
    """Make transformers use its own code in the modules of models that it imports from here on."""
    # transformers would take these in its place, wherever they are installed. They run on no CPU, which estimates of memory need,
    # and choose their way by timing, so that a run that goes on would not end in the same bytes.
    for kernels in _KERNELS:
        sys.modules.setdefault(kernels, None)


@contextmanager
def kernels_hidden() -> Iterator[None]:
    """Context of `hide_kernels`, also where they were imported before; after it they can be imported."""
    before = {name: sys.modules.pop(name) for name in _KERNELS if name in sys.modules}
    hide_kernels()
    try:
        yield
    finally:
        for name in _KERNELS:
            sys.modules.pop(name, None)
        sys.modules.update(before)


class _After(MetaPathFinder):
    """Finds one module as the other finders do, and calls a function after its code has run."""

    def __init__(self, name: str, call: Callable[[], None]):
        self.name, self.call = name, call

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec and spec.loader:
            run = spec.loader.exec_module

            def run_and_call(module: ModuleType) -> None:
                run(module)
                self.call()

            spec.loader.exec_module = run_and_call
        return spec
