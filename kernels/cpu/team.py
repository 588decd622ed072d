"""A team of threads that computes one step together, all inside compiled code.

A step is a job, and a job is a row of regions. Every member runs the same function: it enters each region, takes pieces
of it with `take` until none is left, and leaves. A region is over, and the next one open, when its pieces are taken and
all who entered have left. It does not wait for a member that never came, because its CPU went to another program or it
still sleeps: that one finds the regions over, passes them by, and takes pieces where the others are. So who loses its
CPU amid a region delays the others by one piece, not by its share, and who loses it elsewhere does not delay them.

    member 0 (the caller)     start_job -> region, region, ..., finish_job
    members 1 ..              next_job  -> region, region, ..., next_job, until stop

    region      inside = enter(state, region, pieces)
                if inside: ... piece = take(state, region) ...
                region = leave(state, region, inside)

Only who is inside a region reads or writes what the job is about: a late member may find the next job's numbers there,
and memory that is gone. The number of a region has that of its job in it, so who is late enters nothing of another job.
What was written in a region, all see in the next.

Waiting spins first (the end of a region costs 0.75 us then), and after that sleeps in the kernel: with another job on
the cores a team loses its share of them, and does not stall.

The state is 64-bit words on cache lines of their own.
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

LINE = 8  # words of a cache line
# REGION: number of the job, index of the region in it (0 between jobs), and how many are inside, from the highest bits.
# PIECE: the next piece of regions with an even index, and on the next line of those with an odd one.
REGION, PIECE, STOP, SLEEPERS = 0, LINE, 3 * LINE, 4 * LINE
STATE_WORDS = 6 * LINE
INSIDE_BITS, INDEX_BITS = 12, 16
MAX_MEMBERS = (1 << INSIDE_BITS) - 1
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
    field = context.cast(builder, args[1], sig.args[1], types.intp)
    address = builder.add(args[0], builder.mul(field, ir.Constant(field.type, 8)))
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def atomic_load(typingctx, state, field):
    """A word of the state; what its writer wrote before is seen after."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(_field(context, builder, sig, args), "seq_cst", 8)

    return types.int64(state, field), codegen


