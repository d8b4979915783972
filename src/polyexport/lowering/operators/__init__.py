"""The operators that are compositions of a `Backend`'s primitives, each written once for all frameworks."""

from polyexport.lowering.operators import (  # each writes its operators into `SHARED`
    control as control,
)
from polyexport.lowering.operators import (
    index as index,
)
from polyexport.lowering.operators import (
    math as math,
)
from polyexport.lowering.operators import (
    normalize as normalize,
)
from polyexport.lowering.operators import (
    pools as pools,
)
from polyexport.lowering.operators import (
    quantize as quantize,
)
from polyexport.lowering.operators import (
    random as random,
)
from polyexport.lowering.operators import (
    recurrent as recurrent,
)
from polyexport.lowering.operators import (
    reduce as reduce,
)
from polyexport.lowering.operators import (
    resize as resize,
)
from polyexport.lowering.operators import (
    shape as shape,
)
from polyexport.lowering.operators import (
    signal as signal,
)
from polyexport.lowering.operators import (
    vision as vision,
)
from polyexport.lowering.table import SHARED as SHARED
