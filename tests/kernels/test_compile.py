"""Every kernel compiled for GPUs that are not here: no spills, memory that fits, MMA used."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvplug_kernels.dispatch import interpreted

if interpreted():
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kvplug_kernels.antidiagonal import kernel as antidiagonal  # noqa: E402
from kvplug_kernels.block_mean import kernel as block_mean  # noqa: E402
from kvplug_kernels.code_layout import code_bytes  # noqa: E402
from kvplug_kernels.code_logits import kernel as code_logits  # noqa: E402
from kvplug_kernels.coded_decode import kernel as coded_decode  # noqa: E402
from kvplug_kernels.decode_pages import kernel as decode_pages  # noqa: E402
from kvplug_kernels.encode_pages import kernel as encode_pages  # noqa: E402
from kvplug_kernels.key_codes import kernel as key_codes  # noqa: E402
from kvplug_kernels.pack_tokens import kernel as pack_tokens  # noqa: E402
from kvplug_kernels.page_bound import kernel as page_bound  # noqa: E402
from kvplug_kernels.page_digest import kernel as page_digest  # noqa: E402
from kvplug_kernels.page_layout import PageLayout  # noqa: E402
from kvplug_kernels.page_select import kernel as page_select  # noqa: E402
from kvplug_kernels.resident_pages import kernel as resident_pages  # noqa: E402
from kvplug_kernels.slot_lists import kernel as slot_lists  # noqa: E402
from kvplug_kernels.sparse_decode import kernel as sparse_decode  # noqa: E402
from kvplug_kernels.token_select import kernel as token_select  # noqa: E402
from kvplug_kernels.virtual_heads import kernel as virtual_heads  # noqa: E402

# Triton 3.9 warns that 3.10 will no longer fuse multiply and add by default.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

KIB = 1024
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
POINTERS = {
    "page_table": "*i32", "pages": "*i32", "keep": "*i32", "chosen": "*i32", "counts": "*i32",
    "lengths": "*i32", "table": "*i32", "tokens": "*i32", "slots": "*i64", "scores": "*fp32",
    "partial": "*fp32", "weight": "*fp32", "bounds": "*i32", "sinks": "*bf16", "spread": "*u8",
    "wanted": "*u8", "newest": "*i32", "rows": "*u8", "open_page": "*i32", "sources": "*i32",
}  # fmt: skip
SCALARS = {"scale": "fp32", "top_p": "fp32"}
OPTIONS = {"num_warps", "num_stages"}


@dataclass(frozen=True)
class Variant:
    name: str
    kernel: object
    constants: dict[str, object]
    types: dict[str, str]
    uses_mma: bool = False


def variants(hip: bool) -> list[Variant]:
    found = []
    for dtype, G, D, S in (
        ("bf16", 4, 128, 16), ("fp16", 4, 128, 64), ("bf16", 3, 64, 32), ("fp16", 1, 96, 16),
        ("bf16", 8, 256, 32), ("u8", 4, 128, 16), ("i8", 3, 64, 32),
    ):  # fmt: skip
        name = f"{dtype} G{G} D{D} S{S}"
        tensors = dict.fromkeys(("keys", "values", "digest", "codes"), f"*{dtype}")
        item = 4 if dtype in ("u8", "i8") else 2
        dtype = "bf16" if dtype in ("u8", "i8") else dtype  # of queries over eight bits
        tensors["query"] = f"*{dtype}"
        sizes = sparse_decode.blocks(G, D, item)
        attend = {"H": 8, "G": G, "D": D, "S": S, "PARTS": 16, **sizes}
        attend |= {"keys_d": 1, "values_d": 1, "CAP": 72.0 * (S >= 32)}
        pages, singles = (
            {
                **attend,
                "U": unit,
                "num_stages": sparse_decode.stages(hip, unit < S, sizes["BD"], S >= 32),
            }
            for unit in (S, 1)
        )
        merge = {"SINKS": S == 32, "D": D, "PARTS": 64, "BD": sizes["BD"]}
        K = 4 if S == 32 else 1  # pages of a block
        bound = {"K": K, "G": G, "D": D, "LEVELS": 3 * (S == 32), **page_bound.blocks(G, D)}
        digest = {"K": K, "H": 8, "D": D, "S": S, **page_digest.blocks(D)}
        pack = {"S": S, "C": 2 * D, **pack_tokens.blocks(2 * D)}
        fp32, out = {"out": "*fp32"}, {"out": f"*{dtype}"}
        found += [
            Variant(f"attend {name}", sparse_decode.attend_kernel, pages, tensors, True),
            Variant(f"attend U1 {name}", sparse_decode.attend_kernel, singles, tensors, True),
            Variant(f"merge {name}", sparse_decode.merge_kernel, merge, out),
            Variant(
                f"page_bound {name}", page_bound.page_bound_kernel, bound, tensors | fp32, True
            ),
            Variant(
                f"page_digest {name}",
                page_digest.update_page_digest_kernel,
                digest,
                tensors | {"tokens": "i32"},
            ),
            Variant(
                f"pack_tokens {name}",
                pack_tokens.pack_tokens_kernel,
                pack,
                {"cache": tensors["keys"]}
                | dict.fromkeys(("pages", "tokens", "keep", "targets"), "*i64"),
            ),
        ]
        bits = {16: 1, 32: 2, 64: 4}[S]
        J = code_bytes(S, bits)
        of = {"K": K, "D": D, "S": S, "J": J, "BITS": bits}
        found += [
            Variant(
                f"code_logits {bits} bits {name}",
                code_logits.code_logits_kernel,
                {"G": G, "SOME": S == 32, **of, **code_logits.blocks(G, D)},
                tensors | fp32,
                True,
            ),
            Variant(
                f"key_codes {bits} bits {name}",
                key_codes.update_key_codes_kernel,
                {"TINY": 2.0**-14, "MOST": 65504.0, "keys_d": 1, **of, **key_codes.blocks(D, J)},
                tensors,
            ),
        ]
    for dtype, G, D, S, key_bits, value_bits in (
        ("bf16", 4, 128, 16, 4, 4), ("fp16", 4, 128, 64, 2, 2), ("bf16", 3, 64, 32, 4, 4),
        ("bf16", 8, 128, 128, 8, 8),
    ):  # fmt: skip
        name = f"{key_bits}/{value_bits} bits {dtype} G{G} D{D} S{S}"
        layout = PageLayout(
            page_size=S,
            head_size=D,
            key_bits=key_bits,
            value_bits=value_bits,
            dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[dtype],
        )
        of, limits = layout.constants(), {"TINY": 2.0**-14, "MOST": 65504.0}
        plain = dict.fromkeys(
            ("query", "codes", "scales", "keys", "open_keys", "open_values", "out_keys"),
            f"*{dtype}",
        )
        plain["out_values"] = plain["keys"]
        every = {"keys_d": 1, "open_d": 1, "H": 8, "G": G, "PARTS": 16, **of}
        for unit, cap in ((S, 72.0 * (S >= 32)), (1, 0.0)):
            sizes = coded_decode.blocks(G, D, S, unit, 2)
            attend = {"U": unit, "CAP": cap, "ALL": unit == S == 32, **every, **sizes}
            attend["num_stages"] = coded_decode.stages(hip, unit < S, sizes["BD"], cap > 0)
            found.append(
                Variant(
                    f"attend codes U{unit} {name}",
                    coded_decode.attend_codes_kernel,
                    attend,
                    plain | {"values": "*u8"},
                    True,
                )
            )
        if dtype == "bf16" and D == 128:
            continue
        encode = {"SOME": S >= 32, "keys_d": 1, "values_d": 1, **limits, **of}
        found += [
            Variant(
                f"encode {name}",
                encode_pages.encode_pages_kernel,
                encode | encode_pages.blocks(layout),
                plain | {"values": plain["keys"], "pages": "*i64"},
            ),
            Variant(
                f"decode {name}",
                decode_pages.decode_pages_kernel,
                of | decode_pages.blocks(layout),
                plain | {"values": "*u8", "pages": "*i64"},
            ),
        ]
    for dtype, G, D, S, stride, rows in (
        ("bf16", 4, 128, 16, 8, 32), ("fp16", 8, 256, 32, 16, 64), ("u8", 3, 96, 48, 8, 32),
    ):  # fmt: skip
        name = f"{dtype} G{G} D{D} S{S} stride {stride}"
        tensors = {"keys": f"*{dtype}", "start": "*i32", "tops": "*fp32", "totals": "*fp32"}
        tensors |= {"query": f"*{'fp16' if dtype == 'fp16' else 'bf16'}", "out": "*fp32"}
        sizes = antidiagonal.blocks(rows, D, S // stride, hip)
        of = {"G": G, "D": D, "S": S, "STRIDE": stride, "PARTS": 8, "keys_d": 1, **sizes}
        share = {"BP": antidiagonal.COLUMNS // sizes["EACH"], **of}
        mean = {"D": D, **block_mean.blocks(D)}
        found += [
            Variant(f"antidiagonal sum {name}", antidiagonal.sum_kernel, of, tensors, True),
            Variant(f"antidiagonal {name}", antidiagonal.share_kernel, share, tensors, True),
            Variant(f"block_mean {name}", block_mean.block_mean_kernel, mean, tensors),
        ]
    for T, top_p in ((512, False), (32768, True)):
        parts = {"S": 32, "PARTS": token_select.parts_for(T), "BT": token_select.TILE}
        weigh = {"G": 4, **parts}
        choose = {"S": 32, "TOP_P": top_p, **token_select.blocks(T)}
        floats = dict.fromkeys(("logits", "tops", "totals", "weights"), "*fp32")
        found += [
            Variant(f"sum T{T}", token_select.sum_kernel, parts, floats),
            Variant(f"weigh T{T}", token_select.weigh_kernel, weigh, floats),
            Variant(
                f"choose T{T} {top_p}",
                token_select.choose_kernel,
                choose,
                floats | {"sinks": "i32"},
            ),
        ]
    for P, top_p in ((512, False), (16384, True)):
        select = {"NEWEST": top_p, "TOP_P": top_p, **page_select.blocks(P)}
        integers = {"sinks": "i32"}
        found.append(
            Variant(f"page_select P{P} {top_p}", page_select.page_select_kernel, select, integers)
        )
    for unit in (16, 1):
        heads = {"S": 16, "U": unit, "BK": 256}
        found.append(
            Variant(f"virtual_heads U{unit}", virtual_heads.virtual_heads_kernel, heads, {})
        )
    for K, J, dtype, size in ((64, 64, "bf16", 32 * 256), (128, 256, "fp32", 16 * 192)):
        places = dict.fromkeys(("held", "hot", "away", "behind", "columns", "missing"), "*i32")
        pages = dict.fromkeys(("cache", "host"), f"*{dtype}")
        seat, copy = resident_pages.seats(K, J), resident_pages.blocks(size)
        found += [
            Variant(f"seat K{K} J{J}", resident_pages.seat_kernel, seat, places),
            Variant(
                f"copy {dtype} {size}",
                resident_pages.copy_kernel,
                copy,
                places | pages | {"rows": "*i32"},
            ),
        ]
    for chooses in (True, False):
        of = {"U": 1 if chooses else 32, "CHOOSES": chooses}
        slots = {"S": 32, **of, "BT": 1024}
        found += [
            Variant(f"bounds {chooses}", slot_lists.bounds_kernel, {**of, "BN": 1024}, {}),
            Variant(f"slots {chooses}", slot_lists.slots_kernel, slots, {}),
        ]
    return found


def compiled(variant: Variant, target: GPUTarget):
    """As the launcher would see it: aligned pointers, strides that are multiples of 16."""
    names = variant.kernel.arg_names
    options = {k: v for k, v in variant.constants.items() if k in OPTIONS}
    constants = {k: v for k, v in variant.constants.items() if k not in OPTIONS}
    types = {
        n: "constexpr" if n in constants
        else variant.types.get(n) or POINTERS.get(n) or SCALARS.get(n) or "i32"
        for n in names
    }  # fmt: skip
    aligned = (n for n in names if types[n].startswith("*") or re.search(r"_[bhnstx]$", n))
    source = ASTSource(
        fn=variant.kernel,
        signature=types,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=target, options=options)


def nvidia_spills(cubin: Path) -> int:
    """Bytes of local memory of a thread: what is spilled has no other place."""
    used = cuobjdump("-res-usage", cubin)
    return sum(int(re.search(rf"\b{field}:(\d+)", used)[1]) for field in ("STACK", "LOCAL"))


def cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout


def amd_spills(assembly: str) -> int:
    fields = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return sum(int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1]) for field in fields)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of our own: what is measured was compiled now."""
    old = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    os.environ.pop("TRITON_CACHE_DIR")
    if old is not None:
        os.environ["TRITON_CACHE_DIR"] = old


CASES = [(t, v) for t in TARGETS for v in variants(hip=TARGETS[t][0].backend == "hip")]


@pytest.mark.parametrize("name, variant", CASES, ids=[f"{t} {v.name}" for t, v in CASES])
def test_kernel_fits_the_gpu(name, variant, tmp_path):
    target, memory = TARGETS[name]
    binary = compiled(variant, target)
    assert binary.metadata.shared <= memory
    if target.backend == "cuda":
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        spills, instruction = nvidia_spills(cubin), r"\bH?G?MMA\b"
        # Most of a second, whatever the kernel.
        code = cuobjdump("-sass", cubin) if variant.uses_mma else ""
    else:
        code = binary.asm["amdgcn"]
        spills, instruction = amd_spills(code), r"\bv_mfma"
    assert spills == 0
    assert bool(re.search(instruction, code)) >= variant.uses_mma
