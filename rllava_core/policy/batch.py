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

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from rllava_core.mdp.trajectory import ActionSegment, Segment, Stretch, Trajectory, stretches
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.checks import check_trajectory
from rllava_core.policy.media import MediaStore
from rllava_core.policy.pieces import Piece, Pieces, padded
from rllava_core.policy.trees import Branch, Place, Trees

T = TypeVar("T", bound=Hashable)

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
        self._packed = packed
        self._shared = shared
        self._trajectories = 0
        self._pieces = Pieces(adapter, media)
        self._forbidden = frozenset(adapter.forbidden_tokens)
        self._prefixes = _Numbered[_Prefix]()
        self._branches = _Numbered[Branch]()
        self._reads = _Numbered[Place]()
        self._scored = _Numbered[tuple[int, int]]()  # (read, token)
        self._states = _Numbered[tuple[int, tuple[tuple[int, ...], ...]]]()  # (read, scored tokens of each choice)
        self._decisions: list[_Decision] = []
        # The members of a group repeat each other's answers and choices.
        self._known_stretches: dict[object, list[_Decision]] = {}
        self._known_states: dict[object, int] = {}
        # Of a packed batch: tokens that continue each prefix, by its trees; and the branches that do.
        self._packed_trees: dict[int, list[int]] = {}
        self._packed_branches: dict[tuple[int, Piece], int] = {}

    def add_context(self, segments: Sequence[Segment], name: str, seen: int = -1, start: int = 0) -> int:
        """A whole context as one prefix. Returns its number; `name` is for messages.

        seen, start: where the policy has read the beginning before: the row of its memory, and the first position that
        is free; `segments` are then what follows.
        """
        owner = 0 if self._shared else self._trajectories
        return self._prefixes.add(_Prefix(seen, self._pieces.of(segments, start, name), owner))

    def add_choices(self, prefix: int, choices: Sequence[tuple[int, ...]]) -> int:
        """The state at the end of a prefix with its discrete actions as token ids. Returns the state's number."""
        return self._state(prefix, None, 0, self._prefixes[prefix].piece.next_position, choices)

    def add_trajectory(self, trajectory: Trajectory) -> None:
        """Every decision of a trajectory, in order.

        Raises InvariantError, with its name, if it must not be trained on.
        """
        check_trajectory(trajectory, self._adapter, self._forbidden)
        self._trajectories += 1
        name = trajectory.name
        for stretch in stretches(trajectory.turns):
            prefix = self.add_context(stretch.begin, name)
            key = (prefix, tuple(_content(segment) for segment in stretch.rest))
            if key not in self._known_stretches:
                self._known_stretches[key] = list(self._decided(prefix, stretch, name))
            self._decisions += self._known_stretches[key]

    def build(self) -> PolicyBatch:
        """Everything that was added, padded."""
        prefixes = [] if self._packed else [prefix.piece for prefix in self._prefixes]
        prefix_tokens, prefix_mask, prefix_positions = self._pieces.padded([[piece] for piece in prefixes])
        pieces = [prefix.piece for prefix in self._prefixes]
        trees = Trees(list(self._branches), pieces, beside=self._adapter.takes_trees)
        tree_tokens, tree_mask, tree_positions = self._pieces.padded(trees.pieces)
        # The language head goes through the reads in order, so scored tokens are sorted by their read.
        scored = sorted(range(len(self._scored)), key=lambda number: self._scored[number][0])
        rank = {number: position for position, number in enumerate(scored)}
        widest = max((len(choices) for _, choices in self._states), default=0)
        first_choice, first_state = len(scored), len(self._reads)
        seen = [prefix.seen for prefix in self._prefixes]
        assert len({row < 0 for row in seen}) <= 1, "prefixes begin conversations, or continue them: never both"
        return PolicyBatch(
            prefix_seen=_integers(row for row in seen if row >= 0),
            prefix_tokens=prefix_tokens,
            prefix_mask=prefix_mask,
            prefix_positions=prefix_positions,
            prefix_media=self._pieces.collated(prefixes),
            next_position=_integers(piece.next_position for piece in prefixes),
            tree_prefix=_integers(self._branches[row[0]].after.prefix for row in trees.rows if prefixes),
            tree_tokens=tree_tokens,
            tree_mask=tree_mask,
            tree_sees=trees.sees(),
            tree_positions=tree_positions,
            tree_media=self._pieces.collated(piece for row in trees.pieces for piece in row),
            read_from=_integers(
                place.prefix if place.branch is None else len(prefixes) + trees.starts[place.branch] + place.offset - 1
                for place in self._reads
            ),
            scored_read=_integers(self._scored[number][0] for number in scored),
            scored_token=_integers(self._scored[number][1] for number in scored),
            choice_tokens=self._choice_tokens(rank, widest),
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

    def _choice_tokens(self, rank: Mapping[int, int], widest: int) -> Tensor:
        """[U, C, M]. rank: of each scored token in the batch."""
        rows = [
            [rank[number] for number in choice]
            for _, choices in self._states
            for choice in (*choices, *[()] * (widest - len(choices)))
        ]
        tokens = padded(rows, -1)
        return torch.from_numpy(tokens.reshape(len(self._states), widest, tokens.shape[1]))

    def _decided(self, prefix: int, stretch: Stretch, name: str) -> Iterator[_Decision]:
        # One branch serves all decisions; the last of them is predicted, so nothing after its state is needed.
        last = stretch.rest[-1]
        unread = 1 if isinstance(last, ActionSegment) and last.choice is None else len(last.tokens)
        piece = self._pieces.of(stretch.rest, self._prefixes[prefix].piece.next_position, name, unread)
        branch = self._branch(prefix, piece)
        offset = 0
        for segment in stretch.rest:
            if not isinstance(segment, ActionSegment):
                pass
            elif segment.choice is not None and segment.choices is not None:
                state = self._state(prefix, branch, offset, piece.position(offset), segment.choices)
                yield _Decision(self._states[state][0], state=state, choice=segment.choice)
            else:
                for step, token in enumerate(segment.tokens, start=offset):
                    read = self._read(prefix, branch, step)
                    yield _Decision(read, scored=self._scored.add((read, token)))
            offset += len(segment.tokens)

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
                    before, own = 0, self._pieces.text(choice[:-1], position)
                    grown = self._branch(prefix, own, branch if offset else None, offset)
                else:
                    before, own = offset, self._pieces.continued(self._branches[branch].piece, offset, choice[:-1])
                    grown = self._branch(prefix, own)
                reads += [self._read(prefix, grown, before + step) for step in range(1, len(choice))]
            scored.append(tuple(self._scored.add(pair) for pair in zip(reads, choice, strict=True)))
        state = self._known_states[key] = self._states.add((read, tuple(scored)))
        return state

    def _branch(self, prefix: int, piece: Piece, origin: int | None = None, offset: int = 0) -> int | None:
        if not piece.tokens:
            return None
        if offset > 0 or not self._packed:
            return self._branches.add(Branch(self._place(prefix, origin, offset), piece))
        if (prefix, piece) not in self._packed_branches:
            after = self._end_of(prefix, len(piece.tokens))
            self._packed_branches[prefix, piece] = self._branches.add(Branch(after, piece))
        return self._packed_branches[prefix, piece]

    def _read(self, prefix: int, branch: int | None, offset: int) -> int:
        return self._reads.add(self._place(prefix, branch, offset))

    def _place(self, prefix: int, branch: int | None, offset: int) -> Place:
        """After `offset` tokens of a branch of a prefix, or at the end of the prefix itself (0)."""
        if offset > 0:
            return Place(prefix, branch, offset)
        return self._end_of(prefix) if self._packed else Place(prefix, None, 0)

    def _end_of(self, prefix: int, room: int = 0) -> Place:
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
        return Place(prefix, self._branches.add(Branch(Place(prefix, None, tree), piece)), len(piece.tokens))


class _Prefix(NamedTuple):
    """seen: the row of the memory that it continues, or -1. owner: whose it is, if it is not shared."""

    seen: int
    piece: Piece
    owner: int


class _Decision(NamedTuple):
    """scored: the token, of a text decision. state, choice: of a choice."""

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


def _content(segment: Segment) -> object:
    """What a segment says, by which equal ones are known."""
    if isinstance(segment, ActionSegment):
        return segment.tokens, segment.choice, segment.choices
    return segment.tokens, segment.images


def _integers(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)
