"""The player of one clip and the gallery of all clips. The page asks for the bytes of a clip when it plays it."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import traitlets as t

from ...errors import first_line
from ...machine import environment
from ...records import VideoRecord
from ...runtime.estimate import in_words
from ...video.gallery import ORDERS, Clip, Gallery, key_of
from ..guard import guarded, on_change
from . import Part, source

PIECE = 1 << 20  # bytes of a message, because a page shows its progress and other messages go between
PAGE = 24  # clips of a page of the gallery


def key(clip: Clip) -> str:
    """Return what a page calls a clip's bytes: it differs for another file and for another content."""
    _, changed, size = key_of(clip)
    return f"{changed}/{size}/{clip.path.name}"


def facts(clip: Clip) -> str:
    """Return the settings of a clip in one line, without those that its file does not give."""
    record = clip.record
    seeds = [record.seed] if isinstance(record.seed, int) else record.seed
    attention = record.attention_type and record.attention_type + (f" {record.sla_topk:g}" if record.sla_topk else "")
    parts = [
        record.width and record.height and f"{record.width}x{record.height}",
        record.num_frames and f"{record.num_frames} frames" + _extended(record),
        f"{record.num_steps} steps",
        f"seed {' '.join(map(str, seeds))}",
        attention,
        record.model,
        ", ".join(f"{one.name} {one.strength:g}" for one in record.loras),
        record.several_gpus,
        clip.seconds and in_words(clip.seconds) + environment.dollars(record.cost),
    ]
    return ", ".join(filter(None, parts))


def _extended(record: VideoRecord) -> str:
    """Return how often a clip was extended, because its record has the frames of one part"""
    times = record.more.get("extend")
    return f" extended {times}×" if type(times) is int else ""


def describe(clip: Clip) -> dict:
    """Return what a page shows of a clip. All of it is text, which the page puts in as text."""
    prompt = clip.record.prompt
    return {
        "key": key(clip),
        "name": clip.path.name,
        "words": prompt,
        "label": prompt[:120] or clip.path.name,  # the accessible name
        "facts": facts(clip),
    }


class Player(Part):
    """A component that plays files which the kernel names.

    Args:
        find: returns the file with a key, None where the page may not have it.
    """

    def __init__(self, find: Callable[[str], Path | None], **traits):
        super().__init__(**traits)
        self._find = find
        self.answers["bytes"] = self._bytes

    def _bytes(self, content: dict, _) -> tuple[dict, list[bytes]]:
        path, start = self._find(str(content.get("key"))), content.get("start")
        if path is None or type(start) is not int or start < 0:
            return {"error": "This clip is gone, or has changed."}, []
        try:
            with path.open("rb") as file:
                file.seek(start)
                return {"size": path.stat().st_size}, [file.read(PIECE)]
        except OSError as error:
            return {"error": f"{path.name} cannot be read: {error.strerror or error}."}, []


class ResultPlayer(Player):
    """One clip, large: it plays in a loop without sound, above its prompt and facts."""

    _esm = source("transfer.js", "result.js")
    clip = t.Dict().tag(sync=True)

    def __init__(self):
        super().__init__(self._path)
        self._shown: Clip | None = None
        self._turn = 0  # makes the page play a clip that it shows already and that a person has stopped

    def show(self, clip: Clip | None) -> None:
        """Play a clip. None: show none. A clip that plays already plays on. Works from any thread."""
        self._shown, self._turn = clip, self._turn + 1
        self.clip = describe(clip) | {"turn": self._turn} if clip else {}

    def _path(self, wanted: str) -> Path | None:
        return self._shown.path if self._shown and wanted == key(self._shown) else None


