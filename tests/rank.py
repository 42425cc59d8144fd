"""What torchrun starts in the tests of ranks: the command line, or several evaluations in one process.

With DIE_AFTER=N rank 1 is killed once it has journaled N records, the first time it is started.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from cecompile.cli import main
from cecompile.report.journal import Journal


def die_after(records: int) -> None:
    add, first = Journal.add, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def add_and_die(self, *record):
        add(self, *record)
        if os.environ["RANK"] == "1" and first and self._added == records:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)  # so that no rank does all before another has begun

    Journal.add = add_and_die


def share(directory: Path) -> None:
    """Every evaluation that runs.json lists, by this rank among others; one that has a journal is gone on with."""
    from cecompile import Answerer, Scorer, evaluate
    from cecompile.ranks import Ranks
    from cecompile.report.journal import NAME
    from cecompile.tasks.read import read_dataset

    ranks = Ranks.from_environment()
    for name, run in json.loads((directory / "runs.json").read_text()).items():
        dataset = read_dataset(run["data"], "auto", None)
        kind = Answerer if dataset.task == "chat" else Scorer
        ranks.stages = run["how"].get("pipeline", 1)
        resume = (directory / name / NAME).exists()
        with Journal(directory / name, resume, ranks) as journal:
            evaluate(
                kind.from_pretrained(run["model"], device="cpu", ranks=ranks, **run["how"]),
                dataset.questions,
                task=dataset.task,
                data=run["data"],
                output=directory / name,
                journal=journal,
                repeat=run.get("repeat", 1),
            )


if __name__ == "__main__":
    if "DIE_AFTER" in os.environ:
        die_after(int(os.environ["DIE_AFTER"]))
    if sys.argv[1] == "share":
        share(Path(sys.argv[2]))
    else:
        main()
