"""PPO through the engine that trains, on what the tiny policy played."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rllava_core.config import TrainingSection
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.local_train import LocalTrainEngine
from rllava_core.engines.protocol import TrainSetup
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.testing.rollouts import choice_scripts, conversation_scripts, play, text_scripts, tiny_policy
from rllava_ppo.algorithm import PPO


def engine(algorithm: PPO, **training: Any) -> LocalTrainEngine:
    plain = tiny_policy()
    policy = Policy(plain.adapter, plain.model, algorithm.heads, plain.temperature, copy.deepcopy(plain.model)).eval()
    section = TrainingSection(steps=1, **{"max_grad_norm": None, **training})
    return LocalTrainEngine(LocalTrainConfig(device="cpu"), TrainSetup(policy, {}, MediaStore(policy.adapter), section))


def played() -> list[Trajectory]:
    """Texts, choices and conversations, one of them truncated."""
    return play(tiny_policy(), [*text_scripts(), *conversation_scripts(), *choice_scripts()], group_size=2)


def first_ratios(
    algorithm: PPO, trainer: LocalTrainEngine, trajectories: list[Trajectory], rate: float
) -> torch.Tensor:
    """Of every decision of the first pass."""
    ratios: list[torch.Tensor] = []
    for batch in algorithm.prepare(trajectories, trainer):

        def spy(micro: Any, output: Any) -> Any:
            ratios.append((output.logprobs.detach() - micro.old_logprobs).exp())
            return algorithm.loss(micro, output)

        trainer.step(batch, spy, rate)
    return torch.cat(ratios)


@pytest.mark.parametrize("tokens", [10**6, 60, 1])
def test_the_ratio_of_the_first_step_is_exactly_one(bench: Any, tokens: int) -> None:
    """Though the log-probs that were recorded while sampling differ in their last digits."""
    trajectories = played()
    assert any(trajectory.truncated for trajectory in trajectories)
    algorithm = bench.algorithm()
    ratios = first_ratios(algorithm, engine(algorithm, micro_batch_tokens=tokens), trajectories, 1e-3)
    assert len(ratios) == sum(trajectory.decisions for trajectory in trajectories)
    assert torch.equal(ratios, torch.ones_like(ratios))
    assert not torch.equal(ratios, (ratios.log() + recorded(trajectories, algorithm)).exp())


def recorded(trajectories: list[Trajectory], algorithm: PPO) -> torch.Tensor:
    """[D] by how much the log-probs recorded while sampling differ from those that the trainer computes."""
    sampled = torch.cat([torch.from_numpy(trajectory.behaviour_logprobs) for trajectory in trajectories])
    return engine(algorithm).evaluate(trajectories).logprobs - sampled


def test_the_ratios_of_a_first_pass_in_minibatches_are_one_while_nothing_moves(bench: Any) -> None:
    """To the last digits of float32: minibatches are packed otherwise than the whole."""
    algorithm = bench.algorithm(minibatches=4)
    ratios = first_ratios(algorithm, engine(algorithm), played(), 0.0)
    torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=0, atol=3e-6)


def slopes(policy: Policy) -> dict[str, bool]:
    """Which weights have a gradient."""
    return {
        name: parameter.grad is not None and bool(parameter.grad.any()) for name, parameter in policy.named_parameters()
    }


def one_step(algorithm: PPO) -> LocalTrainEngine:
    trainer = engine(algorithm)
    [batch] = algorithm.prepare(played(), trainer)
    trainer.step(batch, algorithm.loss, 1e-3)
    return trainer


def loss_of(part: str) -> type[PPO]:
    """PPO that learns its policy alone, or its values alone."""

    class Part(PPO):
        def token_loss(self, batch: Any, output: Any) -> torch.Tensor:
            if part == "value":
                return batch.value_weights * self._value_loss(batch, output)
            return -(output.logprobs - batch.old_logprobs).exp() * batch.advantages

    return Part


@pytest.mark.parametrize("part", ["policy", "value"])
def test_a_separate_critic_and_the_policy_have_no_weights_in_common(bench: Any, part: str) -> None:
    algorithm = loss_of(part)(bench.algorithm(critic="separate").config)
    found = slopes(one_step(algorithm).policy)
    of_critic = {name for name in found if name.startswith(("trunk", "heads"))}
    assert of_critic, sorted(found)
    moved = {name for name, slope in found.items() if slope}
    assert moved
    assert moved <= of_critic if part == "value" else not moved & of_critic


def test_a_shared_critic_moves_what_the_policy_reads(bench: Any) -> None:
    algorithm = loss_of("value")(bench.algorithm().config)
    moved = {name for name, slope in slopes(one_step(algorithm).policy).items() if slope}
    assert any(name.startswith("heads") for name in moved)
    assert any(name.startswith("model") for name in moved)
    assert not any("lm_head" in name for name in moved)


def test_values_learn_the_return(bench: Any) -> None:
    """With a policy that is left alone, the critic comes to foresee what is rewarded."""
    algorithm = loss_of("value")(bench.algorithm(epochs=60, gamma=1.0, lam=1.0).config)
    trainer = engine(algorithm, max_grad_norm=1.0)
    trajectories = played()
    for batch in algorithm.prepare(trajectories, trainer):
        trainer.step(batch, algorithm.loss, 3e-3)
    before = algorithm.report()["value/explained_variance"]
    next(iter(algorithm.prepare(trajectories, trainer)))
    assert algorithm.report()["value/explained_variance"] > max(before, 0) + 0.3
