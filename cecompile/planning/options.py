"""The options of a run, as the command line, the Python API and the lm-eval backend take them."""

from dataclasses import dataclass
from pathlib import Path

from cecompile.errors import UserError
from cecompile.model.checkpoint import DTYPES
from cecompile.planning.memory import TargetDevice
from cecompile.workload.plan import BLOCK

CHOICES = {
    "engine": ("auto", "compiled", "eager", "reference"),
    "attention": ("auto", "flex", "sdpa"),
    "dtype": ("auto", *DTYPES),
}
NUMBERS = {"tokens_per_bucket": (BLOCK, 1 << 20), "memory_limit": (1, (1 << 63) - 1), "pipeline": (1, 1 << 30)}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a model runs.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N". Without a number each rank of a machine takes its own CUDA device.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        engine: "compiled", "eager" (the same pass uncompiled), "reference" (the stock model, one by one), or "auto":
            "compiled", but "eager" on a CPU where compiling is estimated to take longer than compiled passes save.
        attention: "auto", "flex" or "sdpa"; "auto" picks by device and by a probe.
        tokens_per_bucket: token slots of a pass; None picks by device and memory.
        memory_limit: bytes that the run may take of the device's memory; None is all that is free.
        cache_dir: the directory of compiled code; None is CECOMPILE_CACHE, else the user's cache directory.
        require_warm: refuse to compile code that the cache lacks.
        pipeline: stages that the layers are divided among, each a rank.
        stream_weights: read the layers' weights anew for each sweep of passes; memory holds two layers.
        target_device: a device to plan for in place of `device`. Plans for a target device are not run.

    Raises:
        UserError: a value is not one of those above, or two options exclude each other.
    """

    device: str = "auto"
    dtype: str = "auto"
    engine: str = "compiled"
    attention: str = "auto"
    tokens_per_bucket: int | None = None
    memory_limit: int | None = None
    cache_dir: str | Path | None = None
    require_warm: bool = False
    pipeline: int = 1
    stream_weights: bool = False
    target_device: TargetDevice | None = None

    def __post_init__(self) -> None:
        for option, known in CHOICES.items():
            if getattr(self, option) not in known:
                raise UserError(f"{option} '{getattr(self, option)}': one of {', '.join(known)}")
        for option, (least, most) in NUMBERS.items():
            _check_number(option.replace("_", " "), getattr(self, option), least, most)
        if self.pipeline > 1 and self.engine == "reference":
            raise UserError("--pipeline: the reference engine runs the whole model")
        if self.stream_weights and self.engine == "reference":
            raise UserError("--stream-weights: --engine reference needs all weights in memory")
        if self.stream_weights and self.pipeline > 1:
            raise UserError("--stream-weights: does not go with --pipeline, whose stages hold their weights")


def _check_number(name: str, value: object, least: int, most: int) -> None:
    """Raises UserError about an option unless `value` is None or a whole number within the bounds."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{name}: {value!r:.40} is no whole number")
    if not least <= value <= most:
        fault = f"few, at least {least}" if value < least else f"many, at most {most}"
        raise UserError(f"{name}: {value} is too {fault}")
