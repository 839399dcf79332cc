"""Costs of programs that can be computed by hand."""

import pytest

from keras_openllama.planning.cost_model import (
    CHIPS,
    CostAssumptions,
    estimate_cost,
    kernel_flops,
)
from keras_openllama.planning.hlo import HloProgram

pytestmark = pytest.mark.backend_free

V4 = CHIPS["v4"]
# Without latency, a collective takes its bytes / (100 GB/s): a ring uses two links.
ASSUMPTIONS = CostAssumptions(hop_seconds=0)
MILLISECOND = 1_050_000  # Cycles.


def fusion(name, cycles, calls="fused", operands="%x"):
    return (
        f"%{name} = bf16[8,128]{{1,0:T(8,128)(2,1)}} fusion({operands}), kind=kLoop, "
        f'calls=%{calls}, backend_config={{"estimated_cycles":"{cycles}"}}'
    )


# An all-gather of 100 MB of bfloat16 over four chips: each receives 75 MB.
GATHER = (
    "all-gather(%part), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, "
    "use_global_device_ids=true"
)
GATHERED = "bf16[50000000]{0:T(1024)(128)(2,1)}"
SECONDS = 0.75 * 100e6 / 100e9  # 0.75 ms


def program(*lines, computations=()):
    """HLO of a program with these lines in its entry computation."""
    before = [
        "HloModule jit_step, is_scheduled=true",
        "%fused (p: bf16[8,128]) -> bf16[8,128] {",
        "  ROOT %n = bf16[8,128]{1,0} negate(%p)",
        "}",
        "%product (p: bf16[8,128]) -> bf16[8,128] {",
        "  ROOT %c = bf16[8,128]{1,0} convolution(%p, %p), dim_labels=bf_io->bf",
        "}",
        *computations,
        "ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {",
        "  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)",
        "  %part = bf16[12500000]{0} parameter(1)",
    ]
    return "\n".join([*before, *(f"  {line}" for line in lines), "}"])


def cost(*lines, computations=(), assumptions=ASSUMPTIONS, slice_shape=None):
    hlo = program(*lines, computations=computations)
    return estimate_cost(hlo, V4, assumptions, slice_shape=slice_shape)


def test_estimate_cost_separates_fusions_with_matrix_products():
    found = cost(
        fusion("a", 2 * MILLISECOND),
        fusion("b", 3 * MILLISECOND, calls="product"),
        "%copy = bf16[8,128]{1,0} copy-start(%a)",
    )
    assert found.other_seconds == pytest.approx(2e-3)
    assert found.matmul_seconds == pytest.approx(3e-3)
    assert found.step_seconds == found.compute_seconds == pytest.approx(5e-3)


def test_estimate_cost_multiplies_a_loop_body_by_its_trip_count():
    computations = [
        "%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {",
        "  " + fusion("in_body", MILLISECOND),
        f"  %g = {GATHERED} {GATHER}",
        "}",
        "%condition (p: (s32[], bf16[8,128])) -> pred[] {",
        "  %bound = s32[]{:T(128)} constant(7)",
        "  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT",
        "}",
    ]
    loop = (
        "%loop = (s32[], bf16[8,128]{1,0}) while(%x), condition=%condition, body=%body"
    )
    found = cost(loop, computations=computations)
    assert found.compute_seconds == pytest.approx(7e-3)
    assert found.exposed_seconds == pytest.approx(7 * SECONDS)
    text = program(loop, computations=computations)
    deeper = estimate_cost(text, V4, ASSUMPTIONS, trip_counts={7: 32})
    assert deeper.compute_seconds == pytest.approx(32e-3)
    known = 'backend_config={"known_trip_count":{"n":"5"}}'
    found = cost(f"{loop}, {known}", computations=computations)
    assert found.compute_seconds == pytest.approx(5e-3)


