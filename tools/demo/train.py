"""Quantisation-aware training of the demo model from scratch."""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import multiprocessing.pool
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tools.demo.data import make_rows, start_worker
from tools.demo.model import BitNet


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay as functions of the share of the training that is done."""

    peak: float
    warm_up: float = 0.02
    decay: float = 0.1

    def rate(self, done: float) -> float:
        if done < self.warm_up:
            return self.peak * done / self.warm_up
        return self.peak * max(0.0, 1 - done) / (1 - self.warm_up)

    def weight_decay(self, done: float) -> float:
        # The second half runs without decay: ternary weights then settle instead of being pulled across thresholds.
        return self.decay if done < 0.5 else 0.0


def train(model: BitNet, args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, float]], bool]:
    """Train until the time or the steps are used up, or those of this piece.

    Returns the loss curve, and whether the training is complete; where it is not, FOLDER/state.pt holds its state.
    """
    device = torch.device(args.device)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    schedule = Schedule(args.rate)
    curve: list[dict[str, float]] = []
    step, spent = 0, 0.0
    state_file = folder / "state.pt"
    if args.resume:
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent, curve = state["step"], state["spent"], state["curve"]
    first, before, complete = step, spent, False

    compiled = args.compile
    step_loss = torch.compile(model.loss) if compiled else model.loss
    autocast = torch.autocast(device.type, torch.bfloat16)
    steps = args.steps or 10**9
    seconds = 60 * args.minutes if args.minutes else math.inf
    context = multiprocessing.get_context("spawn")  # a forked worker would inherit a CUDA context
    workers = args.workers or max(1, (os.cpu_count() or 2) - 1)
    with context.Pool(workers, start_worker, (str(folder / "tokenizer.json"),)) as pool:
        # A step's rows depend on the seed and the step alone: the same data on any number of workers.
        jobs = (((args.seed << 32) + i * args.rows, args.rows, False) for i in range(step, steps))
        started, saved, total = time.monotonic() - spent, time.monotonic(), torch.zeros((), device=device)
        window, waited = 0, 0.0
        rows = _bounded(pool, jobs, 8 * workers)
        while True:
            spent = time.monotonic() - started
            done = max(step / steps, spent / seconds)
            complete = done >= 1
            if complete or (args.piece and step > first and spent - before >= 60 * args.piece):
                break
            asked = time.monotonic()
            ids, weights = next(rows)
            waited += time.monotonic() - asked
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(done)
            optimiser.param_groups[0]["weight_decay"] = schedule.weight_decay(done)
            batch = torch.from_numpy(ids.astype(np.int32)).to(device, non_blocking=True).long()
            weight = torch.from_numpy(weights).to(device, non_blocking=True)
            with autocast:
                try:
                    loss = step_loss(batch, weight)
                except Exception as error:  # a compiler problem must not cost the run
                    if not compiled:
                        raise
                    print(f"torch.compile failed ({type(error).__name__}); going on without it", flush=True)
                    compiled, step_loss = False, model.loss
                    loss = step_loss(batch, weight)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            total += loss.detach()
            step += 1
            window += 1
            if step == first + 1:
                started = time.monotonic() - before  # the first step waits for the workers and for the compiler
                waited = 0.0
            if step % args.report == 0:
                mean = total.item() / window
                total.zero_()
                spent = time.monotonic() - started
                point = {"step": step, "seconds": round(spent, 1), "loss": round(mean, 4), "rate": schedule.rate(done)}
                curve.append(point | {"waited": round(waited, 2)})
                print(
                    f"step {step} loss {mean:.4f} rate {schedule.rate(done):.2e} {spent:.0f} s"
                    f" (the last {window} steps: {waited:.1f} s waiting for data)",
                    flush=True,
                )
                window, waited = 0, 0.0
                if not math.isfinite(mean):
                    raise SystemExit("the loss is no longer finite")
            if args.save_every and time.monotonic() - saved > args.save_every:
                _save_state(state_file, model, optimiser, step, spent, curve)
                saved = time.monotonic()
        if args.save_every or not complete:
            _save_state(state_file, model, optimiser, step, spent, curve)
    return curve, complete


def _bounded(pool: multiprocessing.pool.Pool, jobs: Iterator[tuple[int, int, bool]], ahead: int) -> Iterator:
    """`pool.imap` in order, but never more than `ahead` results before the reader."""
    waiting = [pool.apply_async(make_rows, (job,)) for job in itertools.islice(jobs, ahead)]
    while waiting:
        yield waiting.pop(0).get()
        waiting += [pool.apply_async(make_rows, (job,)) for job in itertools.islice(jobs, 1)]


def _save_state(
    path: Path, model: BitNet, optimiser: torch.optim.Optimizer, step: int, spent: float, curve: list
) -> None:
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "spent": spent,
        "curve": curve,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
