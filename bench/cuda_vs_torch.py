#!/usr/bin/env python3
"""flexchat beside PyTorch on one GPU, in one run: attention, loss, whole training steps.

usage: bench/cuda_vs_torch.py --peers torch_peers.py --out FILE.json [--program build/cuda/flexchat]
       [--paths sdpa,cudnn] SECTION...
sections: attn loss train. The peers script prints and saves what PyTorch reaches on the same shapes.
Each row of the result: ours, PyTorch's best or named peer, and the ratio in favour of ours.
"""
import argparse, json, os, subprocess, sys, tempfile

ATTENTION = {  # the peers' names of shapes
    "b8_t2048_h10_d128": "8x10x10x2048x128", "b2_t8192_h16_d128": "2x16x16x8192x128",
    "b1_t16384_h16_d128": "1x16x16x16384x128", "b4_t4096_h16kv4_d64": "4x16x4x4096x64",
    "b8_t512_h8kv4_d64": "8x8x4x512x64",
}
LOSS = [(16384, 1280, 32768), (16384, 1280, 65536), (8192, 2048, 65536)]
TRAIN = [(20, 8, 1024), (20, 32, 2048), (32, 8, 2048)]


def ours(program, *words, **variables):
    command = [program, *words, "--json"]
    print("$", *(f"{name}={value}" for name, value in variables.items()), " ".join(command), flush=True)
    with tempfile.TemporaryDirectory() as runs:
        done = subprocess.run([*command, "--runs", runs], capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode != 0:
        print(done.stderr.strip()[-2000:], flush=True)
        return None
    return json.loads(done.stdout)


PEERS = """
import importlib.util, json, sys
script, section, out, *shapes = sys.argv[1:]
spec = importlib.util.spec_from_file_location("peers", script)
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)
if shapes:
    peers.SHAPES = {name: peers.SHAPES[name] for name in shapes}
try:
    getattr(peers, section)()
finally:  # what is measured is kept
    json.dump(peers.RESULT, open(out, "w"))
"""


def peers(script, section, *shapes):
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "peers.json")
        subprocess.run([sys.executable, "-c", PEERS, script, section, out, *shapes])
        return json.load(open(out)) if os.path.exists(out) else {}


class Result:
    def __init__(self):
        self.rows, self.raw = [], {}

    def add(self, name, value, unit, peer, peer_value, higher_is_better=True):
        if value is None or peer_value is None:
            ratio = None
        else:
            ratio = value / peer_value if higher_is_better else peer_value / value
        self.rows.append({"name": name, "flexchat": value, "unit": unit, "peer": peer, "peer_value": peer_value,
                          "ratio": ratio})
        show = lambda x: "-" if x is None else f"{x:.4g}"
        print(f"{name:52s} {show(value):>10s} {unit:8s} {peer:16s} {show(peer_value):>10s}  {show(ratio):>6s}x", flush=True)


def attention(result, program, script, paths):
    torch = {}
    for name in ATTENTION:  # each in a process of its own: after a few shapes compiled flex_attention falls back
        torch |= peers(script, "attn", name)
    mods = ["sdpa", "flex", "synaptic"]
    mine = ours(program, "bench", "attention", "--device", "cuda", "--dtype", "bf16", "--mods", *mods, "--shapes",
                *ATTENTION.values())
    # PyTorch takes the backward of cuDNN that is not deterministic.
    vendor = ours(program, "bench", "attention", "--device", "cuda", "--dtype", "bf16", "--mods", "sdpa", "--kernel", "cudnn",
                  "--shapes", *ATTENTION.values(), FLEXCHAT_CUDNN_DETERMINISTIC="0")
    result.raw["attention"] = {"torch": torch, "flexchat": mine, "flexchat_cudnn": vendor}
    rows = {(r["shape"], r["mod"]): r for r in (mine or {"rows": []})["rows"]}
    rows |= {(r["shape"], "cudnn"): r for r in (vendor or {"rows": []})["rows"]}
    for name, shape in ATTENTION.items():
        for way, key in [("fwd", "forward_tflops"), ("bwd", "backward_tflops")]:
            get = lambda mod: rows.get((shape, mod), {}).get(key)
            for peer in ["fa2", "cudnn"]:
                result.add(f"attention {way} {name} sdpa", get("sdpa"), "TFLOP/s", peer, torch.get(f"attn_{way}_{name}_{peer}_TFLOPs"))
            result.add(f"attention {way} {name} sdpa:cudnn", get("cudnn"), "TFLOP/s", "cudnn", torch.get(f"attn_{way}_{name}_cudnn_TFLOPs"))
            result.add(f"attention {way} {name} flex", get("flex"), "TFLOP/s", "flexchat sdpa", get("sdpa"))
            result.add(f"attention {way} {name} flex", get("flex"), "TFLOP/s", "torch flex", torch.get(f"attn_{way}_{name}_flex_TFLOPs"))
            result.add(f"attention {way} {name} synaptic", get("synaptic"), "TFLOP/s", "torch flex", torch.get(f"attn_{way}_{name}_flex_synaptic_TFLOPs"))