def test_estimate_cost_uses_the_most_expensive_branch():
    computations = [
        *("%cheap (p: bf16[8,128]) -> bf16[8,128] {", "  " + fusion("c", 1), "}"),
        "%expensive (p: bf16[8,128]) -> bf16[8,128] {",
        "  " + fusion("d", 4 * MILLISECOND),
        "}",
    ]
    choice = "%choice = bf16[8,128]{1,0} conditional(%i, %x, %x), "
    for branches in (
        "branch_computations={%cheap, %expensive}",
        "true_computation=%expensive, false_computation=%cheap",
    ):
        found = cost(choice + branches, computations=computations)
        assert found.step_seconds == pytest.approx(4e-3)


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        (f"%c = {GATHERED} {GATHER}", SECONDS),
        # An all-reduce is a reduce-scatter and an all-gather.
        (
            f"%c = {GATHERED} all-reduce(%y), replica_groups={{{{0,1,2,3}}}}",
            2 * SECONDS,
        ),
        (
            f"%c = {GATHERED} all-reduce(%y), replica_groups=[64,4]<=[256]",
            2 * SECONDS,
        ),
        (
            f"%c = {GATHERED} all-gather(%part), replica_groups=mesh['a'=64,'b'=4] "
            "{'b'}, dimensions={0}",
            SECONDS,
        ),
        (
            f"%c = {GATHERED} all-gather(%part), replica_groups=mesh['a'=64,'b'=4], "
            "device_ids=([4,64]T(1,0)) {'b'}, dimensions={0}",
            SECONDS,
        ),
        # The compiler combined two of them.
        (
            f"%c = ({GATHERED}, {GATHERED}) all-reduce(%y, %z), "
            "replica_groups={{0,1,2,3}}",
            4 * SECONDS,
        ),
        # Two chips have one link to each other.
        (
            f"%c = {GATHERED} all-gather(%part), replica_groups={{{{0,1}}}}",
            100e6 / 2 / 50e9,
        ),
        # One link, one direction.
        (
            f"%c = {GATHERED} collective-permute(%y), source_target_pairs={{{{0,1}}}}",
            100e6 / 50e9,
        ),
    ],
)
def test_estimate_cost_of_a_synchronous_collective_is_bytes_over_bandwidth(
    line, seconds
):
    found = cost(line)
    [(_, total)] = found.collective_seconds.items()
    assert total == found.exposed_seconds == pytest.approx(seconds)


def test_estimate_cost_of_a_sliced_all_reduce_is_half():
    computations = [
        "%all-reduce-scatter (p: bf16[50000000]) -> bf16[12500000] {",
        f"  %r = {GATHERED} all-reduce(%p), replica_groups={{{{0,1,2,3}}}}",
        "  ROOT %s = bf16[12500000]{0} dynamic-slice(%r, %i)",
        "}",
    ]
    line = "%f = bf16[12500000]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter"
    assert cost(line, computations=computations).exposed_seconds == pytest.approx(
        SECONDS
    )


def test_estimate_cost_adds_latency_for_each_step_of_a_ring():
    found = cost(
        f"%c = {GATHERED} {GATHER}", assumptions=CostAssumptions(hop_seconds=1e-3)
    )
    assert found.exposed_seconds == pytest.approx(SECONDS + 3e-3)


def test_estimate_cost_of_an_all_reduce_on_a_torus_uses_rings_of_all_axes():
    rings = "StrategyND{colors:3 phases:3 cores:{8 4 8},{4 8 8},{8 8 4}"
    groups = f"replica_groups=[1,256]<=[256], to_apply=%add, {rings}"
    found = cost(
        f"%c = f32[2] all-reduce(%x), {groups}",
        assumptions=CostAssumptions(hop_seconds=1e-3),
    )
    # Twice 7, 3 and 7 steps. The bytes are negligible.
    assert found.exposed_seconds == pytest.approx(34e-3, rel=1e-5)


@pytest.mark.parametrize(
    ("sizes", "links"),
    [("4,8,8", 6), ("2,2,4", 3), ("2,2", 2)],  # Small slices do not wrap around.
)
def test_estimate_cost_of_a_split_all_reduce_uses_the_links_of_all_axes(sizes, links):
    axes = sizes.count(",") + 1
    strategy = (
        f"StrategyND{{colors:{axes} phases:{axes} cores:{{1}} num_dims:{axes} "
        f"active_dims:111 dim_sizes:{sizes} dim_used:{{0}}}}"
    )
    reduced = f"%c = {GATHERED} all-reduce(%y), replica_groups={{{{0,1,2,3}}}}"
    found = cost(f'{reduced}, backend_config={{"strategy":"{strategy}"}}')
    assert found.exposed_seconds == pytest.approx(2 * SECONDS * 2 / links)


