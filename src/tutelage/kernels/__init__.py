"""Products of integer-valued matrices, exact whatever computes them."""

from ._build import cache_folder as cache_folder
from ._integer import active_path as active_path
from ._integer import integer_linear as integer_linear
from ._integer import integer_matmul as integer_matmul
from ._integer import resident_codes as resident_codes
from ._native import ACTIVATIONS as ACTIVATIONS
from ._native import Native as Native
from ._native import active as active
from ._native import encoder_block as encoder_block
from ._native import fits as fits
from ._native import native as native
from ._native import packed_linear as packed_linear
from ._native import panel_bytes as panel_bytes
from ._native import to_panels as to_panels
from ._rows import dequantize as dequantize
from ._rows import quantize as quantize
from ._rows import scaled_integer_linear as scaled_integer_linear
from ._rows import squared_error as squared_error
from ._rows import squared_error_gradient as squared_error_gradient
from ._triton import packed_linear_cuda as packed_linear_cuda
from ._triton import triton_packed_linear as triton_packed_linear
from ._triton import triton_status as triton_status
from ._triton import triton_weight_only_linear as triton_weight_only_linear
