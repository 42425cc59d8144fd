"""Ranks: the processes that share one evaluation, as torchrun starts them, on one machine or several.

Ranks agree through a gloo process group on the CPU, whatever the devices, and share work by counters in the group's
store. Where a rank is lost, the others raise an error instead of waiting.
"""

import hashlib
import os
import pickle
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar, cast

from cecompile.errors import AlreadyReportedError, CheckError, UserError, first_line
from cecompile.procfs import process_age

JOIN = timedelta(minutes=5)  # for all ranks to start
WAIT = timedelta(minutes=30)  # for the slowest rank, which may have to compile code that others have in their cache
STEP = timedelta(seconds=5)  # for a single answer
NOTICE = 5.0  # seconds of waiting after which the user is told
MOST = 1 << 20  # ranks
POLL = 0.001  # seconds; signals are handled in between
AGENT = 5.0  # seconds for torchrun's agent to stop this process after another one has failed

Item = TypeVar("Item")
Key = TypeVar("Key")
Value = TypeVar("Value")


class Ranks:
    """One process alone; a `Group` is one of several processes.

    All ranks call the same methods in the same order, and each waits for the others. Only `claim`, the tally and `says`
    do not wait.

    Attributes:
        rank, size: this process's number, and the number of processes.
        local_rank, local_size: the same on this machine.
        attempt, restarts: how often torchrun has restarted the ranks, and how often it may.
        stages: the stages of a pipeline, whose ranks are consecutive; divides `size`.
        store: the process group's store; None for one process alone.
        passes, tokens: run by this rank since `clear_tally`.
    """

    rank, size = 0, 1
    local_rank, local_size = 0, 1
    attempt = restarts = 0
    stages = 1
    passes = tokens = 0
    store: Any = None

    @staticmethod
    def from_environment(stages: int = 1) -> "Ranks":
        """The ranks of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which torchrun sets, in `stages` of a pipeline.

        Raises UserError: a variable is missing, `stages` does not divide the ranks, or not all ranks start.
        """
        size = world_size()
        if stages > size or size % stages:
            refusal = AlreadyReportedError if _number("RANK", 0) else UserError  # all ranks find the fault
            fault = f"{size} processes are no multiple of it" if size > 1 else "needs as many"
            start = f"torchrun --nproc-per-node {stages} -m cecompile eval --pipeline {stages} ... starts them"
            raise refusal(f"--pipeline {stages}: {fault}; {start}")
        return ALONE if size < 2 else Group(stages)

    @property
    def stage(self) -> int:
        """This rank's stage of the pipeline."""
        return self.rank % self.stages

    @property
    def began(self) -> float:
        """The time of the command's start, in seconds since 1970; torchrun's restarts do not change this time."""
        return time.time()

    def claim(self, what: str, items: Sequence[Item]) -> Iterator[Item]:
        """Iterates over items that no other rank takes, in order; together the ranks take all items.

        All ranks give the same `items`, and the same name `what` for them. All stages of a pipeline take the items of
        the first stage.
        """
        return iter(items)

    def clear_tally(self) -> None:
        """Sets `passes` and `tokens` to 0."""
        self.passes = self.tokens = 0

    def tally(self, tokens: int) -> None:
        """Counts a pass of `tokens` tokens."""
        self.passes += 1
        self.tokens += tokens

    def says(self, line: str) -> bool:
        """Whether this rank is the first to tell the user this line."""
        return True

    def lost(self, waited: float = 0.0) -> CheckError:
        """The error to raise when another rank has disappeared, found after `waited` seconds.

        May not return under torchrun: the agent stops this process first.
        """
        return CheckError("another rank was lost")

    def gather(self, mine: Value) -> list[Value]:
        """The values of all ranks, in their order."""
        return [mine]

    def broadcast(self, mine: Value) -> Value:
        """Rank 0's value."""
        return self.gather(mine)[0]

    def all_reduce_min(self, n: int) -> int:
        """The least of all ranks' numbers."""
        return min(self.gather(n))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return True in self.gather(flag)

    def barrier(self) -> None:
        """Waits until all ranks have called this method."""
        self.gather(None)

    def collect(self, mine: Mapping[Key, Value]) -> dict[Key, Value]:
        """The union of all ranks' mappings."""
        return {key: value for part in self.gather(mine) for key, value in part.items()}

    def all_same(self, facts: Mapping[str, Any]) -> None:
        """Raises UserError for the first fact that differs from rank 0's on any rank; `facts` are by name."""
        first, *others = self.gather(facts)
        for rank, theirs in enumerate(others, 1):
            for what, value in first.items():
                if theirs.get(what) != value:
                    raise UserError(f"rank {rank}: {what} is {theirs.get(what)}, rank 0 has {value}")

    def first_does(self, call: Callable[[], Value]) -> Value:
        """Calls `call` on rank 0 alone, and returns its result on all ranks.

        Raises UserError: raised by `call`; an AlreadyReportedError on the other ranks.
        """
        value: Any = None
        if self.rank == 0:
            try:
                value = call()
            except UserError as error:
                self.broadcast((None, str(error)))
                raise
        value, message = self.broadcast((value, None))
        if message is not None:
            raise AlreadyReportedError(message)
        return cast(Value, value)


