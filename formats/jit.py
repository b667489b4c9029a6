"""numba.njit with the settings that every compiled loop here shares."""

from typing import Any

import numba


def jit(function: Any) -> Any:
    """No fastmath: results are the same bytes on every machine."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba's "no locator": neither the package's directory nor the user's cache can be written
        return numba.njit(nogil=True, error_model="numpy")(function)
