"""Small kernels with one planted fault each: the checker finds it, in every order of threads, and names where it is.

A finding reads "kernel: block (x, y, z) warp w lane l: what (file:line)". The lines of mutants/*.cu that it must name
carry the mutant's name in a comment. The same kernel without the fault is clean.
"""

import re
import time

import pytest
import torch

from tests.emulation.kernels import library, needs_kernels, run, source

pytestmark = needs_kernels

RACE = r"race: (reads|writes|updates) (shared memory|a tensor), byte \d+, which .* with no order between the two"
IN_FLIGHT = r"reads shared memory, byte \d+, where an asynchronous copy by .* has not been waited for"
EXITED = r"exited, but block .* waits for it in (__shfl_xor_sync|mma_m16n8k16)|waits for a lane that has exited"
# What is said of each.
MUTANTS = {
    "memory/past_shared": r"undefined behaviour: an index past the end of its array",
    "memory/past_dynamic": r"out of bounds: writes 4 bytes .* the end of shared memory of 256 bytes",
    "memory/past_input": r"out of bounds: reads 4 bytes .* the end of an input of 516 bytes",
    "memory/past_output": r"out of bounds: writes 4 bytes .* the end of an output of 516 bytes",
    "memory/before_output": r"out of bounds: writes 4 bytes 4 bytes before the start of an output",
    "memory/written_input": r"writes an input, byte \d+",
    "memory/misaligned": r"undefined behaviour: an access at an address that is no multiple of 16",
    "memory/uninitialised": r"reads shared memory, byte \d+, which nobody has written",
    "memory/left_by_another_block": r"reads shared memory, byte \d+, which nobody has written",
    "memory/large_static": r"needs \d+ bytes of shared memory, the chip gives a block 232448",
    "memory/large_dynamic": r"233472 bytes of shared memory, the chip gives a block 232448",
    "memory/overflow": r"undefined behaviour: signed multiplication overflows",
    "barriers/missing_barrier": RACE,
    "barriers/missing_second_barrier": RACE,
    "barriers/rare_race": RACE,
    "barriers/missing_warp_barrier": RACE,
    "barriers/shuffle_for_barrier": RACE,
    "barriers/barrier_after_exit": r"waits for it in a barrier of its block|after a thread of the block has exited",
    "barriers/warp_against_block": r"nobody can go on",
    "barriers/wrong_count": r"comes to a barrier of its block of \d+ threads, others to one of \d+",
    "barriers/odd_count": r"barrier 1 of 40 threads, no multiple of 32",
    "barriers/wrong_barrier": r"nobody can go on",
    "barriers/split_warp": r"comes to bar.sync \d where .* is in bar.sync \d",
    "barriers/second_arrival": r"comes again to a barrier of its block that it has arrived at and that is not complete",
    "barriers/arrival_for_wait": RACE,
    "lanes/divergent_shuffle": EXITED,
    "lanes/overlapping_masks": r"with a mask that overlaps another",
    "lanes/outside_the_mask": r"with a mask that leaves this lane out",
    "lanes/source_outside_the_mask": r"__shfl_sync from lane 20, which the mask leaves out",
    "lanes/shuffle_after_exit": EXITED,
    "lanes/different_collectives": r"comes to __shfl_\w+_sync where .* is in __shfl_\w+_sync",
    "lanes/mask_of_absent_lanes": r"with a mask of lanes that the block does not have",
    "blocks/two_writers": RACE,
    "blocks/narrow_release": RACE,
    "blocks/narrow_acquire": RACE,
    "blocks/narrow_fence": RACE,
    "blocks/missing_fence": RACE,
    "blocks/relaxed_poll": RACE,
    "blocks/plain_flag": RACE,
    "blocks/endless_poll": r"polls without end",
    "blocks/endless_spin": r"runs without end: a loop that waits must poll",
    "blocks/missing_grid_barrier": RACE,
    "blocks/missing_block": r"polls without end",
    "blocks/one_block_too_many": r"265 blocks of a cooperative grid, only 264 can be alive together",
    "blocks/one_block_too_many_static": r"265 blocks of a cooperative grid, only 264 can be alive together",
    "copies/missing_wait": IN_FLIGHT,
    "copies/wait_for_too_few": IN_FLIGHT,
    "copies/missing_commit": IN_FLIGHT,
    "copies/missing_barrier_after_wait": RACE + "|" + IN_FLIGHT,
    "copies/never_waited": r"exits before it has waited for its asynchronous copy",
    "copies/reused_too_early": RACE + "|" + IN_FLIGHT,
    "copies/misaligned_source": r"cp_async<16> from an address that is no multiple of 16",
    "copies/misaligned_destination": r"cp_async<16> to an address that is no multiple of 16",
    "copies/past_the_source": r"out of bounds: reads 16 bytes .* the end of an input of 516 bytes",
    "copies/past_the_destination": r"cp_async<4> to an address outside this block's shared memory",
    "copies/to_device_memory": r"cp_async<4> to an address outside this block's shared memory",
    "matrices/misaligned_row": r"warp 0 lane 9: ldmatrix_x4 at an address that is no multiple of 16",
    "matrices/row_past_the_end": r"warp 0 lane 31: (ldmatrix_x4 at an address outside|out of bounds)",
    "matrices/row_in_device_memory": r"lane 3: ldmatrix_x4 at an address outside this block's shared memory",
    "matrices/rows_not_written": r"warp 0 lane 17: reads shared memory, byte \d+, which nobody has written",
    "matrices/missing_barrier_before_rows": RACE,
    "matrices/missing_barrier_after_rows": RACE,
    "matrices/part_of_a_warp": EXITED,
}  # fmt: skip
REFUSED = ("memory/large_dynamic", "blocks/one_block_too_many")  # before there are threads to name
# Elements of a kernel's input and output, which some reach the end of.
INPUT, OUTPUT = 129, {"memory/past_output": 129}
# A finding takes milliseconds; each line it names is a call of addr2line, on a machine that does other things too.
SECONDS = 1.0


