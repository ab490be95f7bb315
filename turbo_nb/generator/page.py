"""What the panels of the generator share: HTML, and boxes and buttons in one style.

Text that people typed, and text from files, is escaped here or by the caller before it enters HTML.
"""

import base64
import html
import io
import traceback
from typing import TYPE_CHECKING

import ipywidgets as w

from ..errors import TurboNbError, explained
from .controls import in_page_words
from .guard import ShowError, on_change

if TYPE_CHECKING:
    from PIL.Image import Image

STYLE = """<style>
.tnb { container-type: inline-size; --tnb-line: color-mix(in srgb, currentColor 18%, transparent);
  --tnb-soft: color-mix(in srgb, currentColor 8%, transparent); --tnb-accent: var(--jp-brand-color1, #1976d2);
  /* gray, because ipywidgets' arrow is black in the dark theme, too */
  --jp-widgets-dropdown-arrow: url("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 18 18'\
%3E%3Cpath fill='none' stroke='%23888' stroke-width='2' d='M5 7l4 4 4-4'/%3E%3C/svg%3E"); }
.tnb .tnb-under { margin-left: 100px; }
.tnb .widget-label { min-width: 0; height: auto; line-height: 1.2; white-space: normal; }
.tnb .tnb-no-label .widget-label { height: 0; margin: 0; overflow: hidden; }
.tnb .widget-html, .tnb .widget-html-content { height: auto; line-height: 1.45; }
.tnb-columns { display: grid; grid-template: auto 1fr / minmax(0, 5fr) minmax(0, 6fr); gap: 14px; align-items: start; }
.tnb-columns > :nth-child(2) { grid-area: 1 / 2 / span 2; }
@container (max-width: 820px) {
  .tnb-columns { grid-template: none / minmax(0, 1fr); }
  .tnb-columns > :nth-child(2) { grid-area: auto; }
}
.tnb-card { border: 1px solid var(--tnb-line); border-radius: 10px; padding: 12px 14px; box-sizing: border-box; }
.tnb h3 { margin: 0 0 4px; font-size: 1.05em; }
.tnb p { margin: 2px 0; line-height: 1.45; }
.tnb .tnb-dim { opacity: .75; }
.tnb .tnb-help { margin: -2px 2px 8px 4px; font-size: .9em; opacity: .75; }
.tnb details { margin: 2px 0; }
.tnb summary { cursor: pointer; }
.tnb .tnb-cut { background: #c6282830; text-decoration: line-through; overflow-wrap: anywhere; }
.tnb .widget-textarea textarea { font: inherit; font-size: 1.1em; line-height: 1.4; resize: vertical; }
.tnb input, .tnb select, .tnb textarea, .tnb button { border-radius: 6px; font-family: inherit; }
.tnb .tnb-go { height: 36px; min-width: 140px; font-weight: 600; }
.tnb .tnb-fold > button { background: none; text-align: left; padding: 0 2px; font-weight: 600; box-shadow: none; }
.tnb .tnb-fold > button:hover { background: var(--tnb-soft); }
.tnb .tnb-bar { height: 10px; border-radius: 99px; background: var(--tnb-soft); overflow: hidden; margin: 6px 0; }
.tnb .tnb-bar > div { height: 100%; border-radius: 99px; background: var(--tnb-accent); transition: width 1s linear; }
.tnb .tnb-model { padding: 8px 12px; background: var(--tnb-soft); border-radius: 8px; }
.tnb .tnb-tag { display: inline-block; padding: 0 9px; margin: 2px 4px 2px 0; border-radius: 99px;
  border: 1px solid var(--tnb-line); }
.tnb .tnb-good { border-color: #2e7d32; } .tnb .tnb-bad { border-color: #c62828; }
.tnb table { border-collapse: collapse; width: 100%; }
.tnb th .tnb-help { font-weight: normal; margin: 0; }
.tnb th, .tnb td { text-align: left; vertical-align: top; padding: 3px 8px 3px 0;
  border-top: 1px solid var(--tnb-line); }
.tnb .tnb-job { border-top: 1px solid var(--tnb-line); padding: 3px 0; align-items: center; }
.tnb .tnb-job .widget-html, .tnb .tnb-job .widget-html-content { overflow: hidden; min-width: 0; width: 100%; }
.tnb .tnb-line { display: flex; gap: 8px; white-space: nowrap; }
.tnb .tnb-line > :nth-child(2) { flex: 1; overflow: hidden; text-overflow: ellipsis; }
.tnb .tnb-stage { background: var(--tnb-soft); border-radius: 8px; min-height: 220px; display: flex;
  align-items: center; justify-content: center; text-align: center; padding: 16px; box-sizing: border-box; }
.tnb img, .tnb video { display: block; max-width: 100%; border-radius: 8px; background: #0002; }
.tnb .tnb-large img, .tnb .tnb-large video { width: 100%; max-height: 70vh; object-fit: contain; }
.tnb .tnb-preview img { image-rendering: auto; filter: saturate(1.1); }
.tnb .tnb-error { border-left: 4px solid #c62828; padding: 6px 10px; background: #c6282818; border-radius: 4px;
  overflow-wrap: anywhere; white-space: pre-line; }
.tnb .tnb-note { margin: 4px 0; overflow-wrap: anywhere; white-space: pre-line; }
.tnb .tnb-prompt { overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical;
  overflow: hidden; }
.tnb-advice { border-left: 4px solid #ef6c00; padding: 6px 10px; background: #ef6c0018; }
.jp-OutputArea:has(.tnb:not(.jupyter-widgets-disconnected)) .tnb-advice { display: none; }
.tnb.jupyter-widgets-disconnected { opacity: .45; pointer-events: none; }
.tnb.jupyter-widgets-disconnected::before, .tnb .jupyter-widgets-disconnected::before { display: none; }
</style>"""
# stands above the page, and shows only where the page is gone or cut off, as it is after a restart of the kernel
ADVICE = (
    '<p class="tnb-advice">The generator\'s kernel has ended. Run this cell again: the prompt, the settings, the clips '
    "and the queue are kept.</p>"
)

