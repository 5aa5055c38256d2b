"""Runs torch code on tensors without data, and follows every byte from where it is made to where it is freed.

Weights and activations are on the meta device. Whole numbers stay real, for the control flow of vision towers depends
on them (how many patches an image has). What is measured is the code that trains, forward and backward, and not a
formula that someone has to keep up with it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from rllava_core.planning.heap import Event, Recording

GRADIENTS = "gradients"
"""What finished gradients are booked as, which stay when a pass is over."""

LOWERED = "lowered"
"""What autocast's copies of weights are booked as."""

META, CPU = torch.device("meta"), torch.device("cpu")


@dataclass(frozen=True)
class Footprint:
    """What a piece of code needs beside what was there before.

    peak: bytes by label, at the moment at which their sum is largest.
    left: bytes by label that are still held when it is done.
    host: bytes that saved activations take in host memory, where they are offloaded.
    flops: floating-point operations of matrix products, convolutions and attention.
    """

    peak: Mapping[str, int]
    left: Mapping[str, int]
    host: int
    flops: int

    @property
    def total(self) -> int:
        return sum(self.peak.values())


class Tracer:
    """A context in which allocations are followed.

    label: what is allocated is booked under this name.
    vocabulary: size of the last dimension by which logits are told from other activations.
    autocast: the type that an engine's mixed precision computes matrix products in; None: that of their operands.
    recording: when it is over, what was allocated and freed in it, in order.
    """

    def __init__(self, vocabulary: int, autocast: torch.dtype | None = None) -> None:
        self._vocabulary = vocabulary
        self._functions = _Functions(self, autocast)
        self._modes = (self._functions, _Dispatch(self))
        self._stack = ExitStack()
        self.label = "activations"
        self._held: dict[int, tuple[str, int, Any]] = {}  # by address of the storage
        self._numbers: dict[int, int] = {}  # of what is held
        self._events: list[Event] = []
        self.recording = Recording((), frozenset())
        self._live: Counter[str] = Counter()
        self._total = 0
        self._peak: Counter[str] = Counter()
        self._peak_total = 0
        self._offloaded = 0
        self._most_offloaded = 0
        self.flops = 0

    def __enter__(self) -> Tracer:
        for mode in self._modes:
            self._stack.enter_context(mode)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        kept = frozenset(self._numbers[address] for address, (label, *_) in self._held.items() if label == GRADIENTS)
        self.recording = Recording(tuple(self._events), kept)

    @property
    def footprint(self) -> Footprint:
        return Footprint(dict(+self._peak), dict(+self._live), self._most_offloaded, self.flops)

    def stage(self) -> Footprint:
        """What was needed since the last stage ended; another begins."""
        found = self.footprint
        self._peak, self._peak_total = Counter(self._live), self._total
        self.flops = 0
        return found

    def leave_autocast(self) -> None:
        """Copies of weights are let go; from here on each is made anew where it is needed, as where layers are computed
        again, or in a model that is not trained."""
        self._functions.copies = None

    def forget(self, tensor: Tensor) -> None:
        """Do not count a tensor any more that was allocated in here."""
        self._free(tensor.untyped_storage()._cdata)

    def rename(self, tensor: Tensor, label: str) -> None:
        """Book a tensor that was allocated in here under another name."""
        address = tensor.untyped_storage()._cdata
        if address in self._held:
            old, size, reference = self._held[address]
            self._held[address] = (label, size, reference)
            self._live[old] -= size
            self._live[label] += size

    @contextmanager
    def offloading(self, keep: Callable[[Tensor], bool]) -> Iterator[None]:
        """What autograd saves goes to the host and comes back when it is needed, but for tensors to keep."""

        def pack(tensor: Tensor) -> Any:
            if keep(tensor) or not tensor.is_meta:
                return tensor
            self._offloaded += tensor.nbytes
            self._most_offloaded = max(self._most_offloaded, self._offloaded)
            return tensor.shape, tensor.stride(), tensor.dtype

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            shape, stride, dtype = saved
            back = torch.empty_strided(shape, stride, dtype=dtype, device=META)
            self._offloaded -= back.nbytes
            return back

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def hold(self, tensor: Tensor, label: str | None = None) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._held:
            return
        if label is None:
            is_logits = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary
            label = "logits" if is_logits else self.label
        self._held[address] = (label, size, weakref.ref(storage, lambda _: self._free(address)))
        self._numbers[address] = len(self._events)
        self._events.append((len(self._events), size))
        self._live[label] += size
        self._total += size
        if self._total > self._peak_total:
            self._peak_total = self._total
            self._peak = Counter(self._live)

    def _free(self, address: int) -> None:
        if address in self._held:
            label, size, _ = self._held.pop(address)
            self._live[label] -= size
            self._total -= size
            self._events.append((self._numbers.pop(address), None))


