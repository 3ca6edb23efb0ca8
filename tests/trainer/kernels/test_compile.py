"""Every kernel compiles for an H200 (sm_90) on a machine without a GPU, and uses what it was written to use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pylon_trainer.step import IGNORED

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"),
]
POINTER_ALIGNMENT = [["tt.divisibility", 16]]
SHARED_MEMORY_BYTES = 227 * 1024
"""What a program may have on sm_90."""


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for_hopper(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], warps: int = 4, stages: int = 3
) -> str:
    """PTX of the kernel: arguments not named in types or constants are int32."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): POINTER_ALIGNMENT for name, kind in types.items() if kind.startswith("*")},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
    )
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES
    return str(compiled.asm["ptx"])


@pytest.mark.parametrize(("element", "per_load"), [("bf16", 8), ("fp16", 8), ("fp32", 4)])
def test_scoring_loads_16_bytes_at_a_time(element: str, per_load: int) -> None:
    from pylon_trainer.kernels.score import triton as score

    ptx = compile_for_hopper(
        score._score_kernel,
        {"logits": f"*{element}", "labels_N": "*i64", "scores_6N": "*fp32", "nonfinite_rows": "*i32"},
        {"IGNORED": IGNORED, "U": score.CHUNKS, "L": score.LANES, "E": per_load},
        warps=score.WARPS,
    )
    assert ptx.count("ld.global.v4.b32") >= 3 * score.CHUNKS


def test_head_multiplies_on_tensor_cores_fed_by_the_copy_engine() -> None:
    from pylon_trainer.kernels.head import triton as head

    tiling = head.TENSOR_CORES
    ptx = compile_for_hopper(
        head._head_kernel,
        {
            "hidden_NH": f"tensordesc<bf16[{tiling.rows},{tiling.depth}]>",
            "weight_VH": f"tensordesc<bf16[{tiling.columns},{tiling.depth}]>",
            "statistics_5SN": "*fp32",
        },
        {"M": tiling.rows, "C": tiling.columns, "D": tiling.depth, "RUN": tiling.run, "GROUP": tiling.group},
        warps=tiling.warps,
        stages=tiling.stages,
    )
    assert "wgmma.mma_async.sync.aligned.m64n256k16" in ptx
    assert "cp.async.bulk.tensor" in ptx


def test_small_kernels_of_the_head_compile() -> None:
    from pylon_trainer.kernels.head import triton as head

    matrices = {"hidden_NH": "*bf16", "weight_VH": "*bf16", "labels_N": "*i64", "nonfinite_rows": "*i32"}
    compile_for_hopper(
        head._join_kernel,
        {**matrices, "statistics_5SN": "*fp32", "scores_6N": "*fp32"},
        {"IGNORED": IGNORED, "M": 16, "D": 128},
    )
    compile_for_hopper(
        head._logit_gradient_kernel,
        {"logits_KC": "*bf16", "logsumexp_K": "*fp32", "labels_K": "*i64", "weights_K": "*fp32"},
        {"BLOCK": head.GRADIENT_BLOCK},
    )


def test_bucketing_compiles() -> None:
    from pylon_trainer.kernels.bucket import triton as bucket

    scores, border = {"scores_N": "*fp32"}, {"prefix_B": "*i64", "border_B": "*i64", "missing_B": "*i32"}
    counts = {"counts_BD": "*i32", "equals_BG": "*i32"}

    def types(kernel: Any, more: Mapping[str, str]) -> dict[str, str]:
        return {name: kind for name, kind in {**scores, **border, **counts, **more}.items() if name in kernel.arg_names}

    for kernel, more, constants in (
        (bucket._count_kernel, {}, {"SHIFT": 21, "D": 2048, "BLOCK": bucket.BLOCK}),
        (bucket._descend_kernel, {}, {"D": 2048}),
        (bucket._count_equals_kernel, {}, {"BLOCK": bucket.BLOCK}),
        (
            bucket._assign_kernel,
            {"bucket_N": "*i32", "thresholds_B": "*fp32"},
            {"B": 3, "G_PADDED": 16, "BLOCK": bucket.BLOCK},
        ),
    ):
        compile_for_hopper(kernel, types(kernel, more), constants)


@pytest.mark.parametrize("kernel", ["forward", "d_queries", "d_keys"])
def test_attention_of_rows_multiplies_on_tensor_cores_fed_in_the_background(kernel: str) -> None:
    from pylon_trainer.kernels.attention import launch

    tiling, function = getattr(launch.TENSOR_CORES[128], kernel), getattr(launch, f"{kernel}_kernel")
    floats = {"logsumexp_KH": "*fp32", "delta_KH": "*fp32", "scale": "fp32", "log2_scale": "fp32"}
    matrices = {name: "*bf16" for name in function.arg_names if name.endswith(("HKE", "KHE", "BJTE", "LJE"))}
    places = {name: "*i32" for name in function.arg_names if name.endswith(("_K", "_L", "_B"))}
    strides = {name: 2048 for name in function.arg_names if name.startswith("stride")}
    constants = {"WINDOWED": True, "G": 3, "E": 128, "E_PADDED": 128, "B_PADDED": 8, "M": tiling.rows, "N": tiling.keys}
    types = {name: kind for name, kind in (floats | matrices | places).items() if name in function.arg_names}
    ptx = compile_for_hopper(function, types, constants | strides, warps=tiling.warps, stages=tiling.stages)
    assert "wgmma.mma_async" in ptx
    assert ptx.count("cp.async.cg.shared.global") >= 4


