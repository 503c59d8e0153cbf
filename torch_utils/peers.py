# SPDX-License-Identifier: Apache-2.0
"""Processes that torchrun (or whoever sets its variables) started: finding each other, and a watch over them.

All talk through one key-value store, that of torchrun's agent or, without one, of the first process. A thread
in each of them gives a sign of life now and then and looks for those of the others, so that none waits for a dead
one in vain, whatever it is doing: a reduction on GPUs would hang until NCCL's own time is up.
"""

import atexit
import contextlib
import os
import pickle
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

START_SECONDS = 600  # until all processes must have come
LEAVE_SECONDS = 5  # that the first process stays at the end, so that none finds itself alone
PEER_SECONDS = 60  # without a sign of life, a process counts as dead; DNNLIB_PEER_TIMEOUT says otherwise
ROUNDS = 10  # signs of life in that time. Rounds are counted, not seconds: suspended processes all count none


class PeerError(RuntimeError):
    """The other processes cannot be reached, or one of them has failed or gone; the text is one line for the user."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that were started together."""

    rank: int
    world_size: int
    local_rank: int  # among those of this machine: the number of its GPU
    local_world_size: int  # how many this machine has, as far as is known
    address: str
    port: int


def find_place() -> Place | None:
    """This process's place, from the environment; None where no RANK and WORLD_SIZE are set. PeerError, one
    line, for variables that are missing or make no sense."""
    env = os.environ
    if not (env.get("RANK") and env.get("WORLD_SIZE")):
        return None
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in names if not env.get(name)]
    if missing:
        raise PeerError(
            f"RANK and WORLD_SIZE are set, so this is one process of several, but {', '.join(missing)} must be set,"
            " too (torchrun does it); unset RANK and WORLD_SIZE for a command of its own"
        )
    try:
        rank, size, local, port = (int(env[name]) for name in names if name != "MASTER_ADDR")
        local_size = int(env.get("LOCAL_WORLD_SIZE") or local + 1)
    except ValueError as err:
        raise PeerError(f"{', '.join(names)}: all but MASTER_ADDR must be whole numbers ({err})") from err
    if not (0 <= rank < size and 0 <= local < local_size <= size):
        raise PeerError(
            f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local}: ranks count from 0 and stay below the number of"
            " processes"
        )
    return Place(rank, size, local, local_size, env["MASTER_ADDR"], port)


