"""Write docs/config.md from the config models, so that the page cannot differ from the code.

uv run python docs/make_config.py
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from rllava_core.config import EngineSection, ModelSection, RewardSection, TaskSection, TrainingSection
from rllava_core.config.describing import keys_of
from rllava_core.engines.config import LocalRolloutConfig, LocalTrainConfig
from rllava_core.policy.config import ModelConfig

INTRODUCTION = """# Every key of a config

Written by `docs/make_config.py` from the code. A config has the sections `model`, `algorithm`, `task`, `engine` and
`training`; unknown keys are refused. A component is chosen by name, and its own options stand beside the name:
`algorithm: {name: NAME, option: value}`. `rllava plugins` lists the components; their options are in the README of
their package. Any key can be set on the command line: `training.steps=100`, `task.rewards.0.weight=0.5`.
"""

SECTIONS: list[tuple[str, type[BaseModel], str]] = [
    ("model", ModelSection, "The model family. Everything beside `adapter` belongs to it."),
    ("model (options that every adapter has)", ModelConfig, ""),
    ("task", TaskSection, ""),
    ("task.rewards (each entry)", RewardSection, "The reward's own options stand beside these."),
    ("engine", EngineSection, ""),
    ("engine.train: local", LocalTrainConfig, ""),
    ("engine.rollout: local", LocalRolloutConfig, ""),
    ("training", TrainingSection, ""),
]


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, model, note in SECTIONS:
        lines = [
            f"## {title}",
            "",
            *([note, ""] if note else []),
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for key in keys_of(model):
            default = "required" if key.default is None else f"`{key.default}`"
            lines.append(f"| `{key.name}` | {key.type} | {default} | {_cell(key.meaning)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (Path(__file__).parent / "config.md").write_text(page(), encoding="utf-8")
