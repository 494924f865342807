"""common/mbarrier.cuh under the emulator: arrivals, bytes, phases, and the order they give."""

import pytest
import torch

from tests.emulation import kernels

pytestmark = kernels.needs_kernels


@pytest.mark.parametrize("n", [1, 32, 33, 97, 500])
def test_full_and_empty_slots_of_a_ring(n):
    source = torch.randint(-99, 99, (n,)).float()

    def run(seed, checked):
        out = torch.full((n,), float("nan"))
        kernels.run("mbarrier", "ring", source, out, seed=seed, checked=checked)
        return out

    assert torch.equal(kernels.every_schedule(run), 2 * source + 1)


def test_a_phase_is_complete_when_all_have_arrived_and_all_bytes_have_come():
    def run(seed, checked):
        out = torch.full((14,), -1, dtype=torch.int32)
        kernels.run("mbarrier", "phases", out, seed=seed, checked=checked)
        return out

    assert kernels.every_schedule(run).tolist() == [1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 7, 0, 1]


@pytest.mark.parametrize("cluster", [1, 2, 5, 8])
@pytest.mark.parametrize("turns", [1, 4])
def test_arrivals_from_other_blocks_bring_what_these_wrote(cluster, turns):
    def run(seed, checked):
        out = torch.full((2, cluster, cluster), -1, dtype=torch.int32)
        kernels.run("mbarrier", "all_to_all", out, cluster, turns, seed=seed, checked=checked)
        return out

    want = torch.arange(cluster, dtype=torch.int32) + 10 * (turns - 1)
    assert torch.equal(kernels.every_schedule(run), want.expand(2, cluster, cluster))


def test_many_mbarriers_at_once():
    def run(seed, checked):
        out = torch.full((64,), float("nan"))
        kernels.run("mbarrier", "many", out, seed=seed, checked=checked)
        return out

    assert torch.equal(kernels.every_schedule(run), torch.arange(64.0))
