"""Batches of a policy: contexts in, decisions out, and nothing computed twice.

What a batch holds, and why. Many trajectories share their beginning (a group shares its prompt with its images), and
many decisions share their state. So a batch is a set of distinct *prefixes*, a set of *trees* that continue a prefix,
and *reads*: distinct positions whose hidden state is used. A tree is a row of distinct *branches*, each of which
continues the prefix or another branch somewhere in its middle; a token of it sees the prefix and the branches that it
goes on from, and not what grows beside it. The policy runs each prefix once, then all trees on top of the prefixes'
key-value cache, and gradients flow through the cache. Every decision points at a read. In a *packed* batch a prefix
is itself a branch, from which all others of its tree grow: the policy runs once, without a cache, which layers that are
computed again in the backward pass could not fill. For a model that takes no trees every row is one line: a prefix, if
it is packed, and one branch, which repeats what it would have grown from.

- A text decision is one token: its log-prob under the state that it was sampled in.
- A choice is one decision: the scores of all choices (sums of their tokens' log-probs), normalised over the choices.
- Turns of which each sees all that came before are one prefix and one branch; a turn that sees less is a prefix of its
  own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Stretch, Trajectory, stretches
from rllava_core.policy.adapter import Features, ModelAdapter
from rllava_core.policy.checks import check_context, check_trajectory
from rllava_core.policy.media import MediaStore

T = TypeVar("T")

ROOM = 1024
"""Tokens that a tree of a packed batch may have behind its prefix, however short that is."""


@dataclass(frozen=True)
class PolicyBatch:
    """P prefixes, B trees, R reads, K scored tokens, U states with choices, D decisions.

    Padded on the right. Index tensors use -1 for padding.
    """

    prefix_seen: Tensor  # [P], row of the memory that each prefix continues; [0] where they begin conversations
    prefix_tokens: Tensor  # [P, S]
    prefix_mask: Tensor  # [P, S]
    prefix_positions: Tensor  # [axes, P, S]
    prefix_media: dict[str, Tensor]
    next_position: Tensor  # [P], where a continuation of each prefix starts
    tree_prefix: Tensor  # [B], which prefix each tree continues; [0] in a packed batch, which has none
    tree_tokens: Tensor  # [B, T]
    tree_mask: Tensor  # [B, T]
    tree_sees: Tensor | None  # [B, T, T] bool, which tokens of its tree a token sees; None: in all, all up to itself
    tree_positions: Tensor  # [axes, B, T]
    tree_media: dict[str, Tensor]
    read_from: Tensor  # [R], into the last state of each prefix, then all of each tree: [P + B·T]
    scored_read: Tensor  # [K], ascending, into reads
    scored_token: Tensor  # [K]
    choice_tokens: Tensor  # [U, C, M], into scored tokens
    state_read: Tensor  # [U], into reads: the state in which a choice is made
    decision_read: Tensor  # [D], into reads: the state in which each decision is made
    decision_logprob: Tensor  # [D], into scored tokens, then the flattened [U, C] choices: [K + U·C]
    decision_entropy: Tensor  # [D], into reads, then states: [R + U]

    @property
    def packed(self) -> bool:
        return len(self.prefix_tokens) == 0

    def to(self, device: torch.device) -> PolicyBatch:
        """The same batch on a device."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            return value and {name: tensor.to(device, non_blocking=True) for name, tensor in value.items()}

        return replace(self, **{field.name: moved(getattr(self, field.name)) for field in fields(self)})


