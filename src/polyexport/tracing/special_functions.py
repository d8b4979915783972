"""Special functions that converters lack, composed of elementary ones; accurate to about seven digits.

Γ and its derivatives by their asymptotic series behind a recurrence, Bessel functions by the approximations of
Abramowitz and Stegun, sections 9.4 and 9.8, and of "Computer Approximations" (Wiley, 1968); the inverse error function
by Giles's for single precision.

https://personal.math.ubc.ca/~cbm/aands/ and https://people.maths.ox.ac.uk/gilesm/files/gems_erfinv.pdf
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SHIFT = 8
"""Steps of a recurrence, after which few terms of a series are enough."""
_EULER_MACLAURIN = (12.0, -720.0, 30240.0, -1209600.0, 47900160.0)
"""(2k)! over the 2kth Bernoulli number."""


def compositions() -> Mapping[Any, Callable[..., Any]]:
    """The functions by PyTorch's operators, under each name that they have there."""
    import torch

    aten = torch.ops.aten
    named = {name: function for key, function in _FUNCTIONS.items() for name in (key, _ALIASES.get(key, key))}
    named |= {f"special_{name}": function for name, function in named.items()}
    found = ((getattr(aten, name, None), function) for name, function in named.items())
    return {
        getattr(packet, overload): function
        for packet, function in found
        if packet is not None
        for overload in packet.overloads()
        if overload in ("default", "self_scalar", "other_scalar")
    }


