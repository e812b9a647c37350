#!/usr/bin/env bash
# probe.py and checks.py on a machine with one GPU, within LIMIT seconds; README.md says what they measure.
#
#   bash benchmarks/gpu/on_device.sh            # results in OUT (default: out)
#   bash benchmarks/gpu/on_device.sh --cpu      # every part at tiny sizes, without a GPU
#
# Parts that cannot run say so in log.txt, and the others run. PYTHON names the interpreter, PARTS ("probe checks") and
# SECTIONS choose. ARCHIVE (.stage/stage.tar.xz), if it is there, holds packages for a machine without network.
set -u
cpu=${1:-}
limit=${LIMIT:-540}
python=${PYTHON:-python3}
parts=${PARTS:-probe checks}
sections=${SECTIONS:-nccl,train,resume,speed,memory,compiled,loss_scale,cached,bad_file,apex,end_to_end,tests}
archive=${ARCHIVE:-.stage/stage.tar.xz}
stage=${STAGE:-$HOME/stage}
here=$(dirname "$0")
mkdir -p "${OUT:-out}"
out=$(cd "${OUT:-out}" && pwd)
export PYTHONUNBUFFERED=1

left() { echo $((limit - SECONDS)); }
say() { printf '== %3d s  %s\n' "$SECONDS" "$*" | tee -a "$out/log.txt"; }
# bounded SECONDS COMMAND...: its output also in the log; exit code 124 if the time ended it.
bounded() {
    local seconds=$1
    shift
    ((seconds >= 5)) || { say "no time left for: $*"; return 124; }
    timeout --signal=TERM --kill-after=8 "$seconds" "$@" 2>&1 | tee -a "$out/log.txt"
    return "${PIPESTATUS[0]}"
}

{
    nvidia-smi || echo "no nvidia-smi"
    nvidia-smi --query-gpu=name,memory.total,driver_version,pstate,clocks.sm,clocks.max.sm,power.limit --format=csv
    nproc
    free -g | sed -n 2p
    df -h / /dev/shm "$HOME" /tmp 2>/dev/null
    $python --version
} >"$out/machine.txt" 2>&1

if [[ -f $archive ]]; then
    say "unpacking $archive"
    mkdir -p "$stage"
    $python -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="fully_trusted")' \
        "$archive" "$stage" || say "it cannot be unpacked"
    export PYTHONPATH="$stage${PYTHONPATH:+:$PYTHONPATH}"
    export LD_LIBRARY_PATH="$stage/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" # of libnvjpeg
fi

backend=auto
settings=
if [[ " $parts " == *" probe "* ]]; then
    say "probe: does DALI work?"
    bounded $(($(left) < 150 ? $(left) : 150)) $python "$here/probe.py" --json "$out/probe.json" $cpu
    code=$?
    # Ended by the time: what the steps until then have found stands.
    if ((code >= 124)); then
        $python - "$out/probe.json" <<'END'
import json, sys
from pathlib import Path

file = Path(sys.argv[1])
found = json.loads(file.read_text()) if file.exists() else {}
ok = [share for share in ("0.65", "0.0") if found.get(f"decode {share}", {}).get("ok")]
sys.exit(1 if not ok else 0 if ok[0] == "0.65" or "decode 0.65" not in found else 3)
END
        code=$?
    fi
    case $code in
    0) backend=dali ;;
    3)
        backend=dali
        settings="--set data.hw_decoder_load=0"
        say "the hardware decoder does not work: runs go without it"
        ;;
    *)
        backend=torch
        sections=$(tr ',' '\n' <<<"$sections" | grep -vx end_to_end | paste -sd,) # it decodes as the product chooses
        say "DALI does not work: runs decode with torch"
        ;;
    esac
fi
if [[ " $parts " == *" checks "* ]]; then
    say "checks: $sections"
    seconds=$(($(left) - 20))
    bounded $((seconds + 15)) $python "$here/checks.py" --json "$out/checks.json" --seconds "$seconds" \
        --backend "$backend" --sections "$sections" $settings $cpu
fi
say "done"
ls -l "$out"
