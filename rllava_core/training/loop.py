"""The training loop: sample, reward, prepare, learn, hand over the weights; and around it evaluate, log and save."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch

from rllava_core.algorithms.protocol import Batch, Loss, LossFunction, fed_back
from rllava_core.config import ResolvedConfig
from rllava_core.engines.config import overlaps
from rllava_core.errors import InvariantError, RewardError, TrainingError, what_happened
from rllava_core.errors import describe as describe_error
from rllava_core.mdp.environment import Failure, Start
from rllava_core.mdp.rewards import reports
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.plugins import Registry
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.checks import check_recomputed
from rllava_core.policy.policy import PolicyOutput
from rllava_core.training import checkpoint
from rllava_core.training.build import Parts, build_parts, device_name
from rllava_core.training.checkpoint import Progress
from rllava_core.training.evaluation import Evaluation, evaluate, held_out
from rllava_core.training.garbage import long_lived_left_alone, settle
from rllava_core.training.gate import gate
from rllava_core.training.lifecycle import Lifecycle
from rllava_core.training.memory import give_back_free_memory, peak_memory_bytes
from rllava_core.training.metrics import Clock, describe, mean
from rllava_core.training.processes import agree, score_once
from rllava_core.training.run_directory import RunDirectory, checkpoints_in
from rllava_core.training.samples import write_sample
from rllava_core.training.schedule import learning_rate
from rllava_core.training.seeds import EPISODES, GLOBAL, SAMPLING, DataOrder, derive, seed_everything
from rllava_core.training.sight import probe, unseen
from rllava_core.training.tracking import MetricsLog, Trackers, check_trackers

_KINDS_SHOWN = 20
"""Different failures of environments that are named one by one."""


class Observer(Protocol):
    """Who watches a run: the command line's display."""

    def started(self, directory: Path, total_steps: int, resumed_at: int | None) -> None: ...

    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def stopping(self) -> None:
        """Ctrl-C was pressed; the step under way is finished and saved first."""
        ...

    def warned(self, message: str) -> None:
        """Something is not as it should be, and the run goes on."""
        ...


def train(
    resolved: ResolvedConfig, registry: Registry, directory: RunDirectory, observer: Observer, *, resume: bool
) -> dict[str, Any]:
    """Run to the last step, or until interrupted. Returns the summary, which is also written to the run directory.

    Raises RllavaError; what was saved before stays as it is.
    """
    training = resolved.run.training
    check_trackers(training.trackers)
    latest = directory.check(resolved.run, resume=resume)
    for warning in [*registry.warnings, *directory.check_plugins(registry)]:
        observer.warned(warning)
    with long_lived_left_alone(), build_parts(resolved, latest) as parts:
        world = parts.trainer.world
        agree(world, resolved.run, registry)
        held_out(parts.task, training.eval_episodes, training.seed)
        progress = Progress() if latest is None else checkpoint.restore(latest, parts)
        # Nothing is written before everything is there, so that a mistake leaves no directory that seems to hold a run.
        if world.rank == 0:
            directory.begin(resolved.run)
            directory.write_manifest(
                registry,
                seed=training.seed,
                device=device_name(parts.policy),
                layout=parts.trainer.layout,
                images="encoded once" if parts.media.encodes else "encoded in every pass",
                processes=world.size,
            )
        observer.started(directory.path, training.steps, None if latest is None else progress.step)
        return _Run(resolved, registry, directory, observer, parts, progress, resumed=latest is not None).execute()


class _Rollout(NamedTuple):
    """What is asked of `Episodes` for a step."""

    starts: list[Start]
    group_size: int
    seed: int
    behaviour: Behaviour


