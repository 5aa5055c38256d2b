"""How the command line as a whole starts and fails."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from rllava_core.cli import COMMANDS, RootGroup, rllava
from rllava_core.errors import ConfigError, RllavaError, TrainingError


def run(*args: str) -> Result:
    """`rllava ...` in this process, with an exception that escapes raised here."""
    return CliRunner().invoke(rllava, args, catch_exceptions=False)


def failing_group(error: BaseException) -> RootGroup:
    """The command line with one more subcommand, `fail`, that raises."""

    def fail() -> None:
        raise error

    group = RootGroup("rllava", lazy_commands=COMMANDS, params=rllava.params)
    group.callback = rllava.callback
    group.add_command(click.Command("fail", callback=fail, help="Fail."))
    return group


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("key 'x' is wrong"), 2), (TrainingError("disk full"), 1), (RllavaError("no"), 1)]
)
def test_an_error_for_the_user_is_one_message_and_its_exit_code(error: RllavaError, code: int) -> None:
    result = CliRunner().invoke(failing_group(error), ["fail"])

    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == f"error: {error}\n"


def test_debug_adds_the_traceback() -> None:
    result = CliRunner().invoke(failing_group(ConfigError("key 'x' is wrong")), ["--debug", "fail"])

    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("error: key 'x' is wrong\n")


def test_an_interrupt_exits_with_130() -> None:
    result = CliRunner().invoke(failing_group(KeyboardInterrupt()), ["fail"])

    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_a_mistake_of_our_own_is_not_disguised() -> None:
    result = CliRunner().invoke(failing_group(ZeroDivisionError("ours")), ["fail"])

    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize("args", [["no-such-command"], ["plugins", "--no-such-option"], ["--no-such-option"]])
def test_wrong_usage_exits_with_2(args: list[str]) -> None:
    assert run(*args).exit_code == 2


def test_version_is_that_of_the_core(fake_distribution: Any) -> None:
    fake_distribution("rllava-core", "1.4", entry_points={})

    assert run("--version").stdout == "rllava 1.4\n"


def test_help_lists_every_command() -> None:
    result = run("--help")

    assert result.exit_code == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