class _Dispatch(TorchDispatchMode):
    """Lets real whole numbers and floats on the meta device meet in one operation, and books what it makes.

    What operations make of which shapes is remembered, for most of a model repeats itself, and finding it out is slow.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:
            args = (args[0], _counted(args[1]), *args[2:])
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if func is torch.ops.aten.eq.Scalar and given[0].is_meta:
            # Pixels are compared with 0, to leave out images that are padding: there are none.
            return self._booked(torch.zeros(given[0].shape, dtype=torch.bool), given)
        if any(tensor.is_meta for tensor in given):
            if kwargs.get("device") == CPU:
                # Moved to where the tokens are, which are real: in a run that is where all is.
                kwargs = {**kwargs, "device": META}
            return self._computed(func, args, kwargs, given)
        if func is torch.ops.aten.cat.default and given[0].is_floating_point():
            # The images of a batch, the only floats that come in with data.
            args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
            return self._computed(func, args, kwargs, given)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            made = func(*args, **{**kwargs, "device": CPU})
            # Whole numbers are wanted for what they are.
            return _on_meta(made) if made.is_floating_point() else made
        return self._booked(func(*args, **kwargs), given)

    def _computed(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        in_place = _is_in_place(func) and args[0].is_meta
        remembered = in_place or _is_pure(func)
        key = (func, _described(args), _described(tuple(kwargs.items()))) if remembered else None
        if key in _KNOWN:
            outputs, flops = _KNOWN[key]
            self._tracer.flops += flops
            if in_place:
                return args[0]
            made = [torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in outputs]
            for tensor in made:
                self._tracer.hold(tensor)
            return made[0] if len(made) == 1 else tuple(made)
        if any(not tensor.is_meta for tensor in given):
            args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=out))
        self._tracer.flops += flops
        if in_place:
            _KNOWN[key] = ([], flops)
        elif key is not None and (isinstance(out, Tensor) or all(isinstance(item, Tensor) for item in out)):
            made = [out] if isinstance(out, Tensor) else out
            _KNOWN[key] = ([(item.shape, item.stride(), item.dtype) for item in made], flops)
        label = "cache" if func is torch.ops.aten.new_empty.default and out.ndim == 4 else None
        return self._booked(out, given, label)

    def _booked(self, out: Any, given: list[Tensor], label: str | None = None) -> Any:
        # Views, and what is changed in place, take no memory.
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in _tensors((out,)):
            if tensor.untyped_storage()._cdata not in known:
                self._tracer.hold(tensor, label)
        return out


class _Functions(TorchFunctionMode):
    """What is decided by the device: the kernel of attention (one that keeps no scores), and autocast."""

    def __init__(self, tracer: Tracer, autocast: torch.dtype | None) -> None:
        super().__init__()
        self._tracer = tracer
        self._autocast = autocast
        self.copies: dict[int, tuple[Tensor, Tensor]] | None = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._autocast is not None and func in _LOWERED:
            args, kwargs = tree_map_only(Tensor, self._lowered, (args, kwargs))
        if func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _lowered(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self._autocast)
        before, self._tracer.label = self._tracer.label, LOWERED
        try:
            if self.copies is None:
                return tensor.to(self._autocast)
            # Autocast keeps the casts of weights until it is left.
            if id(tensor) not in self.copies:
                self.copies[id(tensor)] = (tensor, tensor.to(self._autocast))
            return self.copies[id(tensor)][1]
        finally:
            self._tracer.label = before


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=META).masked_fill(~attn_mask, -torch.inf)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result


_LOWERED = {
    *(functional.linear, functional.conv1d, functional.conv2d, functional.conv3d),
    *(functional.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.mm, torch.baddbmm, torch.addmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm),
}

_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among the arguments of an operation, lists of them included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


_KNOWN: dict[Any, tuple[list[Any], int]] = {}
"""By operation and shapes: the outputs' shapes, strides and types, and the floating-point operations."""


@cache
def _is_pure(func: Any) -> bool:
    """Whether an operation makes new tensors and changes none."""
    if func is torch.ops.aten.new_empty.default:
        return False
    return not any(item.alias_info for item in [*func._schema.arguments, *func._schema.returns])


@cache
def _is_in_place(func: Any) -> bool:
    """Whether an operation changes its first argument and nothing else, neither that one's shape, and returns it."""
    changed = [
        index for index, item in enumerate(func._schema.arguments) if item.alias_info and item.alias_info.is_write
    ]
    returned = [item.alias_info for item in func._schema.returns]
    alone = changed == [0] and len(returned) == 1 and returned[0] is not None and returned[0].is_write
    return alone and torch.Tag.inplace_view not in func.tags


def _described(value: Any) -> Any:
    """Something hashable that says what a meta kernel can know of an argument."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return type(value), value


def _counted(indices: Any) -> list[Any]:
    """Masks as the places that they are true at, whose number the meta device cannot know.

    One that was made of values without data is taken as true everywhere: such ask whether an image is padding.
    """
    found: list[Any] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            mask = torch.ones(index.shape, dtype=torch.bool) if index.is_meta else index
            found.extend(mask.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def backward(loss: Tensor, inputs: Sequence[Tensor] = ()) -> Sequence[Tensor | None]:
    """As `loss.backward()`, or with inputs as `torch.autograd.grad`, inside which the modes of a tracer would be off;
    but layers that are computed again need them."""
    engine: Any = torch.autograd.Variable._execution_engine
    ones = (torch.ones_like(loss),)
    options = {"allow_unreachable": True, "accumulate_grad": not inputs}
    gradients: Sequence[Tensor | None] = engine.run_backward((loss,), ones, False, False, tuple(inputs), **options)
    return gradients


def without_data(tensor: Tensor) -> Tensor:
    """Zeros of the same shape and type in the memory of one number."""
    return torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type, without data."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
