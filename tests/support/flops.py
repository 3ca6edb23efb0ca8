"""FLOPs of the matrix products that a call runs, wherever they run.

torch's own FlopCounterMode also attributes them to modules, by hooks that torch.autograd.grad refuses at leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def flops(call: Callable[[], object]) -> int:
    """Attention included: only its plain form is counted on a CPU."""
    counter = _Counter()
    with sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return counter.total


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output