WRAPPED = {"flex_flow": "row wrap", "align_items": "center"}  # of buttons, which a narrow page would cut off


def image_tag(data: bytes, kind: str, label: str, width: int = 0) -> str:
    """Return an <img> that contains its bytes. width: in pixels; 0: as in the style."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    limit = f' style="width:{width}px"' if width else ""
    return f'<img src="{source}" alt="{html.escape(label)}"{limit}>'


def thumbnail(image: "Image", label: str) -> str:
    """Return an <img> with a small copy of an image."""
    small, out = image.copy(), io.BytesIO()
    small.thumbnail((240, 240))
    small.save(out, "JPEG")
    return image_tag(out.getvalue(), "jpeg", label, small.width)


def error_box(text: str, trace: str = "") -> str:
    """Return HTML of an error in the page's words, which a screen reader reads out at once."""
    details = f"<details><summary>Details</summary><pre>{html.escape(trace)}</pre></details>" if trace else ""
    return f'<div class="tnb-error" role="alert">{html.escape(in_page_words(text))}{details}</div>'


def error_of(error: Exception) -> str:
    """Return HTML of an error. One that this package does not raise on purpose has its traceback."""
    ours = isinstance(error, TurboNbError)
    return error_box(explained(error), "" if ours else "".join(traceback.format_exception(error)))


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of escaped text. kind: a CSS class."""
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>"


def bar(label: str, share: float) -> str:
    """Return a progress bar. share: from 0 to 1."""
    return (
        f'<div class="tnb-bar" role="progressbar" aria-label="{label}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share * 100:.0f}"><div style="width:{share:.1%}"></div></div>'
    )


def card(title: str, *children: w.Widget) -> w.VBox:
    """Return a box with a frame and a heading. title: empty for none."""
    heading = [w.HTML(f"<h3>{title}</h3>")] if title else []
    box = w.VBox([*heading, *children], layout=w.Layout(min_width="0"))
    box.add_class("tnb-card")
    return box


def button(text: str, **more) -> w.Button:
    """Return a button as wide as its text."""
    return w.Button(description=text, layout=w.Layout(width="auto"), **more)


def fold(text: str, content: w.Widget, tooltip: str, show_error: ShowError) -> w.VBox:
    """Return a button that folds a widget, folded at first; the keyboard does not reach the title of an Accordion."""
    toggle = w.ToggleButton(description=f"{text} ▸", tooltip=tooltip, layout=w.Layout(width="auto"))

    def show() -> None:
        visible(content, toggle.value)
        toggle.description = f"{text} {'▾' if toggle.value else '▸'}"

    on_change(toggle, show, show_error)
    show()
    box = w.VBox([toggle, content])
    box.add_class("tnb-fold")
    box.toggle = toggle
    return box


def visible(widget: w.Widget, shown: bool) -> None:
    """Show a widget, or take its place away."""
    widget.layout.display = None if shown else "none"


def family(widget: w.Widget) -> list[w.Widget]:
    """Return a widget and all widgets inside it."""
    return [widget, *(one for child in getattr(widget, "children", ()) for one in family(child))]


def close(widgets: list[w.Widget]) -> None:
    """Close widgets with their styles and layouts, which ipywidgets would keep."""
    for widget in widgets:
        for part in (getattr(widget, "style", None), widget.layout, widget):
            if part is not None:
                part.close()