ALONE = Ranks()


class Group(Ranks):
    """One of several processes; see `Ranks.from_environment`."""

    def __init__(self, stages: int = 1) -> None:
        import torch
        import torch.distributed as dist

        self._torch, self._dist = torch, dist
        self.rank, self.size, self.stages = _rank(None), world_size(), stages
        self.local_rank = _number("LOCAL_RANK", self.rank)
        self.local_size = _number("LOCAL_WORLD_SIZE", self.size)
        self.restarts = _number("TORCHELASTIC_MAX_RESTARTS", 0)
        self._takes = 0
        address, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", None, (1 << 16) - 1)
        try:
            store = dist.PrefixStore("cecompile", self._connected(address, port))
            name, before = meet(store, self.rank, self.size)
            self.store = dist.PrefixStore(name, store)
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=WAIT)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{self.size} ranks at {address}:{port}: {first_line(error)}") from None
        # not every agent of torchrun counts its restarts
        self.attempt = max(before, *self.gather(_number("TORCHELASTIC_RESTART_COUNT", 0)))

    def _connected(self, address: str, port: int) -> Any:
        """Waits for the store of torchrun's agent or of rank 0, and connects."""
        hosts = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        deadline = time.monotonic() + JOIN.total_seconds()
        waiting = Waiting(f"rank {self.rank} waits for rank 0 at {address}:{port}")
        while not hosts:
            try:
                socket.create_connection((address, port), STEP.total_seconds()).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                waiting.tell()
                time.sleep(100 * POLL)
        options: dict[str, Any] = {"is_master": hosts, "timeout": JOIN, "wait_for_workers": False}
        return self._dist.TCPStore(address, port, multi_tenant=True, **options)

    @property
    def began(self) -> float:
        age = process_age(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None
        return time.time() - (age or 0.0)

    def claim(self, what: str, items: Sequence[Item]) -> Iterator[Item]:
        self._takes += 1
        key = f"take/{self._takes}/{what}"
        told = f"{key}/{self.rank // self.stages}"  # where a pipeline's first stage tells each number to the others
        for at in count(1):
            with self._others():
                if self.stage == 0:
                    number = self.store.add(key, 1) - 1
                    if self.stages > 1:
                        self.store.set(f"{told}/{at}", str(number))
                else:
                    while not self.store.check([f"{told}/{at}"]):
                        time.sleep(POLL)
                    number = int(self.store.get(f"{told}/{at}"))
            if number >= len(items):
                return
            yield items[number]

    def says(self, line: str) -> bool:
        try:
            self.store.set_timeout(STEP)
            return bool(self.store.add(f"said/{hashlib.sha256(line.encode()).hexdigest()}", 1) == 1)
        except RuntimeError:
            return True

    def gather(self, mine: Value) -> list[Value]:
        data = pickle.dumps(mine)
        sizes = [int(size) for size in self._all_gathered(self._torch.tensor([len(data)]))]
        padded = self._torch.zeros(max(sizes), dtype=self._torch.uint8)
        padded[: len(data)] = self._torch.frombuffer(bytearray(data), dtype=self._torch.uint8)
        parts = self._all_gathered(padded)
        return [pickle.loads(part[:size].numpy().data) for part, size in zip(parts, sizes, strict=True)]

    def _all_gathered(self, mine: Any) -> list[Any]:
        out = [self._torch.empty_like(mine) for _ in range(self.size)]
        with self._others():
            work = self._dist.all_gather(out, mine, async_op=True)
            while not work.is_completed():  # `wait` alone lets no signal through
                time.sleep(POLL)
            work.wait()
        return out

    @contextmanager
    def _others(self) -> Iterator[None]:
        """Raises CheckError where the other ranks cannot be reached."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError:
            raise self.lost(time.monotonic() - began) from None

    def lost(self, waited: float = 0.0) -> CheckError:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(AGENT)  # the agent's signal ends this process
        silent = f", silent for {waited / 60:.0f} minutes" if waited >= WAIT.total_seconds() else ""
        return CheckError(f"another of the {self.size} ranks was lost{silent}")


def meet(store: Any, rank: int, size: int) -> tuple[str, int]:
    """Waits until all ranks are alive, over a store that earlier ranks may have used.

    Each rank stores its own token. Rank 0 stores the list of all tokens under a new name. Once all ranks have found
    their own tokens in the list, rank 0 allows them to go on.

    Returns:
        The list's name, and the number of earlier meetings of ranks.

    Raises:
        RuntimeError: not all ranks start within JOIN.
    """
    me, name, there = secrets.token_hex(8), "", [""] * size
    deadline = time.monotonic() + JOIN.total_seconds()
    waiting = Waiting(f"rank {rank} waits for other ranks of {size}")
    store.set(f"is/{rank}", me)
    while time.monotonic() < deadline:
        if rank == 0:
            now = [_said(store, f"is/{other}") for other in range(size)]
            waiting.tell(", ".join(str(other) for other in range(size) if not now[other]))
            if all(now) and now != there:
                name, there = secrets.token_hex(8), now
                store.set("all", " ".join([name, *there]))
            if name and store.add(f"{name}/found", 0) == size - 1:
                before = store.add("meetings", 1) - 1
                store.set(f"{name}/go", str(before))
                return name, before
        else:
            if waiting.is_long() and not store.check(["is/0"]) and store.add("told", 1) == 1:
                waiting.tell("0")
            said, *there = _said(store, "all").split() or [name]
            if there[rank : rank + 1] == [me]:
                if said != name:
                    name = said
                    store.add(f"{name}/found", 1)
                before = _said(store, f"{name}/go")
                if before:
                    return name, int(before)
        time.sleep(10 * POLL)
    raise RuntimeError(f"not all came in {JOIN.total_seconds() / 60:.0f} minutes")


def _said(store: Any, key: str) -> str:
    """The value in a store, or ""."""
    return str(store.get(key).decode()) if store.check([key]) else ""


class Waiting:
    """Says on standard error, once a wait for other ranks has lasted NOTICE seconds, who waits and how to stop.

    `who`: the beginning of the line, such as "rank 0 waits for other ranks of 4".
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._at = time.monotonic() + NOTICE

    def is_long(self) -> bool:
        """Whether NOTICE seconds have passed and nothing was told yet."""
        return time.monotonic() >= self._at

    def tell(self, missing: str = "") -> None:
        """Call again and again while waiting; `missing` lists the ranks that have not come."""
        if self.is_long():
            self._at = float("inf")
            who = self._who + (f", not here yet: {missing}" if missing else "")
            most = f"for at most {JOIN.total_seconds() / 60:.0f} minutes"
            print(f"cecompile: {who}, {most}; Ctrl-C stops", file=sys.stderr, flush=True)


def world_size() -> int:
    """The number of ranks in the environment; 1 without."""
    return _number("WORLD_SIZE", 1)


def _rank(default: int | None) -> int:
    rank, size = _number("RANK", default), world_size()
    if rank >= size:
        raise UserError(f"RANK: {rank} in the environment, but WORLD_SIZE {size} leaves 0 to {size - 1}")
    return rank


def has_part_in(command: str) -> bool:
    """Whether this rank runs a command: all ranks run `eval`, one per machine `warm`, rank 0 any other."""
    if world_size() < 2 or command == "eval":
        return True
    rank = _rank(0)
    return (_number("LOCAL_RANK", 0) if command == "warm" else rank) == 0


def _number(name: str, default: int | None, most: int = MOST) -> int:
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal() or len(value) > 20 or int(value) > most:
        raise UserError(f"{name}: '{value}' in the environment, where torchrun puts a number up to {most}")
    return int(value)
