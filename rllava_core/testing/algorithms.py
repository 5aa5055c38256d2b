"""The conformance suite of algorithms: trained for single steps on the tiny policy, on trajectories that it sampled."""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from unittest import SkipTest

import torch
from torch import Tensor

from rllava_core.algorithms.protocol import Algorithm, Batch, Loss
from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.policy import Head, PolicyOutput
from rllava_core.testing.algorithms_base import AlgorithmSuite, Update, leaves_of
from rllava_core.testing.conformance import raise_failures, require, run, slow
from rllava_core.testing.rollouts import (
    Script,
    Shown,
    choice_scripts,
    conversation_scripts,
    demonstrate,
    pack,
    picture,
    play,
    text_scripts,
    with_scores,
)
from rllava_core.training.seeds import seed_everything
from rllava_core.training.storage import load_tree, save_tree

TAKEN_PREFIXES = ("reward/", "rollout/", "eval/", "time/")
TAKEN_NAMES = ("policy/grad_norm", "policy/learning_rate", "policy/updates", "policy/logprob_gap")

RELATIVE = 1e-4
"""Float32 sums in another order differ by about 1e-6 of their largest terms, and a few layers make of it 1e-5 at most;
a loss that is normalised by the micro-batch is wrong by a whole factor."""


class AlgorithmConformance(AlgorithmSuite):
    """Checks of an algorithm. What an author may override:

    needs: what the environment must provide, for an algorithm without a spec; with `choices` in it, only
        trajectories of choices are tried.
    groups: groups of `group_size` trajectories in a step.
    learns: whether a few dozen steps of the algorithm must raise the probability of the rewarded one of three
        choices. False for one that does not change the policy's distribution (a critic alone), or needs longer.
    learning_rate, learning_steps: of that check.
    """

    def test_it_says_what_the_loop_must_provide(self) -> None:
        algorithm = self.create()
        for name in ("experience", "group_size", "heads", "copies", "behaviour", "report"):
            require(hasattr(algorithm, name), f"the algorithm has no attribute {name!r}, which the loop reads")
        require(
            algorithm.experience in ("rollouts", "demonstrations"),
            f"experience is {algorithm.experience!r}; expected 'rollouts' or 'demonstrations'",
        )
        size = algorithm.group_size
        require(
            type(size) is int and size >= 1, f"group_size is {size!r}; expected the number of trajectories, at least 1"
        )
        heads = algorithm.heads
        require(
            isinstance(heads, Mapping)
            and all(isinstance(name, str) and isinstance(head, Head) for name, head in heads.items())
            and all(head.size == "choices" or (type(head.size) is int and head.size >= 1) for head in heads.values()),
            f"heads is {heads!r}; expected a mapping of names to Head(size), the size positive or 'choices'",
        )
        copies = algorithm.copies
        require(
            not isinstance(copies, str) and all(isinstance(name, str) for name in copies),
            f"copies is {copies!r}; expected a sequence of names, such as ('reference',)",
        )
        behaviour = algorithm.behaviour()
        require(
            isinstance(behaviour, Behaviour),
            f"behaviour() returned {type(behaviour).__name__}; expected a Behaviour",
        )
        require(0 <= behaviour.epsilon <= 1, f"behaviour() has epsilon {behaviour.epsilon}; expected a probability")

    def test_every_head_that_it_declares_learns(self) -> None:
        algorithm = self.create()
        if not algorithm.heads:
            raise SkipTest("the algorithm declares no heads")
        updates = self.update(algorithm, self.engine(algorithm), self.trajectories(algorithm))
        for head in algorithm.heads:
            moved = any(bool(update.gradients[f"heads.{head}.weight"].any()) for update in updates)
            require(moved, f"the head {head!r} is declared but its weights get no gradient, so it would stay random")

    def test_the_copies_that_are_asked_for_are_those_declared(self) -> None:
        algorithm = self.create()
        engine = self.engine(algorithm)
        asked: set[str] = set()
        answer = engine.evaluate

        def spy(trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
            asked.update([] if copy is None else [copy])
            return answer(trajectories, copy if copy in algorithm.copies else None)

        engine.evaluate = spy  # type: ignore[method-assign]
        self.update(algorithm, engine, self.trajectories(algorithm))
        undeclared, idle = sorted(asked - set(algorithm.copies)), sorted(set(algorithm.copies) - asked)
        require(not undeclared, f"copies {undeclared} of the policy are asked for, and not in `copies`: there are none")
        require(not idle, f"copies {idle} of the policy are declared, and not asked for: memory for nothing")

    def test_batches_hold_whole_known_turns_and_finite_columns(self) -> None:
        algorithm = self.create()
        trajectories = self.trajectories(algorithm)
        known = {id(action) for trajectory in trajectories for action in trajectory.actions}
        for number, update in enumerate(self.update(algorithm, self.engine(algorithm), trajectories), start=1):
            batch = update.batch
            require(isinstance(batch, Batch), f"prepare() yielded {type(batch).__name__}; expected Batch")
            require(batch.trajectories, f"batch {number} holds no trajectory")
            strangers = [
                item.name for item in batch.trajectories if any(id(action) not in known for action in item.actions)
            ]
            require(
                not strangers,
                f"batch {number} holds actions of {', '.join(strangers[:3])} that prepare() was not given, or parts of "
                "such: a trajectory may hold some turns of an episode, each as it was",
            )
            for name, column in batch.columns.items():
                where = f"column {name!r} of batch {number}"
                require(not column.requires_grad, f"{where} carries a gradient: detach what prepare() computes")
                require(torch.isfinite(column).all(), f"{where} is not finite: {column}")

    def test_the_loss_is_a_finite_scalar_with_a_gradient(self) -> None:
        algorithm = self.create()
        results = self.losses(algorithm)
        for result in results:
            require(isinstance(result, Loss), f"loss() returned {type(result).__name__}; expected Loss")
            total = result.total
            require(total.shape == (), f"the total of the loss has shape {tuple(total.shape)}; expected a scalar")
            require(torch.isfinite(total), f"the total of the loss is {total.item()}")
            require(total.requires_grad, "the total of the loss has no gradient: it was detached, or reads no output")
        updates = self.update(algorithm, self.engine(algorithm), self.trajectories(algorithm))
        moved = any(bool(gradient.any()) for update in updates for gradient in update.gradients.values())
        require(moved, "the gradient is zero for returns that differ within every group, so nothing is learnt")

    def test_metrics_are_finite_scalars_with_names_of_their_own(self) -> None:
        for result in self.losses(self.create()):
            for name, value in result.metrics.items():
                require(
                    re.fullmatch(r"[\w-]+(/[\w-]+)+", name),
                    f"a metric is named {name!r}; expected a flat key with a group, such as 'policy/entropy'",
                )
                require(
                    not name.startswith(TAKEN_PREFIXES) and name not in TAKEN_NAMES,
                    f"the loop reports a metric of its own as {name!r}; choose another name",
                )
                require(
                    isinstance(value, Tensor) and value.shape == (),
                    f"metric {name!r} is {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}; "
                    "expected a scalar tensor",
                )
                require(torch.isfinite(value), f"metric {name!r} is {value.item()}")
                require(not value.requires_grad, f"metric {name!r} keeps the graph of the whole forward: detach it")

    def test_what_it_reports_are_finite_numbers_with_names_of_their_own(self) -> None:
        algorithm = self.create()
        self.updates(algorithm)
        for name, value in algorithm.report().items():
            require(
                isinstance(name, str) and re.fullmatch(r"[\w-]+(/[\w-]+)+", name),
                f"report() names a metric {name!r}; expected a flat key with a group, such as 'value/error'",
            )
            taken = name.startswith(TAKEN_PREFIXES) or name in TAKEN_NAMES
            require(not taken, f"the loop reports a metric of its own as {name!r}; choose another name")
            require(
                isinstance(value, int | float) and math.isfinite(value),
                f"report() gives {name!r} as {value!r}; expected a finite number",
            )

    def test_it_learns_from_texts(self) -> None:
        self.require_sound(text_scripts(), text=True)

    def test_it_learns_from_choices(self) -> None:
        self.require_sound(choice_scripts())

    def test_it_learns_from_several_turns(self) -> None:
        if "choices" not in self.required():
            self.require_sound(conversation_scripts(), text=True)
        self.require_sound(conversation_scripts(choices=True))

    def test_every_turn_is_learnt_from(self) -> None:
        algorithm = self.create()
        engine = self.engine(algorithm)
        trajectories = self.trajectories(algorithm, conversation_scripts(choices="choices" in self.required()))
        turns = max(len(trajectory.actions) for trajectory in trajectories)
        # A batch may hold single turns of an episode.
        turn_of = {id(action): turn for item in trajectories for turn, action in enumerate(item.actions, start=1)}
        learnt: set[int] = set()
        seed_everything(0)
        for batch in self.batches(algorithm, trajectories, engine):
            output = leaves_of(engine.policy(pack(engine.policy, batch.trajectories)))
            algorithm.loss(batch.to(engine.policy.device), output).total.backward()
            places = [
                turn_of[id(action)]
                for trajectory in batch.trajectories
                for action in trajectory.actions
                for _ in range(action.decisions)
            ]
            for values in (output.logprobs, *output.heads.values()):
                if values.grad is not None:
                    moved = values.grad.reshape(len(places), -1).any(dim=1)
                    learnt |= {turn for turn, found in zip(places, moved.tolist(), strict=True) if found}
        missing = sorted(set(range(1, turns + 1)) - learnt)
        require(not missing, f"no decision of turns {missing} of {turns} has a gradient: agents learn from every turn")

    def test_it_learns_from_texts_and_choices_in_one_batch(self) -> None:
        self.require_sound([*text_scripts(), *choice_scripts(), *conversation_scripts()], text=True)

    def test_one_group_alone_is_enough(self) -> None:
        """A run may sample one prompt a step."""
        self.require_sound(choice_scripts()[1:2])

    def test_equal_returns_do_no_harm(self) -> None:
        """A group that is all right or all wrong has no variance to divide by."""
        for score in (0.0, 1.0, 0.1):
            self.require_sound(scores=[score])

    def test_returns_of_any_scale_do_no_harm(self) -> None:
        for scores in ([1e6, -3e5, 7.0], [1e-6, 3e-6, 0.0], [-1e4, -1e4 + 1, -1e4]):
            self.require_sound(scores=scores)

    def test_the_cut_into_micro_batches_changes_nothing(self) -> None:
        results = []
        for tokens in (10**6, 60, 1):
            algorithm = self.create()
            engine = self.engine(algorithm, micro_batch_tokens=tokens)
            # A learning rate of zero: AdamW would make large differences of small ones, batch by batch.
            results.append((tokens, self.update(algorithm, engine, self.trajectories(algorithm), rate=0.0)))
        (_, expected), *others = results
        for tokens, found in others:
            for whole, cut in zip(expected, found, strict=True):
                difference = _distance(whole.gradients, cut.gradients)
                require(
                    difference <= RELATIVE,
                    f"micro-batches of {tokens} tokens change the gradient by {difference:.2g} of its norm: a loss "
                    "must be a sum over decisions, whose normalisation is a column made by prepare() (targets())",
                )
                for name, value in whole.metrics.items():
                    other = cut.metrics.get(name, math.nan)
                    require(
                        abs(other - value) <= RELATIVE * max(1.0, abs(value)),
                        f"metric {name!r} is {value:.6g} in one piece and {other:.6g} in micro-batches of {tokens} "
                        "tokens: metrics are added up, so normalise them by a column made by prepare()",
                    )

    def test_the_order_of_trajectories_changes_nothing(self) -> None:
        """A column that is shifted against its trajectories, or a group that is taken for another, shows here."""
        gradients = []
        for backwards in (False, True):
            algorithm = self.create()
            trajectories = self.trajectories(algorithm)
            updates = self.update(
                algorithm, self.engine(algorithm), trajectories[::-1] if backwards else trajectories, rate=0.0
            )
            learnt = {id(item.turns) for item in updates[0].batch.trajectories}
            if len(updates) > 1 or learnt != {id(item.turns) for item in trajectories}:
                raise SkipTest("the algorithm chooses what each batch holds")
            gradients.append(updates[0].gradients)
        difference = _distance(*gradients)
        require(
            difference <= RELATIVE,
            f"the same trajectories in the opposite order change the gradient by {difference:.2g} of its norm: are the "
            "columns in the order of the batch's decisions?",
        )

    def test_trajectories_and_batches_are_left_as_they_are(self) -> None:
        algorithm = self.create()
        trajectories = self.trajectories(algorithm)
        before = copy.deepcopy(trajectories)
        engine = self.engine(algorithm)
        seed_everything(0)
        for batch in self.batches(algorithm, trajectories, engine):
            columns = {name: column.clone() for name, column in batch.columns.items()}
            engine.step(batch, algorithm.loss, 1e-3)
            for name, column in columns.items():
                require(torch.equal(column, batch.columns[name]), f"loss() changed column {name!r} of its batch")
        for old, new in zip(before, trajectories, strict=True):
            same = (
                (old.behaviour_logprobs == new.behaviour_logprobs).all()
                and old.prompt == new.prompt
                and (old.rewards, old.score, old.group, old.scores) == (new.rewards, new.score, new.group, new.scores)
            )
            require(same, f"the trajectory {old.name!r} was changed: later epochs and the log would read wrong numbers")

    def test_the_same_input_gives_the_same_batches_and_gradients(self) -> None:
        _require_same(
            self.updates(self.create()),
            self.updates(self.create()),
            "two objects that saw the same trajectories from the same random state differ in {}: draw from torch's, "
            "NumPy's or Python's global random state, which the loop seeds for every step",
        )

    def test_two_objects_share_no_state(self) -> None:
        fresh = self.updates(self.create())
        other, own = self.create(), self.create()
        played = with_scores(self.trajectories(other), [3.0, -2.0, 0.7, 5.0])
        for _ in range(2):
            self.update(other, self.engine(other), played)
        _require_same(
            fresh,
            self.updates(own),
            "an object that has learnt changes {} of another: keep state on the object, not on its class or module",
        )

    def test_what_it_keeps_survives_a_checkpoint(self) -> None:
        original = self.create()
        played = with_scores(self.trajectories(original), [2.0, -1.0, 0.5, 4.0])
        for _ in range(2):
            self.update(original, self.engine(original), played)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "algorithm"
            try:
                save_tree(original.state_dict(), path)
            except TrainingError as error:
                require(False, f"state_dict() cannot be saved: {error}")
            state = load_tree(path)
        restored = self.create()
        restored.load_state_dict(state)
        _require_same(
            self.updates(original),
            self.updates(restored),
            "after state_dict() was saved and loaded, {} differ from those of the original: a resumed run would not be "
            "the run that was interrupted",
        )

    @slow
    def test_it_learns_which_choice_is_rewarded(self) -> None:
        """Reward 1 for one of three choices; mean probability over three seeds."""
        if not self.learns:
            raise SkipTest("the suite says `learns = False`")
        before, after = zip(*(self._bandit(seed) for seed in range(3)), strict=True)
        start, end = sum(before) / 3, sum(after) / 3
        require(
            end >= start + (1 - start) / 3,
            f"after {self.learning_steps} steps the rewarded one of three choices has probability {end:.2f}, at first "
            f"{start:.2f}: the gradient has the wrong sign or is lost, or set `learns = False` or a larger "
            "`learning_rate`",
        )

    def _bandit(self, seed: int) -> tuple[float, float]:
        algorithm = self.create()
        script: Script = (Shown((picture(8, 8, seed), "?"), ("a", "b", "c")),)
        policy = self.policy(algorithm, seed)
        engine = self.engine(algorithm, policy, max_grad_norm=1.0)
        [example] = demonstrate(policy.adapter, [script])
        start = engine.evaluate([example]).logprobs.exp().item()
        size = max(8, algorithm.group_size)
        for step in range(self.learning_steps):
            seed_everything(1000 * seed + step)
            if algorithm.experience == "rollouts":
                played = play(policy, [script], size, seed=step)
                chosen = [float(trajectory.answer == example.answer) for trajectory in played]
                played = with_scores(played, chosen)
            else:
                played = [example]
            for batch in algorithm.prepare(played, engine):
                engine.step(batch, algorithm.loss, self.learning_rate)
        return start, engine.evaluate([example]).logprobs.exp().item()


class _Given(AlgorithmConformance):
    """The suite on objects that no plugin registers."""

    def __init__(self, create: Callable[[], Algorithm], needs: Iterable[str], learns: bool) -> None:
        self._create = create
        self.needs = frozenset(needs)
        self.learns = learns

    def create(self) -> Algorithm:
        return self._create()


def check_algorithm(create: Callable[[], Algorithm], *, needs: Iterable[str] = (), learns: bool = True) -> None:
    """Run the suite on what `create` makes. Raises ConformanceError that lists every check that failed.

    needs, learns: as the attributes of `AlgorithmConformance`.
    """
    raise_failures(run(_Given(create, needs, learns)))


def _distance(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two gradients, relative to the first; one that is zero is compared with rounding."""
    difference = sum(float((found[name] - value).double().square().sum()) for name, value in expected.items())
    norm = sum(float(value.double().square().sum()) for value in expected.values())
    return math.sqrt(difference) / max(math.sqrt(norm), RELATIVE)


def _require_same(expected: Sequence[Update], found: Sequence[Update], message: str) -> None:
    """Bitwise: the same arithmetic on the same numbers has no rounding of its own."""
    require(len(expected) == len(found), message.format("the number of batches"))
    for one, other in zip(expected, found, strict=True):
        require(one.batch.columns.keys() == other.batch.columns.keys(), message.format("the names of columns"))
        for name, column in one.batch.columns.items():
            same = column.shape == other.batch.columns[name].shape and torch.equal(column, other.batch.columns[name])
            require(same, message.format(f"column {name!r}"))
        same = all(torch.equal(gradient, other.gradients[name]) for name, gradient in one.gradients.items())
        require(same, message.format("gradients"))
