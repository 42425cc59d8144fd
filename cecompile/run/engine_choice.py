"""Whether compiling pays: an estimate from the plan, made before weights are loaded or anything is compiled.

Compiled passes save time between the model's matrix products, and compiling takes time once for each shape. The figures
are of a 135M model on two cores (AMD EPYC with AVX2) and 400 rows of HellaSwag. They are rounded such that a wrong
choice costs little: near the point where both take as long.
"""

from dataclasses import dataclass
from time import perf_counter

import torch

from cecompile.model.checkpoint import DTYPES
from cecompile.planning.sizes import Sizes
from cecompile.results.journal import Journal
from cecompile.run.runtime import Runtime
from cecompile.workload.plan import Plan

SAVED = 0.2  # of the products' time
COMPILE = 20.0  # seconds for a shape that the cache lacks
LOAD = 2.0  # seconds until the first compiled pass, where the cache has all shapes
TOKENS = 256  # of the products that are timed, or fewer
OPERATIONS = 1e9  # most, of one timed product


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The `engine.choice` of results.json. All seconds are estimates.

    Attributes:
        engine: the engine taken, "compiled" or "eager".
        lacking: the number of shapes that the compile cache lacks.
        compile_s: seconds that compiling takes, or loading what was compiled.
        saved_s: seconds that compiled passes save.
    """

    engine: str
    lacking: int
    compile_s: float
    saved_s: float


def choose_engine(runtime: Runtime, plan: Plan, journal: Journal | None = None) -> EngineChoice | None:
    """The engine that takes less time for a plan; None where "auto" means the compiled engine without an estimate.

    That is so for more than this plan, for several processes, and on a GPU, where uncompiled attention is dense. A run
    that is resumed goes on with the engine in its journal.
    """
    planner, options = runtime.planner, runtime.planner.sizing.options
    if options.engine != "auto" or options.require_warm or options.stream_weights or options.pipeline > 1:
        return None
    if runtime.device.type != "cpu" or runtime.ranks.size > 1 or planner.serves_more:
        return None
    lacking = planner.lacking(plan)
    compile_s = LOAD + COMPILE * lacking
    saved_s = SAVED * _products_s(planner.sizing.needs.model_sizes(), plan, DTYPES.get(options.dtype))
    begun_with = None if journal is None else journal.before("engine")
    engine = begun_with or ("compiled" if saved_s > compile_s else "eager")
    return EngineChoice(engine, lacking, round(compile_s, 1), round(saved_s, 2))


def _products_s(sizes: Sizes, plan: Plan, dtype: torch.dtype | None) -> float:
    """Estimated seconds of a plan's matrix products, from the time of one product of the model's sizes."""
    width, inner = max(1, sizes.width), max(1, sizes.inner)
    tokens = int(min(TOKENS, max(16, OPERATIONS / (2 * width * inner))))
    kind = dtype or {2: torch.bfloat16, 4: torch.float32}.get(sizes.itemsize, torch.float32)
    left, right = torch.ones(tokens, width, dtype=kind), torch.ones(inner, width, dtype=kind)
    seconds = []
    for _ in range(4):
        began = perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(perf_counter() - began)
    rate = 2 * tokens * width * inner / min(seconds)
    readouts = sum(bucket.readouts * plan.runs(i) for i, bucket in enumerate(plan.buckets))
    return 2 * (sizes.active_parameters * plan.slots + width * sizes.vocabulary * readouts) / rate
