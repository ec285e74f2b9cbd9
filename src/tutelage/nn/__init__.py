"""Quantized modules and the quantized attention function."""

from ._attention import ATTENTION_NAME as ATTENTION_NAME
from ._attention import AttentionProbe as AttentionProbe
from ._attention import AttentionQuantizer as AttentionQuantizer
from ._attention import attention as attention
from ._attention import probe_of as probe_of
from ._attention import register_attention as register_attention
from ._attention import use_attention as use_attention
from ._embedding import QuantEmbedding as QuantEmbedding
from ._linear import Arithmetic as Arithmetic
from ._linear import QuantLinear as QuantLinear
from ._linear import quantized_linear as quantized_linear
from ._linear import scaled_integer_linear as scaled_integer_linear
from ._packed import PackedEmbedding as PackedEmbedding
from ._packed import PackedLinear as PackedLinear
