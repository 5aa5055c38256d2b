"""What a run shows on the screen: a live line on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from rllava_core.training.evaluation import Evaluation

PLAIN_INTERVAL = 10.0
"""Seconds between progress lines where there is no terminal."""

COLUMNS = {"reward": "reward/mean", "success": "rollout/success_rate", "entropy": "policy/entropy"}


class Display:
    """Follows a run; a context manager, so that the live line is taken down whatever happens."""

    def __init__(self, resume_command: str, console: Console | None = None) -> None:
        # No markup: a path or an override may hold square brackets.
        self.console = console or Console(highlight=False, soft_wrap=True, markup=False)
        self.resume_command = resume_command
        self.directory: Path | None = None
        self._bar: Progress | None = None
        self._task: Any = None
        self._total = 0
        self._start = (0, 0.0)
        self._last_line = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, directory: Path, total_steps: int, resumed_at: int | None) -> None:
        self.directory, self._total = directory, total_steps
        done = resumed_at or 0
        self._start = (done, time.monotonic())
        self.console.print(f"Resuming {directory} at step {done}" if resumed_at is not None else f"Run {directory}")
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                *(TextColumn(f"{name} [cyan]{{task.fields[{name}]}}[/]") for name in COLUMNS),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=done, **self._values({}))
            self._bar.start()

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self.console.print(
            f"step {step:>5}  held-out success {evaluation.success_rate:.3f}  return {evaluation.return_mean:.3f}  "
            f"turns {evaluation.turns_mean:.1f}  ({evaluation.episodes} episodes)"
        )

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        values = self._values(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, **values)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL or step == self._total:
            self._last_line = now
            first, began = self._start
            left = (now - began) / max(1, step - first) * (self._total - step)
            shown = "  ".join(f"{name} {value}" for name, value in values.items())
            self.console.print(f"step {step:>5}/{self._total}  {shown}  {left:.0f} s left")

    def _values(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        return {name: f"{metrics[key]:.3f}" if key in metrics else "–" for name, key in COLUMNS.items()}

    def stopping(self) -> None:
        self.console.print("Stopping after this step, which will be saved; Ctrl-C again stops at once.")

    def warned(self, message: str) -> None:
        self.console.print(f"warning: {message}")

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The table of held-out results, where everything is, and what to type next."""
        evaluations = summary["eval"]
        if evaluations:
            table = Table(title="Held-out episodes, greedy")
            for heading in ("", "success", "return", "turns", "episodes"):
                table.add_column(heading, justify="left" if not heading else "right")
            names = {"first": "before", "last": "last evaluation", "best": "best"}
            for key, name in names.items():
                row = evaluations[key]
                at = f" (step {row['step']})" if "step" in row else ""
                table.add_row(
                    name + at,
                    f"{row['success_rate']:.3f}",
                    f"{row['return_mean']:.3f}",
                    f"{row['turns_mean']:.1f}",
                    str(row["episodes"]),
                )
            self.console.print(table)
        done = "Completed" if summary["status"] == "completed" else "Interrupted after"
        self.console.print(
            f"{done} {summary['steps']} steps in {summary['wall_seconds']:.1f} s, "
            f"peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB. Everything is in {self.directory}"
        )
        if summary["status"] != "completed":
            self.console.print(f"Go on with:  {self.resume_command}")
            return
        self.console.print(
            f"Next:  rllava eval {self.directory} --swap-images     (is the image seen?)\n"
            f"       rllava eval {self.directory} --save-episodes   (every episode as a picture)\n"
            f"       {self.directory}/trajectories                (sampled answers with their images)\n"
            f"       {self.directory}/checkpoints                 (load them with transformers)"
        )


class Silence:
    """Follows a run and says nothing: what all but the first of several processes do."""

    def started(self, directory: Path, total_steps: int, resumed_at: int | None) -> None:
        return

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        return

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        return

    def stopping(self) -> None:
        return

    def warned(self, message: str) -> None:
        return


def quiet_libraries() -> None:
    """No progress bars of other libraries between ours; their errors still come through."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
