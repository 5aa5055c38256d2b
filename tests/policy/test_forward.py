"""A batch gives what each trajectory would give alone: log-probs, entropies, heads and gradients."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Trajectory
from rllava_core.policy.batch import PolicyBatch
from rllava_core.policy.policy import Head, Policy, PolicyOutput
from rllava_core.testing.rollouts import final_heads
from rllava_core.testing.tiny import END, VOCABULARY

EXACT = {"rtol": 0.0, "atol": 1e-10}


def coefficients(count: int, stream: int) -> Tensor:
    """Fixed random weights, so that a loss tells every decision from every other."""
    return torch.randn(count, generator=torch.Generator().manual_seed(stream), dtype=torch.float64)


def weighted_sum(logprobs: Tensor, entropies: Tensor, heads: Tensor) -> Tensor:
    """A loss that depends on everything that the policy returns."""
    count = len(logprobs)
    return (
        (coefficients(count, 1) * logprobs).sum()
        + (coefficients(count, 2) * entropies).sum()
        + (coefficients(count, 3)[:, None] * heads).sum()
    )


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    """By parameter, the gradient of a loss."""
    named = dict(policy.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(named.items(), found, strict=True)
    }


LAYOUTS = {
    "with a cache": {},
    "packed": {"packed": True},
    "nothing shared": {"packed": True, "shared": False},
}


@pytest.mark.parametrize("trees", [True, False], ids=["trees", "rows"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_batch_equals_its_trajectories_one_by_one(
    toy: Any, situation: list[Trajectory], temperature: float, layout: dict[str, bool], trees: bool
) -> None:
    """Also for a model that takes no trees, which is never given a mask of four dimensions."""
    policy = toy.policy(temperature, heads={"value": Head(2)})
    policy.adapter.takes_trees = trees
    plain = toy.Plain(policy.model, temperature)
    alone = [plain.decisions(trajectory) for trajectory in situation]
    logprobs = torch.cat([decisions.logprobs for decisions in alone])
    entropies = torch.cat([decisions.entropies for decisions in alone])
    states = torch.cat([decisions.states for decisions in alone])
    values = states @ policy.heads["value"].weight.T + policy.heads["value"].bias

    output = policy(toy.pack(policy, situation, **layout))

    torch.testing.assert_close(output.logprobs, logprobs, **EXACT)
    torch.testing.assert_close(output.entropies, entropies, **EXACT)
    torch.testing.assert_close(output.heads["value"], values, **EXACT)
    expected = gradients(policy, weighted_sum(logprobs, entropies, values))
    found = gradients(policy, weighted_sum(output.logprobs, output.entropies, output.heads["value"]))
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name] / scale, gradient / scale, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "vision" not in name)


def test_a_packed_prefix_with_many_continuations_is_read_more_than_once(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than put them all into one row, in which each token would look past all the others."""
    monkeypatch.setattr("rllava_core.policy.batch.ROOM", 20)
    question = toy.context("Which of these? ", toy.picture(8, 8))
    answers = [f"answer {number}" for number in range(12)]
    trajectories = [toy.episode(question, toy.text(answer)) for answer in [*answers, *answers[:3]]]
    trajectories += [toy.episode(question, toy.choice(number, "yes", "no", "or not")) for number in range(2)]
    policy = toy.policy(heads={"value": Head(2)})
    packed = toy.pack(policy, trajectories, packed=True)

    found, expected = policy(packed), policy(toy.pack(policy, trajectories))

    room = 2 * len(question.tokens)
    assert 1 < len(packed.tree_tokens) <= 1 + sum(map(len, answers)) // (room // 2)
    assert packed.tree_tokens.shape[1] <= len(question.tokens) + room
    for ours, theirs in zip(
        (found.logprobs, found.heads["value"]), (expected.logprobs, expected.heads["value"]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


def left(toy: Any, policy: Policy, situation: list[Trajectory], head: str) -> Tensor:
    """[N, size] of the states that episodes were left in; zeros where they were not."""
    plain = toy.Plain(policy.model)
    layer = policy.heads[head]
    rows = [layer(plain.left(item.final)) if item.final else torch.zeros_like(layer.bias) for item in situation]
    return torch.stack(rows)


def test_the_heads_at_the_end_of_contexts(toy: Any, situation: list[Trajectory]) -> None:
    """As in the states that episodes were left in."""
    policy = toy.policy(heads={"value": Head(2), "q": Head(3)})

    found = final_heads(policy, situation)

    assert set(found) == {"value", "q"}
    for name, values in found.items():
        torch.testing.assert_close(values, left(toy, policy, situation, name), **EXACT)


def test_a_separate_critic_reads_its_own_states(toy: Any, mixed: list[Trajectory]) -> None:
    """A gradient of its values leaves the policy alone, and the other way round."""
    heads = {"value": Head(2, own_trunk=True), "q": Head(1)}
    policy = toy.policy(heads=heads, trunk_seed=7)
    assert policy.trunk is not None
    plain, critic = toy.Plain(policy.model), toy.Plain(policy.trunk)

    output = policy(toy.pack(policy, mixed))

    decisions = [plain.decisions(item) for item in mixed]
    states = torch.cat([critic.decisions(item).states for item in mixed])
    torch.testing.assert_close(output.logprobs, torch.cat([item.logprobs for item in decisions]), **EXACT)
    torch.testing.assert_close(output.heads["value"], policy.heads["value"](states), **EXACT)
    own = torch.cat([item.states for item in decisions])
    torch.testing.assert_close(output.heads["q"], policy.heads["q"](own), **EXACT)
    final = [policy.heads["value"](critic.left(item.final)) for item in mixed if item.final]
    found = final_heads(policy, mixed)["value"]
    torch.testing.assert_close(found[[bool(item.final) for item in mixed]], torch.stack(final), **EXACT)
    of_values = gradients(policy, output.heads["value"].sum())
    of_actions = gradients(policy, output.logprobs.sum() + output.heads["q"].sum())
    for name in of_values:
        part = name.split(".")[0]
        assert bool(of_values[name].any()) <= (part == "trunk" or name.startswith("heads.value")), name
        assert bool(of_actions[name].any()) <= (part == "model" or name.startswith("heads.q")), name
    assert of_values["trunk.backbone.embed_tokens.weight"].any()


def test_the_order_of_trajectories_changes_nothing_else(toy: Any, mixed: list[Trajectory]) -> None:
    policy = toy.policy()
    forward, backward = policy(toy.pack(policy, mixed)), policy(toy.pack(policy, mixed[::-1]))

    ends = torch.tensor([trajectory.decisions for trajectory in mixed[::-1]]).tolist()
    for one, other in ((forward.logprobs, backward.logprobs), (forward.entropies, backward.entropies)):
        torch.testing.assert_close(torch.cat(other.split(ends)[::-1]), one, **EXACT)


def test_a_model_in_half_precision_gives_float32_results(toy: Any, mixed: list[Trajectory]) -> None:
    policy = toy.policy(heads={"value": Head(1)}, precision=torch.bfloat16)
    output: PolicyOutput = policy(toy.pack(policy, mixed))
    exact = toy.policy().model
    exact.load_state_dict({name: values.double() for name, values in policy.model.state_dict().items()})
    expected = torch.cat([toy.Plain(exact).decisions(trajectory).logprobs for trajectory in mixed])

    assert output.logprobs.dtype == output.entropies.dtype == output.heads["value"].dtype == torch.float32
    assert (output.logprobs - expected).abs().mean() < 0.05


def scrambled(batch: PolicyBatch) -> PolicyBatch:
    """The same batch with other ids and positions where the padding is."""
    generator = torch.Generator().manual_seed(5)

    def fill(values: Tensor, mask: Tensor, limit: int) -> Tensor:
        return torch.where(mask.bool(), values, torch.randint(0, limit, values.shape, generator=generator))

    return replace(
        batch,
        prefix_tokens=fill(batch.prefix_tokens, batch.prefix_mask, 256),
        prefix_positions=fill(batch.prefix_positions, batch.prefix_mask.expand_as(batch.prefix_positions), 90),
        tree_tokens=fill(batch.tree_tokens, batch.tree_mask, 256),
        tree_positions=fill(batch.tree_positions, batch.tree_mask.expand_as(batch.tree_positions), 90),
    )


def test_padding_has_no_influence_and_gets_no_gradient(toy: Any, mixed: list[Trajectory]) -> None:
    policy = toy.policy(heads={"value": Head(1)})
    batch = toy.pack(policy, mixed)
    assert (batch.prefix_mask == 0).any()
    assert (batch.tree_mask == 0).any()

    results = []
    for version in (batch, scrambled(batch)):
        output = policy(version)
        loss = weighted_sum(output.logprobs, output.entropies, output.heads["value"])
        results.append((output, gradients(policy, loss)))

    (plain, expected), (other, found) = results
    assert torch.equal(other.logprobs, plain.logprobs)
    assert torch.equal(other.entropies, plain.entropies)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


def test_the_padding_token_is_never_learnt(toy: Any) -> None:
    """Its embedding would be pulled if padding took part. (PAD would prove nothing: the embedding itself skips it.)"""
    policy = toy.policy()
    policy.adapter.pad_token = ord("#")
    trajectories = [
        toy.episode(toy.context("A prompt of some length"), toy.text("a long answer")),
        toy.episode(toy.context("?"), toy.text("no"), toy.context("?"), toy.text("o")),
    ]
    batch = toy.pack(policy, trajectories)
    assert (batch.prefix_tokens == ord("#")).any()
    assert (batch.tree_tokens == ord("#")).any()

    embedding = gradients(policy, policy(batch).logprobs.sum())["model.backbone.embed_tokens.weight"]

    assert embedding[ord("#")].abs().max() == 0
    assert embedding[ord("?")].abs().max() > 0


def states_of(trajectories: list[Trajectory]) -> dict[tuple[Any, ...], list[int]]:
    """The tokens that were sampled in each distinct state: all tokens and images before."""
    states = defaultdict(list)
    for turn in (turn for trajectory in trajectories for turn in trajectory.turns):
        tokens = tuple(token for segment in turn.context for token in segment.tokens)
        images = tuple(
            image for segment in turn.context if isinstance(segment, ContextSegment) for image in segment.images
        )
        for token in turn.action.tokens:
            states[tokens, images].append(token)
            tokens += (token,)
    return states


def test_only_states_of_decisions_reach_the_language_head_and_get_gradient(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d(sum of log-probs)/d(logits) is one-hot minus softmax at every decision, and there is nothing else."""
    prompt = toy.context("Find the key.", toy.picture(8, 8))
    shown = toy.context(toy.picture(12, 8, 1), "closer")
    trajectories = [
        toy.episode(prompt, toy.text("left"), shown, toy.text("on")),
        toy.episode(prompt, toy.text("left"), shown, toy.text("off")),
        toy.episode(prompt, toy.text("lift")),
        toy.episode(toy.context("?"), toy.text("go")),
    ]
    temperature = 0.8
    policy = toy.policy(temperature)
    plain = toy.Plain(policy.model, temperature)
    logits: list[Tensor] = []
    # The gradient of a plain linear layer is written out, and has no logits of autograd's.
    monkeypatch.setattr(policy.adapter, "lm_head", lambda model: nn.Sequential(model.lm_head))
    policy.model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))

    sum_of_logprobs = policy(toy.pack(policy, trajectories)).logprobs.sum()
    (gradient,) = torch.autograd.grad(sum_of_logprobs, logits)
    [seen] = logits

    states = states_of(trajectories)
    assert len(seen) <= sum(trajectory.decisions for trajectory in trajectories)
    unexplained = set(range(len(seen)))
    for (tokens, images), sampled in states.items():
        table, hidden = plain.next_token(tokens, images)
        expected = -len(sampled) * table[-1].exp()
        for token in sampled:
            expected[token] += 1
        # Answers that begin alike pass through the same state in branches of their own.
        rows = ((seen - policy.model.lm_head(hidden[-1])).abs().amax(1) < 1e-10).nonzero()[:, 0]
        torch.testing.assert_close(gradient[rows].sum(0), expected.detach() / temperature, **EXACT)
        unexplained -= set(rows.tolist())
    assert not unexplained


def test_tokens_that_may_not_be_sampled_have_no_share_of_the_probability(toy: Any) -> None:
    policy = toy.policy()
    policy.forbidden[ord("a")] = True
    allowed = [token for token in range(256) if token != ord("a")] + [END]
    actions = [ActionSegment((token,), np.full(1, -1, np.float32), "") for token in allowed]
    trajectories = [toy.episode(toy.context("?"), action) for action in actions]

    output = policy(toy.pack(policy, trajectories))

    torch.testing.assert_close(output.logprobs.exp().sum(), torch.tensor(1.0, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(output.entropies[0], -(output.logprobs.exp() * output.logprobs).sum(), **EXACT)


def test_an_unlikely_state_has_finite_gradients_of_its_entropy(toy: Any) -> None:
    """0 · log 0 must not become NaN, in choices or in text."""
    policy = toy.policy(bias={ord("y"): 2000.0, END: -2000.0})
    trajectories = [
        toy.episode(toy.context("?"), toy.text("y")),
        toy.episode(toy.context("?"), toy.choice(0, "y", "n", "nn")),
    ]

    output = policy(toy.pack(policy, trajectories))
    found = gradients(policy, output.entropies.sum())

    assert torch.isfinite(output.entropies).all()
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_a_prompt_is_computed_once_for_its_group_and_a_picture_once_for_its_prompt(toy: Any) -> None:
    policy = toy.policy()
    prompt, other = toy.context("Colour?", toy.picture(8, 8)), toy.context("?", toy.picture(4, 8, 1))
    trajectories = [toy.episode(prompt, toy.text(answer)) for answer in ("red", "blue", "red", "green")]
    trajectories.append(toy.episode(other, toy.text("no")))

    policy(toy.pack(policy, trajectories))

    width = len(prompt.tokens)
    # Two prompts with 4 and 2 patches; then four distinct answers, those of one prompt in one row. The last token of an
    # answer, its end of turn, is only predicted.
    assert policy.adapter.runs == [((2, width), 6), ((2, len("red" + "blue" + "green")), 0)]


def test_turns_that_see_all_before_them_are_read_once(toy: Any) -> None:
    policy = toy.policy()
    prompt, closer = toy.context("Colour?", toy.picture(8, 8)), toy.context("And?", toy.picture(4, 8, 1))
    episode = toy.episode(prompt, toy.text("red"), closer, toy.text("no"), closer, toy.text("go"))

    policy(toy.pack(policy, [episode, episode]))

    length = len("red") + len("no") + len("go") + 2 + 2 * len(closer.tokens)
    assert policy.adapter.runs == [((1, len(prompt.tokens)), 4), ((1, length), 4)]


def test_windows_that_are_equal_are_read_once(toy: Any) -> None:
    policy = toy.policy()
    shown = [toy.context(f"{number}?", toy.picture(8, 8, number)) for number in range(3)]
    one = toy.windows(*((item, toy.text("on")) for item in shown))
    other = toy.windows((shown[0], toy.text("up")), (shown[1], toy.text("on")), (shown[0], toy.text("on")))

    policy(toy.pack(policy, [one, other]))

    # Three observations, and four distinct pairs of one and an answer, two of them in the row of their observation.
    assert policy.adapter.runs == [((3, len(shown[0].tokens)), 12), ((3, 4), 0)]


def test_choices_of_one_token_cost_nothing_beyond_the_prompt(toy: Any) -> None:
    policy = toy.policy()
    prompt = toy.context("Digit?", toy.picture(8, 8))

    policy(toy.pack(policy, [toy.episode(prompt, toy.choice(index, *"0123456789")) for index in (3, 7, 3)]))

    assert policy.adapter.runs == [((1, len(prompt.tokens)), 4)]


def test_answers_share_a_row_only_while_it_is_no_longer_than_their_prompt(toy: Any) -> None:
    policy = toy.policy()
    prompt = toy.context("Why?")
    answers = ["r" * len(prompt.tokens), "no", "go", "a" * (len(prompt.tokens) - 3)]

    policy(toy.pack(policy, [toy.episode(prompt, toy.text(answer)) for answer in answers]))

    width = len(prompt.tokens)
    assert policy.adapter.runs == [((1, width), 0), ((3, width), 0)]


def test_a_longer_choice_costs_a_branch_of_all_but_its_last_token(toy: Any) -> None:
    policy = toy.policy()
    prompt = toy.context("Colour?")

    policy(toy.pack(policy, [toy.episode(prompt, toy.choice(index, "red", "x", "green")) for index in (0, 1, 0)]))

    assert policy.adapter.runs == [((1, len(prompt.tokens)), 0), ((1, len("re" + "gree")), 0)]


def test_the_vocabulary_of_the_language_head_is_what_is_scored(toy: Any) -> None:
    assert toy.policy().forbidden.shape == (VOCABULARY,)
