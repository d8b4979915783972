"""Random numbers that forward draws from a seed, which are constants of an artifact.

Only PyTorch has its generators. While a module is traced, numbers are drawn outside of the trace.

Requirements:
* A draw is seeded where its generator is in the same state at each call of forward, whatever the state before.
* Numbers that differ between inputs, since their count depends on a size, say, are right for one shape only.
* Draws that are not seeded stay in the trace.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyexport.errors import BadRequest
from polyexport.spec import Arrays
from polyexport.tracing.forward import within
from polyexport.tracing.reads import caller_site, named

if TYPE_CHECKING:
    import torch
    from torch import nn

Draw = tuple[str, str]
"""Where forward draws, as `file:line`, and the name of the function that it calls there."""
_Seen = dict[Draw, list[tuple[str, ...]]]
"""For each draw the state of its generator and the shapes of the result, call by call."""


@dataclass(frozen=True, slots=True)
class Draws:
    """What forward draws.

    Attributes:
        seeded: The same numbers at each call, whatever the inputs.
        sized: The same numbers at each call with inputs of the same shapes, and other ones else.
        unseeded: Other numbers at each call.
    """

    seeded: frozenset[Draw] = frozenset()
    sized: frozenset[Draw] = frozenset()
    unseeded: frozenset[Draw] = frozenset()

    @property
    def all(self) -> frozenset[Draw]:
        """Every draw."""
        return self.seeded | self.sized | self.unseeded

    @property
    def known(self) -> bool:
        """Whether there are numbers to be made constants."""
        return bool(self.seeded or self.sized)


def lines(draws: Iterable[Draw]) -> str:
    """Their lines for messages, without folders."""
    return named({site for site, _ in draws})


def advice(draws: Iterable[Draw]) -> str:
    """What to change in forward, so that its outputs can be compared."""
    if all("dropout" in name for _, name in draws):
        return "dropout with training=self.training is off in eval mode"
    return "draw them from torch.Generator().manual_seed(…) in forward, or make them an input"


def draws(model: Any, batches: Sequence[Arrays]) -> Draws:
    """What the flat `model` draws on these inputs, the first of which is called twice."""
    with contextlib.suppress(Exception):  # it ran before, so that only the watching fails
        first = _seen(model, batches[0], 1)
        if first:
            again, others = _seen(model, batches[0], 2), [_seen(model, batch, 3) for batch in batches[1:]]
            same = {draw for draw in first if first[draw] == again.get(draw)}
            fixed = {draw for draw in same if all(first[draw] == other.get(draw) for other in others)}
            return Draws(frozenset(fixed), frozenset(same - fixed), frozenset({*first, *again} - same))
    return Draws()


def _seen(model: Any, inputs: Arrays, seed: int) -> _Seen:
    """What is drawn in one call, with the default generator seeded by `seed` before."""
    import torch

    watch = _watch()
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        tensors = [torch.from_numpy(inputs[name].copy()) for name in model.input_names]
        with watch:
            model(*tensors)
    found: _Seen = watch.found
    return found


def _watch() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: _Seen = {}

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            before = _state(args, given)
            answer = function(*args, **given)
            if _state(args, given) != before:
                shapes = [tuple(each.shape) for each in _leaves(answer) if isinstance(each, torch.Tensor)]
                seen = self.found.setdefault((caller_site(), _name(function)), [])
                seen.append((hashlib.sha256(before).hexdigest(), *map(str, shapes)))
            return answer

    return Watch()


def _state(args: Any, kwargs: Mapping[str, Any]) -> bytes:
    """The state of the generator that a function would use."""
    import torch

    own = (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Generator))
    return next(own, torch.default_generator).get_state().numpy().tobytes()


def _leaves(value: Any) -> list[Any]:
    from torch.utils import _pytree as pytree

    return pytree.tree_leaves(value)


def _name(function: Any) -> str:
    return getattr(function, "__name__", "")


# --- while a module is traced -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def draws_given(model: nn.Module, *, dynamic: bool) -> Iterator[None]:
    """Let forward of a flat model get the numbers that it draws from a seed as constants.

    Raises:
        BadRequest: some differ between sizes, and the trace has `dynamic` axes; or they cannot be told from data.
    """
    found: Draws = getattr(model, "draws", None) or Draws()
    with within(model, lambda _: _constant(found, dynamic=dynamic)) if found.known else contextlib.nullcontext():
        yield


def _constant(found: Draws, *, dynamic: bool) -> Any:
    from torch.overrides import TorchFunctionMode

    class Constant(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given, draw = dict(kwargs or {}), (caller_site(), _name(function))
            if draw not in found.seeded | found.sized:
                return function(*args, **given)
            if dynamic and draw in found.sized:
                raise BadRequest(
                    f"forward draws random numbers from a seed ({lines([draw])}), other ones for other sizes of its "
                    "inputs, and an artifact has constants in their place, which are right for one size only"
                )
            written: Callable[..., Any] = _WRITTEN.get(draw[1], _plain)
            return written(function, *args, **given)

    return Constant()


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Compute with real tensors, of which the trace that is being made sees nothing."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    tracer: Any = torch._C
    tracing = tracer._get_tracing_state()
    tracer._set_tracing_state(None)
    try:
        with _disable_current_modes(), torch.no_grad():
            yield
    finally:
        tracer._set_tracing_state(tracing)


def _drawn(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What a function draws: sizes are plain numbers, other tensors have no values."""
    import torch
    from torch.utils import _pytree as pytree

    def real(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return int(value)
        if not isinstance(value, torch.Tensor):
            return value
        return int(value) if not value.dim() and _name(function) in _SIZED else _empty(value)

    with _outside():
        given, named_ = pytree.tree_map(real, (args, kwargs))
        drawn: torch.Tensor = function(*given, **named_)
    return drawn


_SIZED = frozenset({"rand", "randn", "randint", "randperm", "normal"})


def _empty(like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.zeros([int(size) for size in like.shape], dtype=like.dtype)


def _plain(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a function whose result depends on no values: it makes a tensor, or fills one."""
    name = _name(function)
    if name.endswith("_"):
        x = kwargs["tensor"] if "tensor" in kwargs else args[0]
        return x.copy_(_drawn(function, *args, **kwargs))
    if name in _SIZED or name.endswith("_like"):
        return _drawn(function, *args, **kwargs)
    raise BadRequest(
        f"forward draws random numbers from a seed by {name} ({named({caller_site()})}), and an artifact would have "
        "constants in their place; those of torch.rand, randn, normal, dropout or multinomial can be"
    )


def _dropout(function: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Dropout as a multiple of its input plus an offset: what is drawn does not depend on its values."""
    import torch

    def of(value: float) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            dropped: torch.Tensor = function(torch.full_like(_empty(x), value), *args, **kwargs)
            return dropped

    with _outside():
        offset = of(0.0)
        factor = of(1.0) - offset
        function(_empty(x), *args, **kwargs)  # so that the generator is where it would be
        is_moved = bool(offset.any())
    answer = x * factor + offset if is_moved else x * factor
    return x.copy_(answer) if kwargs.get("inplace") or _name(function).endswith("_") else answer


def _normal(function: Any, mean: Any, std: Any = 1.0, size: Any = None, *, generator: Any = None, **more: Any) -> Any:
    """`torch.normal`, whose mean and deviation may be tensors."""
    import torch

    if size is not None or not any(isinstance(each, torch.Tensor) for each in (mean, std)):
        return _drawn(function, mean, std, *([] if size is None else [size]), generator=generator, **more)
    with _outside():
        shapes = [_empty(each).shape for each in (mean, std) if isinstance(each, torch.Tensor)]
    shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]  # untyped in torch
    return _drawn(torch.normal, 0.0, 1.0, shape, generator=generator) * std + mean


def _bernoulli(function: Any, x: torch.Tensor, p: Any = None, *, generator: Any = None) -> Any:
    """`torch.bernoulli` and `Tensor.bernoulli_`, whose shares may be tensors."""
    import torch

    in_place = _name(function).endswith("_")
    if in_place and not isinstance(p, torch.Tensor):
        return x.copy_(_drawn(function, x, 0.5 if p is None else p, generator=generator))
    share = p if in_place else x
    hit = _drawn(torch.rand, list(x.shape), dtype=share.dtype, generator=generator) < share
    return x.copy_(hit) if in_place else hit.to(x.dtype)


def _multinomial(
    function: Any, x: torch.Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None
) -> torch.Tensor:
    """`torch.multinomial` as PyTorch does it: the greatest quotients, or a search in the sum so far."""
    import torch

    if num_samples == 1 or not replacement:
        divisor = _drawn(torch.Tensor.exponential_, x, generator=generator)
        return (x / divisor).topk(num_samples, -1).indices
    wanted = _drawn(torch.rand, [*x.shape[:-1], num_samples], dtype=torch.float64, generator=generator)
    below = x.cumsum(-1) / x.sum(-1, keepdim=True)
    return (below.unsqueeze(-2) < wanted.to(x.dtype).unsqueeze(-1)).to(torch.int64).sum(-1)


def _gumbel_softmax(
    function: Any, logits: torch.Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> torch.Tensor:
    """`torch.nn.functional.gumbel_softmax`."""
    import torch

    noise = -_drawn(torch.Tensor.exponential_, logits).log()
    soft = ((logits + noise) / tau).softmax(dim)
    if not hard:
        return soft
    positions = torch.arange(soft.shape[dim]).reshape([-1] + [1] * (soft.dim() - 1 - dim % soft.dim()))
    return (positions == soft.argmax(dim, keepdim=True)).to(soft.dtype)


_WRITTEN: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"), _dropout),
    **dict.fromkeys(("alpha_dropout", "alpha_dropout_", "feature_alpha_dropout"), _dropout),
    "normal": _normal,
    **dict.fromkeys(("bernoulli", "bernoulli_"), _bernoulli),
    "multinomial": _multinomial,
    "gumbel_softmax": _gumbel_softmax,
}