def test_estimate_cost_of_an_all_to_all_assumes_a_quarter_of_the_ring():
    groups = "replica_groups=[1,16]<=[16]"
    found = cost(f"%c = {GATHERED} all-to-all(%x), {groups}")
    # 100 MB from each of 16 chips, each byte over 4 of 32 links.
    assert found.exposed_seconds == pytest.approx(16 * 100e6 * 4 / 32 / 50e9)


def test_estimate_cost_of_an_all_to_all_over_a_slice_is_limited_by_its_longest_axis():
    line = f"%c = {GATHERED} all-to-all(%x), replica_groups=[1,16]<=[16]"
    found = cost(line, slice_shape=(2, 2, 4))
    # 8 chips on each side send half of their 100 MB to the other side, over 4 links.
    assert found.exposed_seconds == pytest.approx(8 * 50e6 / 4 / 50e9)
    part = f"%c = {GATHERED} all-to-all(%x), replica_groups=[2,8]<=[16]"
    assert cost(part, slice_shape=(2, 2, 4)).exposed_seconds == pytest.approx(
        cost(part).exposed_seconds
    )


def test_estimate_cost_overlaps_an_asynchronous_all_to_all_with_compute():
    start = (
        f"%all-to-all-start = ({GATHERED}, {GATHERED}, u32[], u32[]) "
        "all-to-all-start(%x), replica_groups=[1,8]<=[8]"
    )
    done = f"%all-to-all-done = {GATHERED} all-to-all-done(%all-to-all-start)"
    found = cost(start, fusion("f", MILLISECOND), done, slice_shape=(2, 2, 2))
    assert found.collective_seconds == {"all-to-all": pytest.approx(1e-3)}
    assert found.exposed_seconds == pytest.approx(0)


def test_estimate_cost_of_a_reduce_scatter_uses_the_size_of_its_input():
    groups = "replica_groups=[1,4]<=[4], to_apply=%add"
    found = cost(f"%c = bf16[12500000] reduce-scatter(%elsewhere), {groups}")
    assert found.exposed_seconds == pytest.approx(SECONDS)


# Start and end of an asynchronous collective, which the compiler writes as operations
# or as fusions.
PAIRS = {
    "operations": (
        f"%all-gather-start = (bf16[12500000], {GATHERED}) "
        + GATHER.replace("all-gather(", "all-gather-start("),
        f"%all-gather-done = {GATHERED} all-gather-done(%all-gather-start)",
    ),
    "fusions": (
        f"%async-collective-start.1 = (bf16[12500000], {GATHERED}) fusion(%part), "
        "kind=kCustom, calls=%start",
        f"%async-collective-done.1 = {GATHERED} fusion(%carried), kind=kCustom, "
        "calls=%done",
    ),
}
STARTED = [
    "%start (p: bf16[12500000]) -> (bf16[12500000], bf16[50000000]) {",
    "  %part = bf16[12500000]{0} parameter(0)",
    f"  %g = {GATHERED} {GATHER}",
    f"  ROOT %s = (bf16[12500000]{{0}}, {GATHERED}) custom-call(%g), "
    'custom_call_target="AsyncCollectiveStart"',
    "}",
    "%done (p: bf16[50000000]) -> bf16[50000000] {",
    f"  %g = {GATHERED} {GATHER}",
    f'  ROOT %d = {GATHERED} custom-call(%g), custom_call_target="AsyncCollectiveDone"',
    "}",
    # A matrix product that advances the collective.
    "%async_collective_fusion (p: bf16[8,128]) -> bf16[8,128] {",
    f"  %g = {GATHERED} {GATHER}",
    "  ROOT %c = bf16[8,128]{1,0} convolution(%p, %p), dim_labels=bf_io->bf",
    "}",
]


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("milliseconds", [0, 0.5, 2])
def test_estimate_cost_overlaps_an_asynchronous_collective_with_compute(
    pair, milliseconds
):
    start, done = pair
    between = fusion(
        "f", round(milliseconds * MILLISECOND), calls="async_collective_fusion"
    )
    found = cost(start, between, done, computations=STARTED)
    assert found.collective_seconds == {"all-gather": pytest.approx(SECONDS)}
    exposed = max(0, SECONDS - milliseconds * 1e-3)
    assert found.exposed_seconds == pytest.approx(exposed, abs=1e-9)
    assert found.matmul_seconds == pytest.approx(milliseconds * 1e-3)