class BatchBuilder:
    """Collects contexts, states and decisions, each distinct one once, and pads them into a `PolicyBatch`.

    packed: let trees begin with their prefixes, so that the batch needs no cache.
    shared: off to share nothing between trajectories, for those who cannot and to compare with. Packed only.
    """

    def __init__(self, adapter: ModelAdapter, media: MediaStore, *, packed: bool = False, shared: bool = True) -> None:
        assert packed or shared, "what shares nothing has no use for a cache"
        self._adapter = adapter
        self._media = media
        self._packed = packed
        self._shared = shared
        self._trajectories = 0
        self._prefixes = _Numbered[_Prefix]()
        self._branches = _Numbered[_Branch]()
        self._reads = _Numbered[_Place]()
        self._scored = _Numbered[tuple[int, int]]()  # (read, token)
        self._states = _Numbered[tuple[int, tuple[tuple[int, ...], ...]]]()  # (read, scored tokens of each choice)
        self._decisions: list[_Decision] = []
        # The members of a group repeat each other's prompts, answers and choices.
        self._known_pieces: dict[object, _Piece] = {}
        self._known_states: dict[object, int] = {}
        # Of a packed batch: tokens that continue each prefix, by its trees; and the branches that do.
        self._packed_trees: dict[int, list[int]] = {}
        self._packed_branches: dict[tuple[int, _Piece], int] = {}

    def add_context(self, segments: Sequence[Segment], name: str, seen: int = -1, start: int = 0) -> int:
        """A whole context as one prefix. Returns its number; `name` is for messages.

        seen, start: where the policy has read the beginning before: the row of its memory, and the first position that
        is free; `segments` are then what follows.
        """
        owner = 0 if self._shared else self._trajectories
        return self._prefixes.add(_Prefix(seen, self._piece(segments, start, name), owner))

    def add_choices(self, prefix: int, choices: Sequence[tuple[int, ...]]) -> int:
        """The state at the end of a prefix with its discrete actions as token ids. Returns the state's number."""
        return self._state(prefix, None, 0, self._prefixes[prefix].piece.next_position, choices)

    def add_trajectory(self, trajectory: Trajectory) -> None:
        """Every decision of a trajectory, in order.

        Raises InvariantError, with its name, if it must not be trained on.
        """
        check_trajectory(trajectory, self._adapter)
        self._trajectories += 1
        for stretch in stretches(trajectory.turns):
            self._add_stretch(stretch, trajectory.name)

    def build(self) -> PolicyBatch:
        """Everything that was added, padded."""
        prefixes = [] if self._packed else [prefix.piece for prefix in self._prefixes]
        prefix_tokens, prefix_mask, prefix_positions = self._pad([[piece] for piece in prefixes])
        trees = self._trees()
        pieces = [[self._branches[number].piece for number in tree] for tree in trees]
        tree_tokens, tree_mask, tree_positions = self._pad(pieces)
        width = tree_tokens.shape[1]
        starts = self._starts(trees, width)
        # The language head goes through the reads in order, so scored tokens are sorted by their read.
        scored = sorted(range(len(self._scored)), key=lambda number: self._scored[number][0])
        rank = {number: position for position, number in enumerate(scored)}
        widest = max((len(choices) for _, choices in self._states), default=0)
        longest = max((len(tokens) for _, choices in self._states for tokens in choices), default=0)
        choice_tokens = torch.full((len(self._states), widest, longest), -1)
        for state, (_, choices) in enumerate(self._states):
            for choice, numbers in enumerate(choices):
                choice_tokens[state, choice, : len(numbers)] = torch.tensor([rank[number] for number in numbers])
        first_choice, first_state = len(scored), len(self._reads)
        seen = [prefix.seen for prefix in self._prefixes]
        assert len({row < 0 for row in seen}) <= 1, "prefixes begin conversations, or continue them: never both"
        return PolicyBatch(
            prefix_seen=_integers(row for row in seen if row >= 0),
            prefix_tokens=prefix_tokens,
            prefix_mask=prefix_mask,
            prefix_positions=prefix_positions,
            prefix_media=self._collate(prefixes),
            next_position=_integers(piece.next_position for piece in prefixes),
            tree_prefix=_integers(self._branches[tree[0]].after.prefix for tree in trees if prefixes),
            tree_tokens=tree_tokens,
            tree_mask=tree_mask,
            tree_sees=self._sees(trees, starts, width),
            tree_positions=tree_positions,
            tree_media=self._collate([piece for tree in pieces for piece in tree]),
            read_from=_integers(
                place.prefix if place.branch is None else len(prefixes) + starts[place.branch] + place.offset - 1
                for place in self._reads
            ),
            scored_read=_integers(self._scored[number][0] for number in scored),
            scored_token=_integers(self._scored[number][1] for number in scored),
            choice_tokens=choice_tokens,
            state_read=_integers(read for read, _ in self._states),
            decision_read=_integers(decision.read for decision in self._decisions),
            decision_logprob=_integers(
                rank[decision.scored]
                if decision.state is None
                else first_choice + decision.state * widest + decision.choice
                for decision in self._decisions
            ),
            decision_entropy=_integers(
                decision.read if decision.state is None else first_state + decision.state
                for decision in self._decisions
            ),
        )

    def _trees(self) -> list[list[int]]:
        """Branches, by number, in rows: each with what grows from it, and beside others of its prefix.

        A row is as long as its prefix at most, or as the longest that need not be cut. Then its tokens never see much
        more than they would alone, and the cache of the prefix is seldom copied.
        """
        grown: dict[int, list[int]] = {}  # by the branch that continues the prefix
        roots: list[int] = []
        for number, branch in enumerate(self._branches):
            roots.append(number if branch.after.branch is None else roots[branch.after.branch])
            grown.setdefault(roots[number], []).append(number)
        lengths = {
            root: sum(len(self._branches[number].piece.tokens) for number in all_) for root, all_ in grown.items()
        }
        limits = [prefix.piece.start + len(prefix.piece.tokens) for prefix in self._prefixes]
        for root, length in lengths.items():
            prefix = self._branches[root].after.prefix
            limits[prefix] = max(limits[prefix], length)
        trees: list[list[int]] = []
        open_: dict[int, tuple[list[int], int]] = {}  # by prefix: the tree that it fills, and its length
        for root, all_ in grown.items():
            prefix = self._branches[root].after.prefix
            tree, length = open_.get(prefix, ([], 0))
            if not tree or not self._adapter.takes_trees or length + lengths[root] > limits[prefix]:
                tree, length = [], 0
                trees.append(tree)
            tree += all_
            open_[prefix] = (tree, length + lengths[root])
        return trees

    def _starts(self, trees: Sequence[Sequence[int]], width: int) -> dict[int, int]:
        """Where each branch begins in the flattened [B, T]."""
        starts = {}
        for row, tree in enumerate(trees):
            start = row * width
            for number in tree:
                starts[number] = start
                start += len(self._branches[number].piece.tokens)
        return starts

    def _sees(self, trees: Sequence[Sequence[int]], starts: Mapping[int, int], width: int) -> Tensor | None:
        """[B, T, T], or None where every tree is one line."""
        if all(self._is_line(tree) for tree in trees):
            return None
        assert self._adapter.takes_trees
        sees = torch.zeros(len(trees), width, width, dtype=torch.bool)
        for row, tree in zip(sees, trees, strict=True):
            for number in tree:
                branch, start = self._branches[number], starts[number] % width
                end = start + len(branch.piece.tokens)
                row[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
                if branch.after.branch is not None:
                    row[start:end] |= row[starts[branch.after.branch] % width + branch.after.offset - 1]
        return sees

    def _is_line(self, tree: Sequence[int]) -> bool:
        """Whether each branch goes on from the end of the one before it."""
        return all(
            self._branches[number].after.branch == before
            and self._branches[number].after.offset == len(self._branches[before].piece.tokens)
            for before, number in pairwise(tree)
        )

    def _add_stretch(self, stretch: Stretch, name: str) -> None:
        prefix = self.add_context(stretch.begin, name)
        tail = self._piece(stretch.rest, self._prefixes[prefix].piece.next_position, name)
        # One branch serves all decisions; the last of them is predicted, so nothing after its state is needed.
        last = stretch.rest[-1]
        unread = 1 if isinstance(last, ActionSegment) and last.choice is None else len(last.tokens)
        branch = self._branch(prefix, tail.cut(len(tail.tokens) - unread))
        offset = 0
        for segment in stretch.rest:
            if isinstance(segment, ActionSegment):
                self._add_decisions(prefix, branch, tail, offset, segment)
            offset += len(segment.tokens)

    def _add_decisions(self, prefix: int, branch: int | None, tail: _Piece, offset: int, action: ActionSegment) -> None:
        if action.choice is not None and action.choices is not None:
            position = tail.position(offset)
            state = self._state(prefix, branch, offset, position, action.choices)
            self._decisions.append(_Decision(self._states[state][0], state=state, choice=action.choice))
            return
        for step, token in enumerate(action.tokens):
            read = self._read(prefix, branch, offset + step)
            self._decisions.append(_Decision(read, scored=self._scored.add((read, token))))

    def _state(
        self, prefix: int, branch: int | None, offset: int, position: int, choices: Sequence[tuple[int, ...]]
    ) -> int:
        """The state after `offset` tokens of a branch, or at the end of a prefix (offset 0), and its choices.

        A choice of several tokens is scored along a branch of its own; its last token needs no forward pass, so choices
        of one token cost nothing beyond the state itself.
        """
        read = self._read(prefix, branch, offset)
        key = (read, tuple(choices))
        if key in self._known_states:
            return self._known_states[key]
        scored = []
        for choice in choices:
            reads = [read]
            if len(choice) > 1:
                if branch is None or not offset or self._adapter.takes_trees:
                    before, own = 0, self._extended(_nothing(position), choice[:-1])
                    grown = self._branch(prefix, own, branch if offset else None, offset)
                else:
                    before, own = offset, self._extended(self._branches[branch].piece.cut(offset), choice[:-1])
                    grown = self._branch(prefix, own)
                reads += [self._read(prefix, grown, before + step) for step in range(1, len(choice))]
            scored.append(tuple(self._scored.add(pair) for pair in zip(reads, choice, strict=True)))
        state = self._known_states[key] = self._states.add((read, tuple(scored)))
        return state

    def _branch(self, prefix: int, piece: _Piece, origin: int | None = None, offset: int = 0) -> int | None:
        if not piece.tokens:
            return None
        if offset > 0 or not self._packed:
            return self._branches.add(_Branch(self._place(prefix, origin, offset), piece))
        if (prefix, piece) not in self._packed_branches:
            after = self._end_of(prefix, len(piece.tokens))
            self._packed_branches[prefix, piece] = self._branches.add(_Branch(after, piece))
        return self._packed_branches[prefix, piece]

    def _read(self, prefix: int, branch: int | None, offset: int) -> int:
        return self._reads.add(self._place(prefix, branch, offset))

    def _place(self, prefix: int, branch: int | None, offset: int) -> _Place:
        """After `offset` tokens of a branch of a prefix, or at the end of the prefix itself (0)."""
        if offset > 0:
            return _Place(prefix, branch, offset)
        return self._end_of(prefix) if self._packed else _Place(prefix, None, 0)

    def _end_of(self, prefix: int, room: int = 0) -> _Place:
        """In a packed batch: the end of a prefix at the beginning of a tree that has room for so many tokens more.

        A tree has room for twice its prefix, or for what costs attention little. Where there is more, the prefix is
        read again, which is cheaper than tokens that look past ever more of what they must not see. Without trees there
        is room for one branch.
        """
        piece = self._prefixes[prefix].piece
        trees = self._packed_trees.setdefault(prefix, [0])
        most = max(2 * len(piece.tokens), ROOM) if self._adapter.takes_trees else 0
        if room and trees[-1] > 0 and trees[-1] + room > most:
            trees.append(0)
        trees[-1] += room
        tree = len(trees) - 1 if room else 0
        return _Place(prefix, self._branches.add(_Branch(_Place(prefix, None, tree), piece)), len(piece.tokens))

    def _piece(self, segments: Sequence[Segment], start: int, name: str) -> _Piece:
        key = (start, tuple((segment.tokens, _images(segment)) for segment in segments))
        if key in self._known_pieces:
            return self._known_pieces[key]
        piece = _nothing(start)
        for segment in segments:
            images = _images(segment)
            features = self._media.features(images)
            if isinstance(segment, ContextSegment):
                check_context(segment, features, self._adapter, name)
            piece = self._extended(piece, segment.tokens, images, features)
        self._known_pieces[key] = piece
        return piece

    def _extended(
        self, piece: _Piece, tokens: tuple[int, ...], images: Sequence[Image] = (), features: Sequence[Features] = ()
    ) -> _Piece:
        positions = self._adapter.positions(tokens, features, piece.next_position)
        end = len(piece.tokens) + len(tokens)
        return _Piece(
            piece.tokens + tokens,
            piece.digests + tuple((image.digest, end) for image in images),
            piece.features + tuple(features),
            torch.cat([piece.positions, positions], dim=1) if piece.tokens else positions,
            piece.start,
            int(positions.max()) + 1 if tokens else piece.next_position,
        )

    def _pad(self, rows: Sequence[Sequence[_Piece]]) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [N, T], mask [N, T], positions [axes, N, T]."""
        lengths = [sum(len(piece.tokens) for piece in row) for row in rows]
        width = max(lengths, default=0)
        axes = self._prefixes[0].piece.positions.shape[0]
        tokens = torch.full((len(rows), width), self._adapter.pad_token)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.zeros(axes, len(rows), width, dtype=torch.long)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            tokens[number, :length] = _integers(token for piece in row for token in piece.tokens)
            mask[number, :length] = 1
            if row:
                positions[:, number, :length] = torch.cat([piece.positions for piece in row], dim=1)
        return tokens, mask, positions

    def _collate(self, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
        features = [item for piece in pieces for item in piece.features]
        return self._adapter.collate(features) if features else {}


@dataclass(frozen=True, eq=False)
class _Piece:
    """A run of tokens with its images and positions. Equal if tokens, images and start are equal."""

    tokens: tuple[int, ...]
    digests: tuple[tuple[str, int], ...]  # (content, end of the segment that shows it)
    features: tuple[Features, ...]
    positions: Tensor  # [axes, T]
    start: int  # position of the first token
    next_position: int

    def cut(self, length: int) -> _Piece:
        """The first `length` tokens, with the images of the segments that end within them."""
        if length >= len(self.tokens):
            return self
        kept = sum(1 for _, end in self.digests if end <= length)
        positions = self.positions[:, :length]
        end = self.position(length)
        return _Piece(self.tokens[:length], self.digests[:kept], self.features[:kept], positions, self.start, end)

    def position(self, offset: int) -> int:
        """Position of the token at `offset`: on a segment's border or between text tokens, where all axes agree."""
        return self.next_position if offset >= len(self.tokens) else int(self.positions[:, offset].min())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Piece) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return self.tokens, self.digests


