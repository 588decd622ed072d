"""A team of threads that computes one step together, all inside compiled code.

Every member runs the same function. `barrier` waits for the others; `take` hands out the pieces of a region, so that a
member that lost its CPU to another program delays the others by one piece, not by its share. Between steps the members
wait in `next_job`. Waiting spins first (a barrier costs 0.75 us then), and after that sleeps in the kernel: with
another job on the cores a team loses its share of them, and does not stall.

    member 0 (the caller)     start -> step ...   barrier   ...   done
    members 1 ..              next_job -> step .. barrier   ...   next_job, until stop

The state is int32 words on cache lines of their own. What a member wrote before a barrier, all see after it.
"""

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from bitnet_numba.kernels.cpu.compiler import entry
from bitnet_numba.kernels.cpu.vec import OPTIONS

LINE = 16  # int32 words of a cache line
ARRIVED, ROUND, PIECE, JOB, STOP, SLEEPERS = (LINE * i for i in range(6))
STATE_WORDS = 8 * LINE
# Rounds of waiting before sleep, each a pause of 40 to 140 cycles: about 20 us within a step, 200 us between steps,
# which is longer than the host needs between two tokens.
SPINS_IN_STEP = 1_000
SPINS_BETWEEN = 10_000

_MACHINE = platform.machine().lower()
_SYS_FUTEX = {"x86_64": 202, "amd64": 202, "aarch64": 98, "arm64": 98}.get(_MACHINE, 0)
FUTEX = _SYS_FUTEX if sys.platform == "linux" else 0  # number of the system call; 0 where there is none
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE, of this process alone
_PAUSE = {"x86_64": "llvm.x86.sse2.pause", "amd64": "llvm.x86.sse2.pause"}.get(_MACHINE)

_syscall = types.ExternalFunction(
    "syscall", types.int64(types.int64, types.intp, types.int64, types.int64, types.int64, types.int64, types.int64)
)
_yield = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())


def _field(context, builder, sig, args):
    address = builder.add(args[0], builder.mul(context.cast(builder, args[1], sig.args[1], types.intp), _int64(4)))
    return builder.inttoptr(address, ir.IntType(32).as_pointer())


def _int64(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), value)


@intrinsic
def atomic_load(typingctx, state, field):
    """A word of the state; what its writer wrote before is seen after."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(_field(context, builder, sig, args), "seq_cst", 4)

    return types.int32(state, field), codegen


@intrinsic
def atomic_store(typingctx, state, field, value):
    """Writes a word of the state."""

    def codegen(context, builder, sig, args):
        value32 = context.cast(builder, args[2], sig.args[2], types.int32)
        builder.store_atomic(value32, _field(context, builder, sig, args), "seq_cst", 4)
        return context.get_dummy_value()

    return types.void(state, field, value), codegen


@intrinsic
def atomic_add(typingctx, state, field, value):
    """Adds to a word of the state; returns what it was before."""

    def codegen(context, builder, sig, args):
        value32 = context.cast(builder, args[2], sig.args[2], types.int32)
        return builder.atomic_rmw("add", _field(context, builder, sig, args), value32, "seq_cst")

    return types.int32(state, field, value), codegen


@intrinsic
def _pause(typingctx):
    """Tells the CPU that this is a loop that waits."""

    def codegen(context, builder, sig, args):
        if _PAUSE is not None:
            signature = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, signature, _PAUSE), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _sleep_until_changed(state, field, old):
    raise NotImplementedError("only compiled functions can call this")


@overload(_sleep_until_changed)
def _sleep_until_changed_here(state, field, old):
    if FUTEX:

        def by_futex(state, field, old):
            _syscall(FUTEX, state + 4 * field, _WAIT, old, 0, 0, 0)

        return by_futex

    def by_yielding(state, field, old):
        _yield()

    return by_yielding


def _wake(state, field):
    raise NotImplementedError("only compiled functions can call this")


@overload(_wake)
def _wake_here(state, field):
    if FUTEX:

        def by_futex(state, field):
            if atomic_load(state, SLEEPERS) > 0:
                _syscall(FUTEX, state + 4 * field, _WAKE, 1 << 30, 0, 0, 0)

        return by_futex
    return lambda state, field: None


@njit(**OPTIONS)
def wait_for_change(state, field, old, spins):
    """Waits until a word of the state is not `old` any more."""
    for _ in range(spins):
        if atomic_load(state, field) != old:
            return
        _pause()
    # Whoever changes the word looks for sleepers after that, and the kernel compares it with `old` before it lets a
    # thread sleep: so none sleeps through a change.
    atomic_add(state, SLEEPERS, 1)
    while atomic_load(state, field) == old:
        _sleep_until_changed(state, field, old)
    atomic_add(state, SLEEPERS, -1)


@njit(**OPTIONS)
def barrier(state, members):
    """Waits until all members have come; the next region's pieces are then untaken."""
    current = atomic_load(state, ROUND)
    if atomic_add(state, ARRIVED, 1) == members - 1:
        atomic_store(state, ARRIVED, 0)
        atomic_store(state, PIECE, 0)
        atomic_add(state, ROUND, 1)
        if members > 1:
            _wake(state, ROUND)
    else:
        wait_for_change(state, ROUND, current, SPINS_IN_STEP)


