"""Packed layers on CUDA devices, in Triton; imported without Triton, which loads when used."""

from ._entry import packed_linear_cuda as packed_linear_cuda
from ._entry import triton_packed_linear as triton_packed_linear
from ._entry import triton_weight_only_linear as triton_weight_only_linear
from ._status import serves as serves
from ._status import triton_status as triton_status