def patience() -> float:
    """Seconds without a sign of life after which a process counts as dead. PeerError for a bad
    DNNLIB_PEER_TIMEOUT."""
    text = os.environ.get("DNNLIB_PEER_TIMEOUT") or str(PEER_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e6:
        raise PeerError(f"DNNLIB_PEER_TIMEOUT={text} must be a number of seconds, 1 at least")
    return seconds


class Team:
    """The processes that were started together, from finding each other to leaving."""

    def __init__(self, place: Place):
        """Waits for all of them; PeerError where they do not come."""
        self.place = place
        self.announced = self._left = False
        seconds = patience()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        where = f"{place.address}:{place.port} (MASTER_ADDR, MASTER_PORT)"
        try:
            limit = timedelta(seconds=START_SECONDS)
            store, _rank, _size = next(dist.rendezvous("env://", timeout=limit))
            self.store = dist.PrefixStore(f"dnnlib/{attempt}", store)
            self.group_store = dist.PrefixStore(f"dnnlib-group/{attempt}", store)
            line = dist.TCPStore(place.address, place.port, is_master=False, timeout=limit)
        except RuntimeError as err:
            why = str(err).splitlines()[0]
            raise PeerError(f"Process {place.rank} cannot reach the others at {where}: {why}") from err
        self._sign()
        self._gather("here", time.monotonic() + START_SECONDS)
        self.watch = Watch(place, dist.PrefixStore(f"dnnlib/{attempt}", line), seconds)
        self.watch.start()

    def _sign(self) -> None:
        self.store.set(f"alive/{self.place.rank}", "0")

    def _gather(self, name: str, end: float = float("inf")) -> None:
        """Waits until every process has come to this point; PeerError when that takes too long."""
        size, here = self.place.world_size, self.store.add(name, 1)
        while here < size:
            if time.monotonic() > end:
                raise PeerError(f"Only {here} of {size} processes came within {START_SECONDS} seconds")
            time.sleep(0.05)
            here = self.store.add(name, 0)

    def announce(self, what: Any) -> None:
        """Gives the others something small and picklable that they receive()."""
        self.announced = True
        self.store.set("announced", pickle.dumps(what))

    def receive(self) -> Any:
        """Waits for what one process announces, however long that takes: the watch sees whether it lives."""
        while not self.store.check(["announced"]):
            time.sleep(0.05)
        return pickle.loads(self.store.get("announced"))

    def leave(self, code: int = 0) -> None:
        """Waits until all are done, and ends the watch: the first process may hold what the others talk through.

        Where nothing has been announced, the first process announces `code`.
        """
        if self._left:
            return
        self._left = self.watch.leaving = True
        with contextlib.suppress(RuntimeError):  # the store has gone: all were done
            if self.place.rank == 0 and not self.announced:
                self.announce(code)
            self._gather("done")
            self.watch.end()
            if self.place.rank == 0:  # the last to go
                self._gather("left", time.monotonic() + LEAVE_SECONDS)
            else:
                self.store.add("left", 1)
        self.watch.end()

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends with an error, if it is the first to know of one."""
        self.watch.end()
        if not self._left and not isinstance(error, PeerError):
            text = f"process {self.place.rank} has failed ({type(error).__name__}: {first_line(error)})"
            with contextlib.suppress(RuntimeError):
                self.store.set("failed", text)
            atexit.register(exit_now, exit_code(error))

    def why_lost(self, error: BaseException) -> str:
        """What is known of a process whose connection broke with this error."""
        with contextlib.suppress(RuntimeError):
            if self.store.check(["failed"]):
                return self.store.get("failed").decode(errors="replace")
        return f"another process has gone ({first_line(error)})"


def exit_code(error: BaseException) -> int:
    """The status that a command ends with after this exception."""
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    return code if isinstance(code, int) else 1


def exit_now(code: int) -> None:
    """Ends the process after its last message: threads of a group that is broken or left can abort an ordinary end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Watch(threading.Thread):
    """Ends this process, with a message, when another one has failed or gives no sign of life."""

    def __init__(self, place: Place, store: dist.Store, seconds: float):
        super().__init__(name="watch over the other processes", daemon=True)
        self.place, self.store, self.seconds = place, store, seconds
        self.leaving = False
        self._over = threading.Event()
        self._others = [rank for rank in range(place.world_size) if rank != place.rank]
        self._signs = {rank: b"0" for rank in self._others}
        self._missed = dict.fromkeys(self._others, 0)

    def run(self) -> None:
        """Signs and looks until end()."""
        beat = 0
        while not self._over.wait(self.seconds / ROUNDS):
            beat += 1
            try:
                self.store.set(f"alive/{self.place.rank}", str(beat))
                problem = self.look()
            except RuntimeError:
                if self.leaving:
                    return
                problem = f"the process at {self.place.address} that connects all others has gone"
            if problem and not self._over.is_set():
                self.give_up(problem)

    def look(self) -> str | None:
        """What is wrong with the other processes, None where all is well."""
        if self.store.check(["failed"]):
            return self.store.get("failed").decode(errors="replace")
        signs = self.store.multi_get([f"alive/{rank}" for rank in self._others])
        for rank, sign in zip(self._others, signs, strict=True):
            self._missed[rank] = self._missed[rank] + 1 if sign == self._signs[rank] else 0
            self._signs[rank] = sign
            if self._missed[rank] > ROUNDS:
                return f"process {rank} has given no sign of life for {self.seconds:g} seconds"
        return None

    def give_up(self, problem: str) -> None:
        """Says why and ends the process at once: its main thread may wait where nothing can wake it."""
        with contextlib.suppress(Exception):
            print(f"\nError: {lost_text(self.place.rank, problem)}", file=sys.stderr, flush=True)
        os._exit(1)

    def end(self) -> None:
        """Stops watching."""
        self._over.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=1)


def first_line(error: BaseException) -> str:
    """The beginning of an error's text."""
    return (str(error).strip().splitlines() or [""])[0][:300]


def lost_text(rank: int, problem: str) -> str:
    """The message of a process that ends because of another."""
    return f"{problem}, so process {rank} ends, too; a training goes on from its last checkpoint with --resume=RUN_DIR"