@intrinsic
def atomic_store(typingctx, state, field, value):
    """Writes a word of the state."""

    def codegen(context, builder, sig, args):
        value = context.cast(builder, args[2], sig.args[2], types.int64)
        builder.store_atomic(value, _field(context, builder, sig, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(state, field, value), codegen


@intrinsic
def atomic_add(typingctx, state, field, value):
    """Adds to a word of the state; returns what it was before."""

    def codegen(context, builder, sig, args):
        value = context.cast(builder, args[2], sig.args[2], types.int64)
        return builder.atomic_rmw("add", _field(context, builder, sig, args), value, "seq_cst")

    return types.int64(state, field, value), codegen


@intrinsic
def atomic_replace(typingctx, state, field, old, new):
    """Writes a word of the state if it is `old`; returns whether it was."""

    def codegen(context, builder, sig, args):
        old, new = (context.cast(builder, args[i], sig.args[i], types.int64) for i in (2, 3))
        done = builder.cmpxchg(_field(context, builder, sig, args), old, new, "seq_cst", "seq_cst")
        return builder.extract_value(done, 1)

    return types.boolean(state, field, old, new), codegen


@intrinsic
def _pause(typingctx):
    """Tells the CPU that this is a loop that waits."""

    def codegen(context, builder, sig, args):
        if _PAUSE is not None:
            signature = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, signature, _PAUSE), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _sleep(state, word):
    raise NotImplementedError("only compiled functions can call this")


@overload(_sleep)
def _sleep_here(state, word):
    """Sleeps until woken, unless REGION is not `word` any more: its low half, so other changes may be slept through."""
    if FUTEX:

        def by_futex(state, word):
            # Whoever changes REGION looks for sleepers after that, and the kernel compares before it lets a thread
            # sleep: so none sleeps through a change. Who wakes others counts them as awake, which they are not yet.
            atomic_add(state, SLEEPERS, 1)
            if _syscall(FUTEX, state + 8 * REGION, _WAIT, word & 0xFFFFFFFF, 0, 0, 0) != 0:
                atomic_add(state, SLEEPERS, -1)

        return by_futex

    def by_yielding(state, word):
        _yield()

    return by_yielding


def _wake(state):
    raise NotImplementedError("only compiled functions can call this")


@overload(_wake)
def _wake_here(state):
    if FUTEX:

        def by_futex(state):
            if atomic_load(state, SLEEPERS) > 0:
                woken = _syscall(FUTEX, state + 8 * REGION, _WAKE, 1 << 30, 0, 0, 0)
                atomic_add(state, SLEEPERS, -woken)

        return by_futex
    return lambda state: None


@njit(**OPTIONS)
def wait_for_end(state, region, spins):
    """Waits until a region is not the current one any more."""
    for _ in range(spins):
        if atomic_load(state, REGION) >> INSIDE_BITS != region:
            return
        _pause()
    while True:
        word = atomic_load(state, REGION)
        if word >> INSIDE_BITS != region:
            return
        _sleep(state, word)


@njit(**OPTIONS)
def _piece_of(region):
    """The word that counts a region's pieces."""
    return PIECE + LINE * (region & 1)


@njit(**OPTIONS)
def enter(state, region, pieces):
    """Whether the member is inside the region now: not if that is over, or all its pieces, at least one, are taken."""
    while True:
        word = atomic_load(state, REGION)
        if word >> INSIDE_BITS != region or atomic_load(state, _piece_of(region)) >= pieces:
            return False
        if atomic_replace(state, REGION, word, word + 1):
            return True


@njit(**OPTIONS)
def take(state, region):
    """Inside a region: the number of the next piece that no member has taken. There may be none: see `enter`."""
    return atomic_add(state, _piece_of(region), 1)


@njit(**OPTIONS)
def leave(state, region, inside):
    """Leaves the region, if the member is inside, and waits for its end. Returns the number of the next region."""
    while inside:
        word = atomic_load(state, REGION)
        if word & MAX_MEMBERS == 1:
            # Nobody is inside a region that uses this word: the last one that did is over.
            atomic_store(state, _piece_of(region + 1), 0)
            if atomic_replace(state, REGION, word, (region + 1) << INSIDE_BITS):
                _wake(state)
                return region + 1
        elif atomic_replace(state, REGION, word, word - 1):
            break
    wait_for_end(state, region, SPINS_IN_STEP)
    return region + 1


@njit(**OPTIONS)
def start_job(state):
    """Member 0: lets the others begin. Returns the number of the job's first region."""
    region = (atomic_load(state, REGION) >> INSIDE_BITS) + 1
    atomic_store(state, _piece_of(region), 0)
    atomic_store(state, REGION, region << INSIDE_BITS)
    _wake(state)
    return region


@njit(**OPTIONS)
def finish_job(state):
    """Member 0, when the last region is over: the job is."""
    job = atomic_load(state, REGION) >> (INSIDE_BITS + INDEX_BITS)
    atomic_store(state, REGION, (job + 1) << (INSIDE_BITS + INDEX_BITS))


@njit(**OPTIONS)
def next_job(state, region):
    """Members 1 ..: waits for a job after that of `region`, or for any if that is 0. Returns the number of the job's
    first region, or 0 if the team is to stop."""
    while True:
        current = atomic_load(state, REGION) >> INSIDE_BITS
        if atomic_load(state, STOP):
            return 0
        index = current & ((1 << INDEX_BITS) - 1)
        if index != 0 and (region == 0 or current >> INDEX_BITS != region >> INDEX_BITS):
            return current - index + 1
        wait_for_end(state, current, SPINS_BETWEEN)


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
        words: Any = (ctypes.c_int64 * (STATE_WORDS + LINE))()
        self._words = words
        _immortal.append(words)
        self.state = -(-ctypes.addressof(words) // (8 * LINE)) * 8 * LINE
        self._view = np.ctypeslib.as_array(words)
        self._first = (self.state - ctypes.addressof(words)) // 8
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