def _nothing(start: int) -> _Piece:
    return _Piece((), (), (), torch.zeros(0, 0, dtype=torch.long), start, start)


@dataclass(frozen=True)
class _Prefix:
    """seen: the row of the memory that it continues, or -1. owner: whose it is, if it is not shared."""

    seen: int
    piece: _Piece
    owner: int


@dataclass(frozen=True)
class _Place:
    """The state after `offset` tokens of a branch; without a branch, the end of the prefix itself."""

    prefix: int
    branch: int | None
    offset: int


@dataclass(frozen=True)
class _Branch:
    """Tokens that go on from a place. In a packed batch, the first of a tree is the prefix, which goes on from none; in
    `after.offset` is the number of its tree."""

    after: _Place
    piece: _Piece


@dataclass(frozen=True)
class _Decision:
    read: int
    scored: int = -1
    state: int | None = None
    choice: int = -1


class _Numbered(Generic[T]):
    """Distinct items, numbered in the order in which they came."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}
        self._items: list[T] = []

    def add(self, item: T) -> int:
        number = self._numbers.setdefault(item, len(self._items))
        if number == len(self._items):
            self._items.append(item)
        return number

    def __getitem__(self, number: int) -> T:
        return self._items[number]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)


def _images(segment: Segment) -> tuple[Image, ...]:
    return segment.images if isinstance(segment, ContextSegment) else ()


def _integers(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)
