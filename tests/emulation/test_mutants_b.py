"""Clusters, mbarriers, bulk copies and wgmma with one planted fault each: as test_mutants.py has it for the rest."""

import re
import time

import pytest
import torch

from tests.emulation.kernels import library, needs_kernels, run, source

pytestmark = needs_kernels

RACE = r"race: (reads|writes|updates) (shared memory|a tensor), byte \d+, which .* with no order between the two"
IN_FLIGHT = r"reads (shared memory|a tensor), byte \d+, where an asynchronous copy by .* has not been waited for"
PROXY = r"an asynchronous operation (reads|overwrites) what .* wrote .* without a proxy fence by that thread"
IN_USE = r"writes shared memory, byte \d+, which an asynchronous operation of .* lane \d+ still reads"
POLLS = r"polls without end:(.|\n)* waits for "
HANG = r"nobody can go on:(.|\n)* waits for "
MUTANTS = {
    "remote_before_start": r"touches the shared memory of block \(\d, 0, 0\), which may not have started",
    "remote_race": RACE + r"|which nobody has written",
    "exit_before_neighbour": r"its block exits while block \(0, 0, 0\) warp 0 lane \d+ may still touch its"
    r"|touches the shared memory of block \(1, 0, 0\), which has exited",
    "remote_out_of_bounds": r"out of bounds: reads 4 bytes",
    "no_such_block": r"block 2 of a cluster of 2",
    "wait_without_arrival": r"lane 5: waits at the barrier of its cluster without having arrived",
    "two_arrivals": r"lane 3: arrives again at the barrier of its cluster without a wait",
    "block_skips_barrier": HANG + r"the barrier of its cluster",
    "not_initialised": r"arrives at an mbarrier that is not initialised",
    "initialisation_not_ordered": r"arrives at an mbarrier with no order after its initialisation by .* lane 0",
    "initialisation_not_announced": r"arrives at an mbarrier with no order after its initialisation by .* lane 0",
    "initialised_twice": r"initialises an mbarrier that is initialised",
    "overwritten": r"writes shared memory, byte \d+, which holds an mbarrier",
    "invalidated_too_early": r"invalidates an mbarrier that .* (may still use|waits for)"
    r"|waits for an mbarrier that (is not initialised|another thread invalidates)",
    "too_many_arrivals": r"arrives at an mbarrier too often: of 32 arrivals \d+ are pending in phase 0",
    "too_few_arrivals": HANG + r"the mbarrier at .*, in phase 0 \(1 of 33 arrivals and 0 bytes are missing\)",
    "endless_test": POLLS + r"the mbarrier at .*\(1 of 33 arrivals and 0 bytes are missing\)",
    "wrong_parity": RACE + r"|which nobody has written",
    "parity_kept": RACE + r"|which nobody has written",
    "missing_mbarrier_wait": RACE + r"|which nobody has written",
    "narrow_wait": RACE,
    "exit_before_arrival": r"its block exits while block \(0, 0, 0\) .* may still arrive at its mbarrier"
    r"|touches the shared memory of block \(1, 0, 0\), which has exited",
    "wait_elsewhere": r"waits for an mbarrier of another block",
    "missing_copy_wait": IN_FLIGHT,
    "mbarrier_not_fenced": r"a bulk copy completes on an mbarrier whose initialisation no fence has shown",
    "too_few_bytes_copied": HANG + r"the mbarrier at .* 16 bytes are missing",
    "too_few_bytes_expected": HANG + r"the mbarrier at .* -16 bytes are missing",
    "odd_bytes": r"a bulk copy of 252 bytes, no multiple of 16",
    "copy_from_odd_address": r"a bulk copy's device memory at an address that is no multiple of 16",
    "copy_past_input": r"out of bounds: reads 256 bytes .* the end of an input",
    "copy_past_shared": r"out of bounds: writes 256 bytes|not this block's shared memory",
    "copy_to_odd_address": r"a bulk copy's shared memory at an address that is no multiple of 16",
    "one_copy_expected": IN_FLIGHT,
    "reused_stage": RACE + "|" + IN_FLIGHT + "|" + HANG,
    "exit_with_copy_under_way": r"its block exits while an asynchronous copy into its shared memory is under way",
    "missing_proxy_fence": PROXY,
    "missing_barrier_before_store": RACE + r"|which nobody has written",
    "store_not_waited_for": r"exits while its bulk copy still reads shared memory",
    "reused_source": IN_USE,
    "late_proxy_fence": PROXY,
    "stored_and_read": IN_FLIGHT,
    "copy_over_writes": PROXY,
    "multicast_to_absent_block": r"a multicast to blocks that the cluster does not have",
    "multicast_before_start": r"which may not have started|not initialised|outside the shared memory",
    "tensor_to_odd_address": r"a tensor copy's shared memory at an address that is no multiple of 128",
    "wrong_rank": r"coordinates \(0, 0, 0\) for a tensor map of 2 dimensions",
    "tensor_bytes": HANG + r"the mbarrier at .* -256 bytes are missing",
    "read_before_wait": r"reads registers of a wgmma that has not been waited for",
    "not_committed": r"reads registers of a wgmma that has not been waited for",
    "waits_for_too_few": r"reads registers of a wgmma that has not been waited for",
    "scaled_before_wait": r"writes registers of a wgmma that has not been waited for",
    "no_register_fence": r"a wgmma with no wgmma_fence before",
    "changed_after_fence": r"the accumulators of a wgmma were touched after the last wgmma_fence",
    "changed_between_products": r"the accumulators of a wgmma were touched after the last wgmma_fence",
    "changed_fragments": r"writes registers of a wgmma that has not been waited for",
    "unfenced_operand": PROXY,
    "unordered_operand": RACE + r"|which nobody has written",
    "operand_overwritten": IN_USE,
    "one_warp_speaks_for_all": IN_USE + "|" + RACE,
    "stage_released_too_early": IN_USE + "|" + RACE,
    "operand_past_the_end": r"out of bounds: reads \d+ bytes",
    "between_patterns": r"operand A of a wgmma does not start in the first row of its swizzle's pattern",
    "odd_stride": r"a wgmma's stride offset of 264, no multiple of 16",
    "three_warps": r"a wgmma that not all warps of its warpgroup have issued|exited",
    "split_warp": r"exited, but .* waits for it in wgmma|waits for a lane that has exited",
    "different_products": r"a wgmma that differs from its warpgroup's other warps'",
    "small_block": r"wgmma_fence in a warpgroup of fewer than 128 threads",
    "exit_before_product": r"exits before it has waited for its wgmma",
    "too_few_registers": POLLS + "registers that other warps must release",
    "releases_more": r"release_registers<176> in a warp whose threads have 168",
    "requests_less": r"request_registers<160> in a warp whose threads have 168",
    "one_warp_releases": POLLS + "registers that other warps must release",
}  # fmt: skip
# A finding takes milliseconds; each line it names is a call of addr2line, on a machine that does other things too.
SECONDS = 1.0
FILES = ("mutants_cluster", "mutants_bulk_copy", "mutants_wgmma")


