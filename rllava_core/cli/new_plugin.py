"""`rllava new-plugin NAME --kind KIND`: the package of a plugin that works, to be changed into one's own.

What it writes is in the folder `templates`; the adapter of a new model starts from the conformance kit's own.
"""

from __future__ import annotations

import ast
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import click

from rllava_core.errors import ConfigError
from rllava_core.plugins import KIND_HOOKS, core_version, load_plugins
from rllava_core.specs import HOOK_API, KINDS, Kind

LONGEST_NAME = 60
"""Leaves room for what is put around it in the names of files."""

_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


@dataclass(frozen=True)
class Shape:
    """What differs between the kinds.

    module: the file of the component. suffix: of its class. capabilities: further lines of its spec.
    dependencies: what its modules import, beside the core.
    usage: how a config chooses it.
    """

    module: str
    suffix: str
    summary: str
    dependencies: tuple[str, ...]
    usage: str
    capabilities: str = ""


SHAPES: dict[Kind, Shape] = {
    "algorithm": Shape(
        "algorithm",
        "Algorithm",
        "REINFORCE with a leave-one-out baseline (arXiv:2402.14740).",
        ("pydantic", "torch"),
        "algorithm: {name: $component, group_size: 16}",
        'needs=frozenset({"train", "rollout", "logprobs"}),',
    ),
    "model": Shape(
        "adapter",
        "Adapter",
        "A vision-language model of a few thousand parameters.",
        ("numpy", "torch", "transformers"),
        "model: {adapter: $component, from_scratch: tiny}",
        'provides=frozenset({"heads"}),',
    ),
    "reward": Shape(
        "reward",
        "Reward",
        "1 for a short answer, less for a longer one.",
        ("pydantic",),
        "task:\n  rewards: [{name: exact_match}, {name: $component, weight: 0.1, words: 3}]",
    ),
    "engine": Shape(
        "engine",
        "Engine",
        "Samples from the policy in this process.",
        ("pydantic", "torch"),
        "engine: {rollout: {name: $component, requests: 16}}",
        'provides=frozenset({"rollout", "logprobs"}),',
    ),
    "environment": Shape(
        "environment",
        "Environment",
        "Which half of a picture is brighter?",
        ("numpy", "pydantic"),
        "task:\n  environment: {name: $component, contrast: 80}\ntraining: {eval_episodes: 100}",
        'provides=frozenset({"choices"}),',
    ),
    "dataset": Shape(
        "dataset",
        "Dataset",
        "Pictures of one colour: which is it?",
        ("numpy", "pydantic"),
        "task:\n  dataset: {name: $component, count: 400}\n  rewards: [{name: exact_match}]",
    ),
}


@click.command("new-plugin")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), required=True, help="What the plugin is to provide.")
@click.option(
    "--dir",
    "parent",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where to make the package's folder; default: here.",
)
def new_plugin(name: str, kind: Kind, parent: Path) -> None:
    """Write an installable package, rllava-NAME, with one small KIND that works, its options, a README and tests."""
    component = name.removeprefix("rllava-").removeprefix("rllava_")
    _check_name(name, component, kind)
    target = parent / f"rllava-{component.replace('_', '-')}"
    if target.exists():
        raise ConfigError(f"{target} exists already: choose another name or another --dir, nothing is overwritten")
    contents = render(component, kind)
    _check_classes(name, contents)
    _write(target, contents)
    click.echo(f"Wrote {target}: the {kind} {component!r}. Next:\n")
    click.echo(f"    cd {target}")
    click.echo("    pip install -e '.[test]'")
    click.echo(f"    rllava plugins check {component} --deep")
    click.echo("    pytest")


def render(component: str, kind: Kind) -> dict[str, str]:
    """The files of the package, by path."""
    shape = SHAPES[kind]
    package = f"rllava_{component.replace('-', '_')}"
    title = "".join(part.capitalize() for part in re.split(r"[_-]", component))
    running = core_version() or HOOK_API
    requirements = [f"rllava-core>={running},<{int(running.partition('.')[0]) + 1}", *shape.dependencies]
    values = {
        "component": component,
        "distribution": f"rllava-{component.replace('_', '-')}",
        "package": package,
        "kind": kind,
        "module": shape.module,
        "hook": KIND_HOOKS[kind],
        "class_name": title if title.endswith(shape.suffix) else f"{title}{shape.suffix}",
        "config_name": f"{title}Config",
        "summary": shape.summary,
        "dependencies": ", ".join(f'"{item}"' for item in sorted(requirements)),
        "usage": Template(shape.usage).substitute(component=component),
        "capabilities": f"\n            {shape.capabilities}" if shape.capabilities else "",
    }

    def filled(template: str) -> str:
        return Template(_read("templates", template)).substitute(values)

    source = f"src/{package}"
    own = _adapter(title, values) if kind == "model" else filled(f"{kind}/{shape.module}.py.txt")
    return {
        "pyproject.toml": filled("package/pyproject.toml.txt"),
        "README.md": filled("package/README.md.txt"),
        ".gitignore": filled("package/gitignore.txt"),
        f"{source}/__init__.py": filled("package/init.py.txt"),
        f"{source}/py.typed": "",
        f"{source}/plugin.py": filled("package/plugin.py.txt"),
        f"{source}/config.py": filled(f"{kind}/config.py.txt"),
        f"{source}/{shape.module}.py": own,
        f"tests/test_{component.replace('-', '_')}.py": filled(f"{kind}/test.py.txt"),
    }


def _adapter(title: str, values: dict[str, str]) -> str:
    """The kit's own adapter under the new name: one that is known to keep the contract."""
    source = _read("testing", "tiny.py")
    source = source.replace(
        "from rllava_core.policy.config import ModelConfig", "from $package.config import $config_name"
    )
    source = source.replace("ModelConfig", "$config_name")
    source = source.replace("TinyAdapter", "$class_name").replace("Tiny", title)
    return Template(source).substitute(values)


def _read(folder: str, path: str) -> str:
    return files("rllava_core").joinpath(folder, *path.split("/")).read_text(encoding="utf-8")


def _check_name(name: str, component: str, kind: Kind) -> None:
    if not _NAME.fullmatch(component) or len(component) > LONGEST_NAME:
        raise ConfigError(
            f"{name!r} is no name for a plugin: use lower-case letters, digits, '-' and '_', beginning with a letter, "
            f"such as 'short-answers', and at most {LONGEST_NAME} characters"
        )
    if component == "core":
        raise ConfigError("'rllava-core' is the core itself: choose another name")
    distribution = f"rllava-{component.replace('_', '-')}"
    for other in load_plugins(strict=False).components(kind):
        if other.spec.name == component and other.distribution != distribution:
            raise ConfigError(f"{other.distribution} provides a {kind} {component!r} already: choose another name")


def _check_classes(name: str, contents: dict[str, str]) -> None:
    """Refuse a name whose classes would hide something that their modules import."""
    for path, text in contents.items():
        if not path.endswith(".py"):
            continue
        tree = ast.parse(text)
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        if imported & defined:
            clash = sorted(imported & defined)[0]
            raise ConfigError(
                f"{name!r} is no name for this plugin: its class {clash!r} would hide one that it imports"
            )


def _write(target: Path, contents: dict[str, str]) -> None:
    """Write all files, or none: in a folder beside the target, which is renamed at the end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            temporary.chmod(0o755)
            for path, text in contents.items():
                file = temporary / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}") from None
