#!/usr/bin/env bash
# Builds every fuzz target and runs it, with the stable compiler and no cargo-fuzz: libFuzzer needs only the coverage counters
# that the compiler can put in by itself. Needs Rust and a C++ compiler, which libFuzzer is compiled with.
#
#   scripts/fuzz.sh [SECONDS | --runs N] [TARGET...]    every target, or these, for 20 s each or as long as told
#   scripts/fuzz.sh build                               builds them, and runs none
#   scripts/fuzz.sh bundle DIR                          puts the targets with their seeds into DIR, with what runs them on a
#                                                       machine without Rust: DIR/run [SECONDS | --runs N] [TARGET...]
#
# JOBS=N runs so many targets at a time (2), and in a bundle so many processes for each target, one target after another
# (all processors). A target begins with its seeds, which are checked in, and with what earlier runs have found, in `corpus`
# beside it. What breaks a promise lies in `artifacts` beside it afterwards; the same target with that file as its argument
# plays it again.
set -euo pipefail

# Where this runs: in the repository, or in a bundle.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -d "$here/bin" ]; then bundled=1; else bundled=0; here=$(dirname "$here"); fi

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
}

# The directories that hold targets: each is a Cargo workspace of its own.
fuzz_dirs=(format/fuzz fuzz)
host=x86_64-unknown-linux-gnu
[ "$(uname -m)" = aarch64 ] && host=aarch64-unknown-linux-gnu

targets() {
    if [ $bundled = 1 ]; then
        find "$here/bin" -maxdepth 1 -type f -printf '%f\n'
    else
        (cd "$here" && find "${fuzz_dirs[@]}" -path '*/fuzz_targets/*.rs' -printf '%f\n' | sed 's/\.rs$//')
    fi | sort
}

# Where a target's seeds, corpus and artifacts lie.
home_of() {
    if [ $bundled = 1 ]; then
        echo "$here"
    else
        (cd "$here" && find "${fuzz_dirs[@]}" -path "*/fuzz_targets/$1.rs") | sed "s|/fuzz_targets/.*||; s|^|$here/|"
    fi
}

binary_of() {
    if [ $bundled = 1 ]; then
        echo "$here/bin/$1"
    else
        local dir
        dir=$(home_of "$1")
        echo "$(built_in "${dir#"$here/"}" "$(coverage_of "$1")")/$host/release/$1"
    fi
}

# Where the targets of a directory are built.
built_in() { echo "$target_dir/${1//\//-}-$2"; }

# What a target is told of its own run: which edges were taken, and what was compared with what too, which leads into a parser.
# A script of steps has nothing to compare. A run's checksums are made right for it, and then most of its time went into that.
coverage_of() {
    case $1 in
    store_ops | index_run | index_run_damage) echo edges ;;
    *) echo compares ;;
    esac
}

