#!/usr/bin/env bash
# From an empty RunPod pod, or any Linux box, to a JupyterLab with turbo_nb in it.
#
#   runpod_start.sh [start]                        JupyterLab up, then setup and downloads behind it
#   runpod_start.sh setup                          only the Python environment
#   runpod_start.sh generate "prompt" out.mp4 […]  one video; further options go to turbo-nb t2v
#   runpod_start.sh doctor [--json …]              what this machine can do
#   runpod_start.sh test [pytest options]          the package's tests
#
# On a pod this is the container's start command, or /post_start.sh beside RunPod's own JupyterLab. It may run again at
# any time. Variables: JUPYTER_PASSWORD or JUPYTER_TOKEN, TURBO_NB_MODELS, TURBO_NB_STOP_IDLE, TURBO_NB_STOP_AFTER,
# TURBO_NB_HOME, TURBO_NB_PYTHON, TURBO_NB_PORT, TURBO_NB_IP, TURBO_NB_OPEN: see docs/runpod.md.

set -euo pipefail

self=$(readlink -f "${BASH_SOURCE[0]}")
checkout=$(dirname "$self")
prefix=${TURBO_NB_ROOT:-} # the tests have /workspace, /tmp, /proc and /start.sh in a folder of their own
pod=${RUNPOD_POD_ID:-}
port=${TURBO_NB_PORT:-8888}
refused='' # variables with an address such as s3://bucket/x, of which a folder called "s3:" would be made
for name in TURBO_NB_HOME HF_HOME PIP_CACHE_DIR TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR; do
  [[ ${!name:-} =~ ^[[:space:]]*[[:alpha:]][[:alnum:]+.-]+:/ ]] || continue
  refused+="${refused:+, }$name" && unset "$name"
done
hook='' theirs='' # start sets them: RunPod's /start.sh called this script; RunPod's own JupyterLab runs
if [[ $pod ]]; then
  root=$prefix/workspace ip=${TURBO_NB_IP:-0.0.0.0}
  home=${TURBO_NB_HOME:-$root/turbo_nb_home}
  run=$prefix/tmp/turbo_nb # on the container's disk, because JupyterLab must start although the volume is full
  export HF_HOME=${HF_HOME:-$root/.cache/huggingface}
else
  root=$checkout ip=${TURBO_NB_IP:-127.0.0.1}
  home=${TURBO_NB_HOME:-$checkout/.turbo_nb}
  run=$home/run
  export HF_HOME=${HF_HOME:-$home/huggingface}
fi
logs=$home/logs venv=$home/venv
export TURBO_NB_HOME=$home PIP_CACHE_DIR=${PIP_CACHE_DIR:-$home/pip}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$home/kernels/triton} # on the volume, because compiling takes time
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$home/kernels/inductor}

log() { printf '%(%T)T turbo_nb: %s\n' -1 "$*" | tee -a "$logs/start.log" 2>/dev/null || true; }

failed() { # message: logs it, and adds it to the file that the first notebook shows; never fails itself
  log "FAILED: $*"
  { echo "$*" >>"$logs/failed.txt"; } 2>/dev/null || true
}

attempt() { # name, command…: runs it with its output in logs/<first word of name>.log; a lock admits one at a time
  local name=$1 file="$logs/${1%% *}.log" code=0
  shift
  { : >>"$file"; } 2>/dev/null || file=/dev/stderr
  log "$name: begun, log in $file"
  { flock 8 && "$@"; } 8>"$run/attempt" >>"$file" 2>&1 || code=$?
  if ((code)); then
    failed "$name, exit $code: $(tail -n 1 "$file" 2>/dev/null); see $file; to try again: bash $self"
  else
    log "$name: done"
  fi
}

