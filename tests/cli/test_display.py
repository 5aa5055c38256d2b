"""What a run shows: plain lines for a file, a live line on a terminal, a table at the end."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rllava_core.cli import display as module
from rllava_core.cli.display import Display
from rllava_core.training.evaluation import Evaluation

METRICS = {"reward/mean": 0.25, "rollout/success_rate": 0.5, "policy/entropy": 1.5}
EVALUATION = Evaluation(0.125, -0.5, 2.5, 8, 0.0, 0.0, {}, (), ())

SUMMARY: dict[str, Any] = {
    "status": "completed",
    "steps": 7,
    "wall_seconds": 12.34,
    "peak_memory_bytes": 3 * 2**20,
    "eval": {
        "first": {"success_rate": 0.1, "return_mean": 0.2, "turns_mean": 9.5, "episodes": 8},
        "last": {"success_rate": 0.3, "return_mean": 0.4, "turns_mean": 1.0, "episodes": 8},
        "best": {"success_rate": 0.5, "return_mean": 0.6, "turns_mean": 1.0, "episodes": 8, "step": 4},
    },
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in one entry."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def plain() -> tuple[Display, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, highlight=False, soft_wrap=True, markup=False)
    return Display("rllava train x --resume", console), output


def terminal() -> tuple[Display, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, markup=False, highlight=False, _environ={})
    return Display("rllava train x --resume", console), output


def test_without_a_terminal_progress_is_lines_ten_seconds_apart(clock: list[float]) -> None:
    display, output = plain()
    with display:
        display.started(Path("runs/a"), 100, None)
        for step in range(1, 101):
            clock[0] += 1.0
            display.stepped(step, METRICS)

    lines = output.getvalue().splitlines()
    assert lines[0] == "Run runs/a"
    assert lines[1] == "step     1/100  reward 0.250  success 0.500  entropy 1.500  99 s left"
    assert [int(line.split("/")[0].split()[1]) for line in lines[1:]] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert lines[-1].endswith("0 s left")
    assert "\x1b" not in output.getvalue()


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(clock: list[float]) -> None:
    display, output = plain()
    display.started(Path("runs/a"), 100, 90)
    clock[0] += 4.0
    display.stepped(92, METRICS)

    assert output.getvalue().splitlines() == [
        "Resuming runs/a at step 90",
        "step    92/100  reward 0.250  success 0.500  entropy 1.500  16 s left",
    ]


def test_what_was_not_measured_is_a_dash() -> None:
    display, output = plain()
    display.started(Path("a"), 1, None)
    display.stepped(1, {"reward/mean": 1.0})

    assert "reward 1.000  success –  entropy –" in output.getvalue()


@pytest.mark.parametrize("make", [plain, terminal])
def test_evaluations_and_a_coming_stop_are_lines(make: Any) -> None:
    display, output = make()
    with display:
        display.started(Path("a"), 10, None)
        display.evaluated(5, EVALUATION)
        display.stopping()

    assert "step     5  held-out success 0.125  return -0.500  turns 2.5  (8 episodes)" in output.getvalue()
    assert "Stopping after this step, which will be saved; Ctrl-C again stops at once." in output.getvalue()


def test_on_a_terminal_one_line_is_kept_up_to_date() -> None:
    display, output = terminal()
    with display:
        display.started(Path("runs/a"), 10, 3)
        display.stepped(4, METRICS)
        display.stepped(5, {**METRICS, "reward/mean": 0.75})
        assert display._bar is not None
        display._bar.refresh()
        live = output.getvalue()
        assert display._bar.live.is_started

    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", live)
    assert "Resuming runs/a at step 3" in text
    assert "step 3/10" in text.replace("step  3/10", "step 3/10")
    assert re.search(r"step\s+5/10 .* reward 0\.750 success 0\.500 entropy 1\.500", text)
    assert "[cyan]" not in text
    # Taken down at the end: the cursor is shown again.
    assert not display._bar.live.is_started
    assert output.getvalue().rstrip().endswith("\x1b[?25h")


def test_the_live_line_is_taken_down_when_a_run_fails() -> None:
    display, output = terminal()

    def fail() -> None:
        with display:
            display.started(Path("a"), 10, None)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert "\x1b[?25h" in output.getvalue()


def test_the_end_is_a_table_and_what_to_type_next() -> None:
    display, output = plain()
    display.started(Path("runs/a"), 7, None)
    display.finished(SUMMARY)

    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in output.getvalue().splitlines() if "│" in line
    ]
    assert rows == [
        ["before", "0.100", "0.200", "9.5", "8"],
        ["last evaluation", "0.300", "0.400", "1.0", "8"],
        ["best (step 4)", "0.500", "0.600", "1.0", "8"],
    ]
    assert "Completed 7 steps in 12.3 s, peak memory 3 MiB. Everything is in runs/a" in output.getvalue()
    assert "rllava eval runs/a --swap-images" in output.getvalue()
    assert "Go on with" not in output.getvalue()


def test_an_interrupted_run_says_how_to_go_on() -> None:
    display, output = plain()
    display.started(Path("runs/a"), 9, None)
    display.finished({**SUMMARY, "status": "interrupted"})

    assert "Interrupted after 7 steps" in output.getvalue()
    assert output.getvalue().endswith("Go on with:  rllava train x --resume\n")
    assert "Next:" not in output.getvalue()


def test_square_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    command = "rllava train x.yaml 'task.choices=[a,b]' --run-dir 'runs/[/x]' --resume"
    display = Display(command)
    display.started(Path("runs/[/x]"), 9, None)
    display.finished({**SUMMARY, "status": "interrupted"})

    output = capsys.readouterr().out
    assert f"Go on with:  {command}\n" in output
    assert output.startswith("Run runs/[/x]\n")


def test_a_warning_is_one_line() -> None:
    display, output = plain()
    display.warned("plugin 'x' was detached [really]")

    assert output.getvalue() == "warning: plugin 'x' was detached [really]\n"