def loss(result, program, script, paths):
    torch = peers(script, "loss")
    result.raw["loss"] = {"torch": torch}
    for n, c, v in LOSS:
        for backend in ["full", "chunked", "cce"]:
            mine = ours(program, "bench", "loss", "--device", "cuda", "--dtype", "bf16", "--loss", backend, "--rows",
                        str(n), "--width", str(c), "--vocab-size", str(v))
            result.raw["loss"][f"{n}x{c}x{v} {backend}"] = mine
            row = (mine or {}).get("rows", [{}])[0]
            for peer in ["compile", "eager"]:
                other = torch.get(f"loss_{n}x{c}x{v}_{peer}", {})
                result.add(f"loss {n}x{c}x{v} {backend}", row.get("fwd_bwd_ms"), "ms", f"torch {peer}", other.get("fwd_bwd_ms"), False)
            mib = torch.get(f"loss_{n}x{c}x{v}_compile", {}).get("peak_MB")  # of 2^20 bytes, despite its name
            result.add(f"loss {n}x{c}x{v} {backend} memory", row.get("extra_mb"), "MB", "torch compile",
                       mib and mib * 2**20 / 1e6, False)


def train(result, program, script, paths):
    torch = peers(script, "train")
    result.raw["train"] = {"torch": torch}
    for depth, batch, tokens in TRAIN:
        other = torch.get(f"train_d{depth}_b{batch}_t{tokens}_v65536_compile", {})
        for path in paths:
            mine = ours(program, "bench", "train", "--device", "cuda", "--dtype", "bf16", "--depth", str(depth), "--sweep",
                        f"b={batch} t={tokens}", "--attention", path)
            result.raw["train"][f"d{depth} b{batch} t{tokens} {path}"] = mine
            row = (mine or {}).get("rows", [{}])[0]
            name = f"train d{depth} B{batch} T{tokens} {path}"
            result.add(name, row.get("tok_s"), "tok/s", "torch compile", other.get("tok_s"))
            result.add(name + " peak", row.get("peak_gb"), "GB", "torch compile", other.get("peak_GB", 0) * 2**30 / 1e9 or None, False)
            result.add(name + " first step", row.get("first_step_s"), "s", "torch compile", other.get("first_4_steps_s"), False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--program", default="build/cuda/flexchat")
    parser.add_argument("--paths", default="sdpa,cudnn", help="attention of our training runs")
    parser.add_argument("sections", nargs="+", choices=["attn", "loss", "train"])
    args = parser.parse_args()
    result = Result()
    for section in args.sections:
        {"attn": attention, "loss": loss, "train": train}[section](result, args.program, args.peers, args.paths.split(","))
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        dirty = bool(subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout.strip())
        gpu = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True,
                             text=True).stdout.strip()
        with open(args.out, "w") as f:  # after each section: what is measured is kept
            json.dump({"command": f"bench/cuda_vs_torch.py --paths {args.paths} " + " ".join(args.sections), "commit": commit, "dirty": dirty, "gpu": gpu,
                       "rows": result.rows, "raw": result.raw}, f, indent=1)


if __name__ == "__main__":
    main()