probe() { # python: prints the versions of Python, torch, jupyterlab and turbo-nb, or -; -P fails below Python 3.11
  "$1" -P -c 'import sys, importlib.metadata as metadata
def found(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return "-"
print(sys.version.split()[0], *map(found, ("torch", "jupyterlab", "turbo-nb")))'
}

pick_python() { # sets base and its versions: the first Python with torch, else the first new enough Python
  local name line candidates=("${TURBO_NB_PYTHON:-python}")
  [[ ${TURBO_NB_PYTHON:-} ]] || candidates+=(python3 python3.13 python3.12 python3.11)
  base=''
  for name in "${candidates[@]}"; do
    line=$(probe "$name" 2>/dev/null) || continue
    [[ ! $base || $(cut -d ' ' -f 2 <<<"$line") != - ]] || continue
    base=$(command -v "$name")
    read -r version torch lab ours <<<"$line"
    [[ $torch == - ]] || return 0
  done
  [[ ! $base ]] || return 0
  failed "no Python 3.11 or newer among: ${candidates[*]}; install one, or name it in TURBO_NB_PYTHON"
  return 1
}

complete() { [[ $torch != - && $lab != - && $ours != - ]]; } # base has everything, so no environment is made

python_now() { # prints the Python that runs turbo_nb at this moment
  if ! complete && [[ -e $venv/installed ]]; then echo "$venv/bin/python"; else echo "$base"; fi
}

setup() { # makes an environment on the volume that adds to the image's packages; a second run finds it ready
  local made="$base $version torch $torch" want options=() need=12 free
  complete && { log "setup: $base has turbo-nb $ours, torch $torch and jupyterlab $lab" && return; }
  want="$made $(cksum <"$checkout/pyproject.toml")"
  [[ $(cat "$venv/installed" 2>/dev/null) != "$want" ]] || { log "setup: $venv is ready" && return; }
  [[ $torch == - ]] || options=(--system-site-packages) need=3
  mkdir -p "$home"
  free=$(df -Pk "$home" | awk 'NR == 2 { print int($4 / 1048576) }')
  if ((free < need)); then
    echo "$home has $free GB free and needs $need; free some, or set TURBO_NB_HOME" >&2
    return 1
  fi
  if [[ $(cat "$venv/made" 2>/dev/null) != "$made" ]]; then # absent, unfinished, or of another image
    "$base" -m venv --clear "${options[@]}" "$venv"
    [[ $torch == - ]] || lend "$venv"
    echo "$made" >"$venv/made"
  fi
  install "$venv/bin/python" notebook
  echo "$want" >"$venv/installed"
}

lend() { # venv: adds the packages of a base that is an environment itself; --system-site-packages does not see them
  "$base" -P -c 'import pathlib, site, sys
if sys.prefix != sys.base_prefix:
    (packages,) = pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages")
    (packages / "base.pth").write_text("\n".join(site.getsitepackages()) + "\n")' "$1"
}

install() { # python, extras: keeps the image's torch, because it was built for the image's CUDA and driver
  local constraints=$home/constraints.txt
  if [[ $torch == - ]]; then : >"$constraints"; else echo "torch==$torch" >"$constraints"; fi
  "$1" -m pip install --no-input --disable-pip-version-check --progress-bar off \
    --constraint "$constraints" --editable "${checkout}[$2]"
}

cli() { "$(python_now)" -m turbo_nb.cli "$@"; }

running() { # regex: whether the command line of a process matches
  local file words
  for file in "$prefix"/proc/[0-9]*/cmdline; do
    { mapfile -d '' -t words <"$file"; } 2>/dev/null || continue
    [[ ${words[*]} =~ $1 ]] && return
  done
  return 1
}

make_secret() { # sets token, because JupyterLab needs one; RunPod left a "{{ … }}" unresolved
  token=${JUPYTER_PASSWORD:-${JUPYTER_TOKEN:-}}
  # As JupyterLab reads what is typed: without white space of any script at its ends, and without control characters.
  token=$("$base" -I -c 'import re, sys
text = sys.stdin.buffer.read().decode("utf-8", "ignore")
sys.stdout.buffer.write(re.sub("[\x00-\x08\x0e-\x1f]", " ", text).strip().encode())' <<<"$token")
  [[ -z $token || $token == *"{{"* ]] && [[ ! $theirs ]] || return 0
  token=$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')
  echo "JupyterLab's token, made for this start and printed only here: $token"
}

make_run() { # makes the runtime folder for this user alone, or takes another where somebody planted one in /tmp
  mkdir -p "${run%/*}"
  mkdir -m 700 "$run" 2>/dev/null || true
  if [[ -d $run && ! -L $run && -O $run ]]; then
    chmod 700 "$run"
  else
    local other
    other=$(mktemp -d "$run.XXXXXX")
    log "$run is a link, a file or somebody else's folder; $other is used instead"
    run=$other
  fi
}

write_kernel() { # python, name shown: writes the kernel python3 of every notebook
  local folder=$run/jupyter/kernels/python3 user=~/.local/share/jupyter/kernels
  {
    # Jupyter puts variables in for $NAME in the environment of a kernel, so a dollar sign is written twice.
    mkdir -p "$folder" && "$base" -I -c 'import json, sys
python, name, *pairs = sys.argv[1:]
env = dict(pair.replace("$", "$$").split("=", 1) for pair in pairs)
argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
print(json.dumps({"argv": argv, "display_name": name, "language": "python", "env": env}, indent=1))' \
      "$1" "$2" "PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}" "HF_HOME=$HF_HOME" "TURBO_NB_HOME=$home" \
      "TRITON_CACHE_DIR=$TRITON_CACHE_DIR" "TORCHINDUCTOR_CACHE_DIR=$TORCHINDUCTOR_CACHE_DIR" >"$folder/kernel.new" &&
      mv "$folder/kernel.new" "$folder/kernel.json" &&
      # RunPod's JupyterLab looks for kernels in the home of the user.
      { [[ ! $theirs ]] || { mkdir -p "$user" && ln -sfn "$folder" "$user/python3"; }; }
  } || failed "the notebooks' kernel could not be written to $folder"
}

place_notebooks() { # sets first, the page to open; copies a checkout's notebooks into the server's root
  local folder
  folder=$(realpath -m --relative-to="$root" "$checkout/notebooks")
  if [[ $folder == ../* ]]; then
    folder=turbo_nb_notebooks
    [[ -e $root/$folder ]] || cp -r "$checkout/notebooks" "$root/$folder"
  fi
  case ${TURBO_NB_OPEN:-lab} in
    lab) first=/lab/tree/$folder/01_setup.ipynb ;;
    generator) first=/voila/render/$folder/04_generate.ipynb ;; # Voilà runs inside JupyterLab's server, with its login
    *)
      first=/lab/tree/$folder/01_setup.ipynb
      failed "TURBO_NB_OPEN is '$TURBO_NB_OPEN'; expected lab or generator; JupyterLab opens"
      ;;
  esac
}

jupyter_lab() { # python: becomes the server. Its configuration takes the token from the environment
  local config=$run/jupyter/config options=(
    --no-browser --ip="$ip" --port="$port" --ServerApp.port_retries=0 --ServerApp.root_dir="$root"
    --LabApp.default_url="$first" --FileContentsManager.delete_to_trash=False
    --ServerApp.tornado_settings='{"websocket_max_message_size": 536870912}' # bytes, for uploads
  )
  [[ -z $pod ]] || options+=(--ServerApp.allow_origin="https://$pod-$port.proxy.runpod.net")
  ((EUID)) || options+=(--allow-root)
  mkdir -p "$config"
  echo 'import os; c.IdentityProvider.token = os.environ["JUPYTER_TOKEN"]' >"$config/jupyter_server_config.py"
  export JUPYTER_CONFIG_DIR=$config JUPYTER_CONFIG_PATH=$config JUPYTER_DATA_DIR=$run/jupyter JUPYTER_PATH=$run/jupyter
  [[ -d ~ && -w ~ ]] || export HOME=$run/home # of a user without one, because Jupyter ends without it
  export JUPYTER_RUNTIME_DIR=$run/jupyter/runtime IPYTHONDIR=$run/ipython JUPYTER_TOKEN=$token PATH=$venv/bin:$PATH
  exec "$1" -m jupyterlab "${options[@]}"
}

serve() { # python: restarts JupyterLab whenever it ends; on a plain box runs it once
  local server code
  trap 'kill "$server" || true; wait; exit 143' TERM
  while true; do
    code=0
    jupyter_lab "$1" 9>&- >>"$run/jupyter.log" 2>&1 &
    server=$!
    wait "$server" || code=$?
    ((!code)) || failed "JupyterLab ended, exit $code: $(tail -n 1 "$run/jupyter.log"); see $run/jupyter.log"
    [[ $pod ]] || return "$code"
    sleep "${TURBO_NB_RETRY_SECONDS:-30}"
  done
}

work() { # runs setup, then the downloads one by one, while JupyterLab is up
  local models model
  IFS=', ' read -ra models <<<"${TURBO_NB_MODELS:-}"
  write_kernel "$(python_now)" "turbo_nb (setting up: wait for its log, then restart the kernel)"
  attempt setup "$BASH" "$self" setup
  if ! complete && [[ ! -e $venv/installed ]]; then
    write_kernel "$base" "turbo_nb (setup failed: see logs/setup.log)" && return
  fi
  write_kernel "$(python_now)" turbo_nb
  [[ -z $pod ]] || complete || ln -sfn "$venv/bin/turbo-nb" "$prefix/usr/local/bin/turbo-nb" || true # for every shell
  for model in "${models[@]}"; do attempt "download $model" cli download "$model"; done
}

seconds() { # 90s, 30m or 2h: prints seconds
  local -A unit=([s]=1 [m]=60 [h]=3600)
  [[ $1 =~ ^([0-9]+)([smh])$ ]] && echo $((10#${BASH_REMATCH[1]} * unit[${BASH_REMATCH[2]}]))
}

ask() { # path: prints the server's answer. The token is in the address, because JupyterLab reads headers as Latin-1
  printf %s "$token" | curl -sfG -m 10 --noproxy '*' --data-urlencode token@- "http://127.0.0.1:$port/api/$1"
}

notebooks() { # prints the server's kernels and terminals with their last activity, or "busy" if the server refuses
  local code=0
  ask kernels || code=$?
  ((code == 0 || code == 7)) || echo '"busy"' # 7: no connection, so no server runs and no notebook either
  ask terminals || true                       # the server may have terminals switched off
}

gpu_busy() { # whether a GPU's utilisation is above 5 %
  nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader 2>/dev/null | awk '$1 > 5 { b = 1 } END { exit !b }'
}

stop_pod() { # reason: logs it and stops the pod
  log "$1: stopping pod $pod"
  runpodctl pod stop "$pod" || runpodctl stop pod "$pod" || # the second is the syntax of older versions
    failed "runpodctl could not stop the pod: stop it in RunPod's console"
}

watch_pod() { # stops the pod when it is idle, or when a batch has ended, as the variables ask; this saves money
  local limit every=${TURBO_NB_CHECK_SECONDS:-30} since=$SECONDS batch=0 before='' now
  # On a node of a Ray cluster no command runs, only the actors of a batch, which bear this name.
  local ours='((^|[ /])turbo-nb|turbo_nb\.cli)' batches='(^|[ /])papermill |^ray::TurboNbActor'
  local others='runpod_start\.sh (setup|generate|test)'
  limit=$(seconds "${TURBO_NB_STOP_IDLE:-0s}") || failed "TURBO_NB_STOP_IDLE is '$TURBO_NB_STOP_IDLE'; it is a number" \
    "with s, m or h, such as 30m; the pod will not stop when idle"
  ((!limit)) || command -v curl >/dev/null || failed "without curl no one sees that the pod is idle; install it"
  ((!limit)) || log "money: the pod stops when idle for $TURBO_NB_STOP_IDLE (no kernel busy, no batch, no download)"
  [[ ${TURBO_NB_STOP_AFTER:-} != batch ]] || log "money: the pod stops when a batch has ended"
  while ((limit)) || [[ ${TURBO_NB_STOP_AFTER:-} == batch ]]; do
    sleep "$every"
    now=$(notebooks)
    # Not "turbo-nb ui", the one command with a u, because a page that nobody uses would keep the pod for ever.
    if [[ $now == *'"busy"'* || $now != "$before" ]] || running "$ours [a-tv-z]|$batches|$others" || gpu_busy; then
      since=$SECONDS
    fi
    before=$now
    if running "$ours batch|$batches"; then
      batch=2 # looks without a batch after which it has ended, because an actor that died is soon replaced
    elif ((batch)) && [[ ${TURBO_NB_STOP_AFTER:-} == batch ]]; then
      ((--batch)) || stop_pod "the batch has ended"
    elif ((limit && SECONDS - since >= limit)); then
      since=$SECONDS && stop_pod "idle for $TURBO_NB_STOP_IDLE"
    fi
  done
}

stay_up() { # exit code: keeps the container up after a failure, because only then can one connect and look
  (($1)) || return 0
  failed "start, exit $1"
  [[ ! $hook ]] || exit 0
  log "the container stays up: connect by SSH or RunPod's web terminal"
  sleep infinity &
  wait
}

start() {
  local server='' again='' url="http://$ip:$port/lab"
  [[ -z $pod ]] || trap 'stay_up $?' EXIT
  # A signal ends the process group, or, if another program leads the group, the jobs of this shell.
  trap 'trap "" TERM; trap - EXIT; kill -- -$$ 2>/dev/null || jobs -p | xargs -r kill; wait; exit 143' TERM INT
  make_run
  exec 9>"$run/lock"
  flock -n 9 || again=1
  { mkdir -p "$logs" && : >"$logs/failed.txt"; } || log "FAILED: no logs in $logs; is the volume full or read-only?"
  [[ ! $refused ]] || failed "$refused is an address; expected a folder of this machine; the default is used"
  if [[ $again ]]; then
    trap - EXIT
    log "already started; setup and downloads are tried again"
    pick_python && work
    return
  fi
  log "GPU: $(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null || echo 'none found')"
  if [[ $pod ]]; then
    url="https://$pod-$port.proxy.runpod.net/lab"
    if running '(^| )/start\.sh( |$)'; then
      hook=1
    elif [[ -x $prefix/start.sh ]]; then
      env -u JUPYTER_PASSWORD "$prefix/start.sh" 9>&- & # RunPod's SSH and hooks, without its JupyterLab
    fi
  fi
  pick_python
  if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || [[ $hook && ${JUPYTER_PASSWORD:-} ]]; then
    [[ $pod ]] || { log "port $port is taken by another program; set TURBO_NB_PORT" && return 1; }
    theirs=1 && log "a JupyterLab that is not ours, RunPod's own, has port $port; no second one is started"
  fi
  make_secret
  place_notebooks || failed "no copy of the notebooks in $root"
  if [[ ! $theirs ]]; then
    [[ $lab != - ]] || attempt setup "$BASH" "$self" setup # JupyterLab itself is missing
    serve "$([[ $lab != - ]] && echo "$base" || echo "$venv/bin/python")" &
    server=$!
    log "JupyterLab: $url; log in $run/jupyter.log"
  fi
  work &
  [[ -z $pod ]] || watch_pod &
  [[ $hook ]] || wait $server
}

command=${1:-start}
shift $(($# > 0))
if [[ $refused && $command != start ]]; then
  echo "$refused is an address; expected a folder of this machine" >&2 && exit 2
fi
case $command in
  start) start ;;
  setup) pick_python; setup ;;
  doctor) pick_python; setup >&2; cli doctor "$@" ;;
  generate)
    (($# > 1)) || { echo 'generate takes a prompt and the mp4 to write' >&2 && exit 2; }
    pick_python; setup >&2; cli t2v --prompt "$1" --save_path "$2" "${@:3}"
    ;;
  test)
    pick_python; setup >&2; install "$(python_now)" notebook,dev >&2
    cd "$checkout"
    "$(python_now)" -m pytest "$@"
    ;;
  -h | --help | help) sed -n '2,/^$/s/^# \{0,1\}//p' "$self" ;;
  *) echo "unknown command '$command'; it is start, setup, generate, doctor or test" >&2 && exit 2 ;;
esac
