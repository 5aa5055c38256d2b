"""A readable sample of trajectories: Markdown with the images beside it, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ContextSegment, Trajectory
from rllava_core.training.files import write_text, writing


def write_sample(directory: Path, step: int, trajectories: Sequence[Trajectory], groups: int = 4) -> Path:
    """`directory/step-NNNNNN.md`: the first `groups` groups, each with its images, answers, log-probs and rewards."""
    with writing(f"trajectory sample in {directory}"):
        (directory / "images").mkdir(parents=True, exist_ok=True)
        sections = [f"# Trajectories of step {step}\n"]
        for group in sorted({trajectory.group for trajectory in trajectories})[:groups]:
            members = [trajectory for trajectory in trajectories if trajectory.group == group]
            sections.append(_section(directory, members))
        path = directory / f"step-{step:06d}.md"
        write_text(path, "\n".join(sections))
    return path


def _section(directory: Path, members: Sequence[Trajectory]) -> str:
    first = members[0]
    lines = [f"## {first.name}\n"]
    lines += _shown(directory, first.prompt)
    if first.example is not None and first.example.answer is not None:
        lines.append(f"\nRight answer: {_code(first.example.answer)}")
    names = list(first.scores)
    lines.append("\n| answer | log-prob | ended | " + " | ".join([*names, "return"]) + " |")
    lines.append("|---" * (len(names) + 4) + "|")
    for trajectory in members:
        turns = " / ".join(_code(action.text) for action in trajectory.actions)
        cells = [
            turns,
            f"{trajectory.behaviour_logprobs.sum():.3f}",
            _ended(trajectory),
            *(f"{trajectory.scores[name]:g}" for name in names),
            f"{trajectory.episode_return:g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    longest = max(members, key=lambda trajectory: len(trajectory.turns))
    if len(longest.turns) > 1:
        lines.append(f"\nThe longest of these, turn by turn ({len(longest.turns)} turns):\n")
        for number, turn in enumerate(longest.turns):
            lines += _shown(directory, turn.observation) if number else []
            unparsed = "" if turn.parsed else ", which the environment could not read"
            lines.append(f"\nTurn {number + 1}: {_code(turn.action.text)}{unparsed}, reward {turn.reward:g}\n")
        if longest.outcome:
            lines += [f"![image]({_save(directory, image)})\n" for image in longest.outcome]
    return "\n".join(lines) + "\n"


def _shown(directory: Path, observation: ContextSegment) -> list[str]:
    images = [f"![image]({_save(directory, image)})\n" for image in observation.images]
    return images + [f"    {line}" for line in observation.text.splitlines()]


def _ended(trajectory: Trajectory) -> str:
    """How the episode ended, or whether its only answer was cut."""
    if trajectory.truncation is not None:
        return f"truncated ({trajectory.truncation})"
    return "yes" if trajectory.actions[-1].ended else "cut"


def _code(text: str) -> str:
    """Text as one line of Markdown code, also within a table. Letters of every script stay as they are."""
    escaped = "".join(
        character if character.isprintable() and character != "\\" else character.encode("unicode_escape").decode()
        for character in text
    )
    escaped = escaped.replace("`", "'").replace("|", "\\|")
    return f"`{escaped}`" if escaped else "(nothing)"


def _save(directory: Path, image: Image) -> str:
    name = f"images/{image.digest[:16]}.png"
    path = directory / name
    if not path.exists():
        image.to_pil().save(path)
    return name
