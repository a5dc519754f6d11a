"""Every Triton kernel is compiled to machine code for NVIDIA GPUs, which needs none, with the arguments that the launchers give.

Looked at is what the compiler makes of it: that no offset of a tensor is a product in 32 bits, and that the shared memory fits
any GPU from the RTX 30 series on.
"""

import importlib
import re

import pytest
import torch
from triton_interpreter import INTERPRETED, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")]
slow = pytest.mark.slow  # the other types and architectures
SHARED_MEMORY = 99 * 1024  # bytes a program, compute capability 8.6 and 8.9
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}


class Compiler:
    """Stands in for `_common.launch`: compiles the kernel as that would, and keeps the result."""

    def __init__(self, capability):
        self.capability = capability
        self.compiled = []

    def __call__(self, kernel, programs, like, *arguments, **constants):
        import triton
        from triton.backends.compiler import GPUTarget

        options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
        types = dict.fromkeys(constants, "constexpr")
        hints = {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            specialised = not kernel.params[i].do_not_specialize
            if isinstance(value, torch.Tensor):
                types[name] = "*" + TYPES[value.dtype]
                hints[(i,)] = [["tt.divisibility", 16]]
            elif value is None or (value == 1 and specialised):
                types[name], constants[name] = "constexpr", value
            else:
                types[name] = "i32" if value < 2**31 else "i64"
                if specialised and value % 16 == 0:
                    hints[(i,)] = [["tt.divisibility", 16]]
        assert set(types) == set(kernel.arg_names), kernel
        source = triton.compiler.ASTSource(kernel, types, constexprs=constants, attrs=hints)
        done = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        self.compiled.append((kernel.__name__, done))


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    import triton

    from ssmlens.ops.triton import _common

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))

    def make(capability):
        own = Compiler(capability)
        monkeypatch.setattr(_common, "launch", own)
        return own

    return make


def check(compiled, expected):
    assert {name for name, _ in compiled} >= expected
    for name, kernel in compiled:
        assert len(kernel.asm["cubin"]) > 1000
        assert kernel.metadata.shared <= SHARED_MEMORY, name
        assert not narrow_offsets(kernel.asm["ttir"]), name


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def kernels(name):
    return importlib.import_module(f"ssmlens.ops.triton.{name}")


@pytest.mark.parametrize(
    ("capability", "dtype", "d_state", "full"),
    [
        (90, torch.float32, 18, True),
        pytest.param(80, torch.bfloat16, 2, False, marks=slow),
        pytest.param(80, torch.float64, 4, False, marks=slow),
    ],
)
def test_selective_scan(compiler, capability, dtype, d_state, full):
    selective = kernels("_selective")
    done = compiler(capability)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch, length, d = 2, 1024, 48
    x, A = empty(batch, length, d, dtype=dtype), empty(d, d_state, dtype=wide)
    B = empty(batch, length, d_state, dtype=dtype) if full else empty(d, d_state, dtype=dtype)
    h = empty(batch, d, d_state, dtype=wide)
    parameter, reset = empty(d, dtype=wide), empty(batch, length, dtype=torch.bool)
    some = (
        x,
        x,
        A,
        B,
        B,
        *((parameter, x, parameter, True, h, reset) if full else (None, None, None, False, None, None)),
    )
    saved = empty(batch, length // selective.segment_length(d_state), d_state, d, dtype=wide)
    selective.forward(*some, y=x, final=h.mT, saved=saved)
    selective.backward(x, h if full else None, saved, *some, samples=1, dx=x, ddt=x, dz=x if full else None)
    check(done.compiled, {"_forward", "_backward_local", "_backward", "_states"})


@pytest.mark.slow
def test_selective_scan_with_many_state_channels(compiler):
    selective = kernels("_selective")
    done = compiler(80)
    x, A = empty(1, 512, 16), empty(16, 256)
    some = (x, x, A, empty(1, 512, 256), empty(1, 512, 256), None, None, None, True, None, None)
    selective.forward(*some, y=x, final=empty(1, 256, 16), saved=None)
    check(done.compiled, {"_forward"})


@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.bfloat16), pytest.param(90, torch.float64, marks=slow)])
def test_linear_scan(compiler, capability, dtype):
    linear = kernels("_linear")
    done = compiler(capability)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, h, h0 = empty(2, 1024, 48, dtype=dtype), empty(2, 1024, 48, dtype=wide), empty(2, 48, dtype=wide)
    reset = empty(2, 1024, dtype=torch.bool)
    linear.scan(u, u, h0, reset)
    linear.gradients(h, u, h, h0, reset, u, h, h0)
    check(done.compiled, {"_local", "_states", "_gradients"})


