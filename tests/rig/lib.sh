# What the rig's scripts share: where the rig is, and how they speak. To be sourced.
#
# The rig is a folder outside the tree with real parts for the tests: QEMU, a guest kernel, NBD servers, fio with libblkio.
# They come from Debian's packages, unpacked without running their scripts and used with their own loader, so that nothing on
# the machine changes and any Debian or Ubuntu will do.

RIG="${DRAY_RIG:-${XDG_CACHE_HOME:-$HOME/.cache}/dray/rig}"
ROOT="$RIG/root"
LOG="$RIG/log"

say() { printf 'rig: %s\n' "$*" >&2; }

die() {
  printf 'rig: %s\n' "$*" >&2
  exit 1
}

# Runs a noisy command with its output in the log, and says how long it took; shows the log's end if it fails.
quietly() {
  local what="$1" start=$SECONDS
  shift
  say "$what ..."
  if ! "$@" >>"$LOG" 2>&1; then
    tail -n 20 "$LOG" >&2
    die "$what failed; the whole output is in $LOG"
  fi
  say "$what: done in $((SECONDS - start)) s"
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# Installs packages of the machine's own distribution, if a command of theirs is missing.
need() {
  local command="$1"
  shift
  command -v "$command" >/dev/null && return
  as_root true 2>/dev/null || die "$command is missing; install the packages: $*"
  quietly "updating the package lists" as_root apt-get update
  quietly "installing $*" as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

# The Debian mirror that this machine's apt uses; DRAY_DEBIAN_MIRROR where apt knows none (Ubuntu).
mirror() {
  if [ -n "${DRAY_DEBIAN_MIRROR:-}" ]; then
    printf '%s\n' "$DRAY_DEBIAN_MIRROR"
    return
  fi
  local site
  site="$(apt-get indextargets --format '$(SITE) $(ORIGIN)' 'Created-By: Packages' 2>/dev/null |
    awk '$2 == "Debian" && $1 ~ /\/debian\/?$/ { print $1; exit }')"
  [ -n "$site" ] || site="$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 2>/dev/null | grep -m 1 '/debian/*$')" ||
    die "apt knows no Debian mirror here; name one in DRAY_DEBIAN_MIRROR"
  printf '%s\n' "$site"
}

# Unpacks packages of a Debian suite into a folder: unpack FOLDER SUITE COMMA-SEPARATED-PACKAGES [EXTRA-SUITE]
unpack() {
  local folder="$1" suite="$2" packages="$3" extra="${4:-}" site
  site="$(mirror)"
  local sources=("deb $site $suite main")
  [ -z "$extra" ] || sources+=("deb $site $extra main")
  rm -rf "$folder"
  mmdebstrap --variant=extract --mode="$(if [ "$(id -u)" = 0 ]; then echo root; else echo fakechroot; fi)" \
    --format=directory --include="$packages" "$suite" "$folder" "${sources[@]}"
}

# One run at a time: a second one waits for the first.
lock() {
  mkdir -p "$RIG/bin"
  exec 9>"$RIG/lock"
  flock 9
}

# True if a part was made by this very recipe: fresh NAME HASHED-TEXT
fresh() {
  [ "$(cat "$RIG/stamp-$1" 2>/dev/null)" = "$(printf '%s' "$2" | sha256sum)" ]
}

made() {
  printf '%s' "$2" | sha256sum >"$RIG/stamp-$1"
}
