"""turbo_nb: TurboDiffusion video models in Jupyter, from wheels alone."""

from importlib import import_module

_HOMES = {
    "generate": "generation",
    "load_pipeline": "pipeline",
    "set_loras": "pipeline",
    "Video": "generation",
    "contact_sheet": "video.sheet",
    "play": "video.player",
    "download_model": "files.download",
    "doctor": "checkup.doctor",
    "read_metadata": "video.mp4",
    "rewrite_prompt": "text.rewrite",
    "TurboNbError": "errors",
    "TurboNbWarning": "errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
