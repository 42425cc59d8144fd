"""Imports of `transformers` without packages that scoring needs none of.

`transformers` imports several packages for images and training wherever they are installed. They cost seconds of the
clock, and memory. In a process of our own command line these packages seem absent while `transformers` is imported.
"""

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


def import_transformers() -> None:
    """Imports the modules of `transformers` that every run needs."""
    with without(UNUSED):
        import transformers.generation.utils
        import transformers.modeling_utils
        import transformers.models.auto.modeling_auto  # noqa: F401
