"""Is the image seen? A policy that does not see it is found out at the first evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rllava_core.errors import TrainingError
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Head
from rllava_core.testing.rollouts import Shown, choice_scripts, conversation_scripts, picture, play, tiny_policy
from rllava_core.testing.tiny import TinyAdapter
from rllava_core.training.sight import UNSEEN, probe, unseen


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic fault: features are computed, and what reaches the language model is not them."""
    own = TinyAdapter.collate
    monkeypatch.setattr(
        TinyAdapter,
        "collate",
        lambda self, features: {name: values * 0 for name, values in own(self, features).items()},
    )


def test_changes_are_those_of_the_log_probs() -> None:
    """Against one forward for each image in each place."""
    policy = tiny_policy()
    scripts = [(Shown((picture(8, 8, seed), "Digit?"), tuple("0123")),) for seed in range(3)]
    played = play(policy, scripts)
    others = [(Shown((picture(8, 8, (seed - 1) % 3), "Digit?"), tuple("0123")),) for seed in range(3)]
    chosen = [trajectory.actions[0].choice for trajectory in played]

    def table(asked: Sequence[Any]) -> Tensor:
        """The log-prob of what was chosen, with other images."""
        from rllava_core.policy.batch import BatchBuilder
        from rllava_core.testing.rollouts import request

        media = MediaStore(policy.adapter)
        found = []
        for script, choice in zip(asked, chosen, strict=True):
            wanted = request(policy.adapter, media, script[0])
            builder = BatchBuilder(policy.adapter, media)
            row = builder.add_context(wanted.context, "x")
            state = builder.add_choices(row, wanted.choices or ())
            batch = builder.build()
            found.append(policy.choice_logprobs(batch, policy.prefill(batch))[state][choice])
        return torch.stack(found)

    found = probe(policy, MediaStore(policy.adapter), played)

    with torch.no_grad():
        expected = (table(scripts) - table(others)).abs()
    assert found["image/swapped"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found["image/influence"] >= float(expected.max()) * 0.999
    assert found["image/blanked"] > 1e-3
    assert found["image/gradient_vision"] > 0
    assert unseen(found) is None


def test_a_gradient_is_measured_and_left_behind_nowhere() -> None:
    policy = tiny_policy()
    played = play(policy, choice_scripts())

    found = probe(policy, MediaStore(policy.adapter), played)

    assert all(parameter.grad is None for parameter in policy.parameters())
    weight = next(parameter for name, parameter in policy.model.named_parameters() if name == "vision.weight")
    bias = next(parameter for name, parameter in policy.model.named_parameters() if name == "vision.bias")
    from rllava_core.testing.rollouts import pack

    shown = [trajectory for trajectory in played if any(turn.observation.images for turn in trajectory.turns)]
    gradients = torch.autograd.grad(policy(pack(policy, shown)).logprobs.mean(), [weight, bias])
    norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    assert found["image/gradient_vision"] == pytest.approx(norm, rel=1e-4)


def test_a_frozen_vision_part_has_no_gradient_to_report() -> None:
    policy = tiny_policy()
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(not name.startswith("vision."))

    found = probe(policy, MediaStore(policy.adapter), play(policy, conversation_scripts()))

    assert "image/gradient_vision" not in found
    assert found["image/influence"] > UNSEEN


@pytest.mark.usefixtures("blind")
def test_a_blind_policy_is_found_out() -> None:
    policy = tiny_policy(heads={"q": Head(2)})

    found = probe(policy, MediaStore(policy.adapter), play(policy, conversation_scripts()))

    assert found["image/influence"] <= UNSEEN
    assert "no influence on the answers" in str(unseen(found))


def test_a_policy_that_sees_by_its_values_alone_is_not_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deep Q-learning acts by a head, and its language head may say anything."""
    policy = tiny_policy(heads={"q": Head(2)})
    played = play(policy, choice_scripts())
    monkeypatch.setattr(policy.model.lm_head, "weight", torch.nn.Parameter(policy.model.lm_head.weight * 0))

    found = probe(policy, MediaStore(policy.adapter), played)

    assert found["image/blanked"] == 0
    assert found["image/influence"] > UNSEEN


def test_what_is_no_number_is_not_called_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of another kind, which the training step names."""
    policy = tiny_policy()
    played = play(policy, choice_scripts())
    monkeypatch.setattr(policy.model.lm_head, "weight", torch.nn.Parameter(policy.model.lm_head.weight * torch.nan))

    found = probe(policy, MediaStore(policy.adapter), played)

    assert math.isnan(found["image/influence"])
    assert unseen(found) is None


def test_a_probe_is_computed_in_micro_batches() -> None:
    policy = tiny_policy()
    played = play(policy, choice_scripts(), group_size=2)
    sizes: list[int] = []
    policy.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].prefix_tokens.numel()))

    small = probe(policy, MediaStore(policy.adapter), played, micro_batch_tokens=30)
    most, _ = max(sizes), sizes.clear()
    large = probe(policy, MediaStore(policy.adapter), played)

    assert most <= 30 < max(sizes)
    for name in ("image/blanked", "image/influence"):
        assert small[name] == pytest.approx(large[name], abs=1e-5)


def test_text_alone_is_no_cause_for_alarm() -> None:
    policy = tiny_policy()
    played = play(policy, [(Shown(("Two and two?",)),)])

    found = probe(policy, MediaStore(policy.adapter), played)

    assert found == {}
    assert unseen(found) is None


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("what", ["warn", "stop", "ignore"])
def test_a_run_whose_images_are_not_seen(
    what: str, run_toy: Callable[..., dict[str, Any]], watcher: Any, logged: Callable[[], list[dict[str, Any]]]
) -> None:
    options = ["training.steps=2", "training.eval_every=1", f"training.unseen_images={what}"]
    if what == "stop":
        with pytest.raises(TrainingError, match=r"step 0: the images have no influence on the answers.*unseen_images"):
            run_toy(*options)
        return

    run_toy(*options)

    told = [warning for warning in watcher.warnings if "no influence" in warning]
    assert len(told) == (3 if what == "warn" else 0)
    assert ["image/influence" in line for line in logged()] == [what == "warn"] * 3