@pytest.mark.parametrize(
    ("capability", "dtype", "by_key", "bonus"),
    [
        (80, torch.bfloat16, False, True),
        (80, torch.float32, True, True),
        pytest.param(90, torch.bfloat16, True, False, marks=slow),
        pytest.param(90, torch.float32, False, False, marks=slow),
        pytest.param(80, torch.float64, True, False, marks=slow),
    ],
)
def test_gated_linear_attention(compiler, capability, dtype, by_key, bonus):
    attention = kernels("_attention")
    done = compiler(capability)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch, length, heads, width = 1, 512, 2, 128
    v = empty(batch, length, heads, width, dtype=dtype)
    k = empty(batch, length, 1, width, dtype=dtype)
    log_a = empty(batch, length, heads, width if by_key else 1, dtype=dtype)
    h = empty(batch, heads, width, width, dtype=wide)
    u = empty(heads, width, dtype=wide) if bonus else None
    reset = empty(batch, length, dtype=torch.bool) if bonus else None
    attention.forward(k, k, v, log_a, u, h, reset, v)
    attention.backward(v, h, k, k, v, log_a, u, h, reset, 1, v)
    own = {"_scores_by_key", "_gradients_by_pairs_and_key"} if by_key else {"_gradients_by_pairs"}
    check(done.compiled, {"_chunk_sums", "_scores", "_outputs", "_gradients_by_states"} | own)


@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.bfloat16), pytest.param(90, torch.float64, marks=slow)])
def test_causal_conv1d(compiler, capability, dtype):
    convolution = kernels("_convolution")
    done = compiler(capability)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight, bias = empty(2, 100, 48, dtype=dtype), empty(48, 4, dtype=wide), empty(48, dtype=wide)
    initial, reset = empty(2, 3, 48, dtype=wide), empty(2, 100, dtype=torch.bool)
    convolution.forward(x, weight, bias, True, initial, reset, x)
    convolution.backward(x, x, weight, bias, True, initial, reset, 1, x, initial)
    check(done.compiled, {"_forward", "_backward_weights", "_backward_inputs"})


# ------------------------------------------------------------------------------------------------ offsets in 32 bits


def narrow_offsets(text):
    """Products in 32 bits on which the offset of an address depends, unless they are of bounded small numbers, as lines of
    the compiler's intermediate code."""
    defined, limits, line_of = {}, {}, {}
    for line in text.splitlines():
        if found := re.match(r"\s*(%\S+?)(?::\d+)? = (\S+)\s*(.*)", line):
            name, operation, rest = found.groups()
            defined[name], line_of[name] = (operation, rest), line.strip()
        if found := re.search(r"scf\.for (%\S+) = (%\S+) to (%\S+) step", line):
            limits[found.group(1)] = found.group(3)

    def operands(name):
        return re.findall(r"%[A-Za-z0-9_#]+", defined[name][1].split(" loc(")[0])

    def bound(name, depth=0):
        """The largest magnitude of an integer, None where it is not known."""
        if name in limits:
            return bound(limits[name], depth + 1)
        if name not in defined or depth > 40:
            return None
        operation, rest = defined[name]
        if operation == "arith.constant":
            value = re.search(r"dense<(-?\d+)>|^(-?\d+) :", rest)
            return None if value is None else abs(int(value.group(1) or value.group(2)))
        if operation == "tt.make_range":
            return int(re.search(r"end = (\d+)", rest).group(1))
        parts = [bound(o, depth + 1) for o in operands(name)]
        if None in parts or not parts:
            return None
        if operation == "arith.muli":
            return parts[0] * parts[1]
        if operation in ("arith.addi", "arith.subi"):
            return parts[0] + parts[1]
        if operation in ("arith.extsi", "tt.splat", "tt.broadcast", "tt.expand_dims"):
            return parts[0]
        return None

    bad, seen = set(), set()
    waiting = [operands(n)[1] for n, (operation, _) in defined.items() if operation == "tt.addptr"]
    assert waiting, "no address in this text"
    while waiting:
        name = waiting.pop()
        if name in seen or name not in defined:
            continue
        seen.add(name)
        operation, rest = defined[name]
        if operation == "arith.muli" and re.search(r": (tensor<\S*x)?i32>?( loc|$)", rest):
            most = bound(name)
            if most is None or most >= 2**31:
                bad.add(line_of[name])
        if operation != "tt.load":
            waiting += operands(name)
    return bad


def test_the_check_finds_offsets_in_32_bits():
    good = """
    %0 = tt.get_program_id x : i32
    %1 = arith.extsi %0 : i32 to i64
    %2 = arith.extsi %stride : i32 to i64
    %3 = arith.muli %1, %2 : i64
    %4 = tt.addptr %x, %3 : !tt.ptr<f32>, i64
    """
    bad = """
    %0 = tt.get_program_id x : i32
    %1 = arith.muli %0, %stride : i32
    %2 = tt.splat %1 : i32 -> tensor<16xi32>
    %3 = arith.extsi %2 : tensor<16xi32> to tensor<16xi64>
    %4 = tt.addptr %x, %3 : tensor<16x!tt.ptr<f32>>, tensor<16xi64>
    """
    assert not narrow_offsets(good)
    assert len(narrow_offsets(bad)) == 1
    small = bad.replace("tt.get_program_id x : i32", "arith.constant 5 : i32").replace("%stride", "%0")
    assert not narrow_offsets(small)
