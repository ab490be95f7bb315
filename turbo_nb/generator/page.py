"""What the panels of the generator share: HTML, players and links, and drawing widgets anew.

Text that people typed, and text from files, is escaped here or by the caller before it enters HTML.
"""

import base64
import html
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import ipywidgets as w

from ..video.gallery import Clip

if TYPE_CHECKING:
    from IPython.display import HTML
    from PIL.Image import Image

STYLE = """<style>
.tnb { max-width: 1080px; --tnb-soft: color-mix(in srgb, currentColor 12%, transparent); }
.tnb .widget-label { min-width: 0; }
.tnb-card { border: 1px solid color-mix(in srgb, currentColor 18%, transparent); border-radius: 8px; padding: 10px 12px;
  box-sizing: border-box; }
.tnb h3 { margin: 0 0 4px; font-size: 1.05em; }
.tnb p { margin: 2px 0; line-height: 1.4; }
.tnb .tnb-dim { opacity: .75; }
.tnb-stages { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; padding: 0; margin: 6px 0; }
.tnb-stages li { padding: 1px 10px; border-radius: 99px; background: var(--tnb-soft); opacity: .7; }
.tnb-stages li[aria-current] { opacity: 1; font-weight: 600; outline: 1px solid currentColor; }
.tnb-stages li.tnb-done { opacity: 1; }
.tnb progress { width: 100%; height: 10px; }
.tnb img, .tnb video { display: block; max-width: 100%; border-radius: 6px; background: #0002; }
.tnb .tnb-error { border-left: 4px solid #c62828; padding: 6px 10px; background: #c6282818; }
.tnb .tnb-prompt { overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical;
  overflow: hidden; }
</style>"""


def player(clip: Clip, width: int = 0) -> "HTML":
    """Return a finished clip for IPython's `display`. It is linked by its relative path, so the notebook stays small.

    Args:
        clip: the clip.
        width: in pixels of the page; 0: the video's own.
    """
    from IPython.display import HTML

    limit = f' style="width:{width}px"' if width else ""
    label = html.escape(f"Video: {clip.record.prompt}")
    return HTML(
        f'<video src="{_address(clip.path)}"{limit} aria-label="{label}" controls loop muted playsinline '
        'preload="metadata"></video>'
    )


def link(path: Path, text: str) -> "HTML":
    """Return a link that downloads a file."""
    from IPython.display import HTML

    return HTML(f'<a href="{_address(path)}" download="{html.escape(path.name)}">{html.escape(text)}</a>')


def _address(path: Path) -> str:
    """Return the path from the notebook's folder as an escaped URL"""
    return html.escape(quote(Path(os.path.relpath(path)).as_posix()))


def image_tag(data: bytes, kind: str, label: str, width: int) -> str:
    """Return an <img> that contains its bytes."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{html.escape(label)}" style="width:{width}px">'


def thumbnail(image: "Image", name: str) -> str:
    """Return an <img> with a small copy of the image that a clip begins with."""
    small, out = image.copy(), io.BytesIO()
    small.thumbnail((240, 240))
    small.save(out, "JPEG")
    return image_tag(out.getvalue(), "jpeg", f"The clip begins with {name}", small.width)


def error_box(text: str, trace: str = "") -> str:
    """Return HTML that a screen reader reads out at once."""
    details = f"<details><summary>Details</summary><pre>{html.escape(trace)}</pre></details>" if trace else ""
    return f'<div class="tnb-error" role="alert">{html.escape(text)}{details}</div>'


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of escaped text. kind: a CSS class."""
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>"


def card(title: str, *children: w.Widget) -> w.VBox:
    """Return a box with a frame and a heading."""
    box = w.VBox([w.HTML(f"<h3>{title}</h3>"), *children], layout=w.Layout(min_width="0"))
    box.add_class("tnb-card")
    return box


def button(text: str, **more) -> w.Button:
    """Return a button as wide as its text."""
    return w.Button(description=text, layout=w.Layout(width="auto"), **more)


def put(output: w.Output, *things) -> None:
    """Show things in an output area. Works from any thread, unlike `with output`."""
    output.outputs = ()
    for thing in things:
        output.append_display_data(thing)


def family(widget: w.Widget) -> list[w.Widget]:
    """Return a widget and all widgets inside it."""
    return [widget, *(one for child in getattr(widget, "children", ()) for one in family(child))]


def close(widgets: list[w.Widget]) -> None:
    """Close widgets with their styles and layouts, which ipywidgets would keep."""
    for widget in widgets:
        for part in (getattr(widget, "style", None), widget.layout, widget):
            if part is not None:
                part.close()