@njit(**OPTIONS)
def take(state):
    """The number of the next piece of this region that no member has taken."""
    return np.int64(atomic_add(state, PIECE, 1))


@njit(**OPTIONS)
def start_job(state):
    """Member 0: lets the others begin. All have left the step before, or wait at its end."""
    atomic_add(state, JOB, 1)
    _wake(state, JOB)


@njit(**OPTIONS)
def next_job(state, job):
    """Members 1 ..: waits for the job after number `job`; returns its number, or -1 if the team is to stop."""
    wait_for_change(state, JOB, np.int32(job), SPINS_BETWEEN)
    # As 32 bits without a sign: a server's team has had 2^31 jobs after some days, and numbers start again at 0.
    return np.int64(-1) if atomic_load(state, STOP) else np.int64(np.uint32(atomic_load(state, JOB)))


@entry
def _start(state):
    start_job(state)


_immortal: list[Any] = []  # memory of all teams whose threads have not ended


class Team:
    """`members` - 1 threads that serve jobs beside the caller, until `stop`.

    serve: a compiled function `serve(member, members, state, *arguments)` that runs jobs until `next_job` is negative.
    The state, and what `arguments` refer to, outlive the threads, which are daemons.
    """

    def __init__(self, members: int, serve: Callable[..., None], arguments: tuple[Any, ...]):
        self.members = members
        # Freed only after `stop`: otherwise, threads may look at it until the process ends.
        words: Any = (ctypes.c_int32 * (STATE_WORDS + LINE))()
        self._words = words
        _immortal.append(words)
        self.state = -(-ctypes.addressof(words) // (4 * LINE)) * 4 * LINE
        self._view = np.ctypeslib.as_array(words)
        self._first = (self.state - ctypes.addressof(words)) // 4
        self._process, self._stopped = os.getpid(), False
        self._threads = [
            threading.Thread(
                target=serve, args=(member, members, self.state, *arguments), name=f"bitnet-{member}", daemon=True
            )
            for member in range(1, members)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no more threads, or Ctrl-C: those that have started do not wait for ever
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            _immortal.append(words)  # for one that is just about to be alive
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        """Whether the threads are there: not after `stop`, nor in a process that was forked since."""
        return os.getpid() == self._process and not self._stopped

    def stop(self) -> None:
        """Ends the threads."""
        if self.alive:
            self._stopped = True
            self._view[self._first + STOP] = 1
            _start(self.state)
            for thread in self._threads:
                thread.join()
            _immortal.remove(self._words)
