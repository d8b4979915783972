"""The operators that are compositions of a `Backend`'s primitives, each written once for all frameworks."""

from polyexport.lowering.operators import (  # each writes its operators into `SHARED`
    control as control,
    index as index,
    math as math,
    normalize as normalize,
    pools as pools,
    quantize as quantize,
    random as random,
    recurrent as recurrent,
    reduce as reduce,
    resize as resize,
    shape as shape,
    signal as signal,
    vision as vision,
)
from polyexport.lowering.table import SHARED as SHARED
