"""Takes a real-size checkpoint through the store and the GPU, and compares every bit with what torch loads.

  gpu_roundtrip.py ALIGHT WORK_DIRECTORY GIB

Makes a safetensors file of bf16 tensors in a decoder's shapes, and thousands of small ones; imports it; loads it onto
the GPU; exports it again by way of the GPU; and compares, on the GPU, what torch loads from both files.
"""
import json, os, subprocess, sys, time

ALIGHT, WORK, GIB = sys.argv[1], sys.argv[2], float(sys.argv[3])
SOURCE, STORE, BACK = f"{WORK}/source.safetensors", f"{WORK}/model.alight", f"{WORK}/back.safetensors"


def make():
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator(device="cuda").manual_seed(7)
    shapes = [("q", (4096, 4096)), ("k", (1024, 4096)), ("v", (1024, 4096)), ("o", (4096, 4096)), ("gate", (14336, 4096)),
              ("up", (14336, 4096)), ("down", (4096, 14336)), ("norm1", (4096,)), ("norm2", (4096,))]
    tensors, total, layer = {}, 0, 0

    def add(name, shape):
        nonlocal total
        bits = torch.randint(-2**15, 2**15 - 1, shape, dtype=torch.int16, device="cuda", generator=generator)
        tensors[name] = bits.view(torch.bfloat16).cpu()
        total += bits.numel() * 2

    while total < GIB * 2**30:
        for name, shape in shapes:
            add(f"model.layers.{layer}.{name}.weight", shape)
        layer += 1
    for n in range(4000):
        add(f"model.experts.{n // 64}.{n % 64}.bias", (1 + n * 37 % 3000,))
    tensors["scalar"] = torch.tensor(0.5)
    tensors["empty"] = torch.zeros(0, 7, dtype=torch.float16)
    save_file(tensors, SOURCE, metadata={"format": "pt", "made by": "gpu_roundtrip.py"})
    os.sync()
    print(f"{len(tensors)} tensors, {total / 2**30:.2f} GiB")


def run(*arguments):
    """Runs the tool; its JSON, the seconds, and its peak resident size in MiB."""
    started = time.perf_counter()
    process = subprocess.Popen([ALIGHT, "--json", *arguments], stdout=subprocess.PIPE)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status != 0:
        sys.exit(f"alight {' '.join(arguments)} ended with {status}: {out[-500:]}")
    print(f"alight {arguments[0]:8} {seconds:6.2f} s, peak {usage.ru_maxrss / 1024:.0f} MiB: {json.dumps(json.loads(out))[:900]}", flush=True)
    return json.loads(out)


def drop_caches():
    os.system("sync; echo 3 > /proc/sys/vm/drop_caches")


def compare():
    import torch
    from safetensors import safe_open

    compared = 0
    with safe_open(SOURCE, "pt", device="cuda:0") as source, safe_open(BACK, "pt", device="cuda:0") as back:
        assert sorted(source.keys()) == sorted(back.keys()), "other keys"
        assert source.metadata() == back.metadata(), (source.metadata(), back.metadata())
        for key in source.keys():
            a, b = source.get_tensor(key), back.get_tensor(key)
            assert a.dtype == b.dtype and a.shape == b.shape, key
            # Bits, not numbers: a NaN equals itself here.
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            assert torch.equal(a.contiguous().view(-1).view(bits), b.contiguous().view(-1).view(bits)), key
            compared += 1
    print(f"{compared} tensors are bit for bit what torch loads from the source")


def in_a_process_of_its_own(step):
    # A child's peak resident size begins with its parent's, so what needs torch must not be this process.
    subprocess.run([sys.executable, *sys.argv[:4], step], check=True)


if len(sys.argv) > 4:
    {"make": make, "compare": compare}[sys.argv[4]]()
    sys.exit()

in_a_process_of_its_own("make")
run("import", STORE, SOURCE)
run("verify", STORE)
drop_caches()
run("load", STORE, "--device", "cuda:0")
for name in sorted(os.listdir(f"{STORE}/segments")):
    with open(f"{STORE}/segments/{name}", "rb") as segment:
        while segment.read(16 << 20):
            pass
run("load", STORE, "--device", "cuda:0", "--repeat", "5")
run("load", STORE, "--device", "host")
run("export", STORE, BACK, "--device", "cuda:0")

in_a_process_of_its_own("compare")
