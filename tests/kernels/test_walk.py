"""Following a wave through AMD machine code: small programs whose executions can be counted by hand."""

import pytest

from gfxlm.kernels.walk import Walked, walk

HEAD = """
\t.amdhsa_user_sgpr_kernarg_segment_ptr 1
\t.amdhsa_user_sgpr_count 2
\t.amdhsa_wavefront_size32 1
"""


def run(body: str, *arguments: int | None, head: str = HEAD) -> Walked:
    return walk(f"kernel:\n{body}\n\ts_endpgm\n.Lfunc_end0:\n{head}", list(arguments))


def test_straight_code() -> None:
    walked = run(
        "\tv_add_f32_e32 v0, v1, v2\n\tv_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[0:7]\n\tds_load_b128 v[0:3], v4"
    )
    assert walked.exact
    assert walked.vector == 1
    assert walked.counts["ds_load_b128"] == 1


def test_a_constant_loop() -> None:
    walked = run("""
\ts_mov_b32 s4, 0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_fmac_f32_e32 v0, v1, v2
\ts_addk_i32 s4, 0x100
\ts_cmpk_lt_u32 s4, 0x1000
\ts_cbranch_scc1 .LBB0_1""")
    assert walked.exact
    assert walked.vector == 16


@pytest.mark.parametrize(("columns", "times"), [(0, 0), (1, 1), (700, 3), (-5, 0)])
def test_a_loop_over_an_argument(columns: int, times: int) -> None:
    walked = run(
        """
\ts_load_b64 s[4:5], s[0:1], 0x0
\ts_load_b32 s6, s[0:1], 0x8
\ts_waitcnt lgkmcnt(0)
\ts_cmp_lt_i32 s6, 1
\ts_cbranch_scc1 .LBB0_3
\ts_mov_b32 s7, 0
.LBB0_2:
\tv_fmac_f32_e32 v0, v1, v2
\ts_add_i32 s7, s7, 0x100
\ts_cmp_ge_i32 s7, s6
\ts_cbranch_scc0 .LBB0_2
.LBB0_3:
""",
        None,
        None,
        columns & 0xFFFFFFFF,
    )
    assert walked.exact
    assert walked.vector == times


def test_nested_loops_with_64_bit_counters() -> None:
    walked = run("""
\ts_mov_b64 s[4:5], 3
.LBB0_1:
\ts_mov_b32 s6, 0
.LBB0_2:
\tv_mul_f32_e32 v0, v1, v2
\ts_add_u32 s6, s6, 1
\ts_cmp_eq_u32 s6, 5
\ts_cbranch_scc0 .LBB0_2
\ts_add_u32 s4, s4, -1
\ts_addc_u32 s5, s5, -1
\ts_cmp_lg_u64 s[4:5], 0
\ts_cbranch_scc1 .LBB0_1""")
    assert walked.exact
    assert walked.vector == 15


def test_a_skip_that_depends_on_lanes_is_not_taken() -> None:
    walked = run("""
\tv_cmp_gt_i32_e32 vcc_lo, 4, v0
\ts_and_saveexec_b32 s4, vcc_lo
\ts_cbranch_execz .LBB0_2
\tv_mov_b32_e32 v0, 0
.LBB0_2:
\ts_cbranch_vccnz .LBB0_3
\tv_mov_b32_e32 v0, 0
.LBB0_3:""")
    assert walked.exact
    assert walked.vector == 3


def test_a_loop_that_depends_on_memory_is_not_exact() -> None:
    walked = run("""
\ts_load_b64 s[4:5], s[0:1], 0x0
\ts_load_b32 s6, s[4:5], 0x0
.LBB0_1:
\tv_mov_b32_e32 v0, 0
\ts_sub_i32 s6, s6, 1
\ts_cmp_lg_u32 s6, 0
\ts_cbranch_scc1 .LBB0_1""")
    assert not walked.exact
    assert walked.vector == 1


def test_an_unknown_instruction_makes_its_result_unknown() -> None:
    walked = run("""
\ts_mov_b32 s4, 3
\ts_brev_b32 s4, s4
.LBB0_1:
\tv_mov_b32_e32 v0, 0
\ts_add_i32 s4, s4, -1
\ts_cmp_lg_u32 s4, 0
\ts_cbranch_scc1 .LBB0_1""")
    assert not walked.exact


def test_preloaded_arguments_and_program_ids() -> None:
    head = HEAD.replace("count 2", "count 5").replace("size32 1", "size32 0")
    head += "\t.amdhsa_user_sgpr_kernarg_preload_length 3\n\t.amdhsa_user_sgpr_kernarg_preload_offset 0\n"
    # s[2:4] are the first three words of the arguments, s5 the program's number.
    walked = run(
        """
\ts_cmp_lg_u32 s5, 0
\ts_cbranch_scc1 .LBB0_2
.LBB0_1:
\tv_mov_b32_e32 v0, 0
\ts_sub_i32 s4, s4, 1
\ts_cmp_gt_i32 s4, 0
\ts_cselect_b64 vcc, exec, 0
\ts_cbranch_vccnz .LBB0_1
.LBB0_2:""",
        None,
        None,
        7,
        head=head,
    )
    assert walked.exact
    assert walked.vector == 7


def test_an_endless_loop_is_given_up() -> None:
    assert not run(".LBB0_1:\n\tv_mov_b32_e32 v0, 0\n\ts_branch .LBB0_1").exact
