"""What a run asks of the machine."""

from __future__ import annotations

import pytest
import torch

from pnorm_decay.models import GPT, ResNet18
from pnorm_decay.training.machine import check_share, prepare_process, share_batch_norm
from pnorm_decay.training.settings import ConfigError

CPU = torch.device("cpu")


def test_a_process_has_its_threads_and_no_denormals():
    try:
        prepare_process(2)
        assert torch.get_num_threads() == 2
        assert float(torch.tensor(1e-38) * 0.1) == 0
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)


def test_a_batch_divides_evenly_among_processes():
    check_share(12, 3)
    with pytest.raises(ConfigError, match=r"trainer\.batch_size=12: 5 processes share a batch"):
        check_share(12, 5)


def test_batch_norms_are_shared_where_they_can_be():
    with pytest.raises(ConfigError, match="a model with batch norm"):
        share_batch_norm(ResNet18(width=4), CPU)
    text = GPT(vocab_size=3, n_layer=1, n_head=1, n_embd=4, block_size=4)
    assert share_batch_norm(text, CPU) is text
    shared = share_batch_norm(ResNet18(width=4), torch.device("cuda"))
    kinds = {type(m) for m in shared.modules() if "Norm" in type(m).__name__}
    assert kinds == {torch.nn.SyncBatchNorm}