build() {
    target_dir=${CARGO_TARGET_DIR:-$here/target}/fuzz
    [ $bundled = 0 ] || return 0
    local coverage options flags bins
    for dir in "${fuzz_dirs[@]}"; do
        for coverage in edges compares; do
            bins=()
            for target in $(cd "$here/$dir/fuzz_targets" && basename -s .rs ./*.rs); do
                [ "$(coverage_of "$target")" != $coverage ] || bins+=(--bin "$target")
            done
            [ ${#bins[@]} -gt 0 ] || continue
            options="level=3 inline-8bit-counters pc-table"
            [ $coverage = edges ] || options+=" trace-compares"
            flags="--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module"
            for option in $options; do flags+=" -Cllvm-args=-sanitizer-coverage-$option"; done
            # With `--target`, so that build scripts and procedural macros are built without counters.
            RUSTFLAGS=$flags CARGO_TARGET_DIR=$(built_in "$dir" $coverage) \
                cargo build --locked --quiet --release --target "$host" --manifest-path "$here/$dir/Cargo.toml" "${bins[@]}"
        done
    done
}

# What libFuzzer is to do otherwise. How many bytes an input has at most, since its own limit, which follows the seeds, would
# be too high or too low: 20 steps of a script, half of what one may have, and so twice as many scripts. And which inputs it changes: to prefer
# those with what is seldom seen took it four fifths of the time, with the many counters of a whole store.
options_of() {
    case $1 in
    store_ops) echo -max_len=84 -entropic=0 ;;
    *) echo -max_len=16384 ;;
    esac
}

# Runs one target, in as many processes as told; prints a line of the table. Fails where the target found something.
run_one() {
    local target=$1 processes=$2 home binary log started status=0 of_target
    home=$(home_of "$target") binary=$(binary_of "$target")
    mkdir -p "$home/corpus/$target" "$home/artifacts/$target" "$home/seeds/$target"
    log=$(mktemp -d)
    local options=(-timeout=60 -rss_limit_mb=4096 -print_final_stats=1 "-artifact_prefix=$home/artifacts/$target/")
    read -ra of_target <<<"$(options_of "$target")"
    options+=("${of_target[@]}")
    started=$SECONDS
    local running=()
    for ((process = 0; process < processes; process++)); do
        local bound=("-max_total_time=$seconds")
        # The processes share the work; each has new inputs of the others from the corpus.
        [ "$runs" = 0 ] || bound=("-runs=$(((runs + processes - 1) / processes))")
        "$binary" "${options[@]}" "${bound[@]}" -reload=1 "$home/corpus/$target" "$home/seeds/$target" \
            >"$log/$process" 2>&1 &
        running+=($!)
    done
    for process in "${running[@]}"; do wait "$process" || status=1; done
    # A process that ended early has no final count: its last line of progress has one.
    local executions crashes
    executions=$(for file in "$log"/*; do
        sed -n 's/^stat::number_of_executed_units: *//p; s/^#\([0-9]*\)[[:space:]].*/\1/p' "$file" | sort -n | tail -1
    done | awk '{ sum += $1 } END { print sum + 0 }')
    crashes=$(grep -l -E 'ERROR: libFuzzer|ERROR: AddressSanitizer|panicked at' "$log"/* | wc -l || true)
    printf '%-18s %14s %9s %9s\n' "$target" "$executions" "$crashes" "$((SECONDS - started))"
    if [ $status != 0 ]; then
        for file in "$log"/*; do
            if ! grep -q '^Done ' "$file"; then tail -n 60 "$file" | cut -c1-300 >&2; fi
        done
    fi
    rm -rf "$log"
    return $status
}

run() {
    seconds=20 runs=0
    case ${1:-} in
    --runs) runs=${2:?how many runs?} && shift 2 ;;
    [0-9]*) seconds=$1 && shift ;;
    esac
    local all=("$@") failed=0
    [ $# -gt 0 ] || mapfile -t all < <(targets)
    for target in "${all[@]}"; do
        targets | grep -qx -- "$target" || { echo "no such target: $target" >&2 && exit 2; }
    done
    printf '%-18s %14s %9s %9s\n' target executions crashes seconds
    if [ $bundled = 1 ]; then
        for target in "${all[@]}"; do run_one "$target" "${JOBS:-$(nproc)}" || failed=1; done
    else
        local running=0
        for target in "${all[@]}"; do
            if [ $running = "${JOBS:-2}" ]; then
                wait -n || failed=1
                running=$((running - 1))
            fi
            run_one "$target" 1 &
            running=$((running + 1))
        done
        for ((; running > 0; running--)); do wait -n || failed=1; done
    fi
    return $failed
}

bundle() {
    local into=${1:?where to?}
    mkdir -p "$into/bin" "$into/seeds"
    for target in $(targets); do
        strip -o "$into/bin/$target" "$(binary_of "$target")"
        rm -rf "${into:?}/seeds/$target"
        cp -r "$(home_of "$target")/seeds/$target" "$into/seeds/"
    done
    cp "${BASH_SOURCE[0]}" "$into/run"
    chmod +x "$into/run"
    du -sh "$into"
}

case ${1:-} in
-h | --help) usage ;;
build) build ;;
bundle) build && bundle "${2:-}" ;;
*) build && run "$@" ;;
esac
