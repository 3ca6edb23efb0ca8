"""FLOPs of the matrix products that a call runs, wherever they run.

torch's own FlopCounterMode also attributes them to modules, by hooks that torch.autograd.grad refuses at leaves.
"""

from __future__ import annotations

from collections.abc import Callable

from step_flops import Counter
from torch.nn.attention import SDPBackend, sdpa_kernel


def flops(call: Callable[[], object]) -> int:
    """Attention included: only its plain form is counted on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
        call()
    return counter.total
