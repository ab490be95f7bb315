"""What runs on the nodes of a cluster: actors of Ray, each with the model on a GPU.

`cluster.py` drives them. An actor that sees the output folder writes there. Otherwise it replies with an mp4's bytes.
"""

import hashlib
import io
import os
import socket
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from .. import pipeline
from ..errors import TurboNbError, collect_warnings
from ..files.fingerprint import fingerprint
from ..files.resolve import ResolvedModel, resolve
from ..machine import atomic, environment
from ..settings import LoadOptions
from ..values import LoRAFile
from ..video import images
from .engines import FoundModel, make
from .jobs import Task
from .manifest import JobRecord, held, worker_lock

Sent = tuple[str, Any]  # a file's hash, and Ray's reference to its bytes


def find_here(options: LoadOptions) -> FoundModel | TurboNbError:
    """Resolve a model on this node. Returns an error, because Ray would wrap one that is raised."""
    try:
        model = resolve(options)
        return FoundModel(spec=model.spec, identity=model.identity, pinned=model.pinned)
    except TurboNbError as error:
        return on_this_node(error)


def on_this_node(error: TurboNbError) -> TurboNbError:
    """Return an error that names this node."""
    return type(error)(f"{error} (on node {socket.gethostname()}, where a path must be, too)")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What an actor receives. It can be pickled, and leaves nothing to decide.

    Args:
        options: of the model, with every decision of `resolve` pinned.
        identity: of the model that the job ids were computed for.
        clip: width, height and frames of the largest clip. prompts: of all tasks, where they are few.
        mark: a file in the output folder that holds its own name. An actor that can read it sees the folder.
        threads: of torch. decoder: what a task needs, "full" or "tiny".
        loras: the files of the LoRAs, None for one that every node has.
    """

    options: LoadOptions
    identity: dict
    clip: tuple[int, int, int]
    prompts: tuple[str, ...]
    mark: Path
    threads: int = 1
    decoder: str = "full"
    loras: tuple[Sent | None, ...] = ()

    def resolve(self) -> ResolvedModel:
        """Resolve the model. Raises TurboNbError where it is not the one that the ids were computed for."""
        loras = tuple(map(_lora_here, self.options.loras, self.loras)) if self.loras else self.options.loras
        model = resolve(replace(self.options, loras=loras))
        if model.identity != self.identity:
            raise TurboNbError(
                f"the model is {model.identity} in an actor. Expected {self.identity}, for which the job ids were "
                "computed. Leave the model's files alone during a run, and start again."
            )
        return model.decoding(self.decoder)

    def sees_folder(self) -> bool:
        """Return whether this process sees the output folder."""
        with suppress(OSError):
            return self.mark.read_text() == self.mark.name
        return False


def own_device(device: str) -> str:
    """Return the device of this actor: the GPU that Ray gave it, also where it sees the others."""
    import ray
    import torch

    given = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    hidden = torch.cuda.device_count() <= len(given)  # Ray hides the others, except with an option of its own
    return device if device != "cuda" or hidden or not given else f"cuda:{given[0]}"


def _lora_here(lora: LoRAFile, sent: Sent | None) -> LoRAFile:
    """Return a LoRA with a path of this node: its own where it has the same content, else that of the sent bytes"""
    path = Path(lora.file)
    if sent is None or (environment.is_file(path) and fingerprint(path) == sent[0]):
        return lora
    import ray

    path = _node_folder() / f"{sent[0][:16]}-{path.name}"
    if not path.is_file():
        atomic.write(path, ray.get(sent[1]))
    return replace(lora, file=str(path))


def _node_folder() -> Path:
    """Return the folder of this node for what it receives and sends, which is made"""
    folder = Path(tempfile.gettempdir()) / f"turbo_nb-{os.getuid() if hasattr(os, 'getuid') else 'batch'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an actor returns: its node, a record or an error, with its warnings and the bytes of an mp4 to be placed."""

    value: str | JobRecord | TurboNbError
    warnings: tuple[str, ...] = ()
    data: bytes | None = None


class SentPictures(images.Pictures):
    """Images by path where this node has the same file, else from the bytes that the driver sent."""

    def __init__(self):
        super().__init__()
        self.files: dict[str, Sent] = {}

    def open(self, image: Any, name: str = "image", *, evict: bool = True) -> Any:
        """Open an image as `Pictures.open` does."""
        digest, data = self.files.get(str(image), (None, None)) if isinstance(image, str | Path) else (None, None)
        with suppress(OSError):
            if digest is None or hashlib.sha256(Path(image).read_bytes()).hexdigest() == digest:
                return super().open(image, name, evict=evict)
        import ray

        return images.load_image(io.BytesIO(ray.get(data)), name)


class TurboNbActor:
    """Keeps the model, and makes one clip at a time. Its process has this name, by which a pod's watch finds it."""

    def __init__(self, order: Order):
        self.order, self.pictures, self.lock = order, SentPictures(), ExitStack()

    def load(self) -> Reply:
        """Load the model, which one actor of a node downloads. Reply with the node, or with an error."""
        import ray
        import torch

        here = ray.get_runtime_context()
        torch.set_num_threads(self.order.threads)
        options = replace(self.order.options, device=own_device(self.order.options.device))
        self.order = replace(self.order, options=options)
        with collect_warnings() as messages:
            try:
                self.folder = self.order.mark.parent if self.order.sees_folder() else None
                if self.folder:
                    self.lock.enter_context(worker_lock(self.folder, here.get_actor_id()))
                atomic.sweep(_node_folder())
                model = self.order.resolve()
                if model.downloads:
                    Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
                    with held(Path(constants.HF_HUB_CACHE), ".turbo_nb.lock", timeout=-1):
                        model = self.order.resolve().fetch()
                self.loaded = pipeline.load(model, clip=self.order.clip, prompts=self.order.prompts)
            except TurboNbError as error:
                return Reply(value=on_this_node(error))
        return Reply(value=here.get_node_id(), warnings=tuple(messages))

    def make(self, task: Task, sent: dict[str, Sent]) -> Reply:
        """Make a clip. Reply with its record, with its bytes where this node does not see the folder, or an error."""
        self.pictures.files, data = sent, None
        here = replace(task, path=(self.folder or _node_folder()) / task.path.name)
        with collect_warnings() as messages:
            try:
                record = make(self.loaded, here, self.pictures)
            except TurboNbError as error:  # a full disk
                return Reply(value=on_this_node(error))
        if record.status == "done" and not self.folder:
            data = here.path.read_bytes()
            here.path.unlink()
        return Reply(value=record, warnings=tuple(messages), data=data)
