"""Pure torch on any device, memory linear in length: chunked matrix products, FFT convolution, scans in blocks.

    scan         linear_scan and what expands into it: selective_scan; the short convolution
    attention    gated_linear_attention; `pieces` and `decay` are its arithmetic
    rwkv         rwkv4_attention        lti    lti_convolution        norm    rms_norm

Shapes and meaning as in `ssmlens.ops`, whose functions check the arguments and call these; every function of a sequence returns
its output, in the dtype of its input, and the final state, in float32 or float64. Inputs may be in half precision: they are widened here.
"""

from ssmlens.ops.chunked.attention import gated_linear_attention
from ssmlens.ops.chunked.lti import lti_convolution
from ssmlens.ops.chunked.norm import rms_norm
from ssmlens.ops.chunked.rwkv import rwkv4_attention
from ssmlens.ops.chunked.scan import causal_conv1d, linear_scan, selective_scan

__all__ = [
    "causal_conv1d", "gated_linear_attention", "linear_scan", "lti_convolution", "rms_norm", "rwkv4_attention",
    "selective_scan",
]  # fmt: skip
