"""Loads the same tensors onto the GPU with alight and with the published loaders that are installed, by turns.

    python3 scripts/gpu_peers.py ALIGHT FOLDER [GIB] [ROUNDS] [decoder|crowd]

Makes a safetensors file of bf16 tensors in FOLDER and a store of the same: those of a decoder, or a crowd of 64 KiB to 4 MiB each.
Every row of a round is a process of its own; its time goes from opening to the last byte on the GPU, imports and CUDA's
context aside. Cold: the page cache dropped before, which needs root. Warm: out of the page cache. Again: the same loads
once more in the same process, the median of those after the second. Medians of ROUNDS; none of the others compares a checksum.
A crowd is loaded warm, and by those that are quick with one. Needs torch and safetensors; measures instanttensor,
fastsafetensors, runai_model_streamer where they can be imported.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time


def safetensors_load_file(path, _torch):
    from safetensors.torch import load_file

    return load_file(path, device="cuda:0")


def torch_load_mmap(path, torch):
    return {key: value.cuda() for key, value in torch.load(path + ".pt", mmap=True).items()}


def fastsafetensors(path, torch):
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cuda:0"), nogds=True)
    loader.add_filenames({0: [path]})
    buffers = loader.copy_files_to_device()
    return {key: buffers.get_tensor(key) for key in buffers.key_to_rank_lidx.keys()}


def runai_streamer(path, _torch):
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        return {key: value.to("cuda:0", non_blocking=True) for key, value in streamer.get_tensors()}


def instanttensor(path, backend=None, views=False):
    if backend:
        os.environ["INSTANTTENSOR_BACKEND"] = backend
    from instanttensor import safe_open

    more = {"copy": False, "buffer_size": os.path.getsize(path) + (1 << 28)} if views else {}
    opened = safe_open(path, framework="pt", device=0, **more)
    tensors = dict(opened.__enter__().tensors())
    return {"opened": opened, **tensors} if views else tensors


LOADERS = {
    "safetensors load_file": safetensors_load_file,
    "torch.load(mmap) and .cuda()": torch_load_mmap,
    "fastsafetensors, no GDS": fastsafetensors,
    "Run:ai streamer": runai_streamer,
    "InstantTensor": lambda path, torch: instanttensor(path),
    "InstantTensor BUFFERED": lambda path, torch: instanttensor(path, "BUFFERED"),
    "InstantTensor BUFFERED, views": lambda path, torch: instanttensor(path, "BUFFERED", True),
    "InstantTensor MMAP, views": lambda path, torch: instanttensor(path, "MMAP", True),
}


# How often a process loads, from the first time on: the second makes what the later ones find.
LOADS = 6

DECODER = [("q", 4096, 4096), ("k", 1024, 4096), ("v", 1024, 4096), ("o", 4096, 4096), ("norm", 1, 4096)]
DECODER += [("gate", 14336, 4096), ("up", 14336, 4096), ("down", 4096, 14336)]
CROWD = [(f"expert{number}", 128, 256 << number % 7) for number in range(64)]


def make(path, gib, shapes):
    import torch
    from safetensors.torch import save_file

    tensors, total, layer = {}, 0, 0
    while total < gib * 2**30:
        for name, rows, columns in shapes:
            random = torch.randint(-(2**15), 2**15 - 1, (rows, columns), dtype=torch.int16, device="cuda")
            tensors[f"model.layers.{layer}.{name}.weight"] = random.view(torch.bfloat16).cpu()
            total += 2 * rows * columns
        layer += 1
    save_file(tensors, path)
    if shapes is DECODER:
        torch.save(tensors, path + ".pt")
    os.sync()
    return len(tensors)


def drop_caches():
    os.sync()
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")


def warm(path):
    files = [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else [path]
    for name in filter(os.path.exists, files):
        subprocess.run(["dd", f"if={name}", "of=/dev/null", "bs=16M"], stderr=subprocess.DEVNULL, check=True)


def child(name, path, loads):
    import torch

    torch.zeros(1, device="cuda:0")
    rates = []
    for _ in range(loads):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        tensors = LOADERS[name](path, torch)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        count = sum(value.numel() * value.element_size() for value in tensors.values() if hasattr(value, "numel"))
        rates.append(count / seconds / 1e9)
        opened = tensors.pop("opened", None)
        del tensors
        if opened:
            opened.__exit__(None, None, None)
    print(json.dumps(rates))
    sys.stdout.flush()
    os._exit(0)


def of_peer(name, path, loads):
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, path, str(loads)], capture_output=True, text=True
    )
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError((done.stderr.strip().splitlines() or ["no answer"])[-1][:120]) from None


def of_alight(alight, store, loads, *options):
    command = [alight, "--json", "load", store, "--device", "cuda:0", "--repeat", str(loads), *options]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    seconds = [run["seconds"] for run in answer["runs"]]
    seconds[0] += answer["open_seconds"]
    return [answer["bytes"] / each / 1e9 for each in seconds]


def main():
    alight, folder = sys.argv[1], sys.argv[2]
    gib = float(sys.argv[3]) if len(sys.argv) > 3 else 8
    rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 5
    crowd = len(sys.argv) > 5 and sys.argv[5] == "crowd"
    path, store = os.path.join(folder, "peers.safetensors"), os.path.join(folder, "peers.alight")
    count = make(path, gib, CROWD if crowd else DECODER)
    subprocess.run([alight, "import", store, path], stdout=subprocess.DEVNULL, check=True)
    pin = ["--pin", str(os.path.getsize(path) + (1 << 30))]
    loads = {
        "alight, verified": lambda loads: of_alight(alight, store, loads),
        "alight, verified, pages pinned": lambda loads: of_alight(alight, store, loads, *pin),
    }
    peers = [name for name in LOADERS if not crowd or name.startswith("InstantTensor")]
    loads |= {name: lambda loads, name=name: of_peer(name, path, loads) for name in peers}
    print(f"{f'GB/s, {count} tensors, {gib} GiB':36} {'cold':>8} {'warm':>8} {'again':>8}")
    found = {name: {"cold": [], "warm": [], "again": []} for name in loads}
    missing = {}
    for state in ("warm",) if crowd else ("warm", "cold"):
        if state == "warm":
            warm(path), warm(path + ".pt"), warm(os.path.join(store, "segments"))
        for _ in range(rounds):
            for name, load in loads.items():
                if name in missing:
                    continue
                try:
                    if state == "cold":
                        drop_caches()
                    first, *later = load(LOADS if state == "warm" else 1)
                    found[name][state].append(first)
                    found[name]["again"] += later[1:]
                    print(f"  {state} {name}: {first:.2f}", file=sys.stderr, flush=True)
                except (RuntimeError, OSError) as error:
                    missing[name] = error
    for name, states in found.items():
        if name in missing:
            print(f"{name:36} not measured: {missing[name]}")
            continue
        shown = [f"{statistics.median(rates):8.2f}" if rates else f"{'-':>8}" for rates in states.values()]
        print(f"{name:36} {' '.join(shown)}")


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    main()
