"""Pictures are preprocessed once, and dropping them from memory changes no result."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from rllava_core.errors import DataError, ModelError
from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ContextSegment, Trajectory
from rllava_core.policy.batch import BatchBuilder
from rllava_core.policy.encoding import encoder_of
from rllava_core.policy.media import MediaStore
from rllava_core.testing.tiny import PATCH

PATCH_BYTES = 3 * PATCH * PATCH * 4


def test_equal_pixels_are_preprocessed_once_wherever_they_came_from(toy: Any) -> None:
    adapter = toy.adapter()
    store = MediaStore(adapter)
    first = toy.picture(8, 8)
    again, other = Image.from_array(first.pixels.copy(), "a copy"), toy.picture(8, 8, 1)

    features = store.features([first, again, other, first])

    assert adapter.preprocessed == ["picture 0", "picture 1"]
    assert features[0] is features[1] is features[3]
    expected = [adapter.preprocess(image)["patches"] for image in (first, again, other, first)]
    for found, values in zip(features, expected, strict=True):
        assert torch.equal(found["patches"], values)


def test_the_same_bytes_in_another_shape_are_another_picture(toy: Any) -> None:
    pixels = toy.picture(8, 4).pixels
    store = MediaStore(toy.adapter())

    tall, wide = store.features([Image.from_array(pixels), Image.from_array(np.reshape(pixels, (4, 8, 3)))])

    assert not torch.equal(tall["patches"], wide["patches"])


def test_the_least_recently_used_is_dropped_beyond_the_limit(toy: Any) -> None:
    adapter = toy.adapter()
    store = MediaStore(adapter, limit_bytes=4 * PATCH_BYTES)
    one, two, three = (toy.picture(8, 4, seed) for seed in range(3))  # two patches each: two fit

    store.features([one, two, one, three])  # drops the second
    adapter.preprocessed.clear()
    store.features([one, three])
    assert adapter.preprocessed == []
    store.features([two])  # drops the first
    assert adapter.preprocessed == ["picture 1"]
    store.features([three, two, one])
    assert adapter.preprocessed == ["picture 1", "picture 0"]


def test_a_large_picture_drops_as_many_as_it_must(toy: Any) -> None:
    adapter = toy.adapter()
    store = MediaStore(adapter, limit_bytes=4 * PATCH_BYTES)
    small = [toy.picture(4, 4, seed) for seed in range(4)]
    large = toy.picture(4, 12, 9)

    store.features([*small, large])  # three patches leave room for one
    adapter.preprocessed.clear()
    store.features([small[3], large])

    assert adapter.preprocessed == []
    store.features(small[:3])
    assert adapter.preprocessed == ["picture 0", "picture 1", "picture 2"]


def test_a_picture_larger_than_the_limit_is_still_served(toy: Any) -> None:
    adapter = toy.adapter()
    store = MediaStore(adapter, limit_bytes=1)
    [features] = store.features([toy.picture(8, 8)])

    assert features["patches"].shape[0] == 4
    store.features([toy.picture(8, 8)])
    assert adapter.preprocessed == ["picture 0"]


def test_dropping_features_changes_no_result(toy: Any, mixed: list[Trajectory]) -> None:
    policy = toy.policy()
    outputs = []
    for limit in (2**30, 1):
        builder = BatchBuilder(policy.adapter, MediaStore(policy.adapter, limit))
        for trajectory in mixed:
            builder.add_trajectory(trajectory)
        outputs.append(policy(builder.build()))

    assert torch.equal(outputs[0].logprobs, outputs[1].logprobs)
    assert torch.equal(outputs[0].entropies, outputs[1].entropies)


def test_what_is_frozen_sees_each_picture_once(toy: Any, mixed: list[Trajectory]) -> None:
    policy = toy.policy()
    assert encoder_of(policy, nullcontext) is None, "its vision part is trained"
    policy.model.vision.requires_grad_(False)
    plain, store = MediaStore(policy.adapter), MediaStore(policy.adapter)
    seen: list[int] = []
    policy.model.vision.register_forward_hook(lambda _, patches, __: seen.append(len(patches[0])))

    store.encode_by(encoder_of(policy, nullcontext))
    outputs = []
    for media in (plain, store, store):
        before = len(seen)
        builder = BatchBuilder(policy.adapter, media)
        for trajectory in mixed:
            builder.add_trajectory(trajectory)
        outputs.append((policy(builder.build()), len(seen) - before))

    pictures = {
        image.digest
        for trajectory in mixed
        for turn in trajectory.turns
        for segment in turn.context
        if isinstance(segment, ContextSegment)
        for image in segment.images
    }
    (expected, passes), (first, encoded), (again, none) = outputs
    assert passes > 0
    assert (encoded, none) == (len(pictures), 0)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    numbers = [
        [item.logprobs, item.entropies, *torch.autograd.grad(item.logprobs.sum(), weights)]
        for item in (expected, first, again)
    ]
    for values in numbers[1:]:
        for found, right in zip(values, numbers[0], strict=True):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_what_is_trained_takes_no_part_in_what_is_kept(toy: Any) -> None:
    """An adapter that says of a weight it sees with that it is the language model's."""
    policy = toy.policy()
    policy.model.vision.weight.requires_grad_(False)
    policy.adapter.part_of = lambda name: "vision" if name == "vision.weight" else "language"
    store = MediaStore(policy.adapter)
    store.encode_by(encoder_of(policy, nullcontext))

    with pytest.raises(ModelError, match="something that is trained takes part"):
        store.shown([toy.picture(8, 8)])


def test_encoded_pictures_are_bounded_by_bytes_of_their_own(toy: Any) -> None:
    adapter = toy.adapter()
    made: list[int] = []

    def encode(features: Any) -> Any:
        made.append(len(features["patches"]))
        return {"seen": torch.zeros(len(features["patches"]), 16)}

    store = MediaStore(adapter)
    store.encode_by(encode, limit_bytes=4 * 16 * 4)
    one, two, three = (toy.picture(8, 4, seed) for seed in range(3))  # two patches each: two fit

    store.shown([one, two, one, three])  # drops the second
    assert made == [2, 2, 2]
    store.shown([one, three])
    assert made == [2, 2, 2]
    store.shown([two])
    assert made == [2, 2, 2, 2]
    assert adapter.preprocessed == ["picture 0", "picture 1", "picture 2"]
    assert store.collated(store.shown([one, two]))["seen"].shape == (4, 16)
    assert store.collated([]) == {}


def test_a_picture_that_the_model_cannot_take_is_named(toy: Any) -> None:
    with pytest.raises(DataError, match="picture 3"):
        MediaStore(toy.adapter()).features([toy.picture(8, 8), toy.picture(2, 8, 3)])
