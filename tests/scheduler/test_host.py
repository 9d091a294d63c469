"""What the host needs: measured where there is a device, else the most that was seen."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.scheduler.contention import Contention, table
from mhc_compile.scheduler.emit import FORK, JOIN
from mhc_compile.scheduler.host import LITTLE, Host, measure


def test_a_table_without_a_measurement_counts_with_a_slow_host() -> None:
    assert Contention("gpu").host == Host()
    assert Host().launch >= 91e-6
    assert Host().move >= 550e-6
    assert "100 us a launch of a step, 600 us a move" in table(Contention("gpu"))


def test_the_call_between_fork_and_join_is_one_that_they_know() -> None:
    x = torch.ones(1)
    (result,) = JOIN(FORK([x], LITTLE, 0), [], LITTLE, 0)
    assert torch.equal(result, -x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_of_a_device() -> None:
    x = torch.randn(256, 256, device="cuda")
    host = measure([lambda: torch.sin(x)])
    assert 1e-6 < host.launch < 1e-2
    assert 1e-6 < host.move < 1e-1
