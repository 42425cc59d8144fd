"""Imports of `transformers` without packages that scoring needs none of, and without collecting garbage.

`transformers` imports several packages for images and training wherever they are installed. They cost seconds of the
clock, and memory. In a process of our own command line these packages seem absent while `transformers` is imported.
"""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("PIL", "sklearn", "scipy", "torchvision")


@contextmanager
def without(packages: tuple[str, ...]) -> Iterator[None]:
    """Makes packages that nobody has imported yet seem absent within this context."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: an import fails, a search finds nothing
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


def import_transformers(*modules: str) -> None:
    """Imports the modules of `transformers` that every run needs, then `modules`, which import `transformers` too.

    Garbage is not collected meanwhile, and later collections leave out the imported objects. On two CPU cores
    collecting took 0.8 of 4.0 seconds of the imports, and each later collection 0.2 seconds.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with without(() if "transformers" in sys.modules else UNUSED):  # which may have asked for them already
            import transformers.generation.utils
            import transformers.modeling_utils
            import transformers.models.auto.modeling_auto  # noqa: F401
        for module in modules:
            importlib.import_module(module)
        if gc.get_freeze_count() == 0:
            gc.freeze()
    finally:
        if collecting:
            gc.enable()


@contextmanager
def uncollected() -> Iterator[None]:
    """Leaves present objects out of collections of garbage within this context, unless some are left out already."""
    none_yet = gc.get_freeze_count() == 0
    if none_yet:
        gc.freeze()
    try:
        yield
    finally:
        if none_yet:
            gc.unfreeze()
