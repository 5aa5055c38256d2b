"""What the six conformance suites share: finding the component, its config's checks, and running without pytest.

A suite is a class whose methods named `test_…` are its checks. A plugin's tests subclass it and name the component:

    from rllava_core.testing import RewardConformance

    class TestBrevity(RewardConformance):
        component = "brevity"
        options = {"limit": 10}

pytest collects the checks like any test, and `rllava plugins check --deep` runs them without pytest. A check that does
not apply raises `unittest.SkipTest`, which pytest understands; one that fails raises ConformanceError.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar
from unittest import SkipTest

from pydantic import BaseModel, ValidationError

from rllava_core.config.resolving import NoOptions
from rllava_core.errors import DataError, describe
from rllava_core.plugins import Component, Registry, load_plugins
from rllava_core.specs import Kind

Check = TypeVar("Check", bound=Callable[..., None])


class ConformanceError(AssertionError):
    """A component does not keep the contract of its kind; the message says what it did and what would be right."""


@dataclass(frozen=True)
class Outcome:
    """What became of one check.

    check: the method's name without `test_`.
    message: why it failed or was skipped.
    """

    check: str
    status: Literal["passed", "failed", "skipped"]
    message: str = ""


def require(condition: object, message: str) -> None:
    """Raise ConformanceError with the message unless the condition holds."""
    if not condition:
        raise ConformanceError(message)


class UnsuitedError(ConformanceError):
    """A component refused the kit's samples with an error of its own: only its author knows which would suit it."""


def slow(check: Check) -> Check:
    """Mark a check that trains or samples for seconds: left out of `rllava plugins check --deep`."""
    check.slow = True  # type: ignore[attr-defined]
    return check


def opinionated(check: Check) -> Check:
    """Mark a check that depends on samples which only an author can choose: left out likewise."""
    check.opinionated = True  # type: ignore[attr-defined]
    return check


class Conformance:
    """Base of the suites.

    component: name of an installed component, bare or `distribution/name`. Empty where `create` is overridden to make
        an object that no plugin registers; the checks of spec and config are then skipped.
    options: what a config would write beside the component's name.
    """

    kind: ClassVar[Kind]
    component: str = ""
    role: str | None = None
    options: Mapping[str, Any] = {}

    def find(self) -> Component:
        """The installed component. Raises PluginError if there is none, SkipTest if none is named."""
        if not self.component:
            raise SkipTest("no component is named, so there is no spec to check")
        environment = {name: value for name, value in os.environ.items() if name.startswith("RLLAVA_")}
        registry = _registry(tuple(sys.path), tuple(sorted(environment.items())))
        return registry.find(self.kind, self.component, self.role)

    def target(self) -> Any:
        """The component's class."""
        return self.find().load_target()

    def config(self) -> BaseModel:
        """The component's config with `options`, validated.

        Raises SkipTest where there are no `options` and the component has some that it cannot do without: only its
        author knows values for them.
        """
        model: type[BaseModel] = self.find().load_config() or NoOptions
        try:
            return model.model_validate(dict(self.options))
        except ValidationError as error:
            missing = [".".join(map(str, line["loc"])) for line in error.errors() if line["type"] == "missing"]
            if self.options or len(missing) < error.error_count():
                raise
            raise SkipTest(f"needs options: {', '.join(missing)}") from None

    def create(self) -> Any:
        """A new object of the component."""
        return self.target()(self.config())

    def test_the_target_can_be_imported(self) -> None:
        require(callable(self.find().load_target()), f"target {self.find().spec.target!r} is not a class or function")

    def test_the_component_has_a_summary(self) -> None:
        summary = self.find().spec.summary
        require(summary.strip(), "ComponentSpec has no summary: say in one line what it does, for `rllava plugins`")
        require("\n" not in summary, "the summary of a ComponentSpec is one line")

    def test_the_config_is_a_pydantic_model(self) -> None:
        model = self._config_model()
        require(
            isinstance(model, type) and issubclass(model, BaseModel),
            f"config {self.find().spec.config!r} is {model!r}; expected a subclass of rllava_core.config.Options",
        )

    def test_the_config_refuses_unknown_keys(self) -> None:
        model = self._config_model()
        require(
            model.model_config.get("extra") == "forbid",
            f"{model.__name__} accepts unknown keys, so a misspelt option would be ignored: derive it from "
            "rllava_core.config.Options",
        )

    def test_every_option_has_a_description(self) -> None:
        model = self._config_model()
        silent = [name for name, field in model.model_fields.items() if not field.description]
        require(not silent, f"{model.__name__}: no Field(description=…) for {', '.join(silent)}")

    def test_the_config_survives_being_written_to_a_file(self) -> None:
        config = self.config()
        again = type(config).model_validate(config.model_dump(mode="json"))
        require(again == config, f"{config!r} became {again!r} when written as JSON and read again")

    def test_the_config_imports_neither_torch_nor_transformers(self) -> None:
        where = self.find().spec.config
        if where is None:
            raise SkipTest("the component has no options")
        module = where.partition(":")[0]
        code, output, error = _imported_alone(module, tuple(sys.path))
        require(code == 0, f"importing {module!r} alone fails: {error.strip()[-500:]}")
        # The last line: the module may print while it is imported.
        heavy = output.splitlines()[-1].strip()
        require(not heavy, f"importing {module!r} imports {heavy}, so checking a config would take seconds")

    def _config_model(self) -> Any:
        model = self.find().load_config()
        if model is None:
            raise SkipTest("the component has no options")
        return model


