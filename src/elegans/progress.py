"""What a person sees while long work runs: what is happening, how fast, and how long it will take."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from elegans.training import train
from elegans.training.convoy import Convoy, gather
from elegans.training.cost import rates_of

LINE_SECONDS = 10.0  # between lines where there is no terminal
UNSURE = 10.0  # seconds of work after which its speed says something of the rest


class _Remaining(ProgressColumn):
    """Remaining time, where something is known of it."""

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
        self.rates, self.total, self.waiting = rates_of("cpu"), 0.0, 0.0  # seconds as predicted: of all that trains, of what has not begun
        self.began: float | None = None
        self.cohorts, self.cohort = 0, 0
        self.convoy: Convoy | None = None
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
        self.rates = rates_of(work.device.platform)
        together = gather([plan.convoy for plan in waiting])
        self.total = self.waiting = sum(Convoy(tuple(waiting[i] for i in members)).seconds(self.rates) for members in together)
        self.cohorts = len(waiting)
        training = sum(len(plan.runs) for plan in waiting)
        skipped = len(work.runs) - training
        note = f", {skipped} already finished" if skipped > 0 else ""
        self.console.print(f"{training} runs in {self.cohorts} cohorts to train{note}; {work.device.device_kind}", highlight=False)

    def _on_convoy(self, detail: tuple[Convoy, int]) -> None:
        convoy, step = detail
        left = [plan for plan in convoy.plans if plan.steps > step]
        first, self.cohort = self.cohort + 1, self.cohort + len(left)
        self.began, self.convoy = self.began or time.monotonic(), convoy
        whole = convoy.seconds(self.rates)
        self.waiting = max(0.0, self.waiting - whole)
        self.total -= whole - convoy.seconds(self.rates, step)
        which = f"cohort {first}" if len(left) == 1 else f"cohorts {first} to {self.cohort}"
        self.title = f"{which}/{self.cohorts}, {sum(len(plan.runs) for plan in left)} runs"
        if step:
            self.console.print(f"{self.title}: resuming at step {step:,} of {convoy.steps:,}", highlight=False)

    def _on_event(self, event: train.Event) -> None:
        if isinstance(event, train.Compiling):
            self._show(f"{self.title}: compiling for {event.size} replicas", "", force=True)
        elif isinstance(event, train.Progress) and self.convoy:
            speed = event.steps * event.size / max(event.seconds, 1e-9)
            loss = "" if event.loss is None else f", median loss {event.loss:.3f}"
            detail = f"step {event.step:,}/{self.convoy.steps:,}{loss}, {speed:,.0f} replica-steps/s"
            self._show(f"{self.title}: training", detail, rest=self._rest(self.convoy, event.step))

    def _rest(self, convoy: Convoy, step: int) -> float:
        """Predicted seconds of what is left when a convoy has come so far; the program that it trains by is compiled."""
        compiled = self.rates.compiling if step < convoy.steps else 0.0
        return self.waiting + convoy.seconds(self.rates, step) - compiled

    def _on_note(self, detail: str) -> None:
        self.console.print(detail, highlight=False, markup=False, soft_wrap=True)

    def _on_measure(self, detail: tuple[str, str]) -> None:
        self.title = f"measuring {detail[0]} of {detail[1]}"
        self._show(self.title, "", force=True)

    def _on_measured(self, detail: tuple[int, int]) -> None:
        self._show(self.title, f"{detail[0]} of {detail[1]} networks")

    def _on_report(self, detail: Any) -> None:
        del detail
        self._show("writing the report", "", force=True)

    def _show(self, what: str, detail: str, rest: float | None = None, force: bool = False) -> None:
        """`rest`: predicted seconds that are left. They are shown as the time that so many took, compiling and measuring included."""
        took, done = time.monotonic() - (self.began or time.monotonic()), self.total - (rest or 0.0)
        left = None if rest is None or took < UNSURE or done <= 0 else rest * took / done
        if self.bar and self.task is not None:
            self.bar.update(self.task, description=what, detail=detail, left=left)
            if rest is not None:
                self.bar.update(self.task, completed=done / self.total)
        elif force or time.monotonic() - self.printed > LINE_SECONDS:
            self.printed = time.monotonic()
            shown = f", {_clock(left)} left" if left is not None else ""
            print(f"{what} {detail}{shown}".strip(), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
