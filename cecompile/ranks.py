"""Ranks: the processes that share one evaluation, as torchrun starts them, on one machine or several.

What they agree on goes through a gloo process group on the CPU, whatever the devices; what is handed out goes by
counters in the group's store. Where a rank is lost, the others are told so instead of waiting for it.
"""

import hashlib
import os
import pickle
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from cecompile.errors import AlreadyReportedError, CheckError, UserError, first_line
from cecompile.procfs import process_age

JOIN = timedelta(minutes=5)  # for all ranks to come together
WAIT = timedelta(minutes=30)  # for the slowest, which may have to compile what others have in their cache
STEP = timedelta(seconds=5)  # for what should take no time
POLL = 0.001  # seconds; signals are dealt with in between
NO_MORE = "none"
AGENT = 5.0  # seconds that torchrun's agent has to stop this process after another one has failed

Item = TypeVar("Item")
Key = TypeVar("Key")
Value = TypeVar("Value")


class Ranks:
    """One process alone. `from_environment` gives the group where there are more.

    All ranks call the same methods in the same order, and each waits for the others; but `claim`, the tally and `says`
    wait for nobody.

    Attributes:
        rank, size: which of how many.
        local_rank, local_size: which of how many on this machine.
        attempt: how often torchrun has started the ranks again.
        restarts: how often it would.
        stages: of a pipeline, which are ranks side by side; `size` is a multiple.
        store: of the process group; None for one process alone.
        passes, tokens: that this rank has run, where there are several.
    """

    rank, size = 0, 1
    local_rank, local_size = 0, 1
    attempt = restarts = 0
    stages = 1
    passes = tokens = 0
    store: Any = None

    @staticmethod
    def from_environment(stages: int = 1) -> "Ranks":
        """The ranks that the environment names: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.

        Args:
            stages: of a pipeline.

        Raises:
            UserError: it is not complete, the ranks cannot be so many stages, or not all come.
        """
        size = world_size()
        if stages > size or size % stages:
            refusal = AlreadyReportedError if _number("RANK", 0) else UserError  # all find it
            raise refusal(
                f"--pipeline {stages}: {f'{size} processes are no multiple of it' if size > 1 else 'needs as many'}; "
                f"torchrun --nproc-per-node {stages} -m cecompile eval --pipeline {stages} ... starts them"
            )
        return ALONE if size < 2 else Group(stages)

    @property
    def stage(self) -> int:
        """This rank's stage of a pipeline."""
        return self.rank % self.stages

    @property
    def began(self) -> float:
        """When the command was given, in seconds since 1970, the same however often torchrun starts its ranks."""
        return time.time()

    def claim(self, what: str, items: Sequence[Item]) -> Iterator[Item]:
        """Items that no other rank takes, in order, the next whenever this one has time; together the ranks take all.

        `what` names them. All ranks give the same items. The stages of a pipeline take the same, as the first does.
        """
        return iter(items)

    def clear_tally(self) -> None:
        """Sets what this rank has run to nothing."""
        self.passes = self.tokens = 0

    def tally(self, tokens: int) -> None:
        """Counts a pass that this rank has run, and its tokens."""

    def says(self, line: str) -> bool:
        """Whether this rank is the first to say this to the user."""
        return True

    def lost(self, waited: float = 0.0) -> CheckError:
        """The error of who finds another rank gone after `waited` seconds; torchrun may stop this one before."""
        return CheckError("another rank was lost")

    def gather(self, mine: Value) -> list[Value]:
        """What each rank has, in their order."""
        return [mine]

    def broadcast(self, mine: Value) -> Value:
        """What rank 0 has."""
        return mine

    def all_reduce_min(self, n: int) -> int:
        """The least of all ranks' numbers."""
        return n

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.all_reduce_min(-int(flag)) < 0

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self.all_reduce_min(0)

    def collect(self, mine: Mapping[Key, Value]) -> dict[Key, Value]:
        """What all ranks have, together; each has it then."""
        union: dict[Key, Value] = {}
        for part in self.gather(mine):
            union.update(part)
        return union

    def all_same(self, facts: Mapping[str, Any]) -> None:
        """Raises UserError where not all ranks have the same facts, by name; says where they differ."""
        every = self.gather(facts)
        for rank, theirs in enumerate(every):
            for what, value in every[0].items():
                if theirs.get(what) != value:
                    raise UserError(f"rank {rank}: {what} is {theirs.get(what)}, rank 0 has {value}")

    def first_does(self, call: Callable[[], Value]) -> Value:
        """What `call` returns on rank 0, which alone calls it.

        Raises:
            UserError: raised there; on other ranks, which need not say it again, ToldError.
        """
        refusal: UserError | None = None
        value: Any = None
        if self.rank == 0:
            try:
                value = call()
            except UserError as error:
                refusal = error
        value, message = self.broadcast((value, None if refusal is None else str(refusal)))
        if refusal is not None:
            raise refusal
        if message is not None:
            raise AlreadyReportedError(message)
        result: Value = value
        return result


ALONE = Ranks()


