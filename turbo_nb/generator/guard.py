"""Callbacks that show their errors on the page, because ipywidgets and threads would only log them.

Every callback of the generator's widgets, and every thread of its panels, is registered through this module.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import ipywidgets as w

ShowError = Callable[[Exception], object]


def guarded(function: Callable[..., Any], show_error: ShowError) -> Callable[..., Any]:
    """Return a function that calls `show_error` with an exception in place of raising it, and then returns None."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            show_error(error)
            return None

    call.show_error = show_error
    return call


def on_click(button: w.Button, action: Callable[[], object], show_error: ShowError) -> None:
    """Call `action` when a button is clicked; see `guarded`."""
    button.on_click(guarded(lambda _: action(), show_error))


def on_change(
    widget: w.Widget, action: Callable[[], object], show_error: ShowError, names: str | list[str] = "value"
) -> None:
    """Call `action` when traits of a widget have changed; see `guarded`."""
    widget.observe(guarded(lambda _: action(), show_error), names)


def raise_error(error: Exception) -> None:
    """Raise an error of a part that has no page to show it on."""
    raise error
