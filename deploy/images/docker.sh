#!/usr/bin/env bash
# Makes what the container runtime needs: a Docker engine, a base image with Python, and the runner image. Each step does
# nothing when its result is there. The last line of output is the runner image's id: KERNELM_NODE_IMAGE=$(deploy/images/docker.sh)
#
#   deploy/images/docker.sh [engine | base | runner]     up to this step; all of them by default. `base` prints its name
#
# PYTHON: the interpreter whose pip gets the wheels (its configuration holds, wherever it comes from); its version must be
# the base image's. BASE: the base image; by default the official one that runner.Dockerfile pins, or, where no image can be
# pulled, a Debian made here.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
logs="$root/build/docker"
python="${PYTHON:-python3}"
debian=bookworm
local_base="kernelm-base:$debian"
runner="kernelm-runner:latest"
mkdir -p "$logs"

say() { echo "docker.sh: $*" >&2; }
answers() { docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

engine() {
  answers && return
  if ! command -v dockerd >/dev/null || ! command -v docker >/dev/null; then
    say "installing docker.io"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends docker.io iptables ca-certificates; } >"$logs/apt.log" 2>&1
  fi
  say "starting dockerd (log: build/docker/dockerd.log)"
  setsid dockerd >"$logs/dockerd.log" 2>&1 </dev/null &
  local pid=$! waited=0
  until answers; do
    if ! kill -0 "$pid" 2>/dev/null || ((waited++ > 300)); then
      tail -n 20 "$logs/dockerd.log" >&2
      say "dockerd does not answer; the lines above say why"
      exit 1
    fi
    sleep 0.2
  done
  echo "$pid" >"$logs/dockerd.pid"
}

base() {
  engine
  if [[ -n "${BASE:-}" ]]; then return; fi
  BASE="$(sed -n 's/^ARG BASE=//p' "$here/runner.Dockerfile")"
  if docker image inspect "$BASE" >/dev/null 2>&1; then return; fi
  if docker image inspect "$local_base" >/dev/null 2>&1; then BASE="$local_base"; return; fi
  say "pulling $BASE"
  if timeout 120 docker pull --quiet "$BASE" >"$logs/pull.log" 2>&1; then return; fi
  say "it can't be pulled ($(tail -n 1 "$logs/pull.log")): making $local_base with debootstrap"
  BASE="$local_base"
  if ! command -v debootstrap >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap; } >>"$logs/apt.log" 2>&1
  fi
  local folder
  folder="$(mktemp -d)"
  if ! debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv "$debian" "$folder" >"$logs/debootstrap.log" 2>&1; then
    tail -n 20 "$logs/debootstrap.log" >&2
    rm -rf "$folder"
    exit 1
  fi
  # what apt had downloaded is of no use in an image
  tar -C "$folder" --exclude=./var/cache/apt/archives/*.deb --exclude=./var/lib/apt/lists/* -c . | docker import - "$local_base" >/dev/null
  rm -rf "$folder"
}

# The wheels are got outside, by a pip that is set up for this machine: the build itself needs no network, no
# certificates and no settings of pip's, and none of these can end up in a layer.
runner() {
  base
  local inputs context version
  inputs="$( (docker image inspect --format '{{.Id}}' "$BASE" 2>/dev/null || echo "$BASE"
              cd "$root" && find kernel/sdk plugins/contracts deploy/images/runner.Dockerfile deploy/constraints.txt -type f \
                -not -path '*/__pycache__/*' -not -path '*.egg-info/*' -print0 | sort -z | xargs -0 sha256sum) | sha256sum | cut -d' ' -f1)"
  if [[ "$(docker image inspect --format '{{index .Config.Labels "kernelm.inputs"}}' "$runner" 2>/dev/null)" != "$inputs" ]]; then
    version="$(docker run --rm --network none "$BASE" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    if [[ "$version" != "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ]]; then
      say "$BASE has Python $version, $python is another: set PYTHON to a python$version, or BASE to an image with the other"
      exit 1
    fi
    context="$(mktemp -d)"
    say "building $runner on $BASE"
    cp "$here/runner.Dockerfile" "$context/Dockerfile"
    if ! { "$python" -m pip wheel --quiet --wheel-dir "$context/wheels" --constraint "$root/deploy/constraints.txt" \
             "$root/kernel/sdk" "$root/plugins/contracts" &&
           docker build --network none --build-arg "BASE=$BASE" --label "kernelm.inputs=$inputs" --tag "$runner" "$context"; } \
         >"$logs/build.log" 2>&1; then
      tail -n 20 "$logs/build.log" >&2
      rm -rf "$context"
      exit 1
    fi
    rm -rf "$context"
  fi
  docker image inspect --format '{{.Id}}' "$runner"
}

case "${1:-runner}" in
  engine | runner) "${1:-runner}" ;;
  base) base && echo "$BASE" ;;
  *) say "usage: docker.sh [engine | base | runner]"; exit 2 ;;
esac