def test_binlop_moves_16_bytes_at_a_time() -> None:
    from pylon_trainer.kernels.binlop import triton as binlop

    elements = {"gate_N": "*bf16", "up_N": "*bf16", "y_N": "*bf16", "coefficients_4": "*fp32"}
    # The launcher tells the compiler that N is a multiple of 16 where it is.
    constants = {"N": 7 * binlop.BLOCK, "BLOCK": binlop.BLOCK}
    forward = compile_for_hopper(binlop._forward_kernel, elements, constants, warps=binlop.WARPS)
    assert forward.count("ld.global.v4.b32") == 4
    assert forward.count("st.global.v4.b32") == 2
    backward = compile_for_hopper(
        binlop._backward_kernel,
        {name: kind for name, kind in elements.items() if name != "up_N"}
        | {"d_y_N": "*bf16", "d_gate_N": "*bf16", "d_up_N": "*bf16", "sums_P4": "*fp32"},
        constants,
        warps=binlop.WARPS,
    )
    assert backward.count("ld.global.v4.b32") == 6
    assert backward.count("st.global.v4.b32") == 4


def test_short_convolution_loads_channels_side_by_side() -> None:
    """Also of rows whose length is no multiple of 16."""
    from pylon_trainer.kernels.convolution import triton as convolution

    floats = {"weight_UW": "*fp32", "bias_U": "*fp32", "sums_PXU": "*fp32", "starts_BT": "*i64"}
    for kernel, tiling in (
        (convolution._forward_kernel, convolution.FORWARD),
        (convolution._backward_kernel, convolution.BACKWARD),
    ):
        matrices = {name: "*bf16" for name in kernel.arg_names if name.endswith(("BTU", "d_recent_BVU"))}
        types = {name: kind for name, kind in (floats | matrices).items() if name in kernel.arg_names}
        shape = {"UNIT": 8, "W": 4, "recent_BVU": None}
        cut = {"TOKENS": tiling.tokens, "ROWS": tiling.rows, "C": tiling.channels}
        ptx = compile_for_hopper(kernel, types, shape | cut, warps=tiling.warps)
        assert "ld.global.b16" not in ptx
        assert "st.global.b16" not in ptx


@pytest.mark.parametrize(("kernel", "inputs", "outputs"), [("forward", 3, 1), ("backward", 4, 3)])
@pytest.mark.parametrize(("element", "per_store"), [("bf16", "v2"), ("fp32", "v4")])
def test_gated_norm_moves_four_numbers_of_a_thread_at_once(
    kernel: str, inputs: int, outputs: int, element: str, per_store: str
) -> None:
    """Also of rows whose length is no multiple of 16; what it reads is on its way while it works."""
    from pylon_trainer.kernels.gated_norm import triton as gated_norm

    function, tiling = getattr(gated_norm, f"_{kernel}_kernel"), getattr(gated_norm, kernel.upper())
    floats = {"skip_H": "*fp32", "weight_O": "*fp32", "sums_QXO": "*fp32", "epsilon": "fp32"}
    matrices = {name: f"*{element}" for name in function.arg_names if name.endswith("NO")}
    types = {name: kind for name, kind in (floats | matrices).items() if name in function.arg_names}
    cut = gated_norm._cut(1536, tiling)
    warps, tiles = cut.pop("num_warps"), 1536 // cut["C"]
    ptx = compile_for_hopper(function, types, {"UNIT": 8, "G": 1, "P": 64, **cut}, warps=warps)
    assert ptx.count("cp.async.ca.shared.global") + ptx.count("cp.async.cg.shared.global") >= inputs * tiles
    assert ptx.count(f"st.global.{per_store}.b32") >= outputs * tiles
    assert "global.b16" not in ptx


@pytest.mark.parametrize("kernel", ["sweep", "outputs", "gradients", "maps"])
def test_scan_multiplies_on_tensor_cores_fed_in_the_background(kernel: str) -> None:
    from pylon_trainer.kernels.scan import launch

    tilings, function = launch.TENSOR_CORES[64], getattr(launch, f"{kernel}_kernel")
    tiling: Any = getattr(tilings, kernel)
    shapes = {"H": 24, "J": 24, "N": 64, "P": 64, "TILES": 1, "Q": tilings.chunk_tokens, "P_TILE": tilings.columns}
    own = {"N_TILE": min(64, tiling.tile), "N_PADDED": 64, "V_PROGRAM": tiling.tile, "REVERSE": False}
    own |= {"HAS_FIRST": False, "first_BHNP": None}
    constants = shapes | {name: value for name, value in own.items() if name in function.arg_names}
    floats = {name: "*fp32" for name in function.arg_names if name.endswith(("BTH", "BHNP", "BTHK"))}
    matrices = {name: "*bf16" for name in function.arg_names if name.endswith(("BTHP", "BTGN", "BCHNP", "QQ"))}
    strides = {name: 1664 for name in function.arg_names if name.startswith("stride")}
    types = {name: kind for name, kind in (floats | matrices).items() if name not in constants}
    ptx = compile_for_hopper(function, types, constants | strides, warps=tiling.warps, stages=tiling.stages)
    assert "wgmma.mma_async" in ptx
    assert ptx.count("cp.async.cg.shared.global") >= 4


def test_sums_of_decays_compile() -> None:
    from pylon_trainer.kernels.scan import launch

    compile_for_hopper(
        launch.sums_kernel,
        {"x_BTH": "*fp32", "sums_BTH": "*fp32", "factor": "fp32"},
        {"REVERSE": True, "H": 24, "H_PADDED": 32, "Q": 64},
    )
