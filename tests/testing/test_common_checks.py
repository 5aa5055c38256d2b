"""Every check that all kinds share has a mutant that it catches; what has no options to run with is skipped."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from rllava_core.testing.conformance import Conformance, Outcome, checks_of, run
from rllava_core.testing.rewards import RewardConformance

SOURCE = '''
from pydantic import BaseModel, Field, field_validator

from rllava_core import ComponentSpec, hookimpl
from rllava_core.config import Options


class Config(Options):
    """How long an answer may be."""

    limit: int = Field(default=10, description="letters")


class Brevity:
    def __init__(self, config):
        self.limit = config.limit

    def __call__(self, trajectories):
        return [float(len(trajectory.answer) < self.limit) for trajectory in trajectories]


@hookimpl
def rllava_rewards():
    return [
        ComponentSpec(
            name="brevity", target="rllava_brevity:Brevity", config="rllava_brevity:Config", summary="Rewards brevity."
        )
    ]
'''

LIMIT = 'limit: int = Field(default=10, description="letters")'
HALVES = (
    f'{LIMIT}\n\n    @field_validator("limit")\n    @classmethod\n    def halve(cls, limit):\n        return limit // 2'
)

IMPORTS = "test_the_config_imports_neither_torch_nor_transformers"

MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    "the_target_can_be_imported": [
        ("rllava_brevity:Brevity", "rllava_brevity:Brief", "has no attribute 'Brief'"),
        ("class Brevity:", "Brevity = 3\nclass Other:", "is not a class or function"),
    ],
    "the_component_has_a_summary": [
        ('summary="Rewards brevity."', 'summary=" "', "has no summary"),
        ("Rewards brevity.", "Rewards\\nbrevity.", "is one line"),
    ],
    "the_config_is_a_pydantic_model": [
        ("class Config(Options)", "class Config", "expected a subclass of rllava_core.config.Options"),
    ],
    "the_config_refuses_unknown_keys": [("Config(Options)", "Config(BaseModel)", "a misspelt option would be ignored")],
    "every_option_has_a_description": [(', description="letters"', "", "no Field(description=…) for limit")],
    "the_config_survives_being_written_to_a_file": [
        (LIMIT, HALVES.replace("(default=10,", "(default=10, validate_default=True,"), "became Config(limit=2)")
    ],
    "the_config_imports_neither_torch_nor_transformers": [
        (
            "from pydantic",
            "import transformers\nfrom pydantic",
            "imports transformers, so checking a config would take seconds",
        ),
    ],
}


def outcomes(**attributes: Any) -> dict[str, Outcome]:
    suite = type("Suite", (RewardConformance,), {"component": "brevity", **attributes})()
    return {outcome.check: outcome for outcome in run(suite)}


def test_every_check_has_a_mutant() -> None:
    assert {f"test_{check}" for check in MUTANTS} == set(checks_of(Conformance))


@pytest.mark.parametrize(
    ("check", "healthy", "mutant", "message"),
    [(check, *entry) for check, entries in MUTANTS.items() for entry in entries],
    ids=[check for check, entries in MUTANTS.items() for _ in entries],
)
def test_a_mutant_is_caught_by_its_check(
    fake_distribution: Any, check: str, healthy: str, mutant: str, message: str
) -> None:
    assert healthy in SOURCE
    site = fake_distribution("rllava-brevity", "1.0", SOURCE.replace(healthy, mutant))
    site.joinpath("transformers.py").write_text("# Stands in for the real one, which takes seconds.")

    attributes = {IMPORTS: None} if check not in IMPORTS else {}  # the one check that starts a process
    outcome = outcomes(**attributes)[check]

    assert outcome.status == "failed"
    assert message in outcome.message


def test_a_healthy_component_passes_every_check(fake_distribution: Any) -> None:
    fake_distribution("rllava-brevity", "1.0", SOURCE)

    assert {outcome.status for outcome in outcomes().values()} == {"passed"}


UNIT = 'unit: str = Field(description="of what")'


def test_checks_that_need_options_are_skipped_without_them(fake_distribution: Any) -> None:
    required = LIMIT.replace("default=10, ", "")
    fake_distribution("rllava-brevity", "1.0", SOURCE.replace(LIMIT, f"{required}\n    {UNIT}"))

    found = outcomes()

    assert not [outcome for outcome in found.values() if outcome.status == "failed"]
    skipped = {outcome.message for outcome in found.values() if outcome.status == "skipped"}
    assert skipped == {"needs options: limit, unit"}
    assert found["every_option_has_a_description"].status == "passed"
    assert found["an_empty_answer_gets_a_number"].status == "skipped"


@pytest.mark.parametrize("options", [{"limit": "long"}, {"limits": 3}, {"unit": 3}, {"limit": 3}])
def test_wrong_or_incomplete_options_are_failures(fake_distribution: Any, options: dict[str, Any]) -> None:
    fake_distribution("rllava-brevity", "1.0", SOURCE.replace(LIMIT, f"{LIMIT}\n    {UNIT}"))

    assert outcomes(options=options)["an_empty_answer_gets_a_number"].status == "failed"


def test_the_suites_without_a_model_import_neither_torch_nor_pytest() -> None:
    script = (
        "import sys; from rllava_core.testing import check_reward, check_environment, check_dataset; "
        "from rllava_core.testing import RewardConformance, EnvironmentConformance, DatasetConformance; "
        "print(*{'torch', 'transformers', 'pytest'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)

    assert done.stdout.split() == []
