"""The inputs of the projections of keys and values, recorded while a cache is filled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.posthoc.method import Engine
from cllm.posthoc.slots import SlotTensors
from cllm.posthoc.turns import add_hook


@contextmanager
def each_input(engine: Engine, slots: Iterable[int], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see` with each of `slots` and the input (B, T, d_model) of its projections in all passes inside of the
    context. Raises `UserError` for a slot whose keys and values are not just projected."""
    handles = []
    try:
        for slot in slots:

            def hook(_: nn.Module, args: tuple[Tensor, ...], slot: int = slot) -> None:
                see(slot, args[0].detach())

            handles += add_hook(engine.projections(slot)[0], hook, engine.layer_of(slot), before=True)
        yield
    finally:
        for handle in handles:
            handle.remove()


class RecordedInputs:
    """The inputs (B, T, d_model) of the projections of some slots, one for each pass."""

    def __init__(self) -> None:
        self._seen: dict[int, list[Tensor]] = {}

    def __getitem__(self, slot: int) -> list[Tensor]:
        return self._seen[slot]

    @contextmanager
    def record(self, engine: Engine) -> Iterator[None]:
        """Forget what was recorded, and record the inputs of all slots inside of the context."""
        slots = engine.slots()
        self._seen = {slot: [] for slot in slots}
        with each_input(engine, slots, lambda slot, x: self._seen[slot].append(x)):
            yield

    def of(self, slot: int, keys: SlotTensors, name: str) -> Tensor:
        """The inputs of `slot` (B, n, d_model), without sinks, as in `keys`.

        Raises:
            UserError: naming the method, if another number of tokens was recorded than the cache has.
        """
        seen = self._seen.get(slot, [])
        times, rest = divmod(sum(x.shape[1] for x in seen), keys.tokens)
        if times > 1 and not rest:
            raise UserError(
                f"{name}: slot {slot} was projected {times} times for every token of the cache; allowed: plans whose "
                "layers run once for each token, and one prefill inside of `with method.watch(engine)`"
            )
        if sum(x.shape[1] for x in seen) != keys.tokens or any(len(x) != len(keys.data[0]) for x in seen):
            raise UserError(
                f"{name}: has not seen the cache being filled: fill it inside of `with method.watch(engine)`, and "
                "compress it before the next one and before release()"
            )
        inputs = torch.cat(seen, dim=1)
        return inputs if keys.sinks is None else keys.sinks.without(inputs)