def file_of(name):
    return next(file for file in FILES if re.search(rf"\b{name}\b", source(file).read_text()))


def call(name, fault, seed=0):
    out = torch.full((128,), -1.0)
    run(file_of(name), name, torch.arange(128.0), out, torch.zeros(4, dtype=torch.int32), fault, seed=seed)
    return out


def lines_of(name):
    """Those of a mutant's source that the finding must name."""
    file = file_of(name)
    numbered = enumerate(source(file).read_text().splitlines(), 1)
    marks = ((number, line.partition("// ")[2].split()) for number, line in numbered)
    return [f"{file}.cu:{number}" for number, names in marks if name in names]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_found_in_every_schedule(name):
    library(file_of(name))
    for seed in range(6):
        start = time.perf_counter()
        with pytest.raises(RuntimeError) as error:
            call(name, True, seed)
        took, said = time.perf_counter() - start, str(error.value)
        assert re.match(rf"\w*{name}_kernel<true>: block \(\d+, 0, 0\) warp \d+ lane \d+: ", said), said
        assert re.search(MUTANTS[name], said), said
        one_line = any(part in said for part in ("nobody has written", "has exited", "nobody can go on"))
        assert one_line or all(line in said for line in lines_of(name)), (said, lines_of(name))
        assert took < SECONDS, said


@pytest.mark.parametrize("name", MUTANTS)
def test_without_it_the_kernel_is_clean(name):
    found = [call(name, False, seed) for seed in range(6)]
    assert all(torch.equal(found[0], other) for other in found) and (found[0] != -1).any()


@pytest.mark.parametrize("name", ["wrong_strides", "wrong_swizzle"])
def test_a_wrong_descriptor_gives_another_product(name):
    right, wrong = (call(name, fault) for fault in (False, True))
    assert right.isfinite().all() and not torch.equal(right, wrong)


def test_a_tile_read_without_its_swizzle_is_another_tile():
    right, wrong = (call("forgotten_swizzle", fault) for fault in (False, True))
    assert torch.equal(right, torch.arange(128.0)) and not torch.equal(wrong, right)


def test_every_mutant_is_tested():
    defined = {
        name
        for file in FILES
        for name in re.findall(r"^(?:\w+_)?(?:MUTANT|KERNEL)\((\w+)", source(file).read_text(), re.M)
        if not name.startswith("name")
    }
    assert MUTANTS.keys() <= defined
    assert defined - MUTANTS.keys() == {"forgotten_swizzle", "wrong_strides", "wrong_swizzle"}
