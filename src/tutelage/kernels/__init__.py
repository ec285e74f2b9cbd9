"""Products of integer-valued matrices, exact whatever computes them."""

from ._integer import active_path as active_path
from ._integer import integer_linear as integer_linear
from ._integer import integer_matmul as integer_matmul
from ._integer import resident_codes as resident_codes
from ._triton import packed_linear_cuda as packed_linear_cuda
from ._triton import triton_packed_linear as triton_packed_linear
from ._triton import triton_status as triton_status
from ._triton import triton_weight_only_linear as triton_weight_only_linear
