"""cecompile: multiple-choice benchmarks for language models, scored as packed token trees in static passes.

`Scorer.from_pretrained(model).score(read_questions(file))` gives each choice's loglikelihood; `evaluate` adds metrics,
latencies and everything that results.json holds. `Answerer` has `answer` instead, for chat questions.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cecompile.run.answerer import Answer, Answerer, Answers
    from cecompile.run.evaluation import Evaluation, evaluate
    from cecompile.run.scorer import Scorer, Scores
    from cecompile.tasks.chat import ChatQuestion
    from cecompile.tasks.question import Question
    from cecompile.tasks.read import read_questions

__all__ = [
    "Answer", "Answerer", "Answers", "ChatQuestion", "Evaluation", "Question", "Scorer", "Scores", "evaluate",
    "read_questions",
]  # fmt: skip

_HOMES = {
    "Answer": "cecompile.run.answerer",
    "Answerer": "cecompile.run.answerer",
    "Answers": "cecompile.run.answerer",
    "ChatQuestion": "cecompile.tasks.chat",
    "Evaluation": "cecompile.run.evaluation",
    "evaluate": "cecompile.run.evaluation",
    "Question": "cecompile.tasks.question",
    "Scorer": "cecompile.run.scorer",
    "Scores": "cecompile.run.scorer",
    "read_questions": "cecompile.tasks.read",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: torch takes seconds, and `cecompile --help` must not wait."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cecompile' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