class GalleryView(Player):
    """The clips of a folder in pages, with search, order, stars, a selection and a comparison.

    Args:
        gallery: the clips.
        on_act: called with the name of an action and the clip.
        on_delete, on_zip: called with clips. The zip of an empty selection has all clips that fit.
        on_error: called with an error of an action.
    """

    _esm = source("transfer.js", "compare.js", "gallery.js")
    items = t.List().tag(sync=True)  # the clips of the page, as `describe` and their stars
    total = t.Int(0).tag(sync=True)
    pages = t.Int(1).tag(sync=True)
    page = t.Int(0).tag(sync=True)
    words = t.Unicode().tag(sync=True)
    order = t.Enum(ORDERS, "newest").tag(sync=True)
    starred = t.Bool(False).tag(sync=True)
    actions = t.List().tag(sync=True)  # name and label of each button of a clip, the most wanted first
    message = t.Dict().tag(sync=True)
    archive = t.Dict().tag(sync=True)
    gone = t.List().tag(sync=True)  # names of clips that were deleted, which a selection forgets

    def __init__(
        self,
        gallery: Gallery,
        *,
        on_act: Callable[[str, Clip], None],
        on_delete: Callable[[list[Clip]], None],
        on_zip: Callable[[list[Clip]], None],
        on_error: Callable[[Exception], None],
    ):
        super().__init__(self._path)
        self._lock, self._drawing = threading.RLock(), False  # because the thread that makes clips draws, too
        self._gallery, self._on_act, self._on_delete, self._on_zip = gallery, on_act, on_delete, on_zip
        self.on_error = on_error
        self._pool: ThreadPoolExecutor | None = None
        self.answers |= {"poster": self._poster, "act": self._act, "star": self._star}
        self.answers |= {"delete": self._delete, "zip": self._zip}
        on_change(self, self.show, self._show_error, ["page", "words", "order", "starred"])

    def show(self) -> None:
        """Show the clips of the page as the folder has them now. Works from any thread."""
        with self._lock:
            if self._drawing:  # the page's number that is set below
                return
            self._drawing = True
            try:
                self._draw()
            finally:
                self._drawing = False

    def _draw(self) -> None:
        find = partial(self._gallery.find, count=PAGE, order=self.order, words=self.words, starred=self.starred)
        page = max(0, self.page)
        clips, total = find(first=page * PAGE)
        pages = max(1, math.ceil(total / PAGE))
        if page >= pages:  # clips were deleted, or fewer fit
            page = pages - 1
            clips, total = find(first=page * PAGE)
        stars = self._gallery.stars()
        items = [describe(clip) | {"star": clip.path.name in stars} for clip in clips]
        with self.hold_sync():
            self.items, self.total, self.pages, self.page = items, total, pages, page

    def say(self, text: str, alert: bool = False) -> None:
        """Show a message. alert: a screen reader reads it at once."""
        self.message = {"text": text, "alert": alert}

    def offer(self, path: Path | None) -> None:
        """Offer a file to download; None: none."""
        if path is None:
            self.archive = {}
        else:
            status = path.stat()
            self.archive = {
                "name": path.name, "path": str(path), "size": status.st_size,
                "key": f"{status.st_mtime_ns}/{status.st_size}/{path.name}",
            }  # fmt: skip
        self._offered = path

    _offered: Path | None = None

    def in_background(self, function: Callable, *arguments) -> None:
        """Call a function in the thread of this component, one call after the other."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "turbo_nb posters")
        self._pool.submit(guarded(function, self._show_error), *arguments)

    def close(self) -> None:
        """Take the component off the page, and end its thread."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _clip(self, name: object) -> Clip | None:
        return self._gallery.named(name) if isinstance(name, str) else None

    def _clips(self, names: object) -> list[Clip]:
        return [clip for name in names if (clip := self._clip(name))] if isinstance(names, list) else []

    def _keyed(self, wanted: str) -> Clip | None:
        clip = self._clip(wanted.rpartition("/")[2])
        return clip if clip and key(clip) == wanted else None

    def _path(self, wanted: str) -> Path | None:
        if self._offered and wanted == self.archive.get("key"):
            return self._offered
        clip = self._keyed(wanted)
        return clip and clip.path

    def _poster(self, content: dict, _) -> None:
        self.in_background(self._make_poster, content)

    def _make_poster(self, content: dict) -> None:
        wanted = str(content.get("key"))
        if wanted not in [item["key"] for item in self.items]:  # the page shows other clips by now
            self.reply(content, {"error": "This clip is not on the page any more."})
        elif clip := self._keyed(wanted):
            try:
                self.reply(content, {}, [self._gallery.poster(clip)])
            except Exception as error:  # because the page would wait for ever
                self.reply(content, {"error": first_line(error)})
        else:
            self.reply(content, {"error": "This clip is gone, or has changed."})

    def _act(self, content: dict, _) -> None:
        self._with_clip(content, partial(self._on_act, str(content.get("action"))))

    def _star(self, content: dict, _) -> None:
        def star(clip: Clip) -> None:
            self._gallery.star(clip, bool(content.get("on")))
            self.show()

        self._with_clip(content, star)

    def _with_clip(self, content: dict, function: Callable[[Clip], None]) -> None:
        """Call a function with the clip that a message names"""
        if clip := self._clip(content.get("name")):
            function(clip)
        else:
            self.say("This clip is gone.", alert=True)
            self.show()

    def _delete(self, content: dict, _) -> None:
        self._on_delete(self._clips(content.get("names")))

    def _zip(self, content: dict, _) -> None:
        clips = self._clips(content.get("names"))
        if not content.get("names"):
            clips = self._gallery.find(order=self.order, words=self.words, starred=self.starred)[0]
        self._on_zip(clips)
