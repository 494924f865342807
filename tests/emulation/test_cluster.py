"""common/cluster.cuh under the emulator: ranks, the cluster's barrier, other blocks' shared memory."""

import pytest
import torch

from tests.emulation import kernels

pytestmark = kernels.needs_kernels


@pytest.mark.parametrize(("grid", "cluster"), [((4, 1, 1), (1, 1, 1)), ((6, 1, 1), (3, 1, 1)), ((4, 4, 2), (2, 2, 2))])
def test_ranks_count_the_blocks_of_a_cluster_x_fastest(grid, cluster):
    out = torch.full((grid[2], grid[1], grid[0], 2), -1, dtype=torch.int32)
    kernels.run("cluster", "ranks", out, *grid, *cluster)
    z, y, x = torch.meshgrid(*(torch.arange(n) for n in reversed(grid)), indexing="ij")
    rank = x % cluster[0] + cluster[0] * (y % cluster[1] + cluster[1] * (z % cluster[2]))
    assert torch.equal(out[..., 0].long(), rank)
    assert (out[..., 1] == cluster[0] * cluster[1] * cluster[2]).all()


@pytest.mark.parametrize(
    ("grid", "cluster", "said"), [((3, 1, 1), (2, 1, 1), "multiple"), ((17, 1, 1), (17, 1, 1), "16")]
)
def test_a_cluster_that_the_chip_refuses_is_refused(grid, cluster, said):
    with pytest.raises(RuntimeError, match=said):
        kernels.run("cluster", "ranks", torch.zeros(34, dtype=torch.int32), *grid, *cluster)


@pytest.mark.parametrize("blocks, cluster", [(1, 1), (2, 2), (6, 3), (16, 8)])
@pytest.mark.parametrize("n", [1, 63, 1001])
def test_a_cluster_adds_what_its_blocks_hold(blocks, cluster, n):
    source = torch.randint(-9, 9, (n,)).float()
    parts = torch.zeros((n + blocks * 64 - 1) // (blocks * 64) * blocks * 64)
    parts[:n] = source
    want = parts.view(-1, blocks // cluster, cluster * 64).sum((0, 2))

    def run(seed, checked):
        out = torch.full((blocks // cluster,), float("nan"))
        kernels.run("cluster", "sum", source, out, blocks, cluster, seed=seed, checked=checked)
        return out

    assert torch.equal(kernels.every_schedule(run), want)


@pytest.mark.parametrize("cluster", [1, 2, 5, 8])
def test_atomics_reach_other_blocks_of_the_cluster(cluster):
    source = torch.randint(0, 37, (513,), dtype=torch.int32)

    def run(seed, checked):
        out = torch.full((37,), -1, dtype=torch.int32)
        kernels.run("cluster", "histogram", source, out, cluster, seed=seed, checked=checked)
        return out

    assert torch.equal(kernels.every_schedule(run).long(), torch.bincount(source, minlength=37))


@pytest.mark.parametrize("entry", ["pass_on", "pass_on_cooperatively"])
def test_work_between_arrival_and_wait(entry):
    def run(seed, checked):
        out = torch.full((8, 32), -1, dtype=torch.int32)
        kernels.run("cluster", entry, out, 4, *([0] if entry == "pass_on" else []), seed=seed, checked=checked)
        return out

    want = torch.arange(8 * 32, dtype=torch.int32).view(2, 4, 32).roll(1, 1).view(8, 32)
    assert torch.equal(kernels.every_schedule(run), want)


def test_a_relaxed_arrival_orders_nothing():
    with pytest.raises(RuntimeError, match=r"race: reads shared memory.*cluster\.cu"):
        kernels.run("cluster", "pass_on", torch.zeros(4, 32, dtype=torch.int32), 4, 1)


def test_the_barrier_of_a_cluster_does_not_wait_for_threads_that_have_exited():
    def run(seed, checked):
        out = torch.full((4, 32), -1, dtype=torch.int32)
        kernels.run("cluster", "leave", out, seed=seed, checked=checked)
        return out

    assert torch.equal(kernels.every_schedule(run), torch.arange(4, dtype=torch.int32)[:, None].expand(4, 32))
