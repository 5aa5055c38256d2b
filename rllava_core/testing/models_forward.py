"""Checks of what a model computes: caches, padding, batches, images and gradients, through the adapter alone."""

from __future__ import annotations

from unittest import SkipTest

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message
from rllava_core.policy.adapter import EncodesImages, ModelAdapter, OwnProcessor
from rllava_core.testing.conformance import require
from rllava_core.testing.models_base import ModelSuite, Piece, head_weight


class ForwardChecks(ModelSuite):
    """The half of the suite that runs the model."""

    @torch.no_grad()
    def test_hidden_states_have_one_row_a_token_and_fill_the_cache(self) -> None:
        adapter, model = self.loaded()
        piece = self.piece(adapter, *self.conversations()[0])
        cache = DynamicCache(config=model.config)
        count, size = len(piece.tokens), head_weight(adapter, model).shape[1]
        found = adapter.hidden_states(
            model,
            tokens=torch.tensor([piece.tokens]),
            attention_mask=torch.ones(1, count, dtype=torch.long),
            positions=adapter.positions(piece.tokens, piece.features, 0)[:, None],
            media=adapter.collate(piece.features),
            cache=cache,
        )
        shape = tuple(found.shape)
        require(shape == (1, count, size), f"hidden_states() gave the shape {shape}; expected {(1, count, size)}")
        held = int(cache.get_seq_length())
        require(held == count, f"the cache holds {held} tokens after a pass of {count}: pass it on to the model")

    @torch.no_grad()
    def test_a_sequence_through_the_cache_equals_the_whole(self) -> None:
        adapter, model = self.loaded()
        for parts in self.conversations():
            pieces = [self.piece(adapter, *parts), Piece(adapter.encode("so")), *self._later(adapter)]
            whole = sum(pieces[1:], start=pieces[0])
            [expected], [found] = self.hidden(adapter, model, [[whole]]), self.hidden(adapter, model, [pieces])
            self.require_close(
                found, expected, "a sequence in pieces through the cache has other hidden states than in one pass"
            )

    @torch.no_grad()
    def test_the_familys_own_forward_gives_the_same(self) -> None:
        """For an adapter that is an `OwnProcessor`. All the other checks compare the adapter with itself."""
        adapter, model = self.loaded()
        if not isinstance(adapter, OwnProcessor):
            raise SkipTest("the adapter offers nothing of the family's own to compare with")
        for parts in self.conversations():
            own = adapter.own_tokens([Message.user(*parts)])
            piece = self.piece(adapter, *parts)
            require(
                tuple(own) == piece.tokens,
                f"the family's processor makes {len(own)} tokens of a prompt of which render() makes "
                f"{len(piece.tokens)}, or others",
            )
            images = [part for part in parts if isinstance(part, Image)]
            expected = model(**adapter.own_inputs(piece.tokens, images)).logits[0]
            [states] = self.hidden(adapter, model, [[piece]])
            self.require_close(
                adapter.lm_head(model)(states),
                expected,
                "the model's own forward gives other logits for a whole prompt",
            )

    @torch.no_grad()
    def test_images_encoded_apart_are_seen_the_same(self) -> None:
        """For an adapter that is an `EncodesImages`: each image alone, and then all of them in one batch."""
        adapter, model = self.loaded()
        if not isinstance(adapter, EncodesImages):
            raise SkipTest("the adapter does not encode images apart")
        says = adapter.encodes_images(model)
        require(isinstance(says, bool), f"encodes_images() gave {says!r}; say True or False")
        if not says:
            raise SkipTest("the adapter says that it cannot encode images of this model apart")
        rows = [[self.piece(adapter, *parts)] for parts in self.conversations()]
        features = [item for [piece] in rows for item in piece.features]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(adapter.part_of(name) == "language")
        with torch.enable_grad():
            alone = adapter.encode_images(model, adapter.collate(features[:1]))
        require(
            not any(values.requires_grad for values in alone.values()),
            "encode_images() computes with weights that part_of() says are the language model's, which may be trained",
        )
        encoded = [adapter.encode_images(model, adapter.collate([item])) for item in features]
        try:
            media = {name: torch.cat([item[name] for item in encoded]) for name in encoded[0]}
            found = self.hidden(adapter, model, rows, [media])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            require(False, f"hidden_states() does not take what encode_images() made of several images ({problem})")
        for own, expected in zip(found, self.hidden(adapter, model, rows), strict=True):
            self.require_close(own, expected, "images that were encoded apart give other hidden states")

    @torch.no_grad()
    def test_continuations_in_one_row_do_not_see_each_other(self) -> None:
        """Two answers to a prompt, one of which goes on with an image, under a mask that is added to the scores.

        A family that says it takes no trees is never given such a mask, by no other check either.
        """
        adapter, model = self.loaded()
        says = getattr(adapter, "takes_trees", None)
        require(isinstance(says, bool), f"takes_trees is {says!r}; say True or False")
        if not says:
            raise SkipTest("the family says that it takes no trees")
        try:
            self._require_trees(adapter, model)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            require(
                False,
                f"a mask of four dimensions raised {type(error).__name__}: {error}; if the family takes none, set "
                "`takes_trees = False`",
            )

    def _require_trees(self, adapter: ModelAdapter, model: PreTrainedModel) -> None:
        prompt = self.piece(adapter, "Is it ", self.picture(0), "?")
        ways = [Piece(adapter.encode("no")), Piece(adapter.encode("yes, see")) + self._later(adapter)[0]]
        cache = DynamicCache(config=model.config)
        before = adapter.positions(prompt.tokens, prompt.features, 0)
        read = len(prompt.tokens)
        adapter.hidden_states(
            model,
            tokens=torch.tensor([prompt.tokens]),
            attention_mask=torch.ones(1, read, dtype=torch.long),
            positions=before[:, None],
            media=adapter.collate(prompt.features),
            cache=cache,
        )
        start = int(before.max()) + 1
        blocks = [torch.ones(len(way.tokens), len(way.tokens)).tril() for way in ways]
        row = ways[0] + ways[1]
        sees = torch.cat([torch.ones(len(row.tokens), read), torch.block_diag(*blocks)], dim=1).bool()
        lowest = torch.finfo(model.dtype).min
        found = adapter.hidden_states(
            model,
            tokens=torch.tensor([row.tokens]),
            attention_mask=torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, lowest)[None, None],
            positions=torch.cat([adapter.positions(way.tokens, way.features, start) for way in ways], dim=1)[:, None],
            media=adapter.collate(row.features),
            cache=cache,
        )[0]
        alone = [self.hidden(adapter, model, [[prompt, way]])[0][read:] for way in ways]
        self.require_close(
            found,
            torch.cat(alone),
            "two continuations in one row, that must not see each other, differ from each alone",
        )
        count = read + len(row.tokens)
        seen = torch.ones(count, count, dtype=torch.bool).tril()
        seen[read:] = sees
        whole = prompt + row
        packed = adapter.hidden_states(
            model,
            tokens=torch.tensor([whole.tokens]),
            attention_mask=torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, lowest)[None, None],
            positions=torch.cat([before, *(adapter.positions(way.tokens, way.features, start) for way in ways)], dim=1)[
                :, None
            ],
            media=adapter.collate(whole.features),
            cache=None,
        )[0, read:]
        self.require_close(
            packed,
            torch.cat(alone),
            "a prompt and two continuations of it in one row, without a cache, differ from each alone",
        )

    @torch.no_grad()
    def test_padding_on_the_right_changes_nothing(self) -> None:
        adapter, model = self.loaded()
        short = [self.piece(adapter, "?"), Piece(adapter.encode("so it is"))]
        long = [self.piece(adapter, "a much longer question that pads the other"), Piece(adapter.encode("no"))]
        [expected] = self.hidden(adapter, model, [short])
        found, _ = self.hidden(adapter, model, [short, long])
        self.require_close(found, expected, "padding changes the hidden states of the tokens before or after it")

    @torch.no_grad()
    def test_a_batch_equals_its_sequences_one_by_one(self) -> None:
        """Images of several sizes, none, one and three of them in a row."""
        adapter, model = self.loaded()
        rows = [[self.piece(adapter, *parts), *self._later(adapter)] for parts in self.conversations()]
        together = self.hidden(adapter, model, rows)
        for number, (row, found) in enumerate(zip(rows, together, strict=True)):
            [expected] = self.hidden(adapter, model, [row])
            self.require_close(found, expected, f"sequence {number} of a batch of mixed images differs from it alone")

    @torch.no_grad()
    def test_the_order_of_a_batch_changes_nothing(self) -> None:
        adapter, model = self.loaded()
        rows = [[self.piece(adapter, *parts)] for parts in self.conversations()]
        forwards, backwards = self.hidden(adapter, model, rows), self.hidden(adapter, model, rows[::-1])
        for found, expected in zip(backwards[::-1], forwards, strict=True):
            self.require_close(found, expected, "a batch in another order gives a sequence other hidden states")

    @torch.no_grad()
    def test_images_are_seen(self) -> None:
        adapter, model = self.loaded()
        [one], [other] = (
            self.hidden(adapter, model, [[self.piece(adapter, self.picture(0, seed), "Which?")]]) for seed in (1, 2)
        )
        self.require_different(one[-1], other[-1], "another image gives the same hidden states: it is not seen")
        logits = adapter.lm_head(model)
        self.require_different(logits(one[-1]), logits(other[-1]), "another image gives the same logits")

    @torch.no_grad()
    def test_images_in_another_order_are_another_prompt(self) -> None:
        adapter, model = self.loaded()
        first, second = self.picture(0, 1), self.picture(0, 2)
        [one], [other] = (
            self.hidden(adapter, model, [[self.piece(adapter, "From ", start, " to ", end, "?")]])
            for start, end in ((first, second), (second, first))
        )
        self.require_different(one[-1], other[-1], "two images in another order give the same hidden states")

    @torch.no_grad()
    def test_an_image_belongs_to_its_own_sequence(self) -> None:
        adapter, model = self.loaded()
        rows = [
            [[self.piece(adapter, self.picture(0, 1), "A")], [self.piece(adapter, self.picture(0, seed), "B")]]
            for seed in (2, 3)
        ]
        (own, other), (same, changed) = (self.hidden(adapter, model, batch) for batch in rows)
        self.require_close(same, own, "another image in one sequence of a batch changes the sequence beside it")
        self.require_different(changed[-1], other[-1], "another image in the second sequence of a batch is not seen")

    def test_gradients_flow_through_the_cache_to_every_part(self) -> None:
        """The prompt with its image is computed first; what is learnt comes after it."""
        adapter, model = self.loaded()
        prompt, answer = self.piece(adapter, "Is it ", self.picture(0), "?"), Piece(adapter.encode("yes"))
        media = {
            name: values.detach().clone().requires_grad_(values.is_floating_point())
            for name, values in adapter.collate(prompt.features).items()
        }
        with_image = self._gradients(adapter, model, [prompt, answer], [media, {}])
        pixels = [values.grad for values in media.values() if values.is_floating_point()]
        require(
            any(gradient is not None and bool(gradient.any()) for gradient in pixels),
            "no gradient reaches the pixels of the prompt from the answer: is the cache detached, or the vision part "
            "run without gradients?",
        )
        without = self._gradients(adapter, model, [self.piece(adapter, "Is it?"), answer], [{}, {}])
        require(without, "no weight gets a gradient from a text")
        vision = set(with_image) - set(without)
        require(
            vision or not self.trains_vision,
            "no weight gets a gradient only where there is an image: if the vision part is meant to be frozen, set "
            "`trains_vision = False`",
        )
        [whole] = self.hidden(adapter, model, [[prompt + answer]])
        model.zero_grad()
        whole[-len(answer.tokens) :].square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in with_image and parameter.grad is not None:
                scale = float(parameter.grad.abs().max())
                gap = float((with_image[name] - parameter.grad).abs().max())
                # Relative to the largest gradient of the weight: sums of float32 in another order.
                require(
                    gap <= 10 * self.tolerance * max(scale, 1.0),
                    f"the gradient of {name} through the cache differs from that of one pass by {gap:.2g}",
                )

    def _later(self, adapter: ModelAdapter) -> list[Piece]:
        """A second turn with an image of its own, and an answer to it."""
        return [self.piece(adapter, self.picture(1, 5), "and now?"), Piece(adapter.encode("no"))]

    def _gradients(
        self, adapter: ModelAdapter, model: PreTrainedModel, pieces: list[Piece], media: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """By name, of the weights that the last piece has a gradient for which is not zero."""
        model.zero_grad()
        [states] = self.hidden(adapter, model, [pieces], media)
        last = states[-len(pieces[-1].tokens) :].square().sum()
        require(last.requires_grad, "the hidden states carry no gradient: is the model run under no_grad?")
        last.backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and bool(parameter.grad.any())
        }
