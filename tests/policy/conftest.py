"""The toy model as anyone would run it: one whole sequence at a time, without cache, padding or sharing.

Everything that a batch computes is compared with this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, Turn, conversation
from rllava_core.policy.batch import BatchBuilder, PolicyBatch
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Head, Policy
from rllava_core.testing.tiny import END, IMAGE, PAD, PATCH, START, TinyAdapter

FORBIDDEN = (START, PAD, IMAGE)


class PreciseTinyAdapter(TinyAdapter):
    """The toy in float64, counting what it is asked to do."""

    precision = torch.float64

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.runs: list[tuple[tuple[int, ...], int]] = []  # shape of the tokens and number of patches of each run
        self.preprocessed: list[str] = []

    def load(self) -> Any:
        model: Any = super().load().to(self.precision)
        if self.precision == torch.float64:
            # Llama's own norm goes through float32.
            for module in list(model.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, LlamaRMSNorm):
                        exact = nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=self.precision)
                        setattr(module, name, exact)
        return model

    def preprocess(self, image: Image) -> Any:
        self.preprocessed.append(image.source)
        return super().preprocess(image)

    def collate(self, features: Sequence[Any]) -> dict[str, Tensor]:
        return {name: values.to(self.precision) for name, values in super().collate(features).items()}

    def hidden_states(self, model: Any, *, tokens: Tensor, media: Mapping[str, Tensor], **inputs: Any) -> Tensor:
        assert self.takes_trees or inputs["attention_mask"].ndim == 2
        self.runs.append((tuple(tokens.shape), len(next(iter(media.values()))) if media else 0))
        return super().hidden_states(model, tokens=tokens, media=media, **inputs)


@dataclass
class Decisions:
    """What the plain model says of the decisions of a trajectory: [D], [D] and [D, H]."""

    logprobs: Tensor
    entropies: Tensor
    states: Tensor


def read(context: Sequence[Segment]) -> tuple[list[int], list[Image]]:
    """The tokens and the images of what a policy sees."""
    tokens = [token for segment in context for token in segment.tokens]
    images = [image for segment in context if isinstance(segment, ContextSegment) for image in segment.images]
    return tokens, images


class Plain:
    """The plain model, and a log-softmax over the whole vocabulary."""

    def __init__(self, model: Any, temperature: float = 1.0) -> None:
        self.model = model
        self.temperature = temperature

    def next_token(self, tokens: Sequence[int], images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Log-probs [T, V] and hidden states [T, H] after each token."""
        weight = self.model.lm_head.weight
        patches = torch.tensor(np.array([patch for image in images for patch in _patches(image)])).to(weight.dtype)
        hidden = self.model.hidden(
            torch.tensor([list(tokens)]),
            patches if images else None,
            position_ids=torch.arange(len(tokens))[None],
            use_cache=False,
        )[0]
        logits = self.model.lm_head(hidden) / self.temperature
        allowed = torch.tensor([token not in FORBIDDEN for token in range(weight.shape[0])])
        logits = torch.where(allowed, logits, -torch.inf)
        return logits - logits.logsumexp(-1, keepdim=True), hidden

    def decisions(self, trajectory: Trajectory) -> Decisions:
        """Each turn of the trajectory alone, with what it saw; each choice as a sequence of its own."""
        logprobs, entropies, states = [], [], []
        for turn in trajectory.turns:
            tokens, images, action = *read(turn.context), turn.action
            if action.choice is None:
                table, hidden = self.next_token([*tokens, *action.tokens], images)
                for step, token in enumerate(action.tokens):
                    row = len(tokens) + step - 1
                    logprobs.append(table[row, token])
                    possible = table[row][table[row] > -torch.inf]
                    entropies.append(-(possible.exp() * possible).sum())
                    states.append(hidden[row])
            else:
                assert action.choices is not None
                scores, state = self.choices(tokens, images, action.choices)
                logprobs.append(scores[action.choice])
                entropies.append(-sum(p.exp() * p for p in scores))
                states.append(state)
        return Decisions(torch.stack(logprobs), torch.stack(entropies), torch.stack(states))

    def left(self, context: Sequence[Segment]) -> Tensor:
        """[H] hidden state in which an episode is left."""
        return self.next_token(*read(context))[1][-1]

    def choices(
        self, tokens: Sequence[int], images: Sequence[Image], choices: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the choices, and the hidden state [H] in which one is made."""
        scores = []
        for choice in choices:
            table, hidden = self.next_token([*tokens, *choice], images)
            scores.append(sum(table[len(tokens) + step - 1, token] for step, token in enumerate(choice)))
        stacked = torch.stack(scores)
        return stacked - stacked.exp().sum().log(), hidden[len(tokens) - 1]

    def greedy(self, context: Sequence[ContextSegment], limit: int) -> list[int]:
        """The most probable token, one at a time, each from a forward pass of the whole sequence."""
        tokens = [token for segment in context for token in segment.tokens]
        images = [image for segment in context for image in segment.images]
        answer: list[int] = []
        while len(answer) < limit and (not answer or answer[-1] != END):
            answer.append(int(self.next_token([*tokens, *answer], images)[0][-1].argmax()))
        return answer


class Workbench:
    """Makes policies, pictures and trajectories."""

    Plain = Plain

    def adapter(self, precision: torch.dtype = torch.float64) -> PreciseTinyAdapter:
        adapter = PreciseTinyAdapter(ModelConfig(from_scratch="tiny"))
        adapter.precision = precision
        return adapter

    def policy(
        self,
        temperature: float = 1.0,
        heads: Mapping[str, Head] | None = None,
        bias: Mapping[int, float] | None = None,
        others: float = 0.0,
        precision: torch.dtype = torch.float64,
        trunk_seed: int | None = None,
    ) -> Policy:
        """bias: added to the logits of these tokens; `others` to those of all the rest.

        trunk_seed: for a separate model that heads read.
        """
        torch.manual_seed(0)
        adapter = self.adapter(precision)
        model = adapter.load().eval()
        if bias is not None:
            head = nn.Linear(*reversed(model.lm_head.weight.shape), dtype=precision)
            head.weight = model.lm_head.weight
            with torch.no_grad():
                head.bias.fill_(others)
                for token, value in bias.items():
                    head.bias[token] = value
            model.lm_head = head
        trunk = None
        if trunk_seed is not None:
            torch.manual_seed(trunk_seed)
            trunk = adapter.load().eval()
        policy = Policy(adapter, model, heads, temperature, trunk)
        if precision == torch.float64:
            policy.heads.double()
        return policy

    def pack(self, policy: Policy, trajectories: Sequence[Trajectory], **layout: bool) -> PolicyBatch:
        builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter), **layout)
        for trajectory in trajectories:
            builder.add_trajectory(trajectory)
        return builder.build()

    def picture(self, height: int, width: int, seed: int = 0) -> Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.from_array(pixels, f"picture {seed}")

    def context(self, *parts: str | Image) -> ContextSegment:
        """What is shown, in tokens written out by hand."""
        tokens = [START]
        for part in parts:
            if isinstance(part, Image):
                width, height = part.size
                tokens += [IMAGE] * (height // PATCH * (width // PATCH))
            else:
                tokens += part.encode()
        images = tuple(part for part in parts if isinstance(part, Image))
        return ContextSegment((*tokens, END, START), images)

    def text(self, answer: str, ended: bool = True, logprob: float = -1.0) -> ActionSegment:
        tokens = (*answer.encode(), END) if ended else tuple(answer.encode())
        return ActionSegment(tokens, np.full(len(tokens), logprob, np.float32), answer, ended)

    def choice(self, index: int, *choices: str, logprob: float = -1.0, end: bool = False) -> ActionSegment:
        entries = tuple((*entry.encode(), *((END,) if end else ())) for entry in choices)
        recorded = np.array([logprob], np.float32)
        return ActionSegment(entries[index], recorded, choices[index], choice=index, choices=entries)

    def episode(self, *segments: Segment, name: str = "example 7", group: int = 0) -> Trajectory:
        """One whose turns see all that came before; truncated if it ends with an observation."""
        left = isinstance(segments[-1], ContextSegment)
        return Trajectory(
            Example(name),
            0,
            group,
            conversation(segments),
            terminated=not left,
            truncation="environment" if left else None,
            final=segments if left else None,
        )

    def windows(self, *turns: Sequence[Segment], name: str = "example 7", group: int = 0) -> Trajectory:
        """One whose turns see what they are given: the context, and the action behind it."""
        taken = []
        for *context, action in turns:
            assert isinstance(action, ActionSegment)
            taken.append(Turn(tuple(context), action))
        return Trajectory(Example(name), 0, group, tuple(taken), terminated=True)


@pytest.fixture
def toy() -> Workbench:
    return Workbench()


def texts_of_different_lengths(toy: Workbench) -> list[Trajectory]:
    prompt = toy.context("Colour?", toy.picture(8, 8))
    answers = [toy.text(""), toy.text("red"), toy.text("dark green"), toy.text("bl", ended=False)]
    return [toy.episode(prompt, answer) for answer in answers]


def duplicates_within_a_group(toy: Workbench) -> list[Trajectory]:
    prompt = toy.context("Colour?", toy.picture(8, 8))
    return [toy.episode(prompt, toy.text(answer)) for answer in ("red", "blue", "red", "red", "re")]


def prompts_of_different_lengths(toy: Workbench) -> list[Trajectory]:
    prompts = [toy.context("?"), toy.context("Which colour is it?"), toy.context("Colour?")]
    return [toy.episode(prompt, toy.text("red" * (index + 1))) for index, prompt in enumerate(prompts)]


def images_of_different_sizes_and_none(toy: Workbench) -> list[Trajectory]:
    pictures = [(toy.picture(8, 8),), (toy.picture(16, 4, 1),), (), (toy.picture(12, 20, 2),)]
    return [toy.episode(toy.context("Colour?", *shown), toy.text("red")) for shown in pictures]


def several_images_in_one_prompt(toy: Workbench) -> list[Trajectory]:
    first, second, third = toy.picture(8, 8), toy.picture(12, 4, 1), toy.picture(4, 16, 2)
    prompts = [
        toy.context("Compare ", first, " with ", second, third, ". Same?"),
        toy.context("Compare ", second, " with ", third, first, ". Same?"),
        toy.context(third),
    ]
    return [toy.episode(prompt, toy.text("no")) for prompt in prompts]


def the_same_tokens_with_other_images(toy: Workbench) -> list[Trajectory]:
    first, second = toy.picture(8, 8), toy.picture(8, 8, 1)
    return [
        toy.episode(toy.context(first, "?"), toy.text("red")),
        toy.episode(toy.context(second, "?"), toy.text("red")),
        toy.episode(toy.context("?"), toy.text("go"), toy.context(first), toy.text("a")),
        toy.episode(toy.context("?"), toy.text("go"), toy.context(second), toy.text("a")),
        toy.episode(toy.context(first, second), toy.choice(0, "yes", "no")),
        toy.episode(toy.context(second, first), toy.choice(0, "yes", "no")),
    ]


def choices_of_one_token(toy: Workbench) -> list[Trajectory]:
    prompt = toy.context("Digit?", toy.picture(8, 8))
    return [toy.episode(prompt, toy.choice(index, *"0123456789")) for index in (3, 7, 3, 0, 9)]


def choices_of_several_tokens(toy: Workbench) -> list[Trajectory]:
    prompt = toy.context("Colour?", toy.picture(8, 12))
    return [toy.episode(prompt, toy.choice(index, "red", "green", "a", "blue")) for index in (1, 2, 3, 1, 0)]


def choices_that_begin_with_each_other(toy: Workbench) -> list[Trajectory]:
    prompt = toy.context("Number?", toy.picture(8, 8))
    return [
        toy.episode(prompt, toy.choice(index, "1", "10", "101", "2", end=end)) for index in range(4) for end in (0, 1)
    ]


def other_choices_for_each_example(toy: Workbench) -> list[Trajectory]:
    return [
        toy.episode(toy.context("Colour?", toy.picture(8, 8)), toy.choice(1, "red", "green")),
        toy.episode(toy.context("Digit?"), toy.choice(2, *"01234")),
        toy.episode(toy.context("Digit?"), toy.choice(2, *"01243")),
        toy.episode(toy.context("Where to?", toy.picture(4, 8)), toy.choice(0, "left", "right", "straight on")),
    ]


def texts_over_several_turns(toy: Workbench) -> list[Trajectory]:
    prompt = toy.context("Find the key.", toy.picture(8, 8))
    closer, other = toy.context(toy.picture(12, 8, 1), "closer"), toy.context("no ", toy.picture(4, 4, 2))
    last = toy.context(toy.picture(8, 16, 3), toy.picture(4, 8, 4))
    return [
        toy.episode(prompt, toy.text("left"), closer, toy.text("go on"), last, toy.text("take it")),
        toy.episode(prompt, toy.text("left"), closer, toy.text("stop", ended=False), other, toy.text("")),
        toy.episode(prompt, toy.text("left"), other, toy.text("go on"), closer, toy.text("take it")),
        toy.episode(prompt, toy.text("left"), toy.context("And?"), toy.text("I give up")),
        toy.episode(prompt, toy.text("left")),
        toy.episode(toy.context("Run!"), toy.text(""), last, toy.text("")),
    ]


def choices_over_several_turns(toy: Workbench) -> list[Trajectory]:
    prompt = toy.context("Find the key.", toy.picture(8, 8))
    moves, levers = ("left", "right", "on"), ("u", "d")
    first, second = toy.context(toy.picture(12, 8, 1)), toy.context(toy.picture(4, 8, 2), "!")
    return [
        toy.episode(prompt, toy.choice(0, *moves), first, toy.choice(2, *moves), second, toy.choice(1, *levers)),
        toy.episode(prompt, toy.choice(0, *moves), first, toy.choice(1, *moves), second, toy.choice(1, *levers)),
        toy.episode(prompt, toy.choice(1, *moves), first, toy.choice(1, *levers), second, toy.choice(0, *moves)),
        toy.episode(prompt, toy.choice(2, *moves), second, toy.choice(0, *levers)),
    ]


def texts_and_choices_in_one_episode(toy: Workbench) -> list[Trajectory]:
    prompt, shown = toy.context("Find the key.", toy.picture(8, 8)), toy.context(toy.picture(12, 8, 1))
    return [
        toy.episode(prompt, toy.text("thinking"), shown, toy.choice(1, "left", "right"), shown, toy.text("done")),
        toy.episode(
            prompt, toy.choice(0, "left", "right"), shown, toy.text("x"), toy.context("?"), toy.choice(1, *"ab")
        ),
        toy.episode(prompt, toy.text("thinking"), shown, toy.choice(0, "left", "right")),
    ]


def windows_over_an_episode(toy: Workbench) -> list[Trajectory]:
    """Turns that see the last observation, or the last two; some begin alike, and some see all after all."""
    shown = [toy.context(f"{number}?", toy.picture(8, 4 + 4 * number, number)) for number in range(4)]
    texts = [toy.text(answer) for answer in ("left", "up", "go", "stop")]
    moves = [toy.choice(number % 2, "left", "on", "l") for number in range(4)]
    return [
        toy.windows(*((shown[number], texts[number]) for number in range(4))),
        toy.windows(*((shown[number], moves[number]) for number in range(4))),
        toy.windows(
            (shown[0], texts[0]),
            (shown[0], texts[0], shown[1], moves[1]),
            (shown[1], moves[1], shown[2], texts[2]),
            (shown[2], texts[2], shown[3], moves[3]),
        ),
        toy.windows((shown[2], texts[1]), (shown[2], texts[1], shown[3], texts[2]), (shown[0], texts[3])),
        toy.windows((shown[0], texts[1]), (shown[0], texts[1])),
    ]


def states_that_episodes_were_left_in(toy: Workbench) -> list[Trajectory]:
    """Truncated after text, a choice and several turns, and others that were not."""
    prompt, closer = toy.context("Find the key.", toy.picture(8, 8)), toy.context(toy.picture(12, 8, 1), "closer")
    one = toy.windows((prompt, toy.text("left")), (closer, toy.choice(1, "left", "on")))
    return [
        toy.episode(prompt, toy.text("left"), closer),
        toy.episode(prompt, toy.text("left"), closer, toy.text("on")),
        toy.episode(prompt, toy.choice(0, "left", "on"), closer, toy.choice(1, "left", "on"), toy.context("?")),
        toy.episode(prompt, toy.text("left", ended=False)),
        replace(one, terminated=False, truncation="turns", final=(toy.context("And?", toy.picture(4, 4, 2)),)),
        replace(one, terminated=False, truncation="turns", final=(closer, one.actions[1], toy.context("!"))),
        replace(one, terminated=False, truncation="failure", final=(closer,)),
    ]


SITUATIONS: list[Callable[[Workbench], list[Trajectory]]] = [
    texts_of_different_lengths,
    duplicates_within_a_group,
    prompts_of_different_lengths,
    images_of_different_sizes_and_none,
    several_images_in_one_prompt,
    the_same_tokens_with_other_images,
    choices_of_one_token,
    choices_of_several_tokens,
    choices_that_begin_with_each_other,
    other_choices_for_each_example,
    texts_over_several_turns,
    choices_over_several_turns,
    texts_and_choices_in_one_episode,
    windows_over_an_episode,
    states_that_episodes_were_left_in,
]


def everything_at_once(toy: Workbench) -> list[Trajectory]:
    """All of the above in one batch, the kinds alternating."""
    lists = [situation(toy) for situation in SITUATIONS]
    longest = max(map(len, lists))
    return [items[place] for place in range(longest) for items in lists if place < len(items)]


@pytest.fixture(params=[*SITUATIONS, everything_at_once], ids=lambda situation: situation.__name__)
def situation(request: pytest.FixtureRequest, toy: Workbench) -> list[Trajectory]:
    """Trajectories of one batch, for every situation that a batch may hold."""
    made: list[Trajectory] = request.param(toy)
    return made


@pytest.fixture
def mixed(toy: Workbench) -> list[Trajectory]:
    return everything_at_once(toy)


def _patches(image: Image) -> list[list[float]]:
    """The colours of each square of 4×4 pixels, row by row, from -1 to 1."""
    width, height = image.size
    scaled = image.pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return [
        [float(scaled[top + y, left + x, colour]) for y in range(PATCH) for x in range(PATCH) for colour in range(3)]
        for top in range(0, height - height % PATCH, PATCH)
        for left in range(0, width - width % PATCH, PATCH)
    ]
