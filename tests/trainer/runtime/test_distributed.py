"""What a broken collective is taken for."""

from __future__ import annotations

import pytest
import torch

from pylon_trainer.errors import PeerLost
from pylon_trainer.runtime.distributed import collective


@pytest.mark.parametrize(
    ("error", "taken_for"),
    [
        (RuntimeError("[gloo] Connection closed by peer\n  at pair.cc:547"), PeerLost),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), PeerLost),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), torch.AcceleratorError),
        (KeyError("ours"), KeyError),
    ],
)
def test_only_what_a_peer_can_cause_is_a_lost_peer(error: Exception, taken_for: type[Exception]) -> None:
    with pytest.raises(taken_for) as raised, collective():
        raise error
    if taken_for is PeerLost:
        assert str(raised.value) == f"a peer died or fell silent: {str(error).splitlines()[0]}"