class Group(Ranks):
    """Several processes, this one among them. Raises: see `Ranks.from_environment`."""

    def __init__(self, stages: int = 1) -> None:
        import torch
        import torch.distributed as dist

        self._torch, self._dist = torch, dist
        self.rank, self.size = _number("RANK", None), world_size()
        self.local_rank = _number("LOCAL_RANK", self.rank)
        self.local_size = _number("LOCAL_WORLD_SIZE", self.size)
        self.restarts = _number("TORCHELASTIC_MAX_RESTARTS", 0)
        self.stages = stages
        self._takes = 0
        address, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", None)
        try:
            store = dist.PrefixStore("cecompile", self._connected(address, port))
            name, before = meet(store, self.rank, self.size)
            self.store = dist.PrefixStore(name, store)
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=WAIT)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{self.size} ranks at {address}:{port}: {first_line(error)}") from None
        # some torchrun's agents count what made them start their ranks again, and others not
        self.attempt = max(before, -self.all_reduce_min(-_number("TORCHELASTIC_RESTART_COUNT", 0)))

    def _connected(self, address: str, port: int) -> Any:
        """The store that torchrun's agent or rank 0 holds, once there is one."""
        hosts = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        deadline = time.monotonic() + JOIN.total_seconds()
        while not hosts:
            try:
                socket.create_connection((address, port), STEP.total_seconds()).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(100 * POLL)
        return self._dist.TCPStore(
            address, port, is_master=hosts, timeout=JOIN, wait_for_workers=False, multi_tenant=True
        )

    @property
    def began(self) -> float:
        age = process_age(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None
        return time.time() - (age or 0.0)

    def claim(self, what: str, items: Sequence[Item]) -> Iterator[Item]:
        self._takes += 1
        key = f"take/{self._takes}/{what}"
        numbers = self._numbers(key, len(items))
        if self.stages > 1:
            replica = f"{key}/{self.rank // self.stages}"
            numbers = self._followed(replica) if self.stage else self._announced(replica, numbers)
        return (items[number] for number in numbers)

    def _numbers(self, key: str, count: int) -> Iterator[int]:
        while True:
            with self._others():
                number = self.store.add(key, 1)
            if number > count:
                return
            yield number - 1

    def _announced(self, key: str, numbers: Iterator[int]) -> Iterator[int]:
        """Says each number to the later stages, and when there are no more."""
        at = 0
        for at, number in enumerate(numbers, 1):
            with self._others():
                self.store.set(f"{key}/{at}", str(number))
            yield number
        with self._others():
            self.store.set(f"{key}/{at + 1}", NO_MORE)

    def _followed(self, key: str) -> Iterator[int]:
        """What the first stage has said, as soon as it does."""
        at = 0
        while True:
            at += 1
            with self._others():
                while not self.store.check([f"{key}/{at}"]):
                    time.sleep(POLL)
                said = self.store.get(f"{key}/{at}").decode()
            if said == NO_MORE:
                return
            yield int(said)

    def tally(self, tokens: int) -> None:
        self.passes += 1
        self.tokens += tokens

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

    def broadcast(self, mine: Value) -> Value:
        data = pickle.dumps(mine) if self.rank == 0 else b""
        size = self._torch.tensor([len(data)])
        self._wait(lambda: self._dist.broadcast(size, 0, async_op=True))
        content = self._torch.zeros(int(size), dtype=self._torch.uint8)
        if self.rank == 0:
            content[:] = self._torch.frombuffer(bytearray(data), dtype=self._torch.uint8)
        self._wait(lambda: self._dist.broadcast(content, 0, async_op=True))
        value: Value = pickle.loads(content.numpy().data)
        return value

    def all_reduce_min(self, n: int) -> int:
        number = self._torch.tensor([n])
        self._wait(lambda: self._dist.all_reduce(number, self._dist.ReduceOp.MIN, async_op=True))
        return int(number)

    def _all_gathered(self, mine: Any) -> list[Any]:
        out = [self._torch.empty_like(mine) for _ in range(self.size)]
        self._wait(lambda: self._dist.all_gather(out, mine, async_op=True))
        return out

    def _wait(self, begin: Callable[[], Any]) -> None:
        """Not in the library's own way, which lets no signal through."""
        with self._others():
            work = begin()
            while not work.is_completed():
                time.sleep(POLL)
            work.wait()

    @contextmanager
    def _others(self) -> Iterator[None]:
        """Raises CheckError where the others cannot be reached."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError:
            raise self.lost(time.monotonic() - began) from None

    def lost(self, waited: float = 0.0) -> CheckError:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(AGENT)  # its signal ends this
        silent = f", silent for {waited / 60:.0f} minutes" if waited >= WAIT.total_seconds() else ""
        return CheckError(f"another of the {self.size} ranks was lost{silent}")


def meet(store: Any, rank: int, size: int) -> tuple[str, int]:
    """Brings ranks together that are all alive, over a store in which others may have met before or tried to.

    Each rank says who it is, rank 0 who all are, and once all have found themselves among those, that they may go.
    Waits in small steps, so that signals are dealt with.

    Returns:
        A name for this meeting, and how many there were before it.

    Raises:
        RuntimeError: not all come.
    """
    me, name, there = secrets.token_hex(8), "", [""] * size
    deadline = time.monotonic() + JOIN.total_seconds()
    store.set(f"is/{rank}", me)
    while time.monotonic() < deadline:
        if rank == 0:
            now = [_said(store, f"is/{other}") for other in range(size)]
            if all(now) and now != there:
                name, there = secrets.token_hex(8), now
                store.set("all", " ".join([name, *there]))
            if name and store.add(f"{name}/found", 0) == size - 1:
                before = store.add("meetings", 1) - 1
                store.set(f"{name}/go", str(before))
                return name, before
        else:
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
    """What is in a store; empty where nothing is."""
    return str(store.get(key).decode()) if store.check([key]) else ""


def world_size() -> int:
    """How many ranks there are, by the environment."""
    return _number("WORLD_SIZE", 1)


def has_part_in(command: str) -> bool:
    """Whether this process has anything to do: all ranks share `eval`, one per machine warms, rank 0 does the rest."""
    if world_size() < 2 or command == "eval":
        return True
    return _number("LOCAL_RANK" if command == "warm" else "RANK", 0) == 0


def _number(name: str, default: int | None) -> int:
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise UserError(f"{name}: '{value}' in the environment, where torchrun puts a number")
    return int(value)