def _real(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_floating_point() else x.float()


def _polynomial(x: torch.Tensor, *coefficients: float) -> torch.Tensor:
    """Of the coefficients from the constant upward."""
    import torch

    total = torch.full_like(x, coefficients[-1])
    for each in reversed(coefficients[:-1]):
        total = total * x + each
    return total


# --- Γ ----------------------------------------------------------------------------------------------------------------


def lgamma(x: torch.Tensor) -> torch.Tensor:
    """`torch.lgamma`; below a half by reflection."""
    import torch

    x = _real(x)
    small = x < 0.5
    mirrored = torch.where(small, 1 - x, x)
    product = mirrored
    for step in range(1, _SHIFT):  # at most about 1e8 where it counts, since Γ of 16 is 1.3e12
        product = torch.where(mirrored < 8, product * (mirrored + step), product)
    shift = torch.where(mirrored < 8, float(_SHIFT), 0.0)
    z = mirrored + shift
    series = _polynomial(1 / (z * z), 1 / 12, -1 / 360, 1 / 1260) / z
    above = (z - 0.5) * (z.log() - 1) - 0.5 + math.log(2 * math.pi) / 2 + series
    above = above - torch.where(mirrored < 8, product.log(), 0.0)
    below = math.log(math.pi) - _sine(x).abs().log() - above
    return torch.where(small, below, above)


def mvlgamma(x: torch.Tensor, p: int) -> torch.Tensor:
    """`torch.mvlgamma`."""
    import torch

    terms = torch.stack([lgamma(_real(x) - step / 2) for step in range(p)])
    return terms.sum(0) + p * (p - 1) / 4 * math.log(math.pi)


def _sine(x: torch.Tensor) -> torch.Tensor:
    """The sine of πx, exactly zero at integers, but for the sign."""
    return ((x - x.round()) * math.pi).sin()


def digamma(x: torch.Tensor) -> torch.Tensor:
    """`torch.digamma`; below zero by reflection, and NaN at negative integers."""
    import torch

    x = _real(x)
    mirrored = torch.where(x < 0, 1 - x, x)
    z = mirrored + _SHIFT
    total = z.log() - 0.5 / z - _polynomial(1 / (z * z), 1 / 12, -1 / 120, 1 / 252) / (z * z)
    for step in range(_SHIFT):
        total = total - 1 / (mirrored + step)
    whole, off = x.round() == x, (x - x.round()) * math.pi
    below = torch.where(whole, math.nan, total - math.pi * off.cos() / off.sin())
    return torch.where(x < 0, below, total)


def polygamma(n: int, x: torch.Tensor) -> torch.Tensor:
    """`torch.polygamma`; the first one below a half by reflection, as in PyTorch."""
    import torch

    if n == 0:
        return digamma(x)
    x = _real(x)
    if n > 1:
        return (-1.0) ** (n + 1) * math.factorial(n) * _zeta(float(n + 1), x)
    found, ratio = _zeta(2.0, torch.where(x < 0.5, 1 - x, x)), math.pi / _sine(x)
    return torch.where(x < 0.5, ratio * ratio - found, found)


def zeta(x: Any, q: Any) -> torch.Tensor:
    """`torch.special.zeta`, Hurwitz's, for positive `q`; one of both may be a number."""
    import torch

    x = _real(x) if isinstance(x, torch.Tensor) else torch.full_like(_real(q), x)
    q = q if isinstance(q, torch.Tensor) else torch.full_like(x, q)
    found = torch.where(x == 1, math.inf, _zeta(x, _real(q)))
    return torch.where(x < 1, math.nan, found)


def _zeta(s: Any, q: torch.Tensor) -> torch.Tensor:
    """By Euler and Maclaurin's formula."""
    z = q + _SHIFT
    last = z ** (-s)
    total, factor, power = z ** (1 - s) / (s - 1) + last * 0.5, s, last / z
    for step, divisor in enumerate(_EULER_MACLAURIN):
        total = total + factor * power / divisor
        factor, power = factor * (s + 2 * step + 1) * (s + 2 * step + 2), power / (z * z)
    for step in range(_SHIFT):
        total = total + (q + step) ** (-s)
    found: torch.Tensor = total
    return found


# --- the error function -----------------------------------------------------------------------------------------------


def erfinv(x: torch.Tensor) -> torch.Tensor:
    """`torch.erfinv`."""
    x = _real(x)
    return _erfinv(x, (1 - x) * (1 + x))


def ndtri(x: torch.Tensor) -> torch.Tensor:
    """`torch.special.ndtri`, accurate at both ends."""
    x = _real(x)
    return math.sqrt(2) * _erfinv(2 * x - 1, 4 * x * (1 - x))


def _erfinv(x: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The inverse at `x`; `rest` is 1 - x²."""
    import torch

    w = -rest.log()
    near = _polynomial(
        w - 2.5,
        *(1.50140941, 0.246640727, -0.00417768164, -0.00125372503, 0.00021858087),
        *(-4.39150654e-06, -3.5233877e-06, 3.43273939e-07, 2.81022636e-08),
    )
    far = _polynomial(
        w.clamp(min=5.0).sqrt() - 3,
        *(2.83297682, 1.00167406, 0.00943887047, -0.0076224613, 0.00573950773),
        *(-0.00367342844, 0.00134934322, 0.000100950558, -0.000200214257),
    )
    return torch.where(rest == 0, x * math.inf, torch.where(w < 5, near, far) * x)


def erfcx(x: torch.Tensor) -> torch.Tensor:
    """`torch.special.erfcx`, by a fit of Chebyshev's kind that is relative to the value."""
    import torch

    x = _real(x)
    t = 1 / (1 + 0.5 * x.abs())
    fit = _polynomial(
        t,
        *(-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806),
        *(0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277),
    )
    above = t * fit.exp()
    return torch.where(x < 0, 2 * (x * x).exp() - above, above)


def log_ndtr(x: torch.Tensor) -> torch.Tensor:
    """`torch.special.log_ndtr`."""
    import torch

    x = _real(x) * math.sqrt(0.5)
    return torch.where(x < 0.7, (erfcx(-x) / 2).log() - x * x, torch.log1p(-0.5 * torch.erfc(x)))


# --- Bessel functions -------------------------------------------------------------------------------------------------


def _scaled_i0(x: torch.Tensor) -> torch.Tensor:
    small = (1.0, 3.5156229, 3.0899424, 1.2067492, 0.2659732, 0.0360768, 0.0045813)
    large = (0.39894228, 0.01328592, 0.00225319, -0.00157565, 0.00916281)
    return _scaled(_real(x), small, (*large, -0.02057706, 0.02635537, -0.01647633, 0.00392377))


def _scaled_i1(x: torch.Tensor) -> torch.Tensor:
    x = _real(x)
    small = (0.5, 0.87890594, 0.51498869, 0.15084934, 0.02658733, 0.00301532, 0.00032411)
    large = (0.39894228, -0.03988024, -0.00362018, 0.00163801, -0.01031555)
    return _scaled(x, small, (*large, 0.02282967, -0.02895312, 0.01787654, -0.00420059), odd=True)


def _scaled(x: torch.Tensor, small: Sequence[float], large: Sequence[float], *, odd: bool = False) -> torch.Tensor:
    """Times exp(-|x|), from two polynomials that meet at 3.75."""
    import torch

    distance = x.abs()
    t = x / 3.75
    near = _polynomial(t * t, *small) * (-distance).exp() * (x if odd else 1.0)
    safe = distance.clamp(min=3.75)
    far = _polynomial(3.75 / safe, *large) / safe.sqrt() * (x.sign() if odd else 1.0)
    return torch.where(distance < 3.75, near, far)


def _scaled_k0(x: torch.Tensor) -> torch.Tensor:
    small = (-0.57721566, 0.42278420, 0.23069756, 0.03488590, 0.00262698, 0.00010750, 0.0000074)
    large = (1.25331414, -0.07832358, 0.02189568, -0.01062446, 0.00587872, -0.00251540, 0.00053208)
    return _scaled_k(_real(x), lambda x, y: _polynomial(y, *small) - (x / 2).log() * _scaled_i0(x) * x.exp(), large)


def _scaled_k1(x: torch.Tensor) -> torch.Tensor:
    import torch

    small = (1.0, 0.15443144, -0.67278579, -0.18156897, -0.01919402, -0.00110404, -0.00004686)
    large = (1.25331414, 0.23498619, -0.03655620, 0.01504268, -0.00780353, 0.00325614, -0.00068245)
    x = _real(x)
    found = _scaled_k(x, lambda x, y: _polynomial(y, *small) / x + (x / 2).log() * _scaled_i1(x) * x.exp(), large)
    return torch.where(x == 0, math.inf, found)


def _scaled_k(x: torch.Tensor, small: Callable[..., torch.Tensor], large: Sequence[float]) -> torch.Tensor:
    """Times exp(x), from two approximations that meet at 2."""
    import torch

    near, far = x.clamp(max=2.0), x.clamp(min=2.0)
    return torch.where(x <= 2, small(near, near * near / 4) * near.exp(), _polynomial(2 / far, *large) / far.sqrt())


_TWO_OVER_PI = 2 / math.pi


def bessel_j0(x: torch.Tensor) -> torch.Tensor:
    """`torch.special.bessel_j0`."""
    import torch

    x = _real(x).abs()
    y = (x * x).clamp(max=64.0)
    top = _polynomial(y, 57568490574.0, -13362590354.0, 651619640.7, -11214424.18, 77392.33017, -184.9052456)
    bottom = _polynomial(y, 57568490411.0, 1029532985.0, 9494680.718, 59272.64853, 267.8532712, 1.0)
    return torch.where(x < 8, top / bottom, _wave0(x, torch.cos, torch.sin, -1.0))


def bessel_y0(x: torch.Tensor) -> torch.Tensor:
    """`torch.special.bessel_y0`."""
    import torch

    x = _real(x)
    y = (x * x).clamp(max=64.0)
    top = _polynomial(y, -2957821389.0, 7062834065.0, -512359803.6, 10879881.29, -86327.92757, 228.4622733)
    bottom = _polynomial(y, 40076544269.0, 745249964.8, 7189466.438, 47447.26470, 226.1030244, 1.0)
    near = top / bottom + _TWO_OVER_PI * bessel_j0(x) * x.log()
    return torch.where(x < 8, near, _wave0(x, torch.sin, torch.cos, 1.0))


def _wave0(x: torch.Tensor, first: Callable[..., Any], second: Callable[..., Any], sign: float) -> torch.Tensor:
    x = x.clamp(min=8.0)
    z, phase = 8 / x, x - math.pi / 4
    p = _polynomial(z * z, 1.0, -0.001098628627, 0.2734510407e-4, -0.2073370639e-5, 0.2093887211e-6)
    q = _polynomial(z * z, -0.01562499995, 0.1430488765e-3, -0.6911147651e-5, 0.7621095161e-6, -0.934945152e-7)
    return (_TWO_OVER_PI / x).sqrt() * (first(phase) * p + sign * z * second(phase) * q)  # type: ignore[no-any-return]


def bessel_j1(x: torch.Tensor) -> torch.Tensor:
    """`torch.special.bessel_j1`."""
    import torch

    x = _real(x)
    y = (x * x).clamp(max=64.0)
    top = _polynomial(y, 72362614232.0, -7895059235.0, 242396853.1, -2972611.439, 15704.48260, -30.16036606)
    bottom = _polynomial(y, 144725228442.0, 2300535178.0, 18583304.74, 99447.43394, 376.9991397, 1.0)
    far = _wave1(x.abs(), torch.cos, torch.sin, -1.0) * x.sign()
    return torch.where(x.abs() < 8, x * top / bottom, far)


def bessel_y1(x: torch.Tensor) -> torch.Tensor:
    """`torch.special.bessel_y1`."""
    import torch

    x = _real(x)
    y = (x * x).clamp(max=64.0)
    top = _polynomial(y, -4.900604943e12, 1.275274390e12, -5.153438139e10, 7.349264551e8, -4237922.726, 8511.937935)
    bottom = _polynomial(y, 2.499580570e13, 4.244419664e11, 3733650367.0, 22459040.02, 102042.6050, 354.9632885, 1.0)
    near = x * top / bottom + _TWO_OVER_PI * (bessel_j1(x) * x.log() - 1 / x)
    return torch.where(x == 0, -math.inf, torch.where(x < 8, near, _wave1(x, torch.sin, torch.cos, 1.0)))


def _wave1(x: torch.Tensor, first: Callable[..., Any], second: Callable[..., Any], sign: float) -> torch.Tensor:
    x = x.clamp(min=8.0)
    z, phase = 8 / x, x - 3 * math.pi / 4
    p = _polynomial(z * z, 1.0, 0.00183105, -0.3516396496e-4, 0.2457520174e-5, -0.240337019e-6)
    q = _polynomial(z * z, 0.04687499995, -0.2002690873e-3, 0.8449199096e-5, -0.88228987e-6, 0.105787412e-6)
    return (_TWO_OVER_PI / x).sqrt() * (first(phase) * p + sign * z * second(phase) * q)  # type: ignore[no-any-return]


def _spherical_j0(x: torch.Tensor) -> torch.Tensor:
    import torch

    x = _real(x)
    safe = torch.where(x == 0, 1.0, x)
    return torch.where(x == 0, 1.0, safe.sin() / safe)


# --- Airy's -----------------------------------------------------------------------------------------------------------

_AIRY_AN = (1.0, 14.02646912, 70.53609068, 159.7563914, 168.0892249, 76.27960536, 12.00759527, 0.3465381015)
_AIRY_AD = (1.0, 14.09591356, 71.47784008, 164.2346929, 177.3180881, 84.51389701, 14.75625626, 0.5675945326)
_AIRY_AFN = (
    -1.677876985e-08,
    -2.776491082e-06,
    -0.0001592764962,
    -0.004062659236,
    -0.04919001326,
    -0.2797799815,
    -0.693158036,
    -0.6264565444,
    -0.1316963234,
)
_AIRY_AFD = (
    4.51850093e-07,
    7.547203483e-05,
    0.004402916416,
    0.1156871738,
    1.475291468,
    9.187074029,
    26.73670409,
    32.68250328,
    13.35604207,
)
_AIRY_AGN = (
    3.415517848e-10,
    8.117892396e-08,
    6.9879367e-06,
    0.0002828516008,
    0.00585804113,
    0.06338889196,
    0.3514656561,
    0.9391692298,
    1.065798976,
    0.3911030296,
    0.01973399321,
)
_AIRY_AGD = (
    4.918345701e-09,
    1.171667332e-06,
    0.0001012590851,
    0.004126565238,
    0.08645808264,
    0.9542936116,
    5.476860694,
    15.56466289,
    19.83529287,
    9.308929081,
)


def airy_ai(x: torch.Tensor) -> torch.Tensor:
    """`torch.special.airy_ai`: a power series near zero, Cephes' rational approximations elsewhere."""
    import torch

    x = _real(x)
    size = x.abs().clamp(min=2.09)
    zeta, root = size * size.sqrt() * (2 / 3), size.sqrt().sqrt()
    z = 1 / zeta
    above = _polynomial(z, *_AIRY_AN) / _polynomial(z, *_AIRY_AD) * (-zeta).exp() / 2
    cosines = z * _polynomial(z * z, *_AIRY_AGN) / _polynomial(z * z, *_AIRY_AGD)
    sines = 1 + z * z * _polynomial(z * z, *_AIRY_AFN) / _polynomial(z * z, *_AIRY_AFD)
    phase = zeta + math.pi / 4
    far = torch.where(x > 0, above, phase.sin() * sines - phase.cos() * cosines) / (root * math.sqrt(math.pi))
    near = x.clamp(-2.09, 2.09)
    cube, even, odd = near**3, [1.0], [1.0]
    for step in range(3, 31, 3):
        even.append(even[-1] / (step * (step - 1)))
        odd.append(odd[-1] / (step * (step + 1)))
    series = 0.355028053887817239 * _polynomial(cube, *even) - 0.258819403792806798 * near * _polynomial(cube, *odd)
    return torch.where(x.isinf(), math.nan, torch.where(x.abs() < 2.09, series, far))


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "lgamma": lgamma,
    "mvlgamma": mvlgamma,
    "digamma": digamma,
    "polygamma": polygamma,
    "zeta": zeta,
    "erfinv": erfinv,
    "ndtri": ndtri,
    "erfcx": erfcx,
    "log_ndtr": log_ndtr,
    "i0": lambda x: _scaled_i0(x) * x.abs().exp(),
    "i0e": _scaled_i0,
    "i1": lambda x: _scaled_i1(x) * x.abs().exp(),
    "i1e": _scaled_i1,
    "modified_bessel_k0": lambda x: _scaled_k0(x) * (-x).exp(),
    "scaled_modified_bessel_k0": _scaled_k0,
    "modified_bessel_k1": lambda x: _scaled_k1(x) * (-x).exp(),
    "scaled_modified_bessel_k1": _scaled_k1,
    "bessel_j0": bessel_j0,
    "bessel_j1": bessel_j1,
    "bessel_y0": bessel_y0,
    "bessel_y1": bessel_y1,
    "spherical_bessel_j0": _spherical_j0,
    "airy_ai": airy_ai,
}
_ALIASES = {
    "lgamma": "gammaln",
    "mvlgamma": "multigammaln",
    "digamma": "psi",
    "i0": "modified_bessel_i0",
    "i1": "modified_bessel_i1",
}
