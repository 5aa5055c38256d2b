"""The tiny models, their real processors, and plain forward passes of whole sequences to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message
from rllava_core.mdp.trajectory import ContextSegment, Trajectory
from rllava_core.policy.policy import Policy
from rllava_smolvlm.adapter import SmolVLM
from rllava_smolvlm.config import SmolVLMOptions


class Workbench:
    """Makes adapters, policies, pictures and conversations, and says what transformers alone says of them."""

    def adapter(self, **options: Any) -> SmolVLM:
        return SmolVLM(SmolVLMOptions(**({} if "path" in options else {"from_scratch": "tiny"}) | options))

    def policy(self, temperature: float = 1.0, **options: Any) -> Policy:
        torch.manual_seed(0)
        adapter = self.adapter(**options)
        return Policy(adapter, adapter.load(), temperature=temperature).eval()

    def picture(self, width: int, height: int, seed: int = 0) -> Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.from_array(pixels, f"picture {seed}")

    def conversations(self) -> dict[str, tuple[Message, ...]]:
        """Images of several sizes before, between and after text, in one message and in several."""
        small, wide, tall = self.picture(8, 8), self.picture(64, 32, 1), self.picture(24, 56, 2)
        long, large = self.picture(100, 4, 3), self.picture(200, 150, 4)
        return {
            "text alone": (Message.user("What is two and two?"),),
            "an image before the text": (Message.user(small, "Which digit?"),),
            "an image after the text": (Message.user("Which digit?", wide),),
            "images around the text": (Message.user("Is ", wide, " the same as ", tall, " or ", small, "?"),),
            "images side by side": (Message.user(tall, wide, small, "Which is largest?"),),
            "an image alone": (Message.user(long),),
            "an image that is shrunk": (Message.user(large, "What is it?"),),
            "a system message": (
                Message("system", Message.user("Answer with one word.").parts),
                Message.user("Which?", small),
            ),
            "several turns": (
                Message.user("Look: ", wide),
                Message("assistant", Message.user("A wall.").parts),
                Message.user(tall, "\n\nAnd now?\n", long),
            ),
            "letters beyond ASCII": (Message.user("Größe, 数字, 🙂?", small, "\n\n  spaces  "),),
        }

    def processed(self, processor: Any, *conversations: Sequence[Message]) -> dict[str, Tensor]:
        """What the real processor makes of a batch of conversations, up to where the assistant answers."""
        texts, images = [], []
        for messages in conversations:
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
            texts.append(processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
            images.append(
                [part.image.to_pil() for one in messages for part in one.parts if isinstance(part, ImagePart)]
            )
        return dict(
            processor(text=texts, images=images if any(images) else None, padding=len(texts) > 1, return_tensors="pt")
        )

    def rendered(self, adapter: SmolVLM, messages: Sequence[Message]) -> tuple[list[int], list[Any]]:
        """Token ids and features of a conversation, from the adapter."""
        images = [part.image for one in messages for part in one.parts if isinstance(part, ImagePart)]
        features = [adapter.preprocess(image) for image in images]
        return list(adapter.render(messages, features)), features

    def plain_logprobs(self, policy: Policy, trajectory: Trajectory) -> Tensor:
        """Of the decisions of a trajectory alone, each choice a sequence of its own: transformers on plain sequences.

        Nothing is shared with the adapter but the processor and the model.
        """
        adapter: Any = policy.adapter
        names = adapter.tokenizer.get_added_vocab()
        never = [number for name, number in names.items() if "image" in name or "global" in name or "_col_" in name]
        forbidden = torch.zeros(policy.model.lm_head.out_features, dtype=torch.bool)
        forbidden[never] = True

        def table(sequence: Sequence[int], images: Sequence[Image]) -> Tensor:
            inputs: dict[str, Any] = {"input_ids": torch.tensor([list(sequence)])}
            if images:
                pictures = [[image.to_pil() for image in images]]
                inputs |= dict(adapter.processor.image_processor(images=pictures, return_tensors="pt"))
            with torch.no_grad():
                logits = policy.model(**inputs, use_cache=False).logits[0] / policy.temperature
            return torch.log_softmax(logits.masked_fill(forbidden, -torch.inf), dim=-1)

        found: list[Tensor] = []
        for turn in trajectory.turns:
            action = turn.action
            tokens = [token for segment in turn.context for token in segment.tokens]
            images = [
                image for segment in turn.context if isinstance(segment, ContextSegment) for image in segment.images
            ]
            answers = action.choices if action.choices is not None else (action.tokens,)
            rows = [table([*tokens, *answer], images)[len(tokens) - 1 :] for answer in answers]
            picked = [
                torch.stack([row[place, token] for place, token in enumerate(answer)])
                for row, answer in zip(rows, answers, strict=True)
            ]
            if action.choice is None:
                found.extend(picked[0])
            else:
                found.append(torch.log_softmax(torch.stack([item.sum() for item in picked]), 0)[action.choice])
        return torch.stack(found)


@pytest.fixture
def bench() -> Workbench:
    return Workbench()