@functools.cache  # checks make hundreds of objects, and each time every installed plugin would be loaded
def _registry(path: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> Registry:
    """Of the plugins installed on a path, under these variables."""
    return load_plugins()


@functools.cache  # several suites may check one component with other options
def _imported_alone(module: str, path: tuple[str, ...]) -> tuple[int, str, str]:
    """Exit code, output and errors of a process that imports a module and says what heavy ones came with it."""
    script = (
        f"import sys; sys.path[:] = {list(path)!r}; import {module}; "
        "print(*({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, errors="replace", timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr


def checks_of(suite: type[Conformance]) -> list[str]:
    """Names of the methods that are a suite's checks, the common ones first, otherwise in the order written."""
    names: dict[str, None] = {}
    for parent in reversed(suite.__mro__):
        names |= dict.fromkeys(name for name in vars(parent) if name.startswith("test_"))
    return [name for name in names if callable(getattr(suite, name))]


def run(suite: Conformance, *, quick: bool = False) -> list[Outcome]:
    """Run every check of a suite and never raise for what a component does.

    quick: without the checks that are slow or need their author; and a component that refuses the kit's samples with a
        message, as a reward for charts refuses questions without one, is not checked rather than found wrong.
    """
    outcomes = []
    for name in checks_of(type(suite)):
        reasons = [reason for mark, reason in _LEFT_OUT.items() if quick and hasattr(getattr(suite, name), mark)]
        if reasons:
            outcomes.append(Outcome(name.removeprefix("test_"), "skipped", reasons[0]))
        else:
            outcomes.append(_run_check(suite, name, lenient=quick))
    return outcomes


_LEFT_OUT = {
    "slow": "takes long: left to the tests of the package",
    "opinionated": "depends on samples that suit it: left to the tests of the package",
}


def raise_failures(outcomes: Iterable[Outcome]) -> None:
    """Raise one ConformanceError that lists every check that failed; nothing if none did."""
    failed = [
        f"{outcome.check.replace('_', ' ')}: {outcome.message}" for outcome in outcomes if outcome.status == "failed"
    ]
    if failed:
        raise ConformanceError("\n".join(failed))


def _run_check(suite: Conformance, name: str, *, lenient: bool) -> Outcome:
    check = name.removeprefix("test_")
    try:
        getattr(suite, name)()
    except SkipTest as reason:
        return Outcome(check, "skipped", str(reason))
    except (UnsuitedError, DataError) as error:
        return Outcome(check, "skipped" if lenient else "failed", f"the samples do not suit it: {error}")
    except ConformanceError as error:
        return Outcome(check, "failed", str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever a component raises is its check's outcome
        return Outcome(check, "failed", describe(error))
    return Outcome(check, "passed")
