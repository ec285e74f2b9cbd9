"""Products of integer-valued matrices, exact whatever computes them."""

from ._integer import active_path as active_path
from ._integer import integer_linear as integer_linear
from ._integer import integer_matmul as integer_matmul
from ._integer import resident_codes as resident_codes
