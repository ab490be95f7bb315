"""Odd environments: whole processes of `turbo-nb`, and so few of them in CI."""

import os
import re
import subprocess
import sys
from pathlib import Path

from fuzz.harness import NUMBERS, PATHS, TEXTS, fuzz, require_documented

import turbo_nb

VARIABLES = (
    "HOME", "TMPDIR", "LANG", "LC_ALL", "PYTHONUTF8", "PYTHONIOENCODING", "TERM", "COLUMNS", "LINES", "NO_COLOR",
    "PATH", "USER", "SHELL", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_HUB_CACHE",
    "HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE",
    "HF_HUB_ETAG_TIMEOUT", "TRANSFORMERS_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_DISABLE_XET", "HF_HUB_VERBOSITY",
    "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CC", "LD_LIBRARY_PATH",
    "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RAY_ADDRESS", "RUNPOD_POD_ID",
    "RUNPOD_ENDPOINT_ID", "COLAB_RELEASE_TAG", "SERVER_SOFTWARE", "JUPYTER_TOKEN", "JUPYTER_PASSWORD",
    "TRITON_CACHE_DIR", "TRITON_INTERPRET", "IMAGEIO_FFMPEG_EXE", "MPLBACKEND", "TURBO_NB_REWRITE_KEY",
    "TURBO_NB_REWRITE_MODEL",
)  # fmt: skip
SOURCE = "".join(path.read_text(encoding="utf-8") for path in Path(turbo_nb.__file__).parent.rglob("*.py"))
VARIABLES += tuple(sorted({*re.findall(r"TURBO_NB_[A-Z_]*[A-Z]\b", SOURCE)} - {*VARIABLES}))
LIKELY = (
    "0", "1", "C", "POSIX", "de_DE.UTF-8", "ja_JP.eucJP", "ascii", "latin-1:strict", "utf-16", "dumb", "nvenc", "x264",
    "reference", "triton", "http://127.0.0.1:1", "127.0.0.1:1", "socks5://127.0.0.1:1",
    "http://user:secret-pw@127.0.0.1:1/?q=secret-pw", "http://[::1", "hf_secret-pw", "/dev/null", "/proc", "/nowhere",
    "dir", "file", "-1", "0,1", "GPU-x", "2.99", "1e3", "debug", "off", "/bin/false", "/bin/true", "/bin/cat",
)  # fmt: skip
SMALL = ["--num_frames", "1", "--num_steps", "1", "--resolution", "16x16", "--device", "cpu"]
LINES = (
    ["doctor"], ["doctor", "--json"], ["info", "good.mp4"], ["info", "page.mp4"], ["download", "a/b"],
    ["download", "TurboWan2.1-T2V-1.3B-480P"], ["t2v", "--prompt", "a red circle", "--save_path", "out/v.mp4", *SMALL],
    ["t2v", "--prompt", "a red circle", "--save_path", "out/v.mp4", "--rewrite", "--timing", *SMALL],
    ["t2v", "--prompt", "a red circle", "--save_path", "out/v.mp4", "--gpus", "all", "--decoder", "tiny", *SMALL],
    ["i2v", "--prompt", "a red circle", "--extend_clip", "good.mp4", "--save_path", "out/v.mp4", "--device", "cpu"],
    ["batch", "good.txt", "--output_dir", "out/b", *SMALL],
)  # fmt: skip
USER = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups")  # has no passwd entry and owns nothing


def test_commands_in_odd_environments(folder):
    def attempt(chance):
        environment = {
            "PYTHONPATH": os.environ.get("PYTHONPATH", os.getcwd()),
            "PATH": os.environ["PATH"],
            "HF_HUB_OFFLINE": "1",
        }
        environment |= {
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "TURBO_NB_CACHE": str(folder / "cache"),
        }
        for _ in range(chance.choice([1, 1, 2, 4])):
            name = chance.choice(VARIABLES)
            if chance.random() < 0.2:
                environment.pop(name, None)
            else:
                text = chance.choice(LIKELY if chance.random() < 0.7 else chance.choice([TEXTS, NUMBERS, PATHS]))
                environment[name] = (
                    text.replace("\0", "")[:50_000]
                    .encode("utf-8", "surrogateescape" if "\udcff" in text else "replace")
                    .decode("utf-8", "surrogateescape")
                )
        command = [sys.executable, "-m", "turbo_nb.cli", *chance.choice(LINES)]
        if chance.random() < 0.15 and os.path.exists("/usr/bin/setpriv"):
            command = [*USER, *command]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if chance.random() < 0.1:
            streams["stdout"] = open("/dev/full", "w") if os.path.exists("/dev/full") else subprocess.PIPE  # noqa: SIM115
        result = subprocess.run(command, cwd=folder, env=environment, timeout=300, check=False, **streams)
        result.stdout = (result.stdout or b"").decode(errors="replace")
        result.stderr = result.stderr.decode(errors="replace")
        try:
            if (
                "usage:" not in result.stderr and "Fatal Python error" not in result.stderr
            ):  # Python itself did not start
                require_documented(result)
            assert "secret-pw" not in result.stderr + result.stdout, "a password is printed"
        except AssertionError as error:
            given = {
                name: environment.get(name, "")[:60]
                for name in VARIABLES
                if environment.get(name) != os.environ.get(name)
            }
            raise AssertionError(f"{error} {command[-2:]} {given}") from error

    fuzz("environments", 2, attempt, limit=300)  # torch alone takes seconds to import, on a busy machine a minute