class _Run:
    """A run under way."""

    def __init__(
        self,
        resolved: ResolvedConfig,
        registry: Registry,
        directory: RunDirectory,
        observer: Observer,
        parts: Parts,
        progress: Progress,
        *,
        resumed: bool,
    ) -> None:
        self.config = resolved.run
        self.training = resolved.run.training
        self.world = parts.trainer.world
        # The first of several processes writes, and tells whoever follows the run.
        self.writes = self.world.rank == 0
        self.lifecycle = Lifecycle(registry.lifecycle if self.writes else [], observer.warned)
        self.directory = directory
        self.observer = observer
        self.parts = parts
        self.progress = progress
        self.resumed = resumed
        self.saved_step = progress.step
        self.episodes = parts.episodes
        self.episodes.report = self._failed
        examples = parts.task.examples("train")
        self.overlaps = overlaps(resolved.rollout_engine.config)
        self.order = None if examples is None else DataOrder(examples, self.training.seed)

    def execute(self) -> dict[str, Any]:
        """The loop, and what goes around it."""
        try:
            self.lifecycle.run_start(self.config, self.directory.path)
            self._iterate()
        except SystemExit as error:
            # Somebody else's code: a reward, an environment, an algorithm. No run ends with the code that it chose.
            failure = TrainingError(f"step {self.progress.step + 1}: a component {describe_error(error)}")
            self._end_badly(failure)
            raise failure from error
        except BaseException as error:
            self._end_badly(error)
            raise
        return self._end("interrupted" if self.progress.step < self.training.steps else "completed")

    def _iterate(self) -> None:
        """The loop."""
        training, progress = self.training, self.progress
        followers = training.trackers if self.writes else ()
        log = MetricsLog(self.directory.metrics, progress.step if self.resumed else -1) if self.writes else None
        trackers = Trackers(followers, self.directory.path, self.config.model_dump(mode="json"))
        began, first = time.perf_counter() - progress.wall_seconds, progress.step + 1
        with closing(trackers), _Interrupt(self.observer) as interrupt:
            settle()
            if not self.resumed:
                metrics = self._evaluate(0)
                if log is not None:
                    log.write(0, metrics)
                trackers.write(0, metrics)
            while progress.step < training.steps and not any(self.world.gathered(interrupt.requested)):
                with self._during(f"step {progress.step + 1}"):
                    metrics = self._step(progress.step)
                progress.step += 1
                if _due(training.eval_every, progress.step, training.steps):
                    metrics |= self._evaluate(progress.step)
                progress.wall_seconds = time.perf_counter() - began
                if log is not None:
                    log.write(progress.step, metrics)
                trackers.write(progress.step, metrics)
                self.observer.stepped(progress.step, metrics)
                self.lifecycle.step_end(progress.step, metrics)
                if _due(training.save_every, progress.step, training.steps):
                    self._save()
                if progress.step == first:
                    settle()  # much is imported in the first step only
            if self.saved_step < progress.step:
                self._save()

    def _end(self, status: str, **more: Any) -> dict[str, Any]:
        """Write the summary and tell the plugins."""
        summary = {
            "status": status,
            "steps": self.progress.step,
            "seed": self.training.seed,
            "wall_seconds": round(self.progress.wall_seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "eval": self.progress.evaluations,
            **more,
        }
        try:
            if self.progress.failures:
                summary["environment_failures"] = dict(Counter(self.progress.failures).most_common(_KINDS_SHOWN))
            if self.lifecycle.detached:
                summary["detached_plugins"] = list(self.lifecycle.detached)
            if self.writes:
                self.directory.write_summary(summary)
        finally:
            self.lifecycle.run_end(summary)
        return summary

    def _end_badly(self, error: BaseException) -> None:
        """The same for a run that failed, whose own error is the one to report."""
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        try:
            self._end(status, error=what_happened(error).removeprefix("raised "))
        except TrainingError as second:
            error.add_note(str(second))

    @contextmanager
    def _during(self, what: str) -> Iterator[None]:
        """A run that fails says where, and what was saved."""
        try:
            yield
        except (TrainingError, RewardError, InvariantError) as error:
            error.args = (f"{what}: {error}; {self._last_checkpoint()}",)
            raise

    def _step(self, step: int) -> dict[str, float]:
        """One iteration: everything random in it follows from (seed, step)."""
        algorithm, trainer = self.parts.algorithm, self.parts.trainer
        clock = Clock()
        seed_everything(derive(self.training.seed, GLOBAL, step))
        failed_before = sum(self.progress.failures.values())
        sampled = False
        if algorithm.experience == "rollouts":
            asked = self._rollout(step)
            trajectories = self.episodes.play(*asked)
            sampled = asked.behaviour.is_policy and not self.episodes.behind
        else:
            trajectories = self.episodes.demonstrate(self._starts(step))
        if not trajectories:
            raise TrainingError("the environments of all episodes failed before their first turn was done")
        clock.lap("rollout")
        # After the last step, too: a later last step may be asked for.
        if self.overlaps:
            self.episodes.play_ahead(*self._rollout(step + 1))
        trajectories = score_once(self.world, trajectories, self.parts.task.rewards)
        clock.lap("reward")
        # Whatever was drawn meanwhile, in some of the processes only.
        seed_everything(derive(self.training.seed, GLOBAL, step, 1))
        fresh = {id(action) for trajectory in trajectories for action in trajectory.actions} if sampled else set()
        rate = learning_rate(self.training, step)
        updates: list[Mapping[str, float]] = []
        batches = algorithm.prepare(trajectories, trainer)
        for batch in fed_back(batches, updates):
            # Before the first update the policy is still the one that sampled.
            loss = algorithm.loss if updates else self._checked(algorithm.loss, batch, fresh)
            updates.append(trainer.step(batch, loss, rate))
        clock.lap("update")
        overlap = {}
        if self.overlaps:
            overlap["rollout/behind"] = float(self.episodes.behind)
            self.episodes.wait()
            clock.lap("wait")
        self.parts.sampler.sync(trainer.policy)
        clock.lap("sync")
        if self.writes and self.training.sample_every and step % self.training.sample_every == 0:
            write_sample(self.directory.trajectories, step + 1, trajectories)
        metrics = {**describe(trajectories, self.parts.task), **mean(updates), **algorithm.report()}
        metrics |= {**reports(self.parts.task.rewards), **self.episodes.report_of_engine()}
        failures = sum(self.progress.failures.values()) - failed_before
        return {**metrics, **overlap, "rollout/environment_failures": float(failures), **clock.laps}

    def _checked(self, loss: LossFunction, batch: Batch, fresh: Collection[int]) -> LossFunction:
        """The loss, after a check that what is trained is what was sampled.

        fresh: the actions, by identity, that the policy as it is now has sampled; others cannot be compared.
        """
        comparable = {id(trajectory) for trajectory in batch.trajectories if _all_in(trajectory, fresh)}
        count = sum(id(trajectory) in comparable for trajectory in batch.trajectories)

        def checked(micro: Batch, output: PolicyOutput) -> Loss:
            own = [trajectory for trajectory in micro.trajectories if id(trajectory) in comparable]
            if not own:
                return loss(micro, output)
            mask = torch.tensor([id(item) in comparable for item in micro.trajectories])
            mask = mask.repeat_interleave(torch.tensor([item.decisions for item in micro.trajectories]))
            logprobs = output.logprobs[mask.to(output.logprobs.device)]
            limits = self.training.max_logprob_gap, self.training.max_token_gap
            gaps = check_recomputed(own, logprobs, self.parts.adapter, *limits)
            gap = torch.tensor(gaps.mean * len(own) / count)
            result = loss(micro, output)
            return Loss(result.total, {**result.metrics, "policy/logprob_gap": gap})

        return checked

    def _failed(self, episode: str, failure: Failure) -> None:
        """An environment in a worker failed: its episode is cut, the run goes on, and the user is told."""
        what = f"{episode}: the environment {failure.what}"
        failures = self.progress.failures
        failures[failure.what] = failures.get(failure.what, 0) + 1
        if failures[failure.what] == 1 and len(failures) <= _KINDS_SHOWN:
            self.observer.warned(f"step {self.progress.step + 1}: {what}; its episode ends here and the run goes on")

    def _rollout(self, step: int) -> _Rollout:
        seed, algorithm = derive(self.training.seed, SAMPLING, step), self.parts.algorithm
        return _Rollout(self._starts(step), algorithm.group_size, seed, algorithm.behaviour())

    def _starts(self, step: int) -> list[Start]:
        count = self.training.prompts_per_step
        seeds = [derive(self.training.seed, EPISODES, step, number) for number in range(count)]
        if self.order is None:
            return [Start(None, seed) for seed in seeds]
        return [Start(example, seed) for example, seed in zip(self.order.take(step * count, count), seeds, strict=True)]

    def _evaluate(self, step: int) -> dict[str, float]:
        clock = Clock()
        training = self.training
        give_back_free_memory()
        with self._during(f"evaluation at step {step}"):
            result = evaluate(
                self.parts.task,
                self.episodes,
                self.parts.algorithm.behaviour(),
                training.eval_episodes,
                training.seed,
                training.prompts_per_step * self.parts.algorithm.group_size,
            )
        summary = result.summary()
        evaluations = self.progress.evaluations
        evaluations.setdefault("first", {**summary})
        evaluations["last"] = {**summary}
        if "best" not in evaluations or summary["success_rate"] > evaluations["best"]["success_rate"]:
            evaluations["best"] = {**summary, "step": step}
        self.observer.evaluated(step, result)
        clock.lap("eval")
        parity = {}
        # By values, or from demonstrations, nobody acts as the policy says.
        if self.parts.algorithm.behaviour().action_values is None and self.parts.algorithm.experience == "rollouts":
            with self._during(f"evaluation at step {step}"):
                parity = gate(self.parts.trainer, self.parts.adapter, result.trajectories, training)
        clock.lap("parity")
        sight = self._look(step, result.trajectories)
        clock.lap("image_probe")
        scores = {f"eval/{name}": value for name, value in {**result.scores, **result.reports}.items()}
        return {**{f"eval/{name}": value for name, value in summary.items()}, **scores, **parity, **sight, **clock.laps}

    def _look(self, step: int, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Whether images have an influence, unless nobody wants to know."""
        if self.training.unseen_images == "ignore":
            return {}
        with self.parts.trainer.autocast():
            metrics = probe(self.parts.policy, self.parts.media, trajectories, self.training.micro_batch_tokens)
        problem = unseen(metrics)
        if problem is not None and self.training.unseen_images == "stop":
            raise TrainingError(f"step {step}: {problem}; set training.unseen_images to warn to go on all the same")
        if problem is not None:
            self.observer.warned(f"step {step}: {problem}")
        return metrics

    def _save(self) -> None:
        directory = self.directory.checkpoints
        give_back_free_memory()
        checkpoint.save(directory, self.parts, self.progress)
        self.saved_step = self.progress.step
        if not self.writes:
            return
        checkpoint.prune(directory, self.training.keep_checkpoints, self.progress.evaluations["best"]["step"])

    def _last_checkpoint(self) -> str:
        found = checkpoints_in(self.directory.checkpoints)
        return f"the last good checkpoint is {found[-1][1]}" if found else "no checkpoint had been saved yet"


def _all_in(trajectory: Trajectory, actions: Collection[int]) -> bool:
    return all(id(action) in actions for action in trajectory.actions)


def _due(every: int, step: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


class _Interrupt:
    """The first Ctrl-C asks for a stop after the step under way; the second stops at once."""

    def __init__(self, observer: Observer) -> None:
        self.requested = False
        self._observer = observer
        self._previous: Any = None

    def __enter__(self) -> _Interrupt:
        # Python delivers signals to the main thread only; elsewhere the caller stops the run its own way.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._observer.stopping()
