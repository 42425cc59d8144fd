"""Program of a rank in the tests of ranks: the command line, or several evaluations in one process.

With DIE_AFTER=N rank 1 is killed once it has journaled N records and rank 0 one, the first time they are started.
Rank 0 then waits for the signal that torchrun sends to whoever is left.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from cecompile.cli import main
from cecompile.results.journal import NAME, Journal, read


def die_after(records: int) -> None:
    from cecompile import ranks

    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    add, dies = Journal.add, os.environ["RANK"] == "1"

    def add_and_stop(self, *record):
        add(self, *record)
        if dies and self._added < records:
            return
        while not dies or not others_have_begun(self):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    Journal.add = add_and_stop
    ranks.AGENT = 600.0  # seconds for the signal, where rank 0 misses rank 1 before it comes


def others_have_begun(journal: Journal) -> bool:
    """True once rank 0 has journaled a record; the first stage of a pipeline journals none."""
    path = journal.path.with_name(NAME)
    return journal._ranks.stages > 1 or (path.exists() and len(list(read(path.read_bytes()))) > 1)


def agree() -> None:
    """Rank 0 prints the answers the ranks agree on. Then rank 1 is killed while rank 0 waits for rank 1.

    Rank 0 ends like the command line, without taking the interpreter apart: a thread of gloo that still holds a tensor
    would otherwise be stopped in the middle of C++, which then aborts.
    """
    from cecompile.errors import CheckError
    from cecompile.ranks import Ranks

    ranks = Ranks.from_environment()
    rank = ranks.rank
    agreed = {
        "everywhere": ranks.gather(ranks.broadcast("x" * 9999 if rank == 0 else None)) == ["x" * 9999] * ranks.size,
        "gather": ranks.gather([rank] * 1000 * rank) == [[r] * 1000 * r for r in range(ranks.size)],
        "collect": ranks.collect({rank: b"a", "both": 1}) == {0: b"a", 1: b"a", "both": 1},
        "least": ranks.all_reduce_min(5 - rank),
        "any": [ranks.any(rank == 1), ranks.any(False)],
        "says": sum(ranks.gather(ranks.says("the same"))),
        "first": ranks.first_does(lambda: rank + 7),
        "taken": sorted(item for one in ranks.gather(list(ranks.claim("it", "abcdef"))) for item in one),
        "again": sum(map(len, ranks.gather(list(ranks.claim("it", range(9)))))),
    }
    if rank == 0:
        print(json.dumps(agreed), flush=True)
    ranks.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        ranks.collect({})
    except CheckError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def share(directory: Path) -> None:
    """Every evaluation that runs.json lists, by this rank among others; one that has a journal is gone on with."""
    from cecompile import Answerer, Scorer, evaluate
    from cecompile.ranks import Ranks
    from cecompile.results.journal import journals_in
    from cecompile.tasks.read import read_dataset

    ranks = Ranks.from_environment()
    for name, run in json.loads((directory / "runs.json").read_text()).items():
        dataset = read_dataset(run["data"], "auto", None)
        kind = Answerer if dataset.task == "chat" else Scorer
        ranks.stages = run["how"].get("pipeline", 1)
        resume = ranks.any(bool(journals_in(directory / name)))
        with Journal(directory / name, resume, ranks) as journal:
            model = kind.from_pretrained(run["model"], device="cpu", ranks=ranks, **run["how"])
            how = {"task": dataset.task, "data": run["data"], "repeat": run.get("repeat", 1)}
            evaluate(model, dataset.questions, output=directory / name, journal=journal, **how)


def run(*arguments: str) -> None:
    """Runs a rank: "share" and a directory, "agree", or the command line with these arguments."""
    if "DIE_AFTER" in os.environ:
        die_after(int(os.environ["DIE_AFTER"]))
    if arguments[0] == "share":
        share(Path(arguments[1]))
    elif arguments[0] == "agree":
        agree()
    else:
        sys.argv = ["cecompile", *arguments]
        main()


def forked(*arguments: str) -> None:
    """`run` as the agent wants a function: one that returns where a program ends well."""
    end, os._exit = os._exit, sys.exit
    try:
        run(*arguments)
    except SystemExit as status:
        if status.code:
            end(status.code)
    finally:
        os._exit = end


def agent(ranks: int, restarts: int, arguments: list[str]) -> None:
    """Starts ranks as torchrun --standalone does, but forks them, unless there is CUDA, which does not bear a fork."""
    import torch
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, max_restarts=restarts, run_id=f"tests-{os.getpid()}",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        start_method="spawn" if torch.cuda.is_available() else "fork",
    )  # fmt: skip
    elastic_launch(config, forked)(*arguments)


if __name__ == "__main__":
    run(*sys.argv[1:])