def call(name, fault, seed=0):
    file, entry = name.split("/")
    x = torch.arange(float(max(INPUT, 192 if file == "matrices" else 0)))
    out = torch.full((OUTPUT.get(name, 320),), -1.0)
    run(f"mutants/{file}", entry, x, out, torch.zeros(4, dtype=torch.int32), fault, seed=seed)
    return out


def lines_of(name):
    """Those of a mutant's source that the finding must name."""
    file, entry = name.split("/")
    numbered = enumerate(source(f"mutants/{file}").read_text().splitlines(), 1)
    marks = ((number, line.partition("// ")[2].split()) for number, line in numbered)
    return [f"{file}.cu:{number}" for number, names in marks if entry in names]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_found_in_every_schedule(name):
    library(f"mutants/{name.split('/')[0]}")
    for seed in range(6):
        start = time.perf_counter()
        with pytest.raises(RuntimeError) as error:
            call(name, True, seed)
        took, said = time.perf_counter() - start, str(error.value)
        who = "" if name in REFUSED else r"block \(\d+, 0, 0\) warp \d+ lane \d+: "
        assert re.match(rf"\w*{name.split('/')[1]}_kernel<true>: {who}", said), said
        assert re.search(MUTANTS[name], said), said
        assert all(line in said for line in lines_of(name)), (said, lines_of(name))
        assert took < SECONDS, said


@pytest.mark.parametrize("name", MUTANTS)
def test_without_it_the_kernel_is_clean(name):
    found = [call(name, False, seed) for seed in range(6)]
    assert all(torch.equal(found[0], other) for other in found) and not torch.equal(
        found[0], torch.full_like(found[0], -1)
    )


def test_a_wrong_fragment_gives_a_wrong_product():
    x = torch.arange(192.0)
    wanted = x[:128].view(16, 8) @ x[128:].view(8, 8)
    right, wrong = (call("matrices/wrong_fragment", fault)[:128].view(16, 8) for fault in (False, True))
    assert torch.equal(right, wanted) and not torch.equal(wrong, wanted)


def test_a_copy_lands_as_late_as_its_wait_allows():
    assert (call("copies/late_source", False)[:64] == 1).all() and (call("copies/late_source", True)[:64] == 2).all()


def test_the_same_fault_in_two_kernels_of_one_process_is_reported_twice():
    for name in ("barriers/missing_barrier", "barriers/missing_warp_barrier") * 2:
        with pytest.raises(RuntimeError, match=f"^{name.split('/')[1]}_kernel<true>: .*race"):
            call(name, True)


def test_every_mutant_is_tested():
    defined = {
        f"{file}/{name}"
        for file in {name.split("/")[0] for name in MUTANTS}
        for name in re.findall(r"^KERNEL\((\w+)\)", source(f"mutants/{file}").read_text(), re.M)
    }
    assert defined - MUTANTS.keys() <= {"matrices/wrong_fragment", "copies/late_source"} and MUTANTS.keys() <= defined