def test_estimate_cost_of_concurrent_collectives_shares_the_links():
    start, done = PAIRS["operations"]
    second = [line.replace("-start", "-start.2") for line in (start, done)]
    second[0] = second[0].replace("all-gather-start.2(", "all-gather-start(", 1)
    second[1] = second[1].replace("%all-gather-done ", "%all-gather-done.2 ")
    work = fusion("f", MILLISECOND)  # 1 ms; both collectives take 1.5 ms.
    found = cost(start, second[0], work, done, second[1])
    assert found.exposed_seconds == pytest.approx(2 * SECONDS - 1e-3)


# ----- Kernels

FORWARD = (
    "%splash_mha_fwd_segmented_residuals.2 = (f32[8,512,128]{2,1,0}, "
    "bf16[8,32,2048,128]{3,2,1,0:T(8,128)(2,1)S(3)}) custom-call(%x, %x), "
    'custom_call_target="tpu_custom_call", '
    "operand_layout_constraints={s8[1,4,4]{2,1,0}, bf16[8,32,2048,128]{3,2,1,0}, "
    "bf16[8,32,2048,128]{3,2,1,0}}, metadata={}"
)


def test_estimate_cost_of_an_attention_kernel_is_half_of_its_matrix_products():
    product = 2 * 8 * 32 * 2048 * 2048 * 128 / 2
    found = cost(FORWARD)
    assert found.kernel_seconds == pytest.approx(2 * product / (0.4 * 275e12))
    backward = FORWARD.replace("mha_fwd", "mha_dkv")
    assert cost(backward).kernel_seconds == pytest.approx(5 * product / (0.4 * 275e12))


def test_estimate_cost_of_a_kernel_without_batch_axis():
    one = FORWARD.replace("bf16[8,32,2048,128]{3,2,1,0}", "bf16[32,2048,128]{2,1,0}")
    assert cost(one).kernel_seconds == pytest.approx(cost(FORWARD).kernel_seconds / 8)


def test_estimate_cost_rejects_unknown_instructions():
    with pytest.raises(
        ValueError, match=r"cost of the kernel my_kernel is unknown.* splash"
    ):
        cost(FORWARD.replace("splash_mha_fwd_segmented_residuals.2", "my_kernel"))
    with pytest.raises(ValueError, match="no ENTRY"):
        HloProgram("HloModule x")
    unknown = f"%c = {GATHERED} all-gather(%part), replica_groups=?, dimensions={{0}}"
    with pytest.raises(ValueError, match="The group size of c is unknown"):
        cost(unknown)
    with pytest.raises(ValueError, match="The start of all-gather-done"):
        cost(PAIRS["operations"][1])


def test_estimate_cost_reports_bytes_of_instructions_without_a_cost():
    computations = [
        "%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {",
        "  %copied = bf16[8,128]{1,0} copy-done(%started)",
        "}",
    ]
    found = cost(
        *("%free = bf16[8,128] bitcast(%x)", "%s = (bf16[8,128]) copy-start(%x)"),
        '%joined = bf16[8,128] custom-call(%x), custom_call_target="ConcatBitcast"',
        '%unknown = bf16[8,128] custom-call(%x), custom_call_target="Mystery"',
        "%gather_fusion.3 = bf16[4,128]{1,0} fusion(%x), kind=kCustom, calls=%fused",
        "%loop = (s32[], bf16[8,128]{1,0}) while(%x), condition=%c, body=%body, "
        'backend_config={"known_trip_count":{"n":"5"}}',
        fusion("costed", MILLISECOND),
        computations=computations,
    )
    assert found.step_seconds == pytest.approx(1e-3)
    assert found.uncosted_bytes == {
        "custom-call Mystery": 2048,
        "fusion gather_fusion": 1024,
        "copy-done": 5 * 2048,
    }


def test_kernel_flops_uses_the_shape_of_the_query():
    [kernel] = [i for i in HloProgram(program(FORWARD)).entry if "splash" in i.name]
    assert kernel_flops(kernel) == 2 * 8 * 32 * 2048 * 2048 * 128


def test_v4_clock_matches_its_peak_and_matrix_units():
    # Two cores with four units, and two FLOPs for each element of a unit.
    flops_per_cycle = 2 * 4 * 128 * 128 * 2
    assert V4.clock == pytest.approx(V4.peak_flops / flops_per_cycle, rel=2e-3)
