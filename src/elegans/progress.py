"""What a person sees while long work runs: what is happening, how fast, and how long it will take."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from elegans.training import train
from elegans.training.convoy import Convoy
from elegans.training.cost import flops_per_step
from elegans.training.planner import CohortPlan

LINE_SECONDS = 10.0  # between lines where there is no terminal


class _Remaining(ProgressColumn):
    """Remaining time by the measured speed; nothing before there is one."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return Text("" if left is None else f"{_clock(left)} left")


class Display:
    """A listener of the driver that draws on stderr: a live bar in a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), _Remaining())
        self.bar = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self.task = self.bar.add_task("starting", total=1.0, detail="", left=None) if self.bar else None
        self.total, self.done, self.seconds, self.measured = 0.0, 0.0, 0.0, 0.0
        self.cohorts, self.cohort = 0, 0
        self.steps = 0
        self.printed = 0.0
        self.title = ""

    def __enter__(self) -> Display:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, stage: str, detail: Any) -> None:
        getattr(self, f"_on_{stage}", lambda _: None)(detail)

    def _on_plan(self, work: Any) -> None:
        waiting = [c.plan() for c in work.stored if not c.status()["finished"]] + work.new
        self.total = sum(_cost(plan) for plan in waiting)
        self.cohorts = len(waiting)
        training = sum(len(plan.runs) for plan in waiting)
        skipped = len(work.runs) - training
        note = f", {skipped} already finished" if skipped > 0 else ""
        self.console.print(f"{training} runs in {self.cohorts} cohorts to train{note}; {work.device.device_kind}", highlight=False)

    def _on_convoy(self, detail: tuple[Convoy, int]) -> None:
        convoy, step = detail
        left = [plan for plan in convoy.plans if plan.steps > step]
        first, self.cohort = self.cohort + 1, self.cohort + len(left)
        self.steps = convoy.steps
        self.total -= sum(_cost(plan, upto=step) for plan in left)
        which = f"cohort {first}" if len(left) == 1 else f"cohorts {first} to {self.cohort}"
        self.title = f"{which}/{self.cohorts}, {sum(len(plan.runs) for plan in left)} runs"
        if step:
            self.console.print(f"{self.title}: resuming at step {step:,} of {self.steps:,}", highlight=False)

    def _on_event(self, event: train.Event) -> None:
        if isinstance(event, train.Compiling):
            self._show(f"{self.title}: compiling for {event.size} replicas", "", None, force=True)
        elif isinstance(event, train.Progress):
            self.done, self.seconds, self.measured = self.done + event.flops, self.seconds + event.seconds, self.measured + event.flops
            left = (self.total - self.done) * self.seconds / self.measured
            speed = event.steps * event.size / max(event.seconds, 1e-9)
            loss = "" if event.loss is None else f", median loss {event.loss:.3f}"
            self._show(f"{self.title}: training", f"step {event.step:,}/{self.steps:,}{loss}, {speed:,.0f} replica-steps/s", left)

    def _on_note(self, detail: str) -> None:
        self.console.print(detail, highlight=False, markup=False, soft_wrap=True)

    def _on_measure(self, detail: tuple[str, str]) -> None:
        self.title = f"measuring {detail[0]} of {detail[1]}"
        self._show(self.title, "", None, force=True)

    def _on_measured(self, detail: tuple[int, int]) -> None:
        self._show(self.title, f"{detail[0]} of {detail[1]} networks", None)

    def _on_report(self, detail: Any) -> None:
        del detail
        self._show("writing the report", "", None, force=True)

    def _show(self, what: str, detail: str, left: float | None, force: bool = False) -> None:
        share = self.done / self.total if self.total else 1.0
        if self.bar and self.task is not None:
            self.bar.update(self.task, description=what, completed=share, detail=detail, left=left)
        elif force or time.monotonic() - self.printed > LINE_SECONDS:
            self.printed = time.monotonic()
            rest = f", {_clock(left)} left" if left is not None else ""
            print(f"{what} {detail}{rest}".strip(), file=sys.stderr, flush=True)


def _cost(plan: CohortPlan, upto: int | None = None) -> float:
    """Training FLOPs of a cohort's program, idle replicas included: up to a step, or in all."""
    end = plan.steps if upto is None else upto
    return sum(max(0, min(s.stop, end) - s.start) * s.size for s in plan.segments) * flops_per_step(plan.runs[0])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
