"""`rllava plugins check`: each plugin in a process of its own, and with --deep its components against the kit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from rllava_core.cli.plugins import names_of, unknown
from rllava_core.errors import printable
from rllava_core.plugins import Plugin, core_version, load_plugins
from rllava_core.plugins.selection import ALLOW, DISABLE, STRICT, is_called
from rllava_core.specs import HOOK_API

TIMEOUT, DEEP_TIMEOUT = 120, 900
"""Seconds after which a check that does not end is given up."""

ATTEMPTS = 3
"""The shortest of so many import times counts: a busy machine is not the plugin's fault."""

STYLES = {"warning": "yellow", "error": "red"}

Finding = dict[str, str]


@click.command()
@click.argument("name", required=False)
@click.option("--deep", is_flag=True, help="Import the components too, and run the conformance kit's quick checks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(name: str | None, deep: bool, as_json: bool) -> None:
    """Check that a plugin, all plugins of a distribution, or all plugins keep the contract.

    Exit code 0: no errors (there may be warnings); 1: errors were found; 2: there is no such plugin.
    """
    installed = load_plugins(strict=False, load=False).plugins
    chosen = [plugin for plugin in installed if name is None or is_called(plugin, name)]
    if name is not None and not chosen:
        raise unknown(name, names_of(installed))
    reports = []
    for plugin in chosen:
        if name is None and plugin.status == "disabled":
            findings = [{"check": "loading", "level": "skipped", "message": f"it is disabled: {plugin.error}"}]
        else:
            findings = _check(plugin, deep)
        report = {
            "name": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "ok": not any(finding["level"] == "error" for finding in findings),
            "findings": findings,
        }
        reports.append(report)
        if not as_json:
            _print(report)
    everything_ok = all(report["ok"] for report in reports)
    if as_json:
        document = {
            "schema": 1,
            "core_version": core_version(),
            "hook_api": HOOK_API,
            "deep": deep,
            "ok": everything_ok,
            "plugins": reports,
        }
        click.echo(json.dumps(document, indent=2))
    if not everything_ok:
        raise SystemExit(1)


def _check(plugin: Plugin, deep: bool) -> list[Finding]:
    module = "rllava_core.plugins.checking"
    findings = _run(module, plugin, TIMEOUT)
    for _ in range(ATTEMPTS - 1):
        if not any(finding["check"] == "import time" and finding["level"] == "error" for finding in findings):
            break
        again = {finding["check"]: finding for finding in _run(module, plugin, TIMEOUT)}
        if again.get("import time", {}).get("level") == "ok":
            findings = [again["import time"] if item["check"] == "import time" else item for item in findings]
    if deep:
        if any(finding["check"] in ("loading", "requirement on the core") for finding in _errors(findings)):
            findings.append({"check": "components", "level": "skipped", "message": "the plugin cannot be loaded"})
        else:
            findings += _run("rllava_core.testing.deep", plugin, DEEP_TIMEOUT)
    return findings


def _errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding["level"] == "error"]


def _run(module: str, plugin: Plugin, timeout: int) -> list[Finding]:
    """The findings of a process, or the one finding that it did not survive."""
    # The plugin is checked by name, whatever the environment would have loaded.
    environment = {key: value for key, value in os.environ.items() if key not in (ALLOW, DISABLE, STRICT)}
    with tempfile.TemporaryDirectory() as directory:
        output, printed = Path(directory) / "findings.json", Path(directory) / "printed.txt"
        # -P: the current folder is not on the path of the command `rllava` either.
        command = [sys.executable, "-P", "-m", module, str(output), *plugin.identity]
        # A file and no pipe: a process that the plugin leaves behind would hold a pipe open.
        with printed.open("wb") as file:
            try:
                done = subprocess.run(command, stdout=file, stderr=file, timeout=timeout, check=False, env=environment)
            except subprocess.TimeoutExpired:
                return [{"check": "loading", "level": "error", "message": f"it did not end within {timeout} s"}]
        if done.returncode == 0 and output.is_file():
            findings: list[Finding] = json.loads(output.read_text(encoding="utf-8"))
            return findings
        lines = printed.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((printable(line) for line in reversed(lines) if line.strip()), "it said nothing")
    message = f"the process that loads it ended with code {done.returncode}: {last}"
    return [{"check": "loading", "level": "error", "message": message}]


def _print(report: dict[str, Any]) -> None:
    findings: list[Finding] = report["findings"]
    passed = sum(finding["level"] == "ok" for finding in findings)
    state = click.style("ok", fg="green") if report["ok"] else click.style("not ok", fg="red")
    click.echo(f"{report['name']} ({report['distribution']} {report['version']}): {state}, {passed} checks passed")
    # One defect makes many checks fail alike.
    alike: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        key = (finding["level"], finding.get("component", ""), finding["message"])
        alike.setdefault(key, []).append(finding["check"])
    for (level, component, message), checks in alike.items():
        if level in STYLES:
            about = f"{component}: " if component else ""
            more = f" (and {len(checks) - 1} more checks)" if len(checks) > 1 else ""
            click.echo(f"  {click.style(level, fg=STYLES[level])}: {about}{checks[0]}{more}: {message}")
    for (level, component, message), checks in alike.items():
        if level == "skipped":
            count = f"{len(checks)} checks" if len(checks) > 1 else f"1 check ({checks[0]})"
            click.echo(f"  skipped: {count}{f' of {component}' if component else ''}: {message}")
