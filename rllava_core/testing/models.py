"""The conformance suite of model adapters: with it a family is a policy, and samples what it is trained on."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import SkipTest

import numpy as np
import torch
from transformers import PreTrainedModel

from rllava_core.errors import ModelError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.batch import PolicyBatch
from rllava_core.policy.policy import Policy
from rllava_core.testing.conformance import raise_failures, require, run
from rllava_core.testing.models_base import head_weight
from rllava_core.testing.models_forward import ForwardChecks
from rllava_core.testing.models_inputs import InputChecks
from rllava_core.testing.rollouts import Script, Shown, pack, play
from rllava_core.training.seeds import seed_everything

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class ModelAdapterConformance(InputChecks, ForwardChecks):
    """Checks of a model adapter, on a small model with random weights. What an author may override:

    options: where the model comes from; `{"from_scratch": "tiny"}`, a preset of the adapter's own.
    image_sizes: three sizes (height, width) of images that the model takes, which become few tokens.
    texts: what must survive `encode` and `decode`.
    special_texts: texts that look like special tokens, to be tried in questions and answers.
    trains_vision: False for a family whose vision part is frozen.
    tolerance: largest difference between two ways to compute the same, relative to numbers above one. In float32 a
        small model has differences of 1e-6; what is wrong (a mask, a position) shows from 1e-3 on.
    """

    def test_load_gives_a_model_with_a_head_over_the_vocabulary(self) -> None:
        adapter, model = self.loaded()
        require(isinstance(model, PreTrainedModel), f"load() gave {type(model).__name__}; expected a PreTrainedModel")
        vocabulary, size = head_weight(adapter, model).shape
        hidden = model.config.get_text_config().hidden_size
        require(size == hidden, f"lm_head() takes {size} numbers, but the config's hidden_size is {hidden}")
        logits = adapter.lm_head(model)(torch.zeros(1, hidden))
        require(
            logits.shape == (1, vocabulary),
            f"the head gave logits of shape {tuple(logits.shape)} for a vocabulary of {vocabulary}",
        )

    def test_every_weight_belongs_to_a_part(self) -> None:
        """`model.train` says of each part how it is trained."""
        adapter, model = self.loaded()
        parts = {adapter.part_of(name) for name, _ in model.named_parameters()}
        unknown = parts - {"vision", "connector", "language"}
        require(not unknown, f"part_of() gave {unknown}; the parts are vision, connector and language")
        require("language" in parts, "no weight belongs to the language part")
        require(parts & {"vision", "connector"}, "no weight belongs to a part that sees: what does part_of() go by?")

    def test_the_context_length_is_known_once_the_model_is_loaded(self) -> None:
        adapter, _ = self.loaded()
        length = adapter.context_length
        require(type(length) is int and length > 0, f"context_length is {length!r} after load(); expected a number")

    def test_the_same_seed_loads_the_same_weights_into_an_independent_copy(self) -> None:
        """The reference policy is a second copy of the weights that training begins with."""
        (_, first), (_, second) = self.loaded(), self.loaded()
        expected = {name: values.clone() for name, values in second.state_dict().items()}
        for name, values in first.state_dict().items():
            require(torch.equal(values, expected[name]), f"two loads from one random state differ in {name}")
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.add_(1.0)
        changed = [name for name, values in second.state_dict().items() if not torch.equal(values, expected[name])]
        require(not changed, f"training one copy of the model changes another: {', '.join(changed[:3])} are shared")

    def test_the_weights_have_the_precision_that_the_config_says(self) -> None:
        for dtype in ("float32", "bfloat16"):
            adapter = self.create_with(dtype=dtype)
            seed_everything(0)
            policy = Policy(adapter, adapter.load()).eval()
            sizes: Counter[str] = Counter()
            for parameter in policy.model.parameters():
                sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
            found = sizes.most_common(1)[0][0]
            require(found == dtype, f"with `dtype: {dtype}` most weights are {found}")
            logprobs = self._recomputed(policy, self._played(policy))
            require(torch.isfinite(logprobs).all(), f"log-probs of images and text are not finite in {dtype}")

    def test_what_is_sampled_is_what_is_trained(self) -> None:
        """Text and choices, with several images and none, over several turns; greedy and drawn."""
        policy = self.policy()
        for seed in (None, 0):
            trajectories = self._played(policy, seed)
            recorded = torch.from_numpy(np.concatenate([item.behaviour_logprobs for item in trajectories]))
            gap = float((self._recomputed(policy, trajectories) - recorded).abs().max())
            require(
                gap <= self.tolerance,
                f"log-probs while sampling and recomputed by Policy.forward differ by {gap:.2g} nats: do positions, "
                "masks or images depend on how a sequence is cut?",
            )

    def test_gradients_do_not_depend_on_what_is_read_together(self) -> None:
        """A prompt once for a group, with what continues it in the same pass or the next, or once for each
        trajectory; and with layers that are computed again in backward, if the model can."""
        policy = self.policy()
        trajectories = self._played(policy)
        ways = {
            "in one pass, packed": {"packed": True},
            "read once for each trajectory": {"packed": True, "shared": False},
        }
        expected = self._learnt(policy, pack(policy, trajectories))
        found = {name: self._learnt(policy, pack(policy, trajectories, **way)) for name, way in ways.items()}
        if policy.model.supports_gradient_checkpointing:
            policy.recompute(True)
            found["computed again"] = self._learnt(policy, pack(policy, trajectories, packed=True))
        for way, gradients in found.items():
            lost = sorted(expected.keys() - gradients.keys())
            require(not lost, f"a batch that is {way} gives {', '.join(lost[:3])} no gradient")
            for name, gradient in gradients.items():
                gap = float((gradient - expected[name]).abs().max())
                # Relative to the largest gradient of the weight: sums of float32 in another order.
                scale = max(1.0, float(expected[name].abs().max()))
                require(
                    gap <= 10 * self.tolerance * scale,
                    f"a batch that is {way} gives {name} another gradient (by {gap:.2g}) than one that reads prompts "
                    "first and goes on from a cache",
                )

    def test_nothing_forbidden_is_sampled(self) -> None:
        policy = self.policy()
        answers = [action for trajectory in self._played(policy, None) for action in trajectory.actions]
        # The policy reads the list once, when it is made.
        late = [token for token in policy.adapter.forbidden_tokens if not policy.forbidden[token]]
        require(not late, f"forbidden_tokens {late[:5]} were not known when load() returned, so they can be sampled")
        for action in answers:
            bad = sorted(set(policy.adapter.forbidden_tokens).intersection(action.tokens))
            require(not bad, f"the greedy answer holds forbidden tokens {bad}; its choices or text encode to them")

    def test_a_checkpoint_is_safetensors_and_no_pickle(self) -> None:
        adapter, model = self.loaded()
        with tempfile.TemporaryDirectory() as directory:
            adapter.save(model, Path(directory))
            names = sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file())
        listing = ", ".join(names) or "nothing"
        require("config.json" in names, f"save() wrote {listing}; expected a config.json")
        require(any(name.endswith(".safetensors") for name in names), f"save() wrote {listing}; expected safetensors")
        pickles = [name for name in names if name.endswith(PICKLES)]
        require(not pickles, f"save() wrote {', '.join(pickles)}: a pickle can run code when it is loaded")

    def test_a_saved_model_computes_the_same_bits(self) -> None:
        policy = self.policy()
        with torch.no_grad():
            # As after training, or the weights that the seed gives would pass for those that were saved.
            for parameter in policy.model.parameters():
                parameter.mul_(1.01)
        trajectories = self._played(policy)
        with tempfile.TemporaryDirectory() as directory:
            policy.adapter.save(policy.model, Path(directory))
            adapter = self.create_with(path=directory, from_scratch=None)
            seed_everything(1)
            loaded = Policy(adapter, adapter.load()).eval()
            for name in ("pad_token", "end_of_turn", "image_token", "forbidden_tokens", "context_length"):
                old, new = getattr(policy.adapter, name), getattr(adapter, name)
                require(old == new, f"{name} is {new!r} after saving and loading, {old!r} before")
            for parts in self.conversations():
                old, new = self.piece(policy.adapter, *parts), self.piece(adapter, *parts)
                require(old.tokens == new.tokens, "a conversation is rendered differently after saving and loading")
            same = torch.equal(self._recomputed(loaded, trajectories), self._recomputed(policy, trajectories))
            require(same, "log-probs after saving and loading are not the same: a weight is not saved, or not read")

    def test_a_directory_without_a_model_is_a_model_error(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            try:
                self.create_with(path=directory, from_scratch=None).load()
            except ModelError as error:
                named = directory in str(error)
                require(named, f"the ModelError of a directory without a model does not name it: {error}")
            except SkipTest:
                raise
            except Exception as error:  # noqa: BLE001 - any other error is what is looked for
                require(
                    False,
                    f"a directory without a model raised {type(error).__name__}: {error}; expected a ModelError",
                )
            else:
                require(False, "a directory without a model was loaded without an error")

    def scripts(self) -> list[Script]:
        """Episodes of text and choices with several images and none, two turns in one."""
        first, second, third = (self.picture(number) for number in range(3))
        return [
            (Shown((first, "Which?"), max_tokens=4),),
            (Shown(("Two and two?",), max_tokens=7),),
            (Shown(("Is ", second, " like ", third, "?"), ("yes", "no", "a bit")),),
            (Shown((third, first), max_tokens=3), Shown(("And ", second, "?"), ("yes", "no")), Shown(("So?",))),
        ]

    def _played(self, policy: Policy, seed: int | None = 0) -> list[Trajectory]:
        return play(policy, self.scripts(), 2, seed)

    def _learnt(self, policy: Policy, batch: PolicyBatch) -> dict[str, torch.Tensor]:
        """By name, the gradients of a loss that tells every decision from every other."""
        policy.zero_grad()
        output = policy(batch)
        weights = torch.randn(len(output.logprobs), generator=torch.Generator().manual_seed(1))
        (weights * (output.logprobs + output.entropies)).sum().backward()
        return {name: item.grad.clone() for name, item in policy.named_parameters() if item.grad is not None}

    def _recomputed(self, policy: Policy, trajectories: list[Trajectory]) -> torch.Tensor:
        with torch.no_grad():
            logprobs: torch.Tensor = policy(pack(policy, trajectories)).logprobs
        return logprobs


class _Given(ModelAdapterConformance):
    """The suite on adapters that no plugin registers."""

    def __init__(self, create: Callable[[], ModelAdapter]) -> None:
        self._create = create

    def create(self) -> ModelAdapter:
        return self._create()


def check_model_adapter(create: Callable[[], ModelAdapter]) -> None:
    """Run the suite on the adapters that `create` makes. Raises ConformanceError that lists every check that failed.

    What needs an adapter with other options (a path, a precision) is skipped unless the adapter keeps its
    `ModelConfig` as `config`.
    """
    raise_failures(run(_Given(create)))
