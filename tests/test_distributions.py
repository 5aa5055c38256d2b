"""Each distribution declares what it imports, so that it works with only what its own metadata bring."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECTS = [ROOT, *sorted(ROOT.glob("plugins/rllava-*")), *sorted(ROOT.glob("examples/plugins/rllava-*"))]


def declared(project: Path) -> dict[str, Requirement]:
    """The requirements of a project, by normalised name."""
    table = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [Requirement(line) for line in table["dependencies"]]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def extras(project: Path) -> set[str]:
    """The requirements of a project that a user may leave out, by normalised name."""
    table = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = table.get("optional-dependencies", {})
    return {canonicalize_name(Requirement(line).name) for lines in groups.values() for line in lines}


def imported(project: Path, *, by_functions: bool) -> set[str]:
    """Top-level names that the package imports when it is used, the standard library and itself left out.

    by_functions: those that are imported when a function is called, not those that come with a module.
    """
    packages = [ROOT / "rllava_core"] if project == ROOT else list((project / "src").iterdir())
    names: set[str] = set()
    for path in (file for package in packages for file in package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        late = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if (id(node) in late) != by_functions:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names) - {package.name for package in packages}


ELSEWHERE = {
    "vllm": "rllava-vllm's `environment.sh` installs it, in an environment of its own",
    "deepspeed": "rllava-deepspeed's `environment.sh` does; it is built where torch is already installed",
}
"""What a module imports that only somebody else's process imports."""


def owner(package: str) -> str:
    """The distribution that a package comes from; ours, which may be editable and so list no files, by their names."""
    if package.startswith("rllava_"):
        return canonicalize_name(package)
    return canonicalize_name(packages_distributions()[package][0])


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_a_distribution_declares_what_it_imports(project: Path) -> None:
    # pytest is what the fixtures of the conformance kit are for; whoever imports them has it.
    needed = {owner(name) for name in imported(project, by_functions=False) - {"pytest", *ELSEWHERE}}
    asked_for = {owner(name) for name in imported(project, by_functions=True) - {"pytest", *ELSEWHERE}}

    assert needed - set(declared(project)) == set()
    # What a function imports may be an extra, whose absence it explains.
    assert asked_for - set(declared(project)) - extras(project) == set()


@pytest.mark.parametrize("project", PROJECTS[1:], ids=lambda project: project.name)
def test_a_plugin_accepts_one_major_of_the_core(project: Path) -> None:
    specifier = declared(project)["rllava-core"].specifier

    assert specifier.contains("1.0.0a1", prereleases=True)
    assert specifier.contains("1.9")
    assert not specifier.contains("2.0")


def test_requirements_of_plugins_ask_for_no_more_than_the_core() -> None:
    """One floor for the whole house: what the core requires too has the same version everywhere."""
    core = declared(ROOT)
    for project in PROJECTS[1:]:
        for name, requirement in declared(project).items():
            if name in core and str(requirement.specifier):
                assert requirement.specifier == core[name].specifier, f"{project.name}: {requirement}"


def test_the_readme_names_every_distribution() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for project in ROOT.glob("plugins/rllava-*"):
        assert re.search(rf"\[`{project.name}`\]\(plugins/{project.name}\)", readme)
