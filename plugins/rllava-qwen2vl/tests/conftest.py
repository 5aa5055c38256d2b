"""The tiny Qwen2-VL, its real processor, and plain forward passes of whole sequences to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, conversation
from rllava_core.policy.adapter import Features
from rllava_core.policy.batch import BatchBuilder, PolicyBatch
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_qwen2vl.adapter import Qwen2VL
from rllava_qwen2vl.config import Qwen2VLOptions


class Counting(Qwen2VL):
    """Keeps count of the images that it preprocesses, and can be in float64."""

    precise = False

    def __init__(self, config: Qwen2VLOptions) -> None:
        super().__init__(config)
        self.preprocessed: list[str] = []

    def load(self) -> Any:
        model: Any = super().load()
        if self.precise:
            model.double()
            # Qwen's own norm goes through float32.
            for module in list(model.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, Qwen2VLRMSNorm):
                        exact = nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                        setattr(module, name, exact)
        return model

    def preprocess(self, image: Image) -> Features:
        self.preprocessed.append(image.digest)
        return super().preprocess(image)


class Workbench:
    """Makes adapters, policies, pictures and trajectories, and says what transformers alone says of them."""

    def adapter(self, **options: Any) -> Counting:
        return Counting(Qwen2VLOptions(**({} if "path" in options else {"from_scratch": "tiny"}) | options))

    def policy(self, temperature: float = 1.0, precise: bool = False, **options: Any) -> Policy:
        torch.manual_seed(0)
        adapter = self.adapter(**options)
        adapter.precise = precise
        return Policy(adapter, adapter.load(), temperature=temperature).eval()

    def pack(self, policy: Policy, trajectories: Sequence[Trajectory]) -> PolicyBatch:
        builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter))
        for trajectory in trajectories:
            builder.add_trajectory(trajectory)
        return builder.build()

    def picture(self, width: int, height: int, seed: int = 0) -> Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.from_array(pixels, f"picture {seed}")

    def processed(self, adapter: Qwen2VL, messages: Sequence[Message]) -> dict[str, Tensor]:
        """What the real processor makes of a conversation, up to where the assistant answers."""
        conversation = [
            {
                "role": message.role,
                "content": [
                    {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                    for part in message.parts
                ],
            }
            for message in messages
        ]
        images = [part.image.to_pil() for one in messages for part in one.parts if isinstance(part, ImagePart)]
        text = adapter.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return dict(adapter.processor(text=[text], images=images or None, return_tensors="pt"))

    def prompt(self, adapter: Qwen2VL, *messages: Message, continues: bool = False) -> ContextSegment:
        """Messages as the adapter renders them."""
        images = tuple(part.image for one in messages for part in one.parts if isinstance(part, ImagePart))
        features = [adapter.preprocess(image) for image in images]
        return ContextSegment(adapter.render(messages, features, continues=continues), images)

    def observation(self, adapter: Qwen2VL, *messages: Message) -> ContextSegment:
        """A later turn: what follows the end-of-turn token of the answer before."""
        return self.prompt(adapter, *messages, continues=True)

    def text(self, adapter: Qwen2VL, answer: str, ended: bool = True) -> ActionSegment:
        tokens = adapter.encode(answer) + (adapter.end_of_turn[:1] if ended else ())
        return ActionSegment(tokens, np.full(len(tokens), -1, np.float32), answer, ended)

    def choice(self, adapter: Qwen2VL, index: int, *choices: str) -> ActionSegment:
        entries = tuple(adapter.encode(choice) for choice in choices)
        recorded = np.full(1, -1, np.float32)
        return ActionSegment(entries[index], recorded, choices[index], choice=index, choices=entries)

    def episode(self, *segments: Segment, group: int = 0) -> Trajectory:
        return Trajectory(Example("train.jsonl:12"), 0, group, conversation(segments), terminated=True)

    def plain_logits(self, adapter: Qwen2VL, model: Any, tokens: Sequence[int], images: Sequence[Image]) -> Tensor:
        """[T, V] of one whole sequence: positions, masks and image tokens are transformers' own business."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(tokens)])}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == adapter.image_token).int()
        if images:
            pictures = [image.to_pil() for image in images]
            inputs |= dict(adapter.processor.image_processor(images=pictures, return_tensors="pt"))
        logits: Tensor = model(**inputs, use_cache=False).logits[0]
        return logits

    def plain_decisions(self, policy: Policy, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of a trajectory alone; each choice as a sequence of its own."""
        adapter: Any = policy.adapter
        forbidden = torch.zeros(policy.forbidden.shape, dtype=torch.bool)
        for name in ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad"):
            forbidden[adapter.tokenizer.convert_tokens_to_ids(f"<|{name}|>")] = True

        def table(sequence: Sequence[int], images: Sequence[Image]) -> Tensor:
            logits = self.plain_logits(adapter, policy.model, sequence, images) / policy.temperature
            return torch.log_softmax(logits.masked_fill(forbidden, -torch.inf), dim=-1)

        logprobs, entropies = [], []
        for turn in trajectory.turns:
            action = turn.action
            tokens = [token for segment in turn.context for token in segment.tokens]
            shown = [segment for segment in turn.context if isinstance(segment, ContextSegment)]
            images = [image for segment in shown for image in segment.images]
            if action.choices is not None and action.choice is not None:
                scores = []
                for choice in action.choices:
                    rows = table([*tokens, *choice], images)
                    scores.append(sum(rows[len(tokens) + k - 1, token] for k, token in enumerate(choice)))
                distribution = torch.log_softmax(torch.stack(scores), 0)
                logprobs.append(distribution[action.choice])
                entropies.append(-(distribution.exp() * distribution).sum())
            else:
                rows = table([*tokens, *action.tokens], images)
                for k, token in enumerate(action.tokens):
                    row = rows[len(tokens) + k - 1]
                    logprobs.append(row[token])
                    entropies.append(-(row[~forbidden].exp() * row[~forbidden]).sum())
        return torch.stack(logprobs), torch.stack(entropies)

    def conversations(self) -> dict[str, tuple[Message, ...]]:
        """Images of several sizes before, between and after text, in one message and in several."""
        small, wide, tall = self.picture(8, 8), self.picture(64, 32, 1), self.picture(24, 56, 2)
        large = self.picture(200, 150, 3)
        return {
            "text alone": (Message.user("What is two and two?"),),
            "an image before the text": (Message.user(small, "Which digit?"),),
            "an image after the text": (Message.user("Which digit?", tall),),
            "images around the text": (Message.user("Is ", wide, " the same as ", tall, " or ", small, "?"),),
            "images side by side": (Message.user(tall, wide, small, "Which is largest?"),),
            "an image alone": (Message.user(wide),),
            "an image that is shrunk": (Message.user(large, "What is it?"),),
            "a system message": (
                Message("system", Message.user("Answer with one word.").parts),
                Message.user("Which?", small),
            ),
            "several turns": (
                Message.user("Look: ", wide),
                Message("assistant", Message.user("A wall.").parts),
                Message.user(tall, "And now? ", small),
            ),
            "letters beyond ASCII": (Message.user("Größe, 数字, 🙂?", small, "\n\n  spaces  "),),
        }

    def trajectories(self, adapter: Qwen2VL) -> list[Trajectory]:
        """Prompts with none, one and several images of several sizes; one turn and several; text and choices."""
        prompts = {name: self.prompt(adapter, *messages) for name, messages in self.conversations().items()}
        closer = self.observation(adapter, Message.user("closer ", self.picture(40, 16, 4)))
        last = self.observation(adapter, Message.user(self.picture(8, 24, 5), self.picture(32, 32, 6)))

        def text(answer: str, ended: bool = True) -> ActionSegment:
            return self.text(adapter, answer, ended)

        moves = ("left", "right", "go on")
        return [
            *(
                self.episode(prompts["images around the text"], text(answer), group=0)
                for answer in ("yes", "no, it is not", "yes", "")
            ),
            *(self.episode(prompts["text alone"], text(answer, ended=False), group=1) for answer in ("4", "four")),
            self.episode(prompts["an image after the text"], text("seven"), group=2),
            self.episode(prompts["images side by side"], self.choice(adapter, 1, "a", "b", "c"), group=3),
            self.episode(prompts["images side by side"], self.choice(adapter, 0, *moves), group=3),
            self.episode(prompts["several turns"], text("Hm."), closer, text("left"), last, text("A key"), group=4),
            self.episode(prompts["several turns"], text("Hm."), last, text("up"), closer, text("Stop"), group=4),
            self.episode(
                prompts["an image before the text"],
                self.choice(adapter, 2, *moves),
                closer,
                self.choice(adapter, 1, *moves),
                last,
                text(""),
                group=5,
            ),
        ]


@pytest.fixture
def bench() -> Workbench:
    return Workbench()


@pytest.fixture
def gradients() -> Callable[[Policy, Tensor], Mapping[str, Tensor]]:
    """Of a loss, by parameter."""

    def of(policy: Policy, loss: Tensor) -> Mapping[str, Tensor]:
        named = dict(policy.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        return dict(zip(named, found, strict=True))

    return of
